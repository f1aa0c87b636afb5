//! From scores to a HeadPlan under a budget, and what the plan costs.
//! Knows scores, groups and bytes; knows nothing of how the scores are measured.

mod baseline;
mod summary;
#[cfg(test)]
mod tests;

pub use baseline::{
    Baseline, DUO_SINKS, DUO_WINDOW, STREAMING_SINKS, budget_bytes, skipping, streaming, streaming_window,
    window_only,
};
pub use summary::{ContextBytes, PlanSummary, SUMMARY_CONTEXTS, cache_bytes_at, summary};

use crate::error::{Result, SurgeryError};
use crate::{HeadBank, HeadsReport, criteria};
use model::plan::{GroupPlan, LayerPlan, PlanCriterion, groups_at};
use model::{GroupMixer, HeadPlan, MixerSpec, ModelConfig};

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

/// What [`plan_by`] needs besides the measurements.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// A name of [`criteria::NAMES`].
    pub criterion: &'a str,
    /// Share of groups to convert, 0..=1.
    pub beta: f64,
    /// Attention groups that every layer keeps at least.
    pub keep_at_least_per_layer: usize,
    /// What converted groups become.
    pub mixer: MixerSpec,
    /// Seed of `random`.
    pub seed: u64,
}

/// The plan of [`select`] by the scores of a criterion, with where they come from on record.
///
/// # Errors
/// As [`criteria::scores`] and [`select`].
pub fn plan_by(heads: &HeadsReport, bank: Option<&HeadBank>, choice: &Choice<'_>) -> Result<HeadPlan> {
    let Choice { criterion, beta, keep_at_least_per_layer, mixer, seed } = *choice;
    let scores = criteria::scores(criterion, heads, bank, seed)?;
    let on_prompts = criteria::find(criterion)?.source.needs_prompts();
    let prompts = heads.needle_prompts.as_ref().filter(|_| on_prompts);
    let tokens = match (bank, prompts) {
        (Some(bank), _) if criterion == "mixer-fisher" => bank.info.fisher_tokens,
        (_, Some(prompts)) => prompts.tokens,
        _ => heads.tokens,
    };
    let criterion = PlanCriterion {
        name: criterion.into(),
        tokens,
        bank_sha256: bank.map(HeadBank::sha256),
        data_sha256: Some(prompts.map_or(&heads.data_sha256, |prompts| &prompts.sha256).clone()),
        seed: (criterion == "random").then_some(seed),
    };
    select(&heads.config, &scores, &SelectOptions { beta, keep_at_least_per_layer, mixer, criterion })
}

/// Converts the `round(beta · groups)` groups of highest score `[layer][group]` (ties: lower layer, lower group first), never more than
/// the floor per layer allows: a group whose layer is at its floor is skipped and the next best takes its place.
///
/// # Errors
/// [`SurgeryError::Argument`] for a `beta` outside 0..=1, scores of another shape, a score that is not finite, or a budget that the
/// floor cannot meet; [`SurgeryError::Model`] when the mixer does not fit the model.
pub fn select(config: &ModelConfig, scores: &[Vec<f64>], options: &SelectOptions) -> Result<HeadPlan> {
    let beta = options.beta;
    if !(0.0..=1.0).contains(&beta) {
        return Err(SurgeryError::Argument(format!("beta is {beta}, expected a share between 0 and 1")));
    }
    if options.keep_at_least_per_layer > config.kv_heads {
        return Err(SurgeryError::Argument(format!(
            "every layer is to keep {} groups, the model's layers have {}",
            options.keep_at_least_per_layer, config.kv_heads
        )));
    }
    check_scores(config, scores)?;
    let groups = config.layers * config.kv_heads;
    let budget = groups_at(beta, groups);
    let per_layer = config.kv_heads - options.keep_at_least_per_layer;
    let possible = config.layers * per_layer;
    if budget > possible {
        return Err(SurgeryError::Argument(format!(
            "beta {beta} converts {budget} of {groups} groups, but keeping {} of {} groups in each of {} layers leaves {possible}\n\
             hint: lower beta to {:.4} or keep fewer groups per layer",
            options.keep_at_least_per_layer,
            config.kv_heads,
            config.layers,
            possible as f64 / groups as f64,
        )));
    }

    let mut order: Vec<(usize, usize)> =
        (0..config.layers).flat_map(|layer| (0..config.kv_heads).map(move |group| (layer, group))).collect();
    // Stable: ties stay in layer and group order. Adding zero makes -0 and 0 a tie.
    order.sort_by(|a, b| (scores[b.0][b.1] + 0.0).total_cmp(&(scores[a.0][a.1] + 0.0)));
    let mut layers: Vec<LayerPlan> = scores
        .iter()
        .map(|layer| LayerPlan {
            groups: layer
                .iter()
                .map(|&score| GroupPlan { mixer: GroupMixer::Attention, score: Some(score) })
                .collect(),
            skipped: false,
        })
        .collect();
    let mut in_layer = vec![0; config.layers];
    let mut left = budget;
    for (layer, group) in order {
        if left == 0 {
            break;
        }
        if in_layer[layer] < per_layer {
            layers[layer].groups[group].mixer = GroupMixer::Recurrent;
            in_layer[layer] += 1;
            left -= 1;
        }
    }
    let plan = HeadPlan {
        criterion: Some(options.criterion.clone()),
        beta,
        keep_at_least_per_layer: options.keep_at_least_per_layer,
        mixer: (budget > 0).then_some(options.mixer),
        layers,
        ..HeadPlan::empty(config)
    };
    plan.validate(config)?;
    Ok(plan)
}

fn check_scores(config: &ModelConfig, scores: &[Vec<f64>]) -> Result<()> {
    if scores.len() != config.layers {
        return Err(SurgeryError::Argument(format!(
            "scores for {} layers, the model has {}",
            scores.len(),
            config.layers
        )));
    }
    for (layer, groups) in scores.iter().enumerate() {
        if groups.len() != config.kv_heads {
            return Err(SurgeryError::Argument(format!(
                "scores for {} groups in layer {layer}, the model has {}",
                groups.len(),
                config.kv_heads
            )));
        }
        if let Some(group) = groups.iter().position(|score| !score.is_finite()) {
            return Err(SurgeryError::Argument(format!(
                "the score of layer {layer} group {group} is {}, expected a finite number",
                groups[group]
            )));
        }
    }
    Ok(())
}
