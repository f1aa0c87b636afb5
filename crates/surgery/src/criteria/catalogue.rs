//! What a criterion costs and where it comes from, for people who choose one.

/// Passes that a criterion takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// None: it reads the head statistics.
    Statistics,
    /// The forward pass that gathers the statistics.
    Forward,
    /// A forward and a backward pass.
    ForwardBackward,
    /// A forward pass for every KV group, from its layer on.
    ForwardPerGroup,
    /// A forward pass over needle prompts.
    ForwardNeedles,
    /// For every needle prompt, a forward pass for every KV group, from its layer on.
    ForwardPerGroupNeedles,
    /// Forward and backward passes of many training steps on needle prompts.
    TrainingNeedles,
    /// A forward and a backward pass with a trained head bank.
    Bank,
}

impl Cost {
    /// A few words for a table.
    pub fn words(self) -> &'static str {
        match self {
            Self::Statistics => "statistics only",
            Self::Forward => "one forward",
            Self::ForwardBackward => "forward + backward",
            Self::ForwardPerGroup => "one forward per group",
            Self::ForwardNeedles => "one forward per prompt",
            Self::ForwardPerGroupNeedles => "one forward per group and prompt",
            Self::TrainingNeedles => "training steps on prompts",
            Self::Bank => "needs bank; forward + backward",
        }
    }
}

/// A time taken once, with other work beside: SmolLM2-135M, two cores, f32 (docs/log, criteria).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Seconds.
    pub seconds: f64,
    /// For how much work.
    pub of: &'static str,
}
