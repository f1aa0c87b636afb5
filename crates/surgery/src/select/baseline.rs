//! Training-free baselines as plans: what other work keeps, chosen and counted like any plan.
//! Knows sizes; knows nothing of where scores come from.

use super::{SelectOptions, cache_bytes_at, select};
use crate::error::{Result, SurgeryError};
use model::plan::{MAX_WINDOW, PlanCriterion};
use model::{Dropped, GroupMixer, HeadPlan, MixerSpec, ModelConfig, RecurrentKind};

/// First tokens that StreamingLLM keeps (arXiv 2309.17453, section 3.2).
pub const STREAMING_SINKS: usize = 4;
/// First tokens that a streaming head of DuoAttention keeps (arXiv 2410.10819, section 3).
pub const DUO_SINKS: usize = 64;
/// Last tokens that a streaming head of DuoAttention keeps.
pub const DUO_WINDOW: usize = 256;

/// A baseline that needs no training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Baseline {
    /// Every group sees the last tokens and a few sinks (arXiv 2309.17453).
    StreamingLlm,
    /// The chosen groups see 64 sinks and the last 256 tokens, the others everything (arXiv 2410.10819).
    DuoAttention,
    /// Groups drawn at random, whatever replaces them.
    Random,
    /// Layers whose output is most like their input are left out (as ShortGPT does, arXiv 2403.03853).
    SkippedLayers,
}

impl Baseline {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::StreamingLlm, Self::DuoAttention, Self::Random, Self::SkippedLayers];

    /// The name used in plans and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::StreamingLlm => "streaming-llm",
            Self::DuoAttention => "duo-attention",
            Self::Random => "random",
            Self::SkippedLayers => "skipped-layers",
        }
    }
}

/// A window and sinks without a recurrence.
pub fn window_only(window: usize, sinks: usize) -> MixerSpec {
    MixerSpec {
        recurrent: RecurrentKind::None,
        window,
        sinks,
        d_state: 0,
        d_conv: 0,
        dropped: Dropped::Forgotten,
    }
}

/// The plan that puts every group behind the same window.
///
/// # Errors
/// [`SurgeryError::Model`] when the mixer does not fit the model.
pub fn streaming(config: &ModelConfig, window: usize, sinks: usize) -> Result<HeadPlan> {
    let mut plan = HeadPlan {
        criterion: Some(PlanCriterion {
            name: Baseline::StreamingLlm.name().into(),
            tokens: 0,
            bank_sha256: None,
            data_sha256: None,
            seed: None,
        }),
        beta: 1.0,
        mixer: Some(window_only(window, sinks)),
        ..HeadPlan::empty(config)
    };
    for group in plan.layers.iter_mut().flat_map(|layer| &mut layer.groups) {
        group.mixer = GroupMixer::Recurrent;
    }
    plan.validate(config)?;
    Ok(plan)
}

/// The largest window with which [`streaming`] holds no more cache bytes (f16) than `bytes`.
///
/// # Errors
/// [`SurgeryError::Argument`] when not even a window of 1 fits, or more than [`MAX_WINDOW`] would.
pub fn streaming_window(config: &ModelConfig, bytes: usize, sinks: usize) -> Result<usize> {
    // Windows have no constant part besides their entries.
    let per_entry = cache_bytes_at(&streaming(config, 1, 0)?, config, 0);
    let entries = bytes / per_entry;
    match entries.checked_sub(sinks) {
        None | Some(0) => Err(SurgeryError::Argument(format!(
            "{bytes} cache bytes hold {entries} tokens in every group, no window beside {sinks} sinks\n\
             hint: lower beta, fewer sinks or a longer context"
        ))),
        Some(window) if window > MAX_WINDOW => Err(SurgeryError::Argument(format!(
            "{bytes} cache bytes hold a window of {window}, at most {MAX_WINDOW} is supported\nhint: a shorter context"
        ))),
        Some(window) => Ok(window),
    }
}

/// The plan that leaves out as few layers as hold the cache within `bytes` (f16) after `tokens` tokens: those of highest `similarity` (mean cosine
/// between what comes in and what goes out; ties: the lower layer first), chosen from one measurement of the whole model.
///
/// # Errors
/// [`SurgeryError::Argument`] for similarities of another number of layers or that are not finite, and when no layer would be left.
pub fn skipping(
    config: &ModelConfig,
    similarity: &[f64],
    calibration_tokens: usize,
    bytes: usize,
    tokens: usize,
) -> Result<HeadPlan> {
    if similarity.len() != config.layers || similarity.iter().any(|s| !s.is_finite()) {
        return Err(SurgeryError::Argument(format!(
            "layer similarities {similarity:?}, expected {} finite numbers",
            config.layers
        )));
    }
    let mut plan = HeadPlan {
        criterion: Some(PlanCriterion {
            name: Baseline::SkippedLayers.name().into(),
            tokens: calibration_tokens,
            bank_sha256: None,
            data_sha256: None,
            seed: None,
        }),
        ..HeadPlan::empty(config)
    };
    let mut order: Vec<usize> = (0..config.layers).collect();
    // Stable: ties stay in order.
    order.sort_by(|&a, &b| similarity[b].total_cmp(&similarity[a]));
    for layer in order {
        if cache_bytes_at(&plan, config, tokens) <= bytes {
            break;
        }
        plan.layers[layer].skipped = true;
    }
    if plan.skipped() == config.layers {
        return Err(SurgeryError::Argument(format!(
            "{bytes} cache bytes hold {tokens} tokens in no layer\nhint: lower beta"
        )));
    }
    plan.validate(config)?;
    Ok(plan)
}

/// Cache bytes (f16) after `tokens` tokens of a plan that converts a share `beta` to `mixer`, whichever groups these are.
///
/// # Errors
/// As [`select`].
pub fn budget_bytes(config: &ModelConfig, beta: f64, mixer: MixerSpec, tokens: usize) -> Result<usize> {
    let scores = vec![vec![0.0; config.kv_heads]; config.layers];
    let criterion =
        PlanCriterion { name: "budget".into(), tokens: 0, bank_sha256: None, data_sha256: None, seed: None };
    let options = SelectOptions { beta, keep_at_least_per_layer: 0, mixer, criterion };
    Ok(cache_bytes_at(&select(config, &scores, &options)?, config, tokens))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, spec};

    #[test]
    fn streaming_windows_every_group() {
        let plan = streaming(&config(), 60, 4).unwrap();
        assert_eq!((plan.converted(), plan.total()), (4, 4));
        assert_eq!(plan.mixer, Some(window_only(60, 4)));
        assert!(streaming(&config(), 0, 0).is_err());
    }

    #[test]
    fn the_most_similar_layers_go_until_the_budget_is_met() {
        let config = ModelConfig { layers: 4, ..config() };
        let skipped = |bytes: usize| {
            let plan = skipping(&config, &[0.5, 0.9, 0.2, 0.9], 7, bytes, 100).unwrap();
            assert!(cache_bytes_at(&plan, &config, 100) <= bytes);
            (0..4).filter(|&layer| plan.is_skipped(layer)).collect::<Vec<_>>()
        };
        // 2 groups × (k, v) × 8 values × 2 bytes for each of 100 tokens.
        let layer = 2 * 2 * 8 * 2 * 100;
        assert_eq!(skipped(4 * layer), [0; 0]);
        assert_eq!(skipped(4 * layer - 1), [1]);
        assert_eq!(skipped(2 * layer + 1), [1, 3]);
        assert_eq!(skipped(layer), [0, 1, 3]);
        assert!(skipping(&config, &[0.5, 0.9, 0.2, 0.9], 7, layer - 1, 100).is_err());
        assert!(skipping(&config, &[0.5, 0.9, 0.2], 7, layer, 100).is_err());
        assert!(skipping(&config, &[0.5, 0.9, 0.2, f64::NAN], 7, layer, 100).is_err());
    }

    #[test]
    fn the_window_is_the_largest_that_fits_the_budget() {
        let config = config();
        for (beta, tokens, sinks) in [(0.25, 1024, 4), (0.5, 1000, 0), (0.75, 8192, 4), (0.75, 300, 1)] {
            for mixer in [window_only(64, 1), spec(RecurrentKind::Mamba2, 16)] {
                let bytes = budget_bytes(&config, beta, mixer, tokens).unwrap();
                let window = streaming_window(&config, bytes, sinks).unwrap();
                let at =
                    |window| cache_bytes_at(&streaming(&config, window, sinks).unwrap(), &config, tokens);
                assert!(at(window) <= bytes && at(window + 1) > bytes, "{beta} {tokens}: {window}");
            }
        }
        // 1 of 4 groups grows: a quarter of 1000 tokens, and 3 windows of 65 shared by 4 groups.
        let bytes = budget_bytes(&config, 0.75, window_only(64, 1), 1000).unwrap();
        assert_eq!(streaming_window(&config, bytes, 4).unwrap(), (1000 + 3 * 65) / 4 - 4);
        assert!(streaming_window(&config, 128 * 4, 4).is_err());
        assert_eq!(streaming_window(&config, 128 * 5, 4).unwrap(), 1);
    }
}
