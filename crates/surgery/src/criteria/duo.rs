//! `duo`: a gate per group between full and streaming attention, learned with the model frozen: what can be streamed without changing the
//! answers' hidden states gets a small gate.

use super::needle::{NeedlePrompt, check_prompts, gather};
use super::state::Saved;
use super::{Cost, Criterion, Inputs, Measured, Measurement, Scores, Source, by_layer};
use crate::error::{Result, SurgeryError};
use kernels::Exec;
use model::{Gates, Model, NoObserver, Progress, Tape, TokenBatch};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Decay of the moments of gradient and squared gradient, and what keeps their ratio finite (Adam).
const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;
/// Share of the steps in which the learning rate rises, and in which it falls.
const RAMP: f64 = 0.2;

pub const CRITERION: Criterion = Criterion {
    name: "duo",
    about: "minus the learned gate between full attention (1) and streaming attention (0), trained to keep the hidden states that answer needle prompts",
    cost: Cost::TrainingNeedles,
    measured: Some(Measured { seconds: 270.0, of: "100 steps of 1,024 tokens" }),
    reference: "DuoAttention, arXiv 2410.10819",
    source: Source::Needles(measure),
};

/// How gates are learned.
#[derive(Clone, Debug, PartialEq)]
pub struct DuoOptions {
    /// Steps, each on one prompt.
    pub steps: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Tokens that streaming attention sees; at deployment 256.
    pub window: usize,
    /// First tokens that it always sees; at deployment 64.
    pub sinks: usize,
    /// Weight of the mean gate in the loss.
    pub l1: f64,
}

impl Default for DuoOptions {
    /// 100 steps of 0.05, window 256, 64 sinks, weight 0.05.
    fn default() -> Self {
        Self { steps: 100, lr: 0.05, window: 256, sinks: 64, l1: 0.05 }
    }
}

fn measure(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Measurement> {
    let mut gates = learn_gates(inputs, progress)?;
    gates.iter_mut().flatten().for_each(|gate| *gate = -*gate);
    Ok(gates.into())
}

/// The learned gates α, `[layer][group]`, 0 to 1; all begin at 1. Prompts come in an order shuffled anew from the seed whenever all were used.
pub fn learn_gates(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Scores> {
    let Inputs { exec, model, prompts, duo: options, .. } = inputs;
    check_prompts("duo", model, prompts)?;
    check_options(options, prompts)?;
    let (layers, groups) = (model.config.layers, model.config.kv_heads);
    let gates = layers * groups;
    // Gates, and the moments of their gradients.
    let initial = [vec![1.0; gates], vec![0.0; 2 * gates]].concat();
    let mut saved = Saved::open(inputs, "duo", &format!("{options:?}"), options.steps, initial)?;
    progress.start("duo", options.steps as u64, "steps");
    progress.resumed(saved.done as u64);
    let mut targets: Vec<Option<Vec<f32>>> = vec![None; prompts.len()];
    let mut tape = Tape::default();
    while saved.done < options.steps {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        let index = prompt_of_step(saved.done, prompts.len(), inputs.seed);
        let prompt = &prompts[index];
        let target = match &mut targets[index] {
            Some(target) => target,
            empty => empty.insert(answer_states(exec, model, prompt)?),
        };
        let alpha = by_layer(&saved.values[..gates], groups, |alpha| alpha);
        let (loss, gradient) = loss_and_gradient(exec, model, options, (prompt, target), &alpha, &mut tape)?;
        step(&mut saved.values, &gradient.concat(), saved.done, options);
        saved.advance(1)?;
        let mean = saved.values[..gates].iter().sum::<f64>() / gates as f64;
        progress.advance(1, &format!("loss {loss:.4}, mean gate {mean:.3}"));
    }
    progress.finish();
    Ok(by_layer(&saved.values[..gates], groups, |alpha| alpha))
}

fn check_options(options: &DuoOptions, prompts: &[NeedlePrompt]) -> Result<()> {
    let DuoOptions { steps, lr, window, sinks, l1 } = *options;
    if steps == 0 || window == 0 || ![lr, l1].iter().all(|x| x.is_finite() && *x >= 0.0) {
        return Err(SurgeryError::Argument(
            "duo needs at least one step, a window of at least one token, and finite rates not below 0"
                .into(),
        ));
    }
    let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
    if window.saturating_add(sinks) >= longest {
        return Err(SurgeryError::Argument(format!(
            "duo: a window of {window} tokens and {sinks} sinks see everything in prompts of {longest} tokens\n\
             hint: make them smaller, or the prompts longer"
        )));
    }
    Ok(())
}

/// The base's hidden states that generate the answers.
pub fn answer_states(exec: &Exec, model: &Model, prompt: &NeedlePrompt) -> Result<Vec<f32>> {
    let hidden = model.forward_batch(exec, &TokenBatch::one(&prompt.tokens), &mut NoObserver, None)?;
    Ok(gather(&hidden, &prompt.answers().0, model.config.d_model))
}

/// Mean squared distance of the answers' hidden states to `target` (over positions and features) plus `l1` times the mean gate, and its
/// gradient with respect to the gates.
pub fn loss_and_gradient(
    exec: &Exec,
    model: &Model,
    options: &DuoOptions,
    (prompt, target): (&NeedlePrompt, &[f32]),
    alpha: &[Vec<f64>],
    tape: &mut Tape,
) -> Result<(f64, Scores)> {
    let (d_model, gates) = (model.config.d_model, model.config.layers * model.config.kv_heads);
    let batch = TokenBatch::one(&prompt.tokens);
    let to_f32 = |layer: &Vec<f64>| layer.iter().map(|&alpha| alpha as f32).collect();
    let mixture =
        Gates { alpha: alpha.iter().map(to_f32).collect(), window: options.window, sinks: options.sinks };
    let hidden = model.forward_gated(exec, &batch, &mixture, tape)?;
    let mut dhidden = vec![0.0; hidden.len()];
    let mut loss = 0.0;
    let scale = 1.0 / target.len() as f64;
    for (row, target) in prompt.answers().0.into_iter().zip(target.chunks_exact(d_model)) {
        for (i, target) in (row * d_model..).zip(target) {
            let difference = f64::from(hidden[i]) - f64::from(*target);
            loss += scale * difference * difference;
            dhidden[i] += (2.0 * scale * difference) as f32;
        }
    }
    let mut gradient = model.backward_gated(exec, &batch, tape, &dhidden);
    loss += options.l1 * alpha.iter().flatten().map(|alpha| alpha.abs()).sum::<f64>() / gates as f64;
    // Gates are never negative.
    gradient.iter_mut().flatten().for_each(|g| *g += options.l1 / gates as f64);
    Ok((loss, gradient))
}

/// One step of Adam, projected back to 0..1; `values`: gates, first and second moments.
fn step(values: &mut [f64], gradient: &[f64], done: usize, options: &DuoOptions) {
    let (alpha, moments) = values.split_at_mut(gradient.len());
    let (first, second) = moments.split_at_mut(gradient.len());
    let ramp = (RAMP * options.steps as f64).max(1.0);
    let (rising, falling) = ((done + 1) as f64 / ramp, (options.steps - done) as f64 / ramp);
    let lr = options.lr * rising.min(falling).min(1.0);
    let unbias = BETAS.map(|beta| 1.0 - beta.powi(done as i32 + 1));
    for (i, g) in gradient.iter().enumerate() {
        first[i] = BETAS[0] * first[i] + (1.0 - BETAS[0]) * g;
        second[i] = BETAS[1] * second[i] + (1.0 - BETAS[1]) * g * g;
        let change = first[i] / unbias[0] / ((second[i] / unbias[1]).sqrt() + EPSILON);
        alpha[i] = (alpha[i] - lr * change).clamp(0.0, 1.0);
    }
}

/// Which prompt a step uses.
fn prompt_of_step(step: usize, prompts: usize, seed: u64) -> usize {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((step / prompts) as u64);
    let mut order: Vec<usize> = (0..prompts).collect();
    order.shuffle(&mut rng);
    order[step % prompts]
}
