//! Writing a GGUF container (version 3): metadata and tensor table first, then the tensors in the announced order.
//! The file appears when it is complete; what the values mean is the caller's business.

use super::reader::{DEFAULT_ALIGNMENT, ELEMENT_TYPES};
use crate::error::{Result, WeightsError};
use crate::files::{AtomicFile, remove_stale};
use crate::stored::first_not_finite;
use kernels::quant::Dtype;
use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Format version written, the newest.
const VERSION: u32 = 3;
/// GGUF's numbers of value types.
mod kind {
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const ARRAY: u32 = 9;
}

/// Metadata being put together; keys keep their order. A key that is set again is ignored: the first value stays.
#[derive(Clone, Debug, Default)]
pub struct MetadataBuilder {
    keys: HashSet<String>,
    bytes: Vec<u8>,
}

impl MetadataBuilder {
    /// Whether `key` is set.
    pub fn contains(&self, key: &str) -> bool {
        self.keys.contains(key)
    }

    /// A value whose type and content are copied from another file, see [`GgufHeader`](super::GgufHeader)`::entries`.
    pub fn copied(&mut self, key: &str, type_and_value: &[u8]) {
        if self.keys.insert(key.to_string()) {
            push_text(&mut self.bytes, key);
            self.bytes.extend_from_slice(type_and_value);
        }
    }

    /// A file's bytes up to the table of its `tensors` tensors.
    pub(crate) fn header(&self, tensors: usize) -> Vec<u8> {
        let mut header = b"GGUF".to_vec();
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(tensors as u64).to_le_bytes());
        header.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        header.extend_from_slice(&self.bytes);
        header
    }

    fn value(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.copied(key, &[&kind.to_le_bytes(), value].concat());
    }

    /// An unsigned integer.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.value(key, kind::U32, &value.to_le_bytes());
    }

    /// A number.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.value(key, kind::F32, &value.to_le_bytes());
    }

    /// A boolean.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.value(key, kind::BOOL, &[u8::from(value)]);
    }

    /// A text.
    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::with_capacity(8 + value.len());
        push_text(&mut bytes, value);
        self.value(key, kind::TEXT, &bytes);
    }

    fn array(&mut self, key: &str, kind: u32, count: usize, values: &[u8]) {
        let header = [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes()].concat();
        self.value(key, kind::ARRAY, &[&header, values].concat());
    }

    /// Texts.
    pub fn texts<T: AsRef<str>>(&mut self, key: &str, values: &[T]) {
        let mut bytes = Vec::new();
        values.iter().for_each(|value| push_text(&mut bytes, value.as_ref()));
        self.array(key, kind::TEXT, values.len(), &bytes);
    }

    /// Signed integers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.array(key, kind::I32, values.len(), &bytes);
    }

    /// Numbers.
    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.array(key, kind::F32, values.len(), &bytes);
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// A tensor announced to the writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufOut {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape; one to four dimensions.
    pub shape: Vec<usize>,
    /// Element type; the last dimension is whole blocks of it.
    pub dtype: Dtype,
}

impl GgufOut {
    /// Size of the tensor's data, `None` for a partial block or an overflow.
    fn bytes(&self) -> Option<usize> {
        let (block, block_bytes) = self.dtype.block();
        let whole = self.shape.last()?.is_multiple_of(block);
        let values = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        whole.then_some(values / block)?.checked_mul(block_bytes)
    }
}

/// Writes one GGUF file under a temporary name and renames it in [`finish`](Self::finish); dropped earlier, it leaves nothing.
pub struct GgufWriter {
    path: PathBuf,
    file: BufWriter<AtomicFile>,
    tensors: Vec<(GgufOut, usize)>,
    /// Tensor being written, and bytes of it that are.
    at: (usize, usize),
    length: u64,
}

impl GgufWriter {
    /// Writes the header of a file with `metadata` and `tensors`. Temporary files that killed processes left for this name go.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] for a name used twice, or a shape that its type cannot have.
    pub fn create(path: &Path, metadata: &MetadataBuilder, tensors: Vec<GgufOut>) -> Result<Self> {
        let bad = |reason: String| WeightsError::malformed(path, "GGUF", reason);
        let mut header = metadata.header(tensors.len());
        let mut names = HashSet::new();
        let mut offset = 0u64;
        let mut sized = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let GgufOut { name, shape, dtype } = &tensor;
            if !names.insert(name.clone()) {
                return Err(bad(format!("the tensor name `{name}` is used twice")));
            }
            let bytes = tensor.bytes().filter(|_| shape.len() <= 4).ok_or_else(|| {
                bad(format!("tensor `{name}` with shape {shape:?} cannot be stored as {}", dtype.name()))
            })?;
            let (kind, _) = ELEMENT_TYPES.iter().find(|(_, d)| d == dtype).expect("every type has a number");
            push_text(&mut header, name);
            header.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&d| header.extend_from_slice(&(d as u64).to_le_bytes()));
            header.extend_from_slice(&kind.to_le_bytes());
            header.extend_from_slice(&offset.to_le_bytes());
            offset += bytes.next_multiple_of(DEFAULT_ALIGNMENT) as u64;
            sized.push((tensor, bytes));
        }
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        remove_stale(path)?;
        let file = BufWriter::with_capacity(1 << 20, AtomicFile::create(path)?);
        let mut writer = Self { path: path.to_path_buf(), file, tensors: sized, at: (0, 0), length: 0 };
        writer.put(&header)?;
        writer.skip_empty();
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.length += bytes.len() as u64;
        self.file.write_all(bytes).map_err(WeightsError::io(&self.path))
    }

    /// Tensors without a value are complete as they are.
    fn skip_empty(&mut self) {
        while self.tensors.get(self.at.0).is_some_and(|(_, bytes)| *bytes == 0) {
            self.at.0 += 1;
        }
    }

    /// Appends bytes to the tensor `name`: tensors come in the announced order, each in pieces of whole blocks.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::NonFinite`] when a value or a scale is NaN or infinite in the tensor's type;
    /// [`WeightsError::Malformed`] when another tensor's turn it is, or these are too many bytes.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let bad = |reason: String| WeightsError::malformed(&self.path, "GGUF", reason);
        if bytes.is_empty() {
            return Ok(());
        }
        let (at, done) = self.at;
        let (tensor, size) = self
            .tensors
            .get(at)
            .filter(|(tensor, _)| tensor.name == name)
            .ok_or_else(|| bad(format!("it is not the turn of tensor `{name}` to be written")))?;
        let (size, dtype) = (*size, tensor.dtype);
        let (block, block_bytes) = dtype.block();
        if bytes.len() > size - done || !bytes.len().is_multiple_of(block_bytes) {
            return Err(bad(format!(
                "tensor `{name}` needs {} more bytes, {} were given",
                size - done,
                bytes.len()
            )));
        }
        if let Some(index) = first_not_finite(dtype, bytes) {
            let index = done / block_bytes * block + index;
            return Err(WeightsError::NonFinite { name: name.to_string(), index });
        }
        self.put(bytes)?;
        self.at.1 += bytes.len();
        if self.at.1 == size {
            let padding = size.next_multiple_of(DEFAULT_ALIGNMENT) - size;
            self.put(&[0; DEFAULT_ALIGNMENT][..padding])?;
            self.at = (at + 1, 0);
            self.skip_empty();
        }
        Ok(())
    }

    /// Flushes to the disk and renames to the final name; returns the file's size.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] when an announced tensor was not written.
    pub fn finish(self) -> Result<u64> {
        if let Some((tensor, _)) = self.tensors.get(self.at.0) {
            return Err(WeightsError::malformed(
                &self.path,
                "GGUF",
                format!("tensor `{}` was announced but not written", tensor.name),
            ));
        }
        let io = WeightsError::io(&self.path);
        self.file.into_inner().map_err(|e| io(e.into_error()))?.commit()?;
        Ok(self.length)
    }
}
