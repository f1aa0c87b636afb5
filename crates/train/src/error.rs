//! The crate's one error type.

use std::path::PathBuf;

/// Why training or data preparation failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// A checkpoint failed.
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
    /// A bank or plan failed.
    #[error(transparent)]
    Surgery(#[from] surgery::SurgeryError),
    /// A data or state file is unusable.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is not enough text.
    #[error("data: {0}")]
    Data(String),
    /// A loss or gradient became NaN or infinite.
    #[error("step {step}: {what} is not finite; the last good state is kept\nhint: lower the learning rate")]
    NonFinite {
        /// Optimiser step.
        step: u64,
        /// Loss or gradient, and of what.
        what: String,
    },
    /// An argument cannot be met.
    #[error("{0}")]
    Argument(String),
    /// The user interrupted; the state was saved where `--resume` finds it.
    #[error("interrupted; continue with --resume")]
    Interrupted,
}

impl From<tasks::TaskError> for TrainError {
    fn from(error: tasks::TaskError) -> Self {
        match error {
            tasks::TaskError::Weights(error) => error.into(),
            tasks::TaskError::Argument(reason) => Self::Argument(reason),
        }
    }
}

impl TrainError {
    /// # Errors
    /// [`TrainError::NonFinite`].
    pub(crate) fn check_finite(step: u64, what: &str, value: f64) -> Result<()> {
        match value.is_finite() {
            true => Ok(()),
            false => Err(Self::NonFinite { step, what: what.into() }),
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TrainError>;
