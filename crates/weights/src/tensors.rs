//! Named tensors behind one trait, whatever the file format.

pub use kernels::quant::Dtype;

use crate::error::{Result, WeightsError};
use crate::stored::StoredTensor;
use std::path::PathBuf;

/// Name, shape and stored type of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face name (GGUF names are translated).
    pub name: String,
    /// Row-major shape, `[out_features, in_features]` for linear layers.
    pub shape: Vec<usize>,
    /// Stored element type.
    pub dtype: Dtype,
    /// Stored size.
    pub bytes: usize,
}

impl TensorInfo {
    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A readable set of tensors with Hugging Face names and row order (llama.cpp's q/k permutation undone).
pub trait TensorSource: Send + Sync {
    /// Every tensor, in file order.
    fn infos(&self) -> &[TensorInfo];
    /// The values as f32, dequantised; NaN or infinity is an error.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>>;
    /// The stored bytes when they can be copied unchanged into safetensors (F32, F16, BF16 in Hugging Face order), else `None`.
    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>>;
    /// The stored bytes of any element type, for packing without dequantising. Values are not checked: see
    /// [`StoredTensor::check_finite`].
    fn stored(&self, name: &str) -> Result<StoredTensor<'_>>;
    /// Tells the operating system that everything is about to be read once, in file order.
    fn prefetch(&self) {}
    /// Gives back the memory that read parts of a mapped file occupy; what is read again comes from the file again. For
    /// loaders, after they have taken what they need, so that a model is not in memory twice.
    fn release(&self) {}
    /// One tensor's description.
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos().iter().find(|info| info.name == name)
    }
}

/// The tensors of another source, some left out as if the file did not hold them.
pub struct Without {
    source: Box<dyn TensorSource>,
    path: PathBuf,
    infos: Vec<TensorInfo>,
}

impl Without {
    /// Leaves out the tensors of `source` whose names `hidden` accepts; `path` is for messages.
    pub fn new(source: Box<dyn TensorSource>, path: PathBuf, hidden: impl Fn(&str) -> bool) -> Self {
        let infos = source.infos().iter().filter(|info| !hidden(&info.name)).cloned().collect();
        Self { source, path, infos }
    }

    fn check(&self, name: &str) -> Result<()> {
        match self.info(name) {
            Some(_) => Ok(()),
            None => Err(WeightsError::MissingTensor { path: self.path.clone(), name: name.to_string() }),
        }
    }
}

impl TensorSource for Without {
    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }
    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.check(name)?;
        self.source.read_f32(name)
    }
    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>> {
        self.check(name)?;
        self.source.raw(name)
    }
    fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        self.check(name)?;
        self.source.stored(name)
    }
    fn prefetch(&self) {
        self.source.prefetch();
    }
    fn release(&self) {
        self.source.release();
    }
}

/// Number of values in all tensors.
pub fn parameter_count(infos: &[TensorInfo]) -> usize {
    infos.iter().map(TensorInfo::values).sum()
}

/// Stored bytes by element type, largest first.
pub fn bytes_by_dtype(infos: &[TensorInfo]) -> Vec<(Dtype, usize)> {
    let mut totals: Vec<(Dtype, usize)> = Vec::new();
    for info in infos {
        match totals.iter_mut().find(|(dtype, _)| *dtype == info.dtype) {
            Some((_, bytes)) => *bytes += info.bytes,
            None => totals.push((info.dtype, info.bytes)),
        }
    }
    totals.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    totals
}

/// Refuses NaN and infinity.
pub(crate) fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(WeightsError::NonFinite { name: name.to_string(), index }),
    }
}

/// Size in bytes of `values` elements, `None` on overflow or a partial block.
pub(crate) fn stored_bytes(dtype: Dtype, values: usize) -> Option<usize> {
    let (block, bytes) = dtype.block();
    values.is_multiple_of(block).then(|| (values / block).checked_mul(bytes)).flatten()
}
