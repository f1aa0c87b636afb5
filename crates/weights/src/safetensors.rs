//! The safetensors format: reading one file or a sharded set, and writing tensor by tensor.
//! Knows names, shapes and bytes; a header is believed only after every number in it was checked.

mod header;
#[cfg(test)]
mod tests;
mod writer;

pub use writer::{OutTensor, SafetensorsWriter, write_f32};

use crate::error::{Result, WeightsError};
use crate::files::read_json;
use crate::mmap::MappedFile;
use crate::stored::{RowOrder, StoredTensor};
use crate::tensors::{Dtype, TensorInfo, TensorSource, check_finite};
use kernels::quant::dequantize;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// `__metadata__` of a file: strings by name.
pub type Metadata = BTreeMap<String, String>;

/// The name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The name of an unsharded checkpoint's file.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Checks `bytes` as a whole safetensors file and returns its tensors, in the order of their bytes, and its metadata.
///
/// # Errors
/// [`WeightsError::Malformed`] (truncated, overlapping or out-of-range offsets, duplicate names, sizes that do not
/// match), [`WeightsError::Unsupported`] for element types other than F32, F16 and BF16.
pub fn parse(bytes: &[u8]) -> Result<(Vec<TensorInfo>, Metadata)> {
    let header = header::parse(bytes, Path::new("<memory>"))?;
    Ok((header.infos, header.metadata))
}

/// One file or all shards of a checkpoint, memory-mapped.
#[derive(Debug)]
pub struct SafetensorsSource {
    path: PathBuf,
    files: Vec<MappedFile>,
    infos: Vec<TensorInfo>,
    /// Per tensor: file and byte range in it.
    places: Vec<(usize, Range<usize>)>,
    by_name: HashMap<String, usize>,
    metadata: Metadata,
}

impl SafetensorsSource {
    /// Opens one file.
    ///
    /// # Errors
    /// As [`parse`], and [`WeightsError::Io`].
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut source = Self::empty(path);
        source.add_file(path)?;
        Ok(source)
    }

    /// Opens `model.safetensors` of a folder, or the shards named by `model.safetensors.index.json`.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file); an index that names a file outside the folder, a missing shard, or a tensor
    /// that is not in the shard it names is [`WeightsError::Malformed`].
    pub fn open_dir(dir: &Path) -> Result<Self> {
        let index_path = dir.join(INDEX_FILE);
        if index_path.exists() {
            return Self::open_index(dir, &index_path);
        }
        let single = dir.join(SINGLE_FILE);
        if !single.exists() {
            return Err(WeightsError::Source {
                what: format!("the weights in {}", dir.display()),
                reason: format!("neither {SINGLE_FILE} nor {INDEX_FILE} is there"),
                hint: "give a folder in Hugging Face layout with safetensors weights, or a .gguf file"
                    .to_string(),
            });
        }
        let mut source = Self::open_file(&single)?;
        source.path = dir.to_path_buf();
        Ok(source)
    }

    fn open_index(dir: &Path, index_path: &Path) -> Result<Self> {
        const FORMAT: &str = "safetensors index";
        let bad = |reason: String| WeightsError::malformed(index_path, FORMAT, reason);
        let index = read_json(index_path, FORMAT)?;
        let map = index
            .get("weight_map")
            .and_then(serde_json::Value::as_object)
            .ok_or_else(|| bad("`weight_map` is missing or not an object".to_string()))?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().ok_or_else(|| {
                bad(format!("the shard of tensor `{tensor}` is {shard}, expected a file name"))
            })?;
            if !is_plain_file_name(shard) {
                return Err(bad(format!(
                    "tensor `{tensor}` is said to be in `{shard}`, expected a file name inside the folder"
                )));
            }
            shards.entry(shard).or_default().push(tensor);
        }
        let mut source = Self::empty(dir);
        for (shard, tensors) in shards {
            let path = dir.join(shard);
            if !path.exists() {
                return Err(bad(format!(
                    "shard `{shard}` is missing (it should hold {} tensors)",
                    tensors.len()
                )));
            }
            let first = source.infos.len();
            source.add_file(&path)?;
            for tensor in tensors {
                if source.by_name.get(tensor).is_none_or(|&at| at < first) {
                    return Err(bad(format!("tensor `{tensor}` is not in shard `{shard}`")));
                }
            }
        }
        Ok(source)
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            files: Vec::new(),
            infos: Vec::new(),
            places: Vec::new(),
            by_name: HashMap::new(),
            metadata: Metadata::new(),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = MappedFile::open(path)?;
        let header = header::parse(&file, path)?;
        for (info, range) in header.infos.into_iter().zip(header.ranges) {
            if self.by_name.insert(info.name.clone(), self.infos.len()).is_some() {
                return Err(WeightsError::malformed(
                    path,
                    "safetensors",
                    format!("tensor `{}` is also in another shard", info.name),
                ));
            }
            self.infos.push(info);
            self.places.push((self.files.len(), range));
        }
        self.metadata.extend(header.metadata);
        self.files.push(file);
        Ok(())
    }

    /// The `__metadata__` strings (of all shards).
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn bytes(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let &at = self
            .by_name
            .get(name)
            .ok_or_else(|| WeightsError::MissingTensor { path: self.path.clone(), name: name.to_string() })?;
        let (file, range) = &self.places[at];
        Ok((&self.infos[at], &self.files[*file][range.clone()]))
    }
}

impl TensorSource for SafetensorsSource {
    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let (info, bytes) = self.bytes(name)?;
        let mut values = vec![0.0; info.values()];
        dequantize(info.dtype, bytes, &mut values);
        check_finite(name, &values)?;
        Ok(values)
    }

    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>> {
        let (info, bytes) = self.bytes(name)?;
        Ok(Some((info.dtype, bytes)))
    }

    fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let (info, bytes) = self.bytes(name)?;
        Ok(StoredTensor::new(info.dtype, &info.shape, bytes, RowOrder::HuggingFace))
    }

    fn prefetch(&self) {
        self.files.iter().for_each(MappedFile::prefetch);
    }

    fn release(&self) {
        self.files.iter().for_each(MappedFile::release);
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.infos[at])
    }
}

/// One tensor read into memory.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values as f32.
    pub values: Vec<f32>,
}

/// Reads a whole file, such as a training state: every tensor as f32 in the order of its bytes, and the metadata.
///
/// # Errors
/// As [`SafetensorsSource::open_file`]; NaN or infinity is [`WeightsError::NonFinite`].
pub fn read_all(path: &Path) -> Result<(Vec<NamedTensor>, Metadata)> {
    let source = SafetensorsSource::open_file(path)?;
    let tensors = source
        .infos
        .iter()
        .map(|info| {
            let values = source.read_f32(&info.name)?;
            Ok(NamedTensor { name: info.name.clone(), shape: info.shape.clone(), values })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((tensors, source.metadata))
}

/// Whether `name` is one file name: no separators, no `..`, not absolute.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', '\0'])
}
