//! What a plan costs in cache bytes, from sizes alone.

use kernels::kv::KvType;
use model::mixers::HeadLayout;
use model::{HeadPlan, ModelConfig};
use serde::{Deserialize, Serialize};

/// Context lengths that summaries report, in tokens.
pub const SUMMARY_CONTEXTS: [usize; 4] = [1024, 4096, 8192, 32768];

/// Bytes of one value of an f16 cache.
const BYTES_PER_VALUE: usize = 2;

/// Cache bytes after some tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextBytes {
    /// Tokens in the cache.
    pub tokens: usize,
    /// Bytes of the base model.
    pub base_bytes: usize,
    /// Bytes of the hybrid: growing part and constant part.
    pub hybrid_bytes: usize,
}

/// What a plan does to a model's cache (f32 values).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// Groups converted, all layers.
    pub converted: usize,
    /// Groups in all layers.
    pub total: usize,
    /// Bytes that each token adds to the base model's cache.
    pub base_bytes_per_token: usize,
    /// Bytes that each token adds to the hybrid's cache.
    pub hybrid_bytes_per_token: usize,
    /// Bytes of the hybrid's cache that do not grow.
    pub constant_bytes: usize,
    /// Both caches at [`SUMMARY_CONTEXTS`].
    pub contexts: Vec<ContextBytes>,
    /// Tokens from which on the hybrid's cache is smaller; `None` when it never is.
    pub smaller_from_tokens: Option<usize>,
    /// Indices of the kept groups by layer; none of a layer that is left out.
    pub kept_groups: Vec<Vec<usize>>,
}

/// Cache bytes (f16) that each token adds under `plan`, which must fit `config`, and those that do not grow.
fn growing_and_constant(plan: &HeadPlan, config: &ModelConfig) -> (usize, usize) {
    let (converted, skipped) = (plan.converted(), plan.skipped() * config.kv_heads);
    let growing = 2 * (plan.total() - converted - skipped) * config.head_dim * BYTES_PER_VALUE;
    let constant =
        plan.mixer.map_or(0, |spec| converted * HeadLayout::new(spec, config).cache_bytes(KvType::F16));
    (growing, constant)
}

/// Cache bytes (f16) after `tokens` tokens under `plan`, which must fit `config`.
pub fn cache_bytes_at(plan: &HeadPlan, config: &ModelConfig, tokens: usize) -> usize {
    let (growing, constant) = growing_and_constant(plan, config);
    tokens * growing + constant
}

/// Counts groups and cache bytes of `plan`, which must fit `config`.
pub fn summary(plan: &HeadPlan, config: &ModelConfig) -> PlanSummary {
    let (converted, total) = (plan.converted(), plan.total());
    let base = config.kv_bytes_per_token(BYTES_PER_VALUE);
    let (hybrid, constant) = growing_and_constant(plan, config);
    PlanSummary {
        converted,
        total,
        base_bytes_per_token: base,
        hybrid_bytes_per_token: hybrid,
        constant_bytes: constant,
        contexts: SUMMARY_CONTEXTS
            .into_iter()
            .map(|tokens| ContextBytes {
                tokens,
                base_bytes: tokens * base,
                hybrid_bytes: tokens * hybrid + constant,
            })
            .collect(),
        smaller_from_tokens: constant.checked_div(base - hybrid).map(|tokens| tokens + 1),
        kept_groups: (0..plan.layers.len())
            .map(|layer| {
                (0..plan.layers[layer].groups.len())
                    .filter(|&group| !plan.is_skipped(layer) && !plan.is_converted(layer, group))
                    .collect()
            })
            .collect(),
    }
}
