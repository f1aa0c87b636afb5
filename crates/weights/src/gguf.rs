//! GGUF files: container, names, configuration, dequantised tensors.
//! Knows llama.cpp's conventions and undoes them; what leaves this module is in Hugging Face order.

mod config;
mod names;
mod reader;
#[cfg(test)]
mod tests;

pub use names::hf_name;
pub use reader::{GgufHeader, GgufTensor, Metadata, Value, parse};

use crate::config::{Family, unsupported};
use crate::error::{Result, WeightsError};
use crate::mmap::MappedFile;
use crate::tensors::{Dtype, TensorInfo, TensorSource, check_finite};
use kernels::quant::dequantize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// llama.cpp's divisors of the RoPE frequencies; they go into the configuration.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A file's content.
#[derive(Debug)]
enum Bytes {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct GgufSource {
    path: PathBuf,
    file: Bytes,
    metadata: Metadata,
    config_json: serde_json::Value,
    tensors: Vec<GgufTensor>,
    infos: Vec<TensorInfo>,
    /// Per tensor: values per head when its rows are permuted within heads.
    permuted: Vec<Option<usize>>,
    by_name: HashMap<String, usize>,
}

impl GgufSource {
    /// Opens and checks a GGUF file of a supported family.
    ///
    /// # Errors
    /// As [`parse`]; [`WeightsError::Unsupported`] for another architecture, a feature that is not computed, or a tensor
    /// the family does not have.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(Bytes::Mapped(MappedFile::open(path)?), path)
    }

    /// [`open`](Self::open) for a file that is in memory; `path` is for messages only.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(bytes: Vec<u8>, path: &Path) -> Result<Self> {
        Self::new(Bytes::Owned(bytes), path)
    }

    fn new(file: Bytes, path: &Path) -> Result<Self> {
        let GgufHeader { metadata, mut tensors } = parse(&file, path)?;
        let family = config::family(&metadata, path)?;
        let rope_factors = match tensors.iter().position(|t| t.name == ROPE_FREQS) {
            None => None,
            Some(at) => {
                let tensor = tensors.remove(at);
                let mut values = vec![0.0; tensor.shape.iter().product()];
                dequantize(tensor.dtype, &file[tensor.range], &mut values);
                Some(values)
            }
        };
        let config_json = config::to_hf_json(&metadata, &tensors, rope_factors.as_deref(), path)?;
        let head_dim = config_json["head_dim"].as_u64().and_then(|d| usize::try_from(d).ok()).unwrap_or(0);
        let mut source = Self {
            path: path.to_path_buf(),
            file,
            metadata,
            config_json,
            infos: Vec::new(),
            permuted: Vec::new(),
            by_name: HashMap::new(),
            tensors,
        };
        for (at, tensor) in source.tensors.iter().enumerate() {
            let name = hf_name(&tensor.name).ok_or_else(|| {
                unsupported(format!(
                    "tensor `{}` in {}: {} has none",
                    tensor.name,
                    path.display(),
                    family.model_type()
                ))
            })?;
            let is_qk = [".q_proj.", ".k_proj."].iter().any(|part| name.contains(part));
            let permuted = (family == Family::Llama && is_qk).then_some(head_dim);
            let rows = tensor.shape.first().copied().unwrap_or(0);
            if let Some(head_dim) = permuted.filter(|&d| d == 0 || d % 2 != 0 || rows % d != 0) {
                return Err(WeightsError::malformed(
                    path,
                    "GGUF",
                    format!(
                        "tensor `{}` has {rows} rows, expected a multiple of the head size {head_dim}",
                        tensor.name
                    ),
                ));
            }
            source.permuted.push(permuted);
            source.by_name.insert(name.clone(), at);
            source.infos.push(TensorInfo {
                name,
                shape: tensor.shape.clone(),
                dtype: tensor.dtype,
                bytes: tensor.range.len(),
            });
        }
        Ok(source)
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// A `config.json` in Hugging Face form, made from the metadata.
    pub fn config_json(&self) -> &serde_json::Value {
        &self.config_json
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.by_name
            .get(name)
            .copied()
            .ok_or_else(|| WeightsError::MissingTensor { path: self.path.clone(), name: name.to_string() })
    }
}

impl TensorSource for GgufSource {
    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let at = self.find(name)?;
        let tensor = &self.tensors[at];
        let mut values = vec![0.0; self.infos[at].values()];
        dequantize(tensor.dtype, &self.file[tensor.range.clone()], &mut values);
        check_finite(name, &values)?;
        Ok(match self.permuted[at] {
            None => values,
            Some(head_dim) => unpermute(&values, tensor.shape[0], head_dim),
        })
    }

    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>> {
        let at = self.find(name)?;
        let tensor = &self.tensors[at];
        let unchanged = tensor.dtype.is_plain() && self.permuted[at].is_none();
        Ok(unchanged.then(|| (tensor.dtype, &self.file[tensor.range.clone()])))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.infos[at])
    }
}

/// Undoes `LlamaModel.permute` of llama.cpp's converter: it stores the rows `(i, j)` of a head, `i` in 0..2 the half
/// and `j` in 0..head_dim/2, in the order `(j, i)`.
fn unpermute(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / rows.max(1);
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..rows / head_dim {
        for i in 0..2 {
            for j in 0..half {
                let row = head * head_dim + 2 * j + i;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}
