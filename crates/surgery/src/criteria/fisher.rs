//! First-order cost of replacing a group's head outputs: `F_g = (1/2T) E Σ_t (γ_t · Δ_t)²` with γ the gradient of the summed negative
//! log-likelihood of labels drawn from the base's own softmax. To second order this is the KL divergence per token.

use crate::error::{Result, SurgeryError};
use crate::exp::exp_nonpositive;
use crate::stats::check_sequences;
use kernels::{Exec, MatRef};
use model::observe::AttnView;
use model::{GradObserver, Grads, LayerObserver, Model, Progress, Tape, TokenBatch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 256;

/// Overwrites the second argument `[T, heads · head_dim]` with Δ, replacement minus original head outputs, of the viewed layer.
pub type Delta<'a> = dyn FnMut(&AttnView<'_>, &mut [f32]) + 'a;

/// F_g `[layer][group]` over `sequences`: per sequence one forward and one backward pass and one draw of labels.
///
/// # Errors
/// [`SurgeryError::Argument`] for a hybrid model or no sequences; [`SurgeryError::Model`]; [`SurgeryError::Interrupted`].
pub fn fisher(
    exec: &Exec,
    model: &Model,
    sequences: &[Vec<u32>],
    seed: u64,
    label: &str,
    delta: &mut Delta<'_>,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<f64>>> {
    check_sequences(model, sequences)?;
    let config = &model.config;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sums = vec![vec![0.0; config.kv_heads]; config.layers];
    progress.start(label, tokens as u64, "tokens");
    for sequence in sequences {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        let batch = TokenBatch::one(sequence);
        let mut tape = Tape::default();
        let mut deltas =
            Deltas { delta, width: config.heads * config.head_dim, layers: vec![Vec::new(); config.layers] };
        let hidden = model.forward_batch(exec, &batch, &mut deltas, Some(&mut tape))?;
        let mut grads = Grads::zeros(&model.params, &[]);
        let dhidden = sampled_gradient(exec, model, &hidden, &mut rng, &mut grads);
        let mut costs = Costs { deltas: &deltas.layers, sums: &mut sums };
        model.backward(exec, &batch, &tape, &dhidden, &mut grads, &mut costs, true);
        progress.advance(sequence.len() as u64, "");
    }
    progress.finish();
    let factor = 0.5 / tokens as f64;
    sums.iter_mut().flatten().for_each(|sum| *sum *= factor);
    Ok(sums)
}

/// Gradient of the summed NLL with respect to the final hidden states, labels drawn from the softmax; the logits exist in chunks only.
fn sampled_gradient(
    exec: &Exec,
    model: &Model,
    hidden: &[f32],
    rng: &mut ChaCha8Rng,
    grads: &mut Grads,
) -> Vec<f32> {
    let (d_model, vocab) = (model.config.d_model, model.config.vocab);
    let mut dhidden = Vec::with_capacity(hidden.len());
    for chunk in hidden.chunks(LOGIT_ROWS * d_model) {
        let mut logits = model.logits(exec, chunk);
        let draws: Vec<f64> = (0..chunk.len() / d_model).map(|_| rng.random()).collect();
        exec.parallel_chunks(&mut logits, vocab, |row, logits| {
            sample_softmax(logits, draws[row]);
        });
        dhidden.extend(model.logits_backward(exec, chunk, &logits, None, grads));
    }
    dhidden
}

/// Draws a label from the softmax of `logits` (`draw` uniform in 0..1) and overwrites them with the NLL's gradient, softmax − onehot.
/// Returns the label.
pub fn sample_softmax(logits: &mut [f32], draw: f64) -> usize {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in logits.iter_mut() {
        *x = exp_nonpositive(*x - max);
    }
    let total: f64 = logits.iter().map(|&e| f64::from(e)).sum();
    let (mut rest, mut label) = (draw * total, logits.len() - 1);
    for (i, &e) in logits.iter().enumerate() {
        rest -= f64::from(e);
        if rest < 0.0 {
            label = i;
            break;
        }
    }
    let scale = (1.0 / total) as f32;
    logits.iter_mut().for_each(|e| *e *= scale);
    logits[label] -= 1.0;
    label
}

struct Deltas<'a, 'b> {
    delta: &'a mut Delta<'b>,
    width: usize,
    layers: Vec<Vec<f32>>,
}

impl LayerObserver for Deltas<'_, '_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let mut out = vec![0.0; view.out.rows() * self.width];
        (self.delta)(&view, &mut out);
        self.layers[view.layer] = out;
    }
}

struct Costs<'a> {
    /// `[T, heads · head_dim]` by layer.
    deltas: &'a [Vec<f32>],
    /// Σ_t (γ_t · Δ_t)² by layer and group.
    sums: &'a mut [Vec<f64>],
}

impl GradObserver for Costs<'_> {
    fn head_outputs(&mut self, layer: usize, _sequence: usize, grad: MatRef<'_>) {
        let groups = self.sums[layer].len();
        let group_width = grad.cols() / groups;
        for (t, delta) in self.deltas[layer].chunks_exact(grad.cols()).enumerate() {
            let parts = grad.row(t).chunks_exact(group_width).zip(delta.chunks_exact(group_width));
            for (sum, (grad, delta)) in self.sums[layer].iter_mut().zip(parts) {
                let dot = kernels::elementwise::dot(grad, delta);
                *sum += dot * dot;
            }
        }
    }
}
