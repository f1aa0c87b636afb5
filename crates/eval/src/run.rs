//! What a result file says of the run that made it: the `run` object of every JSON output. Knows nothing of command lines.

use model::Engine;
use serde::{Deserialize, Serialize};
use surgery::select::summary;

/// Tokens at which caches are compared.
pub const CACHE_TOKENS: usize = 8192;

/// The run that made a result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The command line, quoted for a shell.
    pub command: String,
    /// Version of the program.
    pub version: String,
    /// Commit that it was built from; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// When the output was written, UTC, as `2026-11-26T16:39:21Z`.
    pub date: String,
    /// The CPU's name; absent where the system does not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Instruction set in use.
    pub isa: String,
    /// Compute threads.
    pub threads: usize,
    /// Seeds of what was drawn; empty where nothing was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<u64>,
    /// The models that were run, the measured one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<RunModel>,
}

/// One model of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunModel {
    /// The argument that named it.
    pub name: String,
    /// Weights in memory: an element type, or `stored`.
    pub weights: String,
    /// Element type of the attention cache.
    pub kv_type: String,
    /// KV groups converted.
    pub converted: usize,
    /// KV groups in all.
    pub total: usize,
    /// Bytes that its cache takes in f16 after [`CACHE_TOKENS`] tokens, whatever it ran in, so that models can be compared.
    pub cache_bytes_8k: usize,
}

impl RunModel {
    /// Describes `engine`, which was asked for as `name` with its weights as `weights`.
    pub fn of(name: &str, weights: &str, engine: &Engine) -> Self {
        let cost = summary(&engine.plan, &engine.config);
        Self {
            name: name.into(),
            weights: weights.into(),
            kv_type: engine.kv_type().name().to_ascii_lowercase(),
            converted: cost.converted,
            total: cost.total,
            cache_bytes_8k: CACHE_TOKENS * cost.hybrid_bytes_per_token + cost.constant_bytes,
        }
    }
}
