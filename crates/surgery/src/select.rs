//! From scores to a HeadPlan under a budget.

use crate::error::Result;
use model::plan::PlanCriterion;
use model::{HeadPlan, MixerSpec, ModelConfig};

/// What [`select`] needs besides the scores.
#[derive(Clone, Debug)]
pub struct SelectOptions {
    /// Share of groups to convert, 0..=1.
    pub beta: f64,
    /// Attention groups that every layer keeps at least.
    pub keep_at_least_per_layer: usize,
    /// What converted groups become.
    pub mixer: MixerSpec,
    /// Recorded in the plan.
    pub criterion: PlanCriterion,
}

/// Converts the `round(beta · groups)` groups of highest score `[layer][group]` (ties: lower layer, lower group first), never more than
/// the floor per layer allows. A budget the floor cannot meet is an error; NaN scores are errors.
pub fn select(config: &ModelConfig, scores: &[Vec<f64>], options: &SelectOptions) -> Result<HeadPlan> {
    let _ = (config, scores, options);
    todo!()
}
