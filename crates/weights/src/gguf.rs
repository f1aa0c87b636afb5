//! GGUF files: container, names, configuration, dequantised tensors.
//! Knows llama.cpp's conventions and undoes them; what leaves this module is in Hugging Face order.

mod config;
mod describe;
mod export;
mod names;
pub(crate) mod own;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use export::{Export, ExportFile, ExportTensor};
pub use names::{gguf_name, hf_name};
pub use reader::{GgufHeader, GgufTensor, Metadata, Value, parse};
pub use writer::{GgufOut, GgufWriter, MetadataBuilder};

use crate::config::{Family, ModelConfig, unsupported};
use crate::error::{Result, WeightsError};
use crate::mmap::MappedFile;
use crate::stored::{RowOrder, StoredTensor};
use crate::tensors::{Dtype, TensorInfo, TensorSource, check_finite};
use kernels::quant::dequantize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// llama.cpp's divisors of the RoPE frequencies.
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
    plan_json: Option<serde_json::Value>,
    tensors: Vec<GgufTensor>,
    infos: Vec<TensorInfo>,
    /// Per tensor: the order of its rows.
    orders: Vec<RowOrder>,
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
        let GgufHeader { metadata, mut tensors, .. } = parse(&file, path)?;
        own::check_version(&metadata, path)?;
        let own_config = own::json(&metadata, own::CONFIG_KEY, path)?;
        let hybrid = own::is_hybrid(&metadata);
        let (config_json, plan_json, interleaved_heads) = if hybrid {
            let missing =
                |key| WeightsError::malformed(path, "GGUF", format!("`{key}` of the hybrid is missing"));
            let plan = own::json(&metadata, own::PLAN_KEY, path)?.ok_or_else(|| missing(own::PLAN_KEY))?;
            (own_config.ok_or_else(|| missing(own::CONFIG_KEY))?, Some(plan), None)
        } else {
            // Where the file tells the scaling itself, it need not be found again from its factors.
            let factors = take_rope_factors(&file, &mut tensors).filter(|_| own_config.is_none());
            let described = config::to_hf_json(&metadata, &tensors, factors.as_deref(), path)?;
            let head_dim = described["head_dim"].as_u64().and_then(|d| usize::try_from(d).ok()).unwrap_or(0);
            let family = config::family(&metadata, path)?;
            if let Some(own) = &own_config {
                check_same_architecture(own, family, head_dim, path)?;
            }
            let interleaved_heads = (family == Family::Llama).then_some(head_dim);
            (own_config.unwrap_or(described), None, interleaved_heads)
        };
        let mut source = Self {
            path: path.to_path_buf(),
            file,
            metadata,
            config_json,
            plan_json,
            infos: Vec::new(),
            orders: Vec::new(),
            by_name: HashMap::new(),
            tensors,
        };
        for (at, tensor) in source.tensors.iter().enumerate() {
            let name = if hybrid { Some(tensor.name.clone()) } else { hf_name(&tensor.name) };
            let name = name.ok_or_else(|| {
                unsupported(format!(
                    "tensor `{}` in {}: the supported families have none",
                    tensor.name,
                    path.display()
                ))
            })?;
            let order = match interleaved_heads {
                Some(head_dim) if is_query_or_key(&name) => interleaved(tensor, head_dim, path)?,
                _ => RowOrder::HuggingFace,
            };
            source.orders.push(order);
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

    /// A `config.json` in Hugging Face form: the one the file holds, or made from llama.cpp's metadata.
    pub fn config_json(&self) -> &serde_json::Value {
        &self.config_json
    }

    /// A hybrid's `head_plan.json`.
    pub fn plan_json(&self) -> Option<&serde_json::Value> {
        self.plan_json.as_ref()
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
        Ok(match self.orders[at] {
            RowOrder::HuggingFace => values,
            order => in_order(&values, tensor.shape[0], order),
        })
    }

    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>> {
        let at = self.find(name)?;
        let tensor = &self.tensors[at];
        let unchanged = tensor.dtype.is_plain() && self.orders[at] == RowOrder::HuggingFace;
        Ok(unchanged.then(|| (tensor.dtype, &self.file[tensor.range.clone()])))
    }

    fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let at = self.find(name)?;
        let tensor = &self.tensors[at];
        let bytes = &self.file[tensor.range.clone()];
        Ok(StoredTensor::new(tensor.dtype, &tensor.shape, bytes, self.orders[at]))
    }

    fn prefetch(&self) {
        if let Bytes::Mapped(file) = &self.file {
            file.prefetch();
        }
    }

    fn release(&self) {
        if let Bytes::Mapped(file) = &self.file {
            file.release();
        }
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.infos[at])
    }
}

/// Takes llama.cpp's divisors of the RoPE frequencies out of the list of tensors; they go into the configuration.
fn take_rope_factors(file: &[u8], tensors: &mut Vec<GgufTensor>) -> Option<Vec<f32>> {
    let at = tensors.iter().position(|t| t.name == ROPE_FREQS)?;
    let tensor = tensors.remove(at);
    let mut values = vec![0.0; tensor.shape.iter().product()];
    dequantize(tensor.dtype, &file[tensor.range], &mut values);
    Some(values)
}

/// The file's own configuration must be of the architecture that the file names, since that decides the order of rows.
fn check_same_architecture(
    own: &serde_json::Value,
    named: Family,
    head_dim: usize,
    path: &Path,
) -> Result<()> {
    let config = ModelConfig::from_hf_json(own).map_err(|e| e.at(path))?;
    let (found, named) = (describe::architecture(config.family), describe::architecture(named));
    if (found, config.head_dim) == (named, head_dim) {
        return Ok(());
    }
    let reason = format!(
        "`{}` is of {found} with heads of {}, the file's other metadata are of {named} with heads of {head_dim}",
        own::CONFIG_KEY,
        config.head_dim
    );
    Err(WeightsError::malformed(path, "GGUF", reason))
}

/// Whether llama.cpp's converter permutes the rows of this tensor of a llama model.
fn is_query_or_key(name: &str) -> bool {
    [".q_proj.", ".k_proj."].iter().any(|part| name.contains(part))
}

/// The order of a permuted tensor's rows, whose number must be whole heads.
fn interleaved(tensor: &GgufTensor, head_dim: usize, path: &Path) -> Result<RowOrder> {
    let bad = |reason: String| {
        WeightsError::malformed(path, "GGUF", format!("tensor `{}` has {reason}", tensor.name))
    };
    let &[rows, _] = tensor.shape.as_slice() else {
        return Err(bad(format!("shape {:?}, expected a matrix", tensor.shape)));
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || !rows.is_multiple_of(head_dim) {
        return Err(bad(format!("{rows} rows, expected a multiple of the head size {head_dim}")));
    }
    Ok(RowOrder::Interleaved { head_dim })
}

/// The rows of `values` in Hugging Face order.
fn in_order(values: &[f32], rows: usize, order: RowOrder) -> Vec<f32> {
    let width = values.len() / rows.max(1);
    (0..rows).flat_map(|row| &values[order.stored_row(row) * width..][..width]).copied().collect()
}
