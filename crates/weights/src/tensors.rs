//! Named tensors behind one trait, whatever the file format.

use crate::error::Result;

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

/// A readable set of tensors with Hugging Face names and row order (llama.cpp's q/k permutation undone).
pub trait TensorSource: Send + Sync {
    /// Every tensor, in file order.
    fn infos(&self) -> &[TensorInfo];
    /// The values as f32, dequantised; NaN or infinity is an error.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>>;
    /// The stored bytes when they can be copied unchanged into safetensors (F32, F16, BF16 in Hugging Face order), else `None`.
    fn raw(&self, name: &str) -> Result<Option<(Dtype, &[u8])>>;
}
