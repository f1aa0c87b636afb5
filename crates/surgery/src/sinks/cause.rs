//! From what the interventions did to the name of a cause. Knows shares of strengths; knows nothing of models.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Share of the sink's strength that a donor must take over for an attribute to count as a cause.
pub const TAKES_OVER: f64 = 0.5;
/// Resamples of an interval.
const RESAMPLES: usize = 1000;
/// Ends of the interval, as shares of the resamples.
const ENDS: (f64, f64) = (0.025, 0.975);

/// Why a position absorbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Its position code.
    PositionalEncoding,
    /// Its token.
    Lexical,
    /// It sees only itself.
    MaskInduced,
    /// More than one of these.
    Mixed,
    /// None of these alone.
    None,
    /// An intervention is missing: no ordinary position to compare with, or every run broke the model.
    Unknown,
}

impl Cause {
    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::PositionalEncoding => "positional-encoding-based",
            Self::Lexical => "feature-based, lexical",
            Self::MaskInduced => "feature-based, mask-induced",
            Self::Mixed => "mixed",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }

    /// The cause of a sink at `position` from the shares τ that a donor takes over with its position code, with its token, and when it sees
    /// only itself. The last decides for the first position alone: no other sees only itself, so that none has this to hand over.
    pub fn of(position: usize, codes: Option<f64>, tokens: Option<f64>, alone: Option<f64>) -> Self {
        let alone = if position == 0 { alone } else { Some(0.0) };
        let (Some(codes), Some(tokens), Some(alone)) = (codes, tokens, alone) else {
            return Self::Unknown;
        };
        match (codes >= TAKES_OVER, tokens >= TAKES_OVER, alone >= TAKES_OVER) {
            (true, false, false) => Self::PositionalEncoding,
            (false, true, false) => Self::Lexical,
            (false, false, true) => Self::MaskInduced,
            (false, false, false) => Self::None,
            _ => Self::Mixed,
        }
    }
}

/// A mean over runs with its bootstrap interval of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Mean over sequences of the mean over runs.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end; the same as the lower one when there is a single run.
    pub high: f64,
    /// Runs.
    pub runs: usize,
}

impl Estimate {
    /// Estimates from the runs of each sequence; sequences are drawn with replacement, and in each the runs. `None` without a run.
    pub fn of(sequences: &[Vec<f64>], rng: &mut ChaCha8Rng) -> Option<Self> {
        let sequences: Vec<&Vec<f64>> = sequences.iter().filter(|runs| !runs.is_empty()).collect();
        if sequences.is_empty() {
            return None;
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let center = mean(&sequences.iter().map(|runs| mean(runs)).collect::<Vec<_>>());
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let drawn = (0..sequences.len()).map(|_| {
                    let runs = sequences[rng.random_range(0..sequences.len())];
                    (0..runs.len()).map(|_| runs[rng.random_range(0..runs.len())]).sum::<f64>()
                        / runs.len() as f64
                });
                drawn.sum::<f64>() / sequences.len() as f64
            })
            .collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[(share * (RESAMPLES - 1) as f64).round() as usize];
        let runs = sequences.iter().map(|runs| runs.len()).sum();
        Some(Self { mean: center, low: at(ENDS.0), high: at(ENDS.1), runs })
    }

    /// Whether the whole interval lies on one side of [`TAKES_OVER`].
    pub fn is_clear(&self) -> bool {
        self.runs > 1 && (self.low >= TAKES_OVER || self.high < TAKES_OVER)
    }
}
