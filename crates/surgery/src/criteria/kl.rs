//! `kl`: the KL divergence that windowing one group causes, measured: the model is run with each group windowed in turn.

use super::state::Saved;
use super::window::{SINKS, WINDOW, window_delta};
use super::{Cost, Criterion, Inputs, Measured, Measurement, Scores, Source, by_layer};
use crate::error::{Result, SurgeryError};
use crate::stats::check_sequences;
use kernels::loss::kl_divergence;
use kernels::{Exec, MatRef};
use model::observe::AttnView;
use model::{LayerObserver, Model, Progress, TokenBatch, Trace};

/// Rows of logits that exist at once, for the base and for one windowed model.
const LOGIT_ROWS: usize = 128;

pub const CRITERION: Criterion = Criterion {
    name: "kl",
    about: "minus the KL per token from the base to the model in which only this group is windowed (64 tokens and the sink)",
    cost: Cost::ForwardPerGroup,
    measured: Some(Measured { seconds: 340.0, of: "3,072 tokens" }),
    reference: "this project",
    source: Source::Groups(measure),
};

fn measure(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Measurement> {
    let mut kl = window_kl(inputs, WINDOW, progress)?;
    kl.iter_mut().flatten().for_each(|kl| *kl = -*kl);
    Ok(kl.into())
}

/// KL(base ‖ base with one group windowed) per token, `[layer][group]`. Layers below the group's are not run again; the parts that survive an
/// interruption are (sequence, layer).
pub fn window_kl(inputs: &Inputs<'_>, window: usize, progress: &mut dyn Progress) -> Result<Scores> {
    let Inputs { exec, model, sequences, .. } = *inputs;
    check_sequences(model, sequences)?;
    let (layers, groups) = (model.config.layers, model.config.kv_heads);
    let parts = sequences.len() * layers;
    let settings = format!("window {window}, sinks {SINKS}");
    let mut saved = Saved::open(inputs, "kl", &settings, parts, vec![0.0; layers * groups])?;
    progress.start("kl", (parts * groups) as u64, "groups");
    progress.resumed((saved.done * groups) as u64);
    while saved.done < parts {
        let batch = TokenBatch::one(&sequences[saved.done / layers]);
        let mut windowed = Windowed { exec, model, window, deltas: Vec::new() };
        let trace = model.forward_trace(exec, &batch, &mut windowed)?;
        for layer in saved.done % layers..layers {
            if progress.cancelled() {
                return Err(SurgeryError::Interrupted);
            }
            let kl = layer_kl(exec, model, &batch, &trace, (layer, &windowed.deltas[layer]));
            for (sum, kl) in saved.values[layer * groups..].iter_mut().zip(&kl) {
                *sum += kl;
            }
            saved.advance(1)?;
            progress.advance(groups as u64, &format!("layer {layer}"));
        }
    }
    progress.finish();
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    Ok(by_layer(&saved.values, groups, |sum| sum / tokens as f64))
}

/// Σ_t KL of every group of a layer; `delta` `[T, heads · head_dim]`: windowed minus full head outputs.
fn layer_kl(
    exec: &Exec,
    model: &Model,
    batch: &TokenBatch,
    trace: &Trace,
    (layer, delta): (usize, &[f32]),
) -> Vec<f64> {
    let (groups, d_model, vocab) = (model.config.kv_heads, model.config.d_model, model.config.vocab);
    let width = model.config.heads * model.config.head_dim;
    let delta = MatRef::dense(delta, batch.rows(), width);
    let columns = width / groups;
    let changed: Vec<Vec<f32>> = (0..groups)
        .map(|group| {
            let (first, delta) = (group * columns, delta.columns(group * columns, columns));
            model.forward_from(exec, batch, trace, layer, first..first + columns, delta)
        })
        .collect();
    let mut sums = vec![0.0; groups];
    let (mut base, mut logits) = (Vec::new(), Vec::new());
    for (chunk, hidden) in trace.hidden.chunks(LOGIT_ROWS * d_model).enumerate() {
        model.logits_into(exec, hidden, None, &mut base);
        let start = chunk * LOGIT_ROWS * d_model;
        let mut kl = vec![0.0; hidden.len() / d_model];
        for (changed, sum) in changed.iter().zip(&mut sums) {
            let changed = &changed[start..start + hidden.len()];
            // Rows that windowing did not reach have the same bits.
            if changed == hidden {
                continue;
            }
            model.logits_into(exec, changed, None, &mut logits);
            kl_divergence(exec, &base, &logits, vocab, 1.0, &mut kl, None);
            *sum += kl.iter().map(|&kl| f64::from(kl)).sum::<f64>();
        }
    }
    sums
}

/// Keeps windowed minus full head outputs of every layer.
struct Windowed<'a> {
    exec: &'a Exec,
    model: &'a Model,
    window: usize,
    deltas: Vec<Vec<f32>>,
}

impl LayerObserver for Windowed<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let config = &self.model.config;
        let mut delta = vec![0.0; view.q.rows() * config.heads * config.head_dim];
        window_delta(self.exec, config, self.window, &view, &mut delta);
        self.deltas.push(delta);
    }
}
