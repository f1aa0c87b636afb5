//! HeadPlan: which KV group of which layer is attention and which is recurrent. The spine of the system.
//! A person can read and edit the JSON; nothing else decides which head is which.

use crate::error::Result;
use serde::{Deserialize, Serialize};
use weights::{Family, ModelConfig};

/// The recurrent part of a converted group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecurrentKind {
    /// No recurrence: local window + sinks only (training-free).
    None,
    /// The paper's Mamba-1 block.
    Mamba,
    /// Mamba-2 (SSD), attention-initialised.
    Mamba2,
    /// Gated delta rule, attention-initialised.
    GatedDelta,
}

/// What replaces attention in every converted group of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixerSpec {
    /// Recurrent part.
    pub recurrent: RecurrentKind,
    /// Tokens of the local softmax window, the query's own included; 0: no local part (then `sinks` is 0 as well).
    pub window: usize,
    /// First tokens the local part always sees.
    pub sinks: usize,
    /// State size: `head_dim` for `mamba2` and `gated-delta`, N (16) for `mamba`, 0 for `none`.
    pub d_state: usize,
    /// Taps of the short convolution; 0 for `none`.
    pub d_conv: usize,
}

/// Attention or recurrent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupMixer {
    /// Kept: causal softmax attention with a growing cache.
    Attention,
    /// Converted: the plan's [`MixerSpec`].
    Recurrent,
}

/// One KV group's decision.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupPlan {
    /// What the group is.
    pub mixer: GroupMixer,
    /// The criterion's score (higher: safer to convert).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

/// One layer's groups, in KV-head order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPlan {
    /// Decisions, one per KV head.
    pub groups: Vec<GroupPlan>,
}

/// The model a plan was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanModel {
    /// Architecture family.
    pub family: Family,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
}

/// How the groups were chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanCriterion {
    /// Criterion name (`mixer-fisher`, `recency`, …).
    pub name: String,
    /// Calibration tokens behind the scores.
    #[serde(default)]
    pub tokens: usize,
    /// SHA-256 of the head bank used, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bank_sha256: Option<String>,
    /// SHA-256 of the calibration token ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_sha256: Option<String>,
    /// Seed, for criteria that draw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The whole plan; `plan.json` and a checkpoint's `head_plan.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadPlan {
    /// Format version, 1.
    pub version: u32,
    /// The model it fits.
    pub model: PlanModel,
    /// How it was made; absent for hand-written plans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criterion: Option<PlanCriterion>,
    /// Share of KV groups converted (informative; the groups decide).
    pub beta: f64,
    /// Attention groups that every layer keeps at least.
    #[serde(default)]
    pub keep_at_least_per_layer: usize,
    /// What converted groups become; absent only when none is converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixer: Option<MixerSpec>,
    /// One entry per layer.
    pub layers: Vec<LayerPlan>,
}

impl HeadPlan {
    /// The plan that keeps everything.
    pub fn empty(config: &ModelConfig) -> Self {
        let _ = config;
        todo!()
    }
    /// Parses and validates against `config`; every mismatch is an error that says what was expected.
    pub fn from_json(json: &str, config: &ModelConfig) -> Result<Self> {
        let _ = (json, config);
        todo!()
    }
    /// Checks the plan against a model (shape, spec ranges, at least the structure of [`MixerSpec`]).
    pub fn validate(&self, config: &ModelConfig) -> Result<()> {
        let _ = config;
        todo!()
    }
    /// Pretty JSON.
    pub fn to_json(&self) -> String {
        todo!()
    }
    /// Whether `group` of `layer` is recurrent.
    pub fn is_converted(&self, layer: usize, group: usize) -> bool {
        self.layers[layer].groups[group].mixer == GroupMixer::Recurrent
    }
    /// Number of converted groups in all layers.
    pub fn converted(&self) -> usize {
        self.layers.iter().flat_map(|l| &l.groups).filter(|g| g.mixer == GroupMixer::Recurrent).count()
    }
    /// Number of groups in all layers.
    pub fn total(&self) -> usize {
        self.layers.iter().map(|l| l.groups.len()).sum()
    }
}
