//! Head statistics in one streaming pass, and `heads.json`.

use crate::error::Result;
use kernels::Exec;
use model::{Model, Progress, plan::PlanModel};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Means over query positions of one head (or, for a group, over its query heads).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadStats {
    /// Live attention within the last 16 tokens.
    pub recency_ratio_16: f64,
    /// Live attention within the last 64 tokens.
    pub recency_ratio_64: f64,
    /// Live attention within the last 128 tokens.
    pub recency_ratio_128: f64,
    /// Attention on the sinks.
    pub sink_mass: f64,
    /// Mean distance in tokens, sinks left out.
    pub mean_distance: f64,
    /// Entropy in nats.
    pub entropy: f64,
    /// Attention on the previous token.
    pub prev_token_mass: f64,
    /// Less than a tenth of the attention is live: the head does next to nothing.
    pub no_op: bool,
    /// Attention mass by distance; bucket 0 is distance 0, bucket b distances `2^(b−1)..2^b`.
    pub mass_by_distance: Vec<f64>,
}

/// A KV group: mean statistics of its query heads and the criteria's scores (higher: safer to convert).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupStats {
    /// Means over the group's query heads.
    #[serde(flatten)]
    pub stats: HeadStats,
    /// Score by criterion name.
    pub scores: BTreeMap<String, f64>,
}

/// One layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerHeads {
    /// Per query head.
    pub heads: Vec<HeadStats>,
    /// Per KV group.
    pub groups: Vec<GroupStats>,
}

/// The content of `heads.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadsReport {
    /// Format version, 1.
    pub version: u32,
    /// The model analysed.
    pub model: PlanModel,
    /// Tokens analysed.
    pub tokens: usize,
    /// Tokens per sequence.
    pub context: usize,
    /// Sink positions left out of the live statistics.
    pub sinks: Vec<usize>,
    /// SHA-256 of the token ids (little-endian u32).
    pub data_sha256: String,
    /// Seed of the seeded criteria.
    pub seed: u64,
    /// One entry per layer.
    pub layers: Vec<LayerHeads>,
}

impl HeadsReport {
    /// Reads and checks a `heads.json`.
    pub fn read(path: &Path) -> Result<Self> {
        let _ = path;
        todo!()
    }
    /// Writes it atomically.
    pub fn write(&self, path: &Path) -> Result<()> {
        let _ = path;
        todo!()
    }
}

/// What [`analyze`] computes.
#[derive(Clone, Debug)]
pub struct AnalyzeOptions {
    /// Criteria to score (names as in [`crate::criteria::NAMES`]); those that need a bank are not allowed here.
    pub criteria: Vec<String>,
    /// Seed of `random` and of label sampling in `kl-fisher`.
    pub seed: u64,
}

/// Statistics and scores of every head and group over `sequences` of token ids (each processed on its own).
pub fn analyze(exec: &Exec, model: &Model, sequences: &[Vec<u32>], options: &AnalyzeOptions, progress: &mut dyn Progress) -> Result<HeadsReport> {
    let _ = (exec, model, sequences, options, progress);
    todo!()
}
