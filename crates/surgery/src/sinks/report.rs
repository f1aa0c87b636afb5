//! `sinks.json`: what it holds, reading with checks, writing whole.

use super::cause::{Cause, Estimate};
use super::interventions::{Constant, Tally};
use super::massive::LayerActivations;
use crate::error::Result;
use crate::report_file::{self, Checked};
use model::plan::PlanModel;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The format version written and accepted.
pub(super) const VERSION: u32 = 1;

/// The content of `sinks.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SinksReport {
    /// Format version, 1.
    pub version: u32,
    /// The model examined.
    pub model: PlanModel,
    /// Sequences examined.
    pub sequences: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Tokens of the longest.
    pub context: usize,
    /// SHA-256 of the token ids (little-endian u32).
    pub data_sha256: String,
    /// Seed of the donors and of the intervals.
    pub seed: u64,
    /// Ordinary positions that each sink's attributes are handed to, per sequence.
    pub donors: usize,
    /// Mean negative log-likelihood of the second halves, unchanged, in nats per token.
    pub nll: f64,
    /// Sinks by position, the one that absorbs most first.
    pub sinks: Vec<Sink>,
    /// Runs by intervention.
    pub runs: BTreeMap<String, Tally>,
    /// What a constant added to all position codes changed; `None` without sinks, or when the context left no room.
    pub constant: Option<Constant>,
    /// The residual stream's largest values by layer.
    pub activations: Vec<LayerActivations>,
    /// Heads that do next to nothing.
    pub no_op_heads: Vec<NoOpHead>,
    /// Text of tokens at sinks, as far as whoever made this knows it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub texts: BTreeMap<u32, String>,
    /// The run that made this; nothing that was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<serde_json::Value>,
}

/// An absorbing position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sink {
    /// Where.
    pub position: usize,
    /// Sequences in which it absorbs.
    pub sequences: Vec<usize>,
    /// Its token in each of them.
    pub tokens: Vec<u32>,
    /// Share of all (layer, head) pairs where it absorbs, mean over these sequences.
    pub share: f64,
    /// Attention it gets, mean over its heads.
    pub mass: f64,
    /// Δ in nats above the median key, mean over its heads.
    pub strength: f64,
    /// Norm of its value as a share of the median norm; median over its heads.
    pub value_ratio: f64,
    /// What the tests said; `None` where none were made.
    pub tests: Option<SinkTests>,
    /// Its heads.
    pub heads: Vec<HeadSink>,
}

/// Tests of one sink. Shares are of its strength, summed over its heads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SinkTests {
    /// Sequences in which it was tested.
    pub sequences: usize,
    /// KL per token when its value is zero in all of its heads, the weights kept.
    pub kl_value: f64,
    /// KL per token when its key is masked in all of its heads.
    pub kl_key: f64,
    /// Its value is at most half of the median norm, and cutting it costs at most half of what cutting the key costs.
    pub waiver: bool,
    /// Share that a donor takes over with its position code (I1).
    pub codes: Option<Estimate>,
    /// With its token (I2).
    pub tokens: Option<Estimate>,
    /// By seeing only itself (I3b).
    pub alone: Option<Estimate>,
    /// Share that its position keeps where all tokens are the same ordinary one (I6).
    pub repeat: Option<Estimate>,
    /// Share that two ordinary positions have after swapping position codes with one another.
    pub control_codes: Option<Estimate>,
    /// The same of tokens.
    pub control_tokens: Option<Estimate>,
    /// The cause.
    pub cause: Cause,
    /// Whether the intervals of all shares that decide lie on one side of one half.
    pub clear: bool,
}

/// One head of a sink; means over the sequences where the sink absorbs in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadSink {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Sequences where it absorbs.
    pub sequences: usize,
    /// Attention it gets.
    pub mass: f64,
    /// Δ in nats above the median key.
    pub strength: f64,
    /// Norm of its value as a share of the median norm.
    pub value_ratio: f64,
    /// A waiver by the norm in this head and the cuts in all heads together.
    pub waiver: Option<bool>,
    /// Share that a donor takes over with its position code, in this head.
    pub codes: Option<f64>,
    /// With its token.
    pub tokens: Option<f64>,
    /// By seeing only itself.
    pub alone: Option<f64>,
    /// The cause in this head.
    pub cause: Option<Cause>,
}

/// A head whose attention all but vanishes in sinks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NoOpHead {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Attention outside the absorbing positions.
    pub live_mass: f64,
}

impl SinksReport {
    /// Reads and checks a `sinks.json`.
    ///
    /// # Errors
    /// [`Weights`](crate::SurgeryError::Weights) when it cannot be read, [`File`](crate::SurgeryError::File) when it is malformed, of
    /// another version, or names layers and heads that its model does not have.
    pub fn read(path: &Path) -> Result<Self> {
        report_file::read(path, ("sinks.json", VERSION), Self::check)
    }

    /// Writes it atomically, as indented JSON.
    ///
    /// # Errors
    /// [`File`](crate::SurgeryError::File) when a layer or head does not exist, [`Weights`](crate::SurgeryError::Weights) when the file
    /// cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        report_file::write(path, self, Self::check)
    }

    /// The token of a sink: its text or number where it is the same in all sequences, else how many there are.
    pub fn token_name(&self, sink: &Sink) -> String {
        match &sink.tokens[..] {
            [first, rest @ ..] if rest.iter().all(|token| token == first) => {
                self.texts.get(first).map_or_else(|| format!("#{first}"), |text| format!("{text:?}"))
            }
            tokens => format!("{} different", tokens.len()),
        }
    }

    /// The no-op heads as `layer.head`.
    pub fn no_op_names(&self) -> Vec<String> {
        self.no_op_heads.iter().map(|head| format!("{}.{}", head.layer, head.head)).collect()
    }

    fn check(&self) -> Checked {
        let (layers, heads) = (self.model.layers, self.model.heads);
        let sinks = self.sinks.iter().flat_map(|sink| sink.heads.iter().map(|h| (h.layer, h.head)));
        let mut places = sinks.chain(self.no_op_heads.iter().map(|h| (h.layer, h.head)));
        if let Some((layer, head)) = places.find(|&(layer, head)| layer >= layers || head >= heads) {
            return Err(format!(
                "layer {layer} head {head} listed, the model has {layers} layers of {heads} heads"
            ));
        }
        for sink in &self.sinks {
            if sink.position >= self.context || sink.sequences.iter().any(|&s| s >= self.sequences) {
                return Err(format!(
                    "a sink at position {} of sequences {:?}; there are {} sequences of up to {} tokens",
                    sink.position, sink.sequences, self.sequences, self.context
                ));
            }
        }
        Ok(())
    }
}
