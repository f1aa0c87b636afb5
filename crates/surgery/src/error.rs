//! The crate's one error type.

use std::path::PathBuf;

/// Why an analysis, a selection or a conversion failed.
#[derive(Debug, thiserror::Error)]
pub enum SurgeryError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// A checkpoint failed.
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
    /// A results file is malformed or belongs to another model.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, with expected and found.
        reason: String,
    },
    /// An argument cannot be met.
    #[error("{0}")]
    Argument(String),
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, SurgeryError>;
