//! Losses of micro-batches and their gradient at the final hidden states. Knows logits and labels; knows nothing of updates.

use super::{Stage, StepReport};
use crate::error::{Result, TrainError};
use crate::teacher::teacher;
use kernels::linear::RoundedWeight;
use kernels::loss::{IGNORED, cross_entropy, cross_entropy_in_place, kl_divergence};
use kernels::{Exec, Store};
use model::{Engine, Grads, Model, NoObserver, Tape, TokenBatch};

/// Rows of logits in memory at once.
const LOGIT_ROWS: usize = 256;

/// What a run's losses are computed with.
pub(super) struct Losses {
    stage: Stage,
    /// The base, when it teaches.
    teacher: Option<Engine>,
    logits: LogitBuffers,
    /// The output projection, once it was rounded; nothing in f32.
    output: Option<RoundedWeight>,
    /// Whether `output` is of the present weights.
    output_is_current: bool,
}

/// Of [`LOGIT_ROWS`] rows, reused from chunk to chunk.
#[derive(Default)]
struct LogitBuffers {
    own: Vec<f32>,
    teacher: Vec<f32>,
    /// Unused without a teacher: the logits' memory serves for both.
    gradient: Vec<f32>,
    /// Losses.
    values: Vec<f32>,
}

/// Positions of a step, over which losses are means.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    rows: usize,
    /// Those with a next token.
    targets: usize,
}

impl Counts {
    pub fn of(batches: &[TokenBatch]) -> Self {
        let sequences = batches.iter().flat_map(TokenBatch::iter);
        Self {
            rows: batches.iter().map(TokenBatch::rows).sum(),
            targets: sequences.map(|s| s.len().saturating_sub(1)).sum(),
        }
    }
}

/// Sums over positions.
#[derive(Clone, Copy, Default)]
pub(super) struct LossSums {
    kl: f64,
    ce: f64,
}

impl Losses {
    /// # Errors
    /// [`TrainError::Argument`] for [`Stage::Distill`] without a base.
    pub fn new(exec: &Exec, stage: Stage, base: Option<&Model>) -> Result<Self> {
        let teacher = match (stage, base) {
            (Stage::Distill { .. }, Some(base)) => Some(teacher(exec, base)?),
            (Stage::Distill { .. }, None) => {
                return Err(TrainError::Argument("distillation needs the base".into()));
            }
            (Stage::Continue, _) => None,
        };
        Ok(Self { stage, teacher, logits: LogitBuffers::default(), output: None, output_is_current: false })
    }

    /// To be told when the hybrid's output projection is about to differ from what the last pass saw.
    pub fn output_changes(&mut self) {
        self.output_is_current = false;
    }

    /// Forward pass of one micro-batch of a step of `counts`, and as far back as the final hidden states, whose gradient it returns. Adds its
    /// losses to `sums`.
    pub fn backpropagate(
        &mut self,
        exec: &Exec,
        hybrid: &Model,
        batch: &TokenBatch,
        counts: Counts,
        (tape, grads): (&mut Tape, &mut Grads),
        sums: &mut LossSums,
    ) -> Result<Vec<f32>> {
        let (vocab, d_model) = (hybrid.config.vocab, hybrid.config.d_model);
        let teacher = match &self.teacher {
            Some(engine) => Some((engine, engine.observe(exec, batch, &mut |_, _, _| {})?)),
            None => None,
        };
        let (rows, targets) = (counts.rows.max(1) as f32, counts.targets.max(1) as f32);
        let (kl_weight, ce_weight) = match self.stage {
            Stage::Distill { kl, ce } => (kl / rows, ce / targets),
            Stage::Continue => (0.0, 1.0 / targets),
        };
        let hidden = hybrid.forward_batch(exec, batch, &mut NoObserver, Some(tape))?;
        let labels = next_tokens(batch);
        if !std::mem::replace(&mut self.output_is_current, true) {
            match &mut self.output {
                Some(rounded) => rounded.set(exec, hybrid.output_weight()),
                None => self.output = RoundedWeight::new(exec, hybrid.output_weight()),
            }
        }
        let output = self.output.as_ref();
        let mut dhidden = Vec::with_capacity(hidden.len());
        let LogitBuffers { own: logits, teacher: wanted, gradient: dlogits, values } = &mut self.logits;
        for (chunk, labels) in labels.chunks(LOGIT_ROWS).enumerate() {
            let range = chunk * LOGIT_ROWS * d_model..(chunk * LOGIT_ROWS + labels.len()) * d_model;
            let h = &hidden[range.clone()];
            hybrid.logits_into(exec, h, output, logits);
            values.resize(labels.len(), 0.0);
            let gradient = match &teacher {
                None => {
                    cross_entropy_in_place(exec, logits, vocab, labels, ce_weight, values);
                    sums.ce += sum(values);
                    &*logits
                }
                Some((engine, hidden)) => {
                    dlogits.resize(logits.len(), 0.0);
                    let (to, store) = match ce_weight != 0.0 {
                        true => (Some(dlogits.as_mut_slice()), Store::Accumulate),
                        false => (None, Store::Overwrite),
                    };
                    cross_entropy(exec, logits, vocab, labels, ce_weight, values, to);
                    sums.ce += sum(values);
                    engine.logits_into(exec, &hidden[range], wanted);
                    kl_divergence(exec, wanted, logits, vocab, kl_weight, values, Some((dlogits, store)));
                    sums.kl += sum(values);
                    &*dlogits
                }
            };
            dhidden.extend(hybrid.logits_backward(exec, h, gradient, output, grads));
        }
        Ok(dhidden)
    }

    /// What a step with these losses and this norm reports.
    pub fn report(&self, sums: LossSums, counts: Counts, grad_norm: f64) -> StepReport {
        let ce = sums.ce / counts.targets.max(1) as f64;
        let (loss, kl) = match self.stage {
            Stage::Continue => (ce, None),
            Stage::Distill { kl: kl_weight, ce: ce_weight } => {
                let kl = sums.kl / counts.rows.max(1) as f64;
                (f64::from(kl_weight) * kl + f64::from(ce_weight) * ce, Some(kl))
            }
        };
        StepReport { loss, kl, ce, grad_norm, beta: None }
    }
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum()
}

/// The token each position predicts; the last of a sequence predicts none.
pub(super) fn next_tokens(batch: &TokenBatch) -> Vec<u32> {
    let sequences = batch.iter().filter(|sequence| !sequence.is_empty());
    sequences.flat_map(|sequence| sequence[1..].iter().copied().chain(std::iter::once(IGNORED))).collect()
}
