//! `patching`: how much of the answer is lost when a group's outputs come from the same prompt with another needle.

use super::needle::{NeedlePrompt, answer_log_prob, check_prompts};
use super::state::Saved;
use super::{Cost, Criterion, Inputs, Measured, Measurement, Scores, Source, by_layer};
use crate::error::{Result, SurgeryError};
use kernels::MatRef;
use model::observe::AttnView;
use model::{LayerObserver, Progress, TokenBatch};

/// Nats per answer token between prompt and corrupted prompt below which the model does not read the needle and the effect is a ratio of noise.
const MIN_GAP: f64 = 0.1;

pub const CRITERION: Criterion = Criterion {
    name: "patching",
    about: "minus the indirect effect: share of the answer's log-probability that is lost when the group's outputs come from the prompt with another needle",
    cost: Cost::ForwardPerGroupNeedles,
    measured: Some(Measured { seconds: 480.0, of: "8 prompts of 1,024 tokens" }),
    reference: "HydraHead, arXiv 2606.20097",
    source: Source::Needles(measure),
};

fn measure(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Measurement> {
    let mut effects = indirect_effects(inputs, progress)?;
    effects.iter_mut().flatten().for_each(|effect| *effect = -*effect);
    Ok(effects.into())
}

/// IE = (m(x) − m(x; O_g ← x′)) / (m(x) − m(x′)) of every group, `[layer][group]`, mean over the prompts: x the prompt, x′ the prompt with
/// distractors for needles, m the mean log-probability of the answer tokens, O_g the group's head outputs at all positions. Prompts whose
/// needles the model does not read (m(x) − m(x′) below 0.1 nats) are left out. The parts that survive an interruption are (prompt, layer).
pub fn indirect_effects(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Scores> {
    let Inputs { exec, model, prompts, .. } = *inputs;
    check_prompts("patching", model, prompts)?;
    let (layers, groups) = (model.config.layers, model.config.kv_heads);
    let (width, parts) = (model.config.heads * model.config.head_dim, prompts.len() * layers);
    // Sums of every group, and then the prompts that counted.
    let mut saved = Saved::open(inputs, "patching", "", parts, vec![0.0; layers * groups + 1])?;
    progress.start("patching", (parts * groups) as u64, "groups");
    progress.resumed((saved.done * groups) as u64);
    while saved.done < parts {
        let prompt = &prompts[saved.done / layers];
        let batch = TokenBatch::one(&prompt.tokens);
        let (mut clean, mut corrupted) = (Outputs::default(), Outputs::default());
        let trace = model.forward_trace(exec, &batch, &mut clean)?;
        let other = TokenBatch::one(&prompt.corrupted());
        let hidden = model.forward_batch(exec, &other, &mut corrupted, None)?;
        let metric = |hidden: &[f32], prompt: &NeedlePrompt| answer_log_prob(exec, model, prompt, hidden);
        let known = metric(&trace.hidden, prompt);
        let gap = known - metric(&hidden, prompt);
        if gap < MIN_GAP {
            saved.advance(layers)?;
            progress.advance((layers * groups) as u64, "needle not read");
            continue;
        }
        for layer in saved.done % layers..layers {
            if progress.cancelled() {
                return Err(SurgeryError::Interrupted);
            }
            let mut delta = std::mem::take(&mut corrupted.0[layer]);
            delta.iter_mut().zip(&clean.0[layer]).for_each(|(delta, clean)| *delta -= clean);
            let delta = MatRef::dense(&delta, batch.rows(), width);
            for group in 0..groups {
                let (first, columns) = (group * width / groups, width / groups);
                let delta = delta.columns(first, columns);
                let patched = model.forward_from(exec, &batch, &trace, layer, first..first + columns, delta);
                saved.values[layer * groups + group] += (known - metric(&patched, prompt)) / gap;
            }
            if layer + 1 == layers {
                saved.values[layers * groups] += 1.0;
            }
            saved.advance(1)?;
            progress.advance(groups as u64, &format!("layer {layer}"));
        }
    }
    progress.finish();
    let used = saved.values[layers * groups];
    if used == 0.0 {
        return Err(SurgeryError::Argument(format!(
            "the model reads the needle of none of the {} prompts: replacing it changes the answers by less than {MIN_GAP} nats\n\
             hint: use shorter prompts",
            prompts.len()
        )));
    }
    progress.note(&format!("patching: {used} of {} prompts whose needles the model reads", prompts.len()));
    Ok(by_layer(&saved.values[..layers * groups], groups, |sum| sum / used))
}

/// Keeps the head outputs `[T, heads · head_dim]` of every layer.
#[derive(Default)]
struct Outputs(Vec<Vec<f32>>);

impl LayerObserver for Outputs {
    fn attention(&mut self, view: AttnView<'_>) {
        self.0.push(view.out.to_dense());
    }
}
