//! The crate's one error type.

use std::path::{Path, PathBuf};

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

impl WeightsError {
    /// Wraps the system's error with the path concerned.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl Fn(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path: path.clone(), source }
    }

    pub(crate) fn malformed(path: &Path, format: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), format, reason: reason.into() }
    }

    /// Puts the real path into an error made where it was not known.
    pub(crate) fn at(self, path: &Path) -> Self {
        match self {
            Self::Malformed { format, reason, .. } => {
                Self::Malformed { path: path.to_path_buf(), format, reason }
            }
            other => other,
        }
    }
}
