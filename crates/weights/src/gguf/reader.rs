//! The GGUF container (versions 2 and 3, little endian): metadata and tensor table.
//! Every count and length is bounded by the bytes that are left before anything is allocated.

use crate::config::unsupported;
use crate::error::{Result, WeightsError};
use crate::tensors::{Dtype, stored_bytes};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Dimensions a tensor may have, as in ggml.
const MAX_DIMS: usize = 4;
/// Arrays may hold arrays this deep.
const MAX_DEPTH: usize = 4;
/// Smallest bytes of one metadata entry (empty key, type, one byte) and of one tensor entry (empty name, no dimensions).
const MIN_ENTRY: (usize, usize) = (13, 24);
/// Alignment of tensor data when `general.alignment` is absent.
pub(super) const DEFAULT_ALIGNMENT: usize = 32;

/// ggml's numbers of the element types.
pub(super) const ELEMENT_TYPES: [(u32, Dtype); 11] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Q4_0),
    (3, Dtype::Q4_1),
    (6, Dtype::Q5_0),
    (7, Dtype::Q5_1),
    (8, Dtype::Q8_0),
    (12, Dtype::Q4K),
    (13, Dtype::Q5K),
    (14, Dtype::Q6K),
    (30, Dtype::BF16),
];

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// The value as a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(v) => Some(*v),
            Self::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(v) => Some(*v as f64),
            Self::Signed(v) => Some(*v as f64),
            Self::Float(v) => Some(*v),
            _ => None,
        }
    }

    /// The value as text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(v) => Some(v),
            _ => None,
        }
    }

    /// The value as a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// The value as an array.
    pub fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// Metadata by key.
pub type Metadata = HashMap<String, Value>;

/// A tensor as the file lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// llama.cpp's name.
    pub name: String,
    /// Row-major shape (the file's order reversed).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// Bytes in the file.
    pub range: Range<usize>,
}

/// A checked GGUF header.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufHeader {
    /// Metadata by key.
    pub metadata: Metadata,
    /// Every metadata key in file order with the bytes of its type and value, for copying them unchanged.
    pub entries: Vec<(String, Range<usize>)>,
    /// Tensors in file order.
    pub tensors: Vec<GgufTensor>,
}

/// Checks `bytes` as a whole GGUF file.
///
/// # Errors
/// [`WeightsError::Malformed`] naming what is wrong; [`WeightsError::Unsupported`] for another version, byte order or
/// element type. `path` is for messages only.
pub fn parse(bytes: &[u8], path: &Path) -> Result<GgufHeader> {
    let mut cursor = Cursor { bytes, at: 0, path };
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err(cursor.bad("the file does not start with `GGUF`"));
    }
    let version = cursor.u32("the version")?;
    if version != 2 && version != 3 {
        let swapped = matches!(version.swap_bytes(), 1..=3);
        let what = if swapped { "big-endian GGUF".to_string() } else { format!("GGUF version {version}") };
        return Err(unsupported(format!(
            "{what} ({}); supported are versions 2 and 3, little endian",
            path.display()
        )));
    }
    let tensors = cursor.count("tensors", MIN_ENTRY.1)?;
    let count = cursor.count("metadata entries", MIN_ENTRY.0)?;
    let mut metadata = Metadata::new();
    let mut entries = Vec::new();
    for _ in 0..count {
        let key = cursor.string("a metadata key")?;
        let from = cursor.at;
        let kind = cursor.u32("a metadata type")?;
        let value = cursor.value(kind, &key, 0)?;
        if metadata.contains_key(&key) {
            return Err(cursor.bad(format!("the metadata key `{key}` occurs twice")));
        }
        entries.push((key.clone(), from..cursor.at));
        metadata.insert(key, value);
    }
    let mut listed = Vec::new();
    for _ in 0..tensors {
        listed.push(cursor.tensor()?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(v) => v
            .as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| v.is_power_of_two() && (8..=1 << 20).contains(v))
            .ok_or_else(|| {
                cursor.bad(format!("`general.alignment` is {v:?}, expected a power of two from 8"))
            })?,
    };
    let tensors = place(listed, alignment, &cursor)?;
    Ok(GgufHeader { metadata, entries, tensors })
}

struct Entry {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    offset: u64,
}

/// Turns relative offsets into checked byte ranges.
fn place(entries: Vec<Entry>, alignment: usize, cursor: &Cursor) -> Result<Vec<GgufTensor>> {
    let start = cursor.at.next_multiple_of(alignment);
    let length = cursor.bytes.len();
    let mut names = std::collections::HashSet::new();
    let mut tensors = Vec::new();
    for Entry { name, shape, dtype, offset } in entries {
        if !names.insert(name.clone()) {
            return Err(cursor.bad(format!("the tensor name `{name}` occurs twice")));
        }
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(dtype.block().0) {
            return Err(cursor.bad(format!(
                "tensor `{name}` has rows of {row} values, expected a multiple of {} for {}",
                dtype.block().0,
                dtype.name()
            )));
        }
        let bytes = shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .and_then(|values| stored_bytes(dtype, values))
            .ok_or_else(|| {
                cursor.bad(format!("the size of tensor `{name}` with shape {shape:?} overflows"))
            })?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(
                cursor.bad(format!("tensor `{name}` starts at {offset}, expected a multiple of {alignment}"))
            );
        }
        let range = usize::try_from(offset)
            .ok()
            .and_then(|offset| start.checked_add(offset))
            .and_then(|from| Some(from..from.checked_add(bytes)?))
            .filter(|range| range.end <= length)
            .ok_or_else(|| {
                cursor.bad(format!(
                    "tensor `{name}` needs {bytes} bytes at offset {offset}, but the file has {} bytes of data",
                    length.saturating_sub(start)
                ))
            })?;
        tensors.push(GgufTensor { name, shape, dtype, range });
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().filter(|t| !t.range.is_empty()).collect();
    order.sort_by_key(|t| t.range.start);
    for pair in order.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(cursor.bad(format!("tensors `{}` and `{}` overlap", pair[0].name, pair[1].name)));
        }
    }
    Ok(tensors)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    fn bad(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::malformed(self.path, "GGUF", reason)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8]> {
        if length > self.left() {
            return Err(self.bad(format!("{what} needs {length} bytes, but only {} are left", self.left())));
        }
        let bytes = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `least` bytes each.
    fn count(&mut self, what: &str, least: usize) -> Result<usize> {
        let count = self.u64(what)?;
        usize::try_from(count).ok().filter(|&n| n <= self.left() / least).ok_or_else(|| {
            self.bad(format!("{count} {what} are announced, but only {} bytes are left", self.left()))
        })
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(self.bad(format!("{what} is not UTF-8"))),
        }
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.bad(format!("`{key}` is the boolean {other}, expected 0 or 1"))),
            },
            8 => Value::Text(self.string(key)?),
            9 if depth == MAX_DEPTH => return Err(self.bad(format!("`{key}` is an array nested too deep"))),
            9 => {
                let kind = self.u32(key)?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    _ => 12,
                };
                let count = self.count(&format!("values of `{key}`"), least)?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, key, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.bad(format!("`{key}` has the unknown type {other}"))),
        })
    }

    fn tensor(&mut self) -> Result<Entry> {
        let name = self.string("a tensor name")?;
        let dims = self.u32("a tensor's dimensions")? as usize;
        if dims > MAX_DIMS {
            return Err(
                self.bad(format!("tensor `{name}` has {dims} dimensions, expected at most {MAX_DIMS}"))
            );
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let size = self.u64("a tensor's size")?;
            shape.push(
                usize::try_from(size)
                    .map_err(|_| self.bad(format!("tensor `{name}` has a dimension of {size}")))?,
            );
        }
        shape.reverse();
        let kind = self.u32("a tensor's type")?;
        let dtype = ELEMENT_TYPES.iter().find(|(id, _)| *id == kind).map(|&(_, dtype)| dtype).ok_or_else(|| {
            unsupported(format!(
                "tensor `{name}` in {} has ggml element type {kind}; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, \
                 Q5_0, Q5_1, Q4_K, Q5_K and Q6_K",
                self.path.display()
            ))
        })?;
        let offset = self.u64("a tensor's offset")?;
        Ok(Entry { name, shape, dtype, offset })
    }
}
