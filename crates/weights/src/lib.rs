//! Checkpoints as they lie on disk or on a hub: formats, configurations, tokenizers, chat templates, model sources.
//! Knows bytes, names and shapes; knows nothing of layers or arithmetic.
#![deny(unsafe_code)]

pub mod config;
pub mod error;
pub mod fetch;
pub mod files;
pub mod gguf;
#[doc(hidden)]
pub mod hostile;
#[allow(unsafe_code)]
pub mod mmap;
pub mod safetensors;
pub mod source;
pub mod stored;
pub mod tensors;
pub mod tokenizer;

pub use config::{Family, ModelConfig, RopeScaling};
pub use error::WeightsError;
pub use source::{Checkpoint, ModelSource};
pub use stored::{RowOrder, StoredTensor};
pub use tensors::{Dtype, TensorInfo, TensorSource};
pub use tokenizer::Tokenizer;
