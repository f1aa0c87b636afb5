//! HeadPlan: which KV group of which layer is attention and which is recurrent. The spine of the system.
//! A person can read and edit the JSON; nothing else decides which head is which.

use crate::error::{ModelError, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use weights::{Family, ModelConfig};

mod elastic;
#[cfg(test)]
mod tests;

pub use elastic::{Elastic, groups_at};

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

/// What becomes of tokens that a converted group's window no longer shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dropped {
    /// Nothing.
    #[default]
    Forgotten,
    /// They are averaged to one key and value that weighs as much as their number: RazorAttention's compensation token (arXiv 2407.15891).
    Averaged,
    /// The recurrent part answers for them, with the share of the softmax that they are estimated to have; of `mamba2` and `gated-delta`.
    Weighed,
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
    /// What becomes of tokens behind the window; left out of the JSON where they are forgotten.
    #[serde(default, skip_serializing_if = "Dropped::are_forgotten")]
    pub dropped: Dropped,
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
    /// The layer is left out: its output is its input, and it caches nothing. It then converts no group.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
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
    /// The budgets that the heads were trained for together; absent where they were trained for this plan's only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elastic: Option<Elastic>,
    /// One entry per layer.
    pub layers: Vec<LayerPlan>,
}

/// The plan format this crate reads and writes.
pub const PLAN_VERSION: u32 = 1;
/// Longest plan JSON that is parsed, far above a plan for any model (a group takes about 50 bytes).
pub const MAX_PLAN_BYTES: usize = 16 << 20;
/// Largest local window.
pub const MAX_WINDOW: usize = 65_536;
/// Most sinks.
pub const MAX_SINKS: usize = 4_096;
/// Largest state of the `mamba` mixer.
pub const MAX_MAMBA_STATE: usize = 256;
/// Most taps of the short convolution.
pub const MAX_CONV: usize = 8;

fn bad<T>(reason: String) -> Result<T> {
    Err(ModelError::Plan(reason))
}

fn expect_eq<T: PartialEq + fmt::Display>(what: &str, expected: T, found: T) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    bad(format!("made for another model: {what} is {found} in the plan, {expected} in the model"))
}

impl Dropped {
    fn are_forgotten(&self) -> bool {
        *self == Self::Forgotten
    }
}

impl RecurrentKind {
    /// The name used in plans and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mamba => "mamba",
            Self::Mamba2 => "mamba2",
            Self::GatedDelta => "gated-delta",
        }
    }
}

impl fmt::Display for MixerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { recurrent, window, sinks, d_state, d_conv, dropped } = self;
        let kind = recurrent.name();
        write!(f, "mixer {kind}, window {window}, sinks {sinks}, d_state {d_state}, d_conv {d_conv}")?;
        match dropped {
            Dropped::Forgotten => Ok(()),
            Dropped::Averaged => f.write_str(", dropped tokens averaged"),
            Dropped::Weighed => f.write_str(", dropped tokens weighed"),
        }
    }
}

impl MixerSpec {
    /// A mixer of the usual sizes for heads of `head_dim` values: 4 taps, a state of 16 for `mamba` and of `head_dim` for the other recurrences.
    pub fn of(recurrent: RecurrentKind, window: usize, sinks: usize, head_dim: usize) -> Self {
        let (d_state, d_conv) = match recurrent {
            RecurrentKind::None => (0, 0),
            RecurrentKind::Mamba => (16, 4),
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => (head_dim, 4),
        };
        Self { recurrent, window, sinks, d_state, d_conv, dropped: Dropped::Forgotten }
    }

    /// Whether the mixer can [weigh](Dropped::Weighed) what its window drops.
    pub fn can_weigh(&self) -> bool {
        matches!(self.recurrent, RecurrentKind::Mamba2 | RecurrentKind::GatedDelta) && self.window > 0
    }

    /// Whether a head is exactly the base's over sequences of at most `tokens`, because what it [weighs](Dropped::Weighed) is never there.
    pub fn is_exact_over(&self, tokens: usize) -> bool {
        self.dropped == Dropped::Weighed && tokens <= self.window.saturating_add(self.sinks)
    }

    /// Checks that the sizes are in range and fit heads of `head_dim` values.
    ///
    /// # Errors
    /// [`ModelError::Plan`] naming the field, the allowed range and what was found.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        let Self { recurrent, window, sinks, d_state, d_conv, dropped } = *self;
        let kind = recurrent.name();
        if window > MAX_WINDOW {
            return bad(format!("mixer window is {window}, at most {MAX_WINDOW} is supported"));
        }
        if sinks > MAX_SINKS {
            return bad(format!("mixer sinks is {sinks}, at most {MAX_SINKS} is supported"));
        }
        if sinks > 0 && window == 0 {
            return bad(format!("mixer has {sinks} sinks but no window; sinks need a window of at least 1"));
        }
        if dropped == Dropped::Averaged && window == 0 {
            return bad("mixer averages the tokens that its window drops, but has no window".into());
        }
        if dropped == Dropped::Weighed && !self.can_weigh() {
            return bad(format!(
                "mixer `{kind}` with window {window} weighs the tokens that its window drops; that takes mamba2 or gated-delta and a window"
            ));
        }
        let state_range = match recurrent {
            RecurrentKind::None if window == 0 => {
                return bad("mixer `none` needs a window of at least 1, found 0".into());
            }
            RecurrentKind::None => 0..=0,
            RecurrentKind::Mamba => 1..=MAX_MAMBA_STATE,
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => head_dim..=head_dim,
        };
        if !state_range.contains(&d_state) {
            let (low, high) = state_range.into_inner();
            return bad(format!(
                "mixer `{kind}` has d_state {d_state}, expected {}",
                describe_range(low, high)
            ));
        }
        let (low, high) = if recurrent == RecurrentKind::None { (0, 0) } else { (1, MAX_CONV) };
        if !(low..=high).contains(&d_conv) {
            return bad(format!(
                "mixer `{kind}` has d_conv {d_conv}, expected {}",
                describe_range(low, high)
            ));
        }
        Ok(())
    }
}

fn describe_range(low: usize, high: usize) -> String {
    if low == high { low.to_string() } else { format!("{low} to {high}") }
}

impl fmt::Display for PlanModel {
    /// What a message says of the model: family, layers, heads, KV heads and head size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, layers, heads, kv_heads, head_dim } = self;
        let family = family.model_type();
        write!(f, "family {family}, {layers} layers, {heads} heads, {kv_heads} KV heads, head_dim {head_dim}")
    }
}

impl PlanModel {
    /// The identity of `config`.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            family: config.family,
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        }
    }
}

impl HeadPlan {
    /// The plan that keeps everything.
    pub fn empty(config: &ModelConfig) -> Self {
        let group = GroupPlan { mixer: GroupMixer::Attention, score: None };
        Self {
            version: PLAN_VERSION,
            model: PlanModel::of(config),
            criterion: None,
            beta: 0.0,
            keep_at_least_per_layer: 0,
            mixer: None,
            elastic: None,
            layers: vec![LayerPlan { groups: vec![group; config.kv_heads], skipped: false }; config.layers],
        }
    }

    /// Parses and validates against `config`; every mismatch is an error that says what was expected. Safe on
    /// hostile text: its length is bounded and nothing is sized by a number in it.
    ///
    /// # Errors
    /// [`ModelError::Plan`] for text that is too long or no plan, another version, and everything that
    /// [`validate`](Self::validate) refuses.
    pub fn from_json(json: &str, config: &ModelConfig) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        if json.len() > MAX_PLAN_BYTES {
            return bad(format!("{} bytes of JSON, at most {MAX_PLAN_BYTES} are read", json.len()));
        }
        // The version first: a newer plan should say that it is newer, not that it has unknown fields.
        let Version { version } =
            serde_json::from_str(json).map_err(|e| ModelError::Plan(format!("not a plan: {e}")))?;
        if version != PLAN_VERSION {
            return bad(format!("version {version}, expected {PLAN_VERSION}"));
        }
        let plan: Self =
            serde_json::from_str(json).map_err(|e| ModelError::Plan(format!("not a plan: {e}")))?;
        plan.validate(config)?;
        Ok(plan)
    }

    /// Checks the plan against a model: version, the model's sizes, number of layers and groups, the mixer's ranges, the elastic mark, and that a
    /// mixer is given when a group is converted.
    ///
    /// # Errors
    /// [`ModelError::Plan`] saying what was expected and found.
    pub fn validate(&self, config: &ModelConfig) -> Result<()> {
        if self.version != PLAN_VERSION {
            return bad(format!("version {}, expected {PLAN_VERSION}", self.version));
        }
        let (expected, found) = (PlanModel::of(config), &self.model);
        expect_eq("family", expected.family.model_type(), found.family.model_type())?;
        expect_eq("layers", expected.layers, found.layers)?;
        expect_eq("heads", expected.heads, found.heads)?;
        expect_eq("kv_heads", expected.kv_heads, found.kv_heads)?;
        expect_eq("head_dim", expected.head_dim, found.head_dim)?;
        if self.layers.len() != config.layers {
            return bad(format!("lists {} layers, the model has {}", self.layers.len(), config.layers));
        }
        if !(0.0..=1.0).contains(&self.beta) {
            return bad(format!("beta is {}, expected 0 to 1", self.beta));
        }
        self.elastic.as_ref().map_or(Ok(()), Elastic::validate)?;
        if self.layers.iter().all(|layer| layer.skipped) {
            return bad("every layer is skipped".into());
        }
        for (layer, LayerPlan { groups, skipped }) in self.layers.iter().enumerate() {
            if groups.len() != config.kv_heads {
                return bad(format!(
                    "layer {layer} lists {} groups, the model has {}",
                    groups.len(),
                    config.kv_heads
                ));
            }
            let kept = groups.iter().filter(|g| g.mixer == GroupMixer::Attention).count();
            if *skipped && kept < groups.len() {
                return bad(format!(
                    "layer {layer} is skipped and converts groups; it can do only one of both"
                ));
            }
            if kept < self.keep_at_least_per_layer {
                return bad(format!(
                    "layer {layer} keeps {kept} attention groups, keep_at_least_per_layer is {}",
                    self.keep_at_least_per_layer
                ));
            }
        }
        match &self.mixer {
            Some(spec) => spec.validate(config.head_dim),
            None if self.converted() > 0 => {
                bad(format!("{} groups are converted but no mixer is given", self.converted()))
            }
            None => Ok(()),
        }
    }

    /// Pretty JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan holds only strings, numbers and lists")
    }

    /// The JSON of [`to_json`](Self::to_json) as a value.
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("a plan holds only strings, numbers and lists")
    }

    /// Whether `group` of `layer` is recurrent.
    pub fn is_converted(&self, layer: usize, group: usize) -> bool {
        self.layers[layer].groups[group].mixer == GroupMixer::Recurrent
    }

    /// Whether `layer` is left out.
    pub fn is_skipped(&self, layer: usize) -> bool {
        self.layers[layer].skipped
    }

    /// Number of layers that are left out.
    pub fn skipped(&self) -> usize {
        self.layers.iter().filter(|layer| layer.skipped).count()
    }

    /// Whether nothing is converted or left out: the base model.
    pub fn is_base(&self) -> bool {
        self.converted() == 0 && self.skipped() == 0
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
