//! Named tensors behind one trait, whatever the file format.

use crate::error::{Result, WeightsError};

/// Element types as stored.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    /// Values per block (1 when not quantised) and bytes per block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// The name used by safetensors and llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Whether values are stored one by one (F32, F16, BF16), as safetensors can hold them.
    pub fn is_plain(self) -> bool {
        self.block().0 == 1
    }
}

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
    /// One tensor's description.
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos().iter().find(|info| info.name == name)
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
