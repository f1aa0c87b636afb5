//! The crate's one error type.

/// Why a model could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Weights(#[from] weights::WeightsError),
    /// A head plan is malformed or does not fit the model.
    #[error("head plan: {0}")]
    Plan(String),
    /// A plan cannot be run, or a hybrid not trained, at the asked budget.
    #[error("beta {beta}: {reason}")]
    Budget {
        /// The share of KV groups to convert that was asked for.
        beta: f64,
        /// What is wrong with it.
        reason: String,
    },
    /// A parameter is missing or has the wrong shape.
    #[error("parameter `{name}`: expected shape {expected:?}, found {found}")]
    Param {
        /// Full parameter name.
        name: String,
        /// Shape the model needs.
        expected: Vec<usize>,
        /// Shape found, or `nothing`.
        found: String,
    },
    /// The checkpoint holds a parameter of a layer that the configuration and plan know nothing of; leaving it out would
    /// silently compute another model.
    #[error(
        "parameter `{name}` is no part of the model\nhint: the configuration or head plan does not belong to these weights"
    )]
    Unexpected {
        /// Full parameter name.
        name: String,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {token} at position {position} is outside the vocabulary of {vocab}")]
    Token {
        /// The id.
        token: u32,
        /// Where.
        position: usize,
        /// Vocabulary size.
        vocab: usize,
    },
    /// More tokens than the model's context limit.
    #[error(
        "{requested} tokens exceed the model's context of {limit}\nhint: shorten the input, or allow longer contexts explicitly"
    )]
    Context {
        /// Position that would be reached.
        requested: usize,
        /// The limit.
        limit: usize,
    },
    /// An operation on the cache that a recurrent state cannot do, or a cache of another model.
    #[error("cache: {0}")]
    Cache(String),
    /// Changes to a pass that cannot be made.
    #[error("intervention: {0}")]
    Intervention(String),
    /// Sampling parameters out of range.
    #[error("sampler: {0}")]
    Sampler(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;
