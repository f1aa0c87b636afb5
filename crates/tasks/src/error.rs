//! The crate's one error type.

/// Why a task cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The tokenizer failed.
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
    /// What was asked for cannot be met.
    #[error("{0}")]
    Argument(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TaskError>;
