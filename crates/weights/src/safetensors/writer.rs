//! Writing tensor by tensor: the header is laid out first, the bytes follow in any order, the file appears when complete.

use super::Metadata;
use crate::error::{Result, WeightsError};
use crate::files::AtomicFile;
use crate::tensors::{Dtype, TensorInfo};
use half::{bf16, f16};
use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Values converted per write.
const PIECE: usize = 1 << 16;

/// A tensor announced to the writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutTensor {
    /// Its name.
    pub name: String,
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl From<&TensorInfo> for OutTensor {
    fn from(info: &TensorInfo) -> Self {
        Self { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() }
    }
}

struct Slot {
    dtype: Dtype,
    values: usize,
    offset: u64,
    written: bool,
}

/// Writes one safetensors file under a temporary name and renames it in [`finish`](Self::finish); dropped earlier, it leaves nothing.
pub struct SafetensorsWriter {
    path: PathBuf,
    file: AtomicFile,
    slots: HashMap<String, Slot>,
    buffer: Vec<u8>,
}

impl SafetensorsWriter {
    /// Lays out a file for `tensors` and `metadata`. Wider element types come first, so that every tensor is aligned.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] for a duplicate name, a quantised type or an overflowing size.
    pub fn create(path: &Path, tensors: &[OutTensor], metadata: &Metadata) -> Result<Self> {
        let bad = |reason: String| WeightsError::malformed(path, "safetensors", reason);
        let mut order: Vec<&OutTensor> = tensors.iter().collect();
        order.sort_by_key(|t| std::cmp::Reverse(t.dtype.block().1));
        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".to_string(), serde_json::json!(metadata));
        }
        let mut slots = HashMap::new();
        let mut end = 0u64;
        for OutTensor { name, dtype, shape } in order {
            if !dtype.is_plain() {
                return Err(bad(format!("tensor `{name}` cannot be written as {}", dtype.name())));
            }
            let values = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let (values, next) = values
                .and_then(|n| Some((n, end.checked_add(n.checked_mul(dtype.block().1)? as u64)?)))
                .ok_or_else(|| bad(format!("the size of tensor `{name}` with shape {shape:?} overflows")))?;
            let entry =
                serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [end, next]});
            if name == "__metadata__" || header.insert(name.clone(), entry).is_some() {
                return Err(bad(format!("the tensor name `{name}` is used twice or reserved")));
            }
            slots.insert(name.clone(), Slot { dtype: *dtype, values, offset: end, written: false });
            end = next;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let data_start = 8 + text.len() as u64;
        for slot in slots.values_mut() {
            slot.offset += data_start;
        }
        let io = WeightsError::io(path);
        let mut file = AtomicFile::create(path)?;
        file.file().write_all(&(text.len() as u64).to_le_bytes()).map_err(&io)?;
        file.file().write_all(&text).map_err(&io)?;
        Ok(Self { path: path.to_path_buf(), file, slots, buffer: Vec::new() })
    }

    fn start(&mut self, name: &str, found: usize, bytes: bool) -> Result<Dtype> {
        let bad = |reason: String| WeightsError::malformed(&self.path, "safetensors", reason);
        let slot = self
            .slots
            .get_mut(name)
            .ok_or_else(|| bad(format!("tensor `{name}` was not announced to the writer")))?;
        let expected = if bytes { slot.values * slot.dtype.block().1 } else { slot.values };
        if found != expected {
            let unit = if bytes { "bytes" } else { "values" };
            return Err(bad(format!("tensor `{name}` needs {expected} {unit}, {found} were given")));
        }
        if std::mem::replace(&mut slot.written, true) {
            return Err(bad(format!("tensor `{name}` was written twice")));
        }
        let (dtype, offset) = (slot.dtype, slot.offset);
        self.file.file().seek(SeekFrom::Start(offset)).map_err(WeightsError::io(&self.path))?;
        Ok(dtype)
    }

    /// Writes a tensor's bytes as they are.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] when the tensor was not announced, is written twice, or has another size.
    pub fn write_raw(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.start(name, bytes.len(), true)?;
        self.file.file().write_all(bytes).map_err(WeightsError::io(&self.path))
    }

    /// Writes a tensor's values, rounded to nearest-even in its announced type.
    ///
    /// # Errors
    /// As [`write_raw`](Self::write_raw); a value that is not finite in the announced type is [`WeightsError::NonFinite`].
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let dtype = self.start(name, values.len(), false)?;
        for (piece, values) in values.chunks(PIECE).enumerate() {
            self.buffer.clear();
            let mut bad = None;
            for (i, &v) in values.iter().enumerate() {
                let finite = match dtype {
                    Dtype::F16 => {
                        let v = f16::from_f32(v);
                        self.buffer.extend_from_slice(&v.to_le_bytes());
                        v.is_finite()
                    }
                    Dtype::BF16 => {
                        let v = bf16::from_f32(v);
                        self.buffer.extend_from_slice(&v.to_le_bytes());
                        v.is_finite()
                    }
                    _ => {
                        self.buffer.extend_from_slice(&v.to_le_bytes());
                        v.is_finite()
                    }
                };
                if !finite {
                    bad = bad.or(Some(i));
                }
            }
            if let Some(i) = bad {
                return Err(WeightsError::NonFinite { name: name.to_string(), index: piece * PIECE + i });
            }
            self.file.file().write_all(&self.buffer).map_err(WeightsError::io(&self.path))?;
        }
        Ok(())
    }

    /// Writes the values of a tensor that was announced as BF16.
    ///
    /// # Errors
    /// As [`write_f32`](Self::write_f32), and [`WeightsError::Malformed`] for a tensor of another type.
    pub fn write_bf16(&mut self, name: &str, values: &[bf16]) -> Result<()> {
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(WeightsError::NonFinite { name: name.to_string(), index });
        }
        let dtype = self.start(name, values.len(), false)?;
        if dtype != Dtype::BF16 {
            let reason = format!("tensor `{name}` is to be {dtype:?}, its values are BF16");
            return Err(WeightsError::malformed(&self.path, "safetensors", reason));
        }
        for values in values.chunks(PIECE) {
            self.buffer.clear();
            self.buffer.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            self.file.file().write_all(&self.buffer).map_err(WeightsError::io(&self.path))?;
        }
        Ok(())
    }

    /// Flushes to the disk and renames to the final name.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] when an announced tensor was not written.
    pub fn finish(self) -> Result<()> {
        if let Some((name, _)) = self.slots.iter().find(|(_, slot)| !slot.written) {
            return Err(WeightsError::malformed(
                &self.path,
                "safetensors",
                format!("tensor `{name}` was announced but not written"),
            ));
        }
        self.file.commit()
    }
}

/// Writes `(name, shape, values)` tensors as F32 in one go, such as a training state.
///
/// # Errors
/// As [`SafetensorsWriter`].
pub fn write_f32(path: &Path, tensors: &[(&str, &[usize], &[f32])], metadata: &Metadata) -> Result<()> {
    let announced: Vec<OutTensor> = tensors
        .iter()
        .map(|(name, shape, _)| OutTensor {
            name: name.to_string(),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &announced, metadata)?;
    for (name, _, values) in tensors {
        writer.write_f32(name, values)?;
    }
    writer.finish()
}
