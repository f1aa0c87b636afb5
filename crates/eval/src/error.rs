//! The crate's one error type.

use std::path::PathBuf;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// Tokenizer or checkpoint failed.
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
    /// Scores are missing, or a plan does not fit.
    #[error(transparent)]
    Surgery(#[from] surgery::SurgeryError),
    /// A data file failed.
    #[error(transparent)]
    Train(#[from] train::TrainError),
    /// A results file cannot be read or written, or a line of a test holds no question.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Two models that are to be compared do not speak the same tokens.
    #[error(
        "the base has a vocabulary of {expected}, the model one of {found}\nhint: compare with the model that was converted"
    )]
    Mismatch {
        /// Vocabulary of the base.
        expected: usize,
        /// Vocabulary of the other.
        found: usize,
    },
    /// A model gives no number where a log-likelihood is wanted.
    #[error(
        "the model's logits are not finite\nhint: the checkpoint is damaged or its training diverged; with --weights f32 nothing is rounded"
    )]
    NonFinite,
    /// An argument cannot be met.
    #[error("{0}")]
    Argument(String),
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

impl From<tasks::TaskError> for EvalError {
    fn from(error: tasks::TaskError) -> Self {
        match error {
            tasks::TaskError::Weights(error) => error.into(),
            tasks::TaskError::Argument(reason) => Self::Argument(reason),
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, EvalError>;
