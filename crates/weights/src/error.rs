//! The crate's one error type.

use std::path::PathBuf;

/// Why a checkpoint could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or folder concerned.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what its format demands.
    #[error("{path}: malformed {format}: {reason}")]
    Malformed {
        /// File concerned.
        path: PathBuf,
        /// `safetensors`, `GGUF`, `config.json`, …
        format: &'static str,
        /// What is wrong, with expected and found.
        reason: String,
    },
    /// A valid file asks for something this project does not compute.
    #[error("unsupported: {what}")]
    Unsupported {
        /// What is asked for and what is supported.
        what: String,
    },
    /// A tensor is missing.
    #[error("{path}: tensor `{name}` is missing")]
    MissingTensor {
        /// File or folder concerned.
        path: PathBuf,
        /// Hugging Face name.
        name: String,
    },
    /// A tensor has an unexpected shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Hugging Face name.
        name: String,
        /// From the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor `{name}` holds a non-finite value at index {index}")]
    NonFinite {
        /// Hugging Face name.
        name: String,
        /// First offending flat index.
        index: usize,
    },
    /// A source (hub, package registry, cache) could not deliver.
    #[error("cannot get {what}: {reason}\nhint: {hint}")]
    Source {
        /// What was to be fetched.
        what: String,
        /// Why not.
        reason: String,
        /// What the user can do.
        hint: String,
    },
    /// Tokenizer or chat template failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, WeightsError>;
