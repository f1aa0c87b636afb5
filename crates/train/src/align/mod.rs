//! Stage `align`: trains a replacement head for every KV group from the base's own layer inputs and head outputs; no backward
//! pass through the network, hidden states never leave memory.

mod group;
mod inputs;
mod state;

#[cfg(test)]
mod tests;

use crate::data::SequenceStream;
use crate::error::{Result, TrainError};
use crate::optim::Schedule;
use crate::state::{MetricsLog, save_offending_batch, with_suffix};
use group::{Aligner, Frozen, StepRates};
use kernels::Exec;
use model::plan::PlanModel;
use model::{Model, Progress, TokenBatch};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use surgery::criteria::mixer_fisher;
use surgery::{HeadBank, SurgeryError};

/// AdamW (β₁, β₂) of the measured recipe; no weight decay.
const BETAS: (f32, f32) = (0.9, 0.98);
/// Per-layer errors are noted this many times in a run.
const NOTES: u64 = 20;

/// Settings of [`align`]; the defaults are the measured recipe.
#[derive(Clone, Debug)]
pub struct AlignOptions {
    /// Tokens to train on in this run (added to what a resumed or extended bank has seen).
    pub tokens: u64,
    /// Tokens per step; at least one sequence is taken.
    pub tokens_per_step: usize,
    /// Peak learning rate.
    pub lr: f32,
    /// Multiplier for the copied q, k, v projections; at 0 they are frozen, and no gradients of theirs are computed.
    pub projection_lr_scale: f32,
    /// Linear warm-up steps.
    pub warmup: u64,
    /// Final learning rate as a share of the peak (cosine).
    pub final_lr: f32,
    /// Gradient clip per layer (0: none).
    pub clip: f32,
    /// Sequences held out to measure the error.
    pub heldout: Vec<Vec<u32>>,
    /// Sequences for `mixer-fisher`.
    pub fisher: Vec<Vec<u32>>,
    /// Where the bank goes; the training state lies beside it as `<out>.state`.
    pub out: PathBuf,
    /// Seconds between states on disk.
    pub save_every_s: u64,
    /// Steps between states on disk, besides `save_every_s`.
    pub save_every_steps: Option<u64>,
    /// Continue from `<out>.state`; without such a file, start at the beginning. Only the learning rate may differ from the
    /// interrupted run.
    pub resume: bool,
    /// JSONL metrics file, one [`AlignMetric`] per step.
    pub metrics: Option<PathBuf>,
}

impl AlignOptions {
    /// The scale of the copied projections' learning rate beside a window of this size: a window reads them too, and is exact as long as they do not
    /// change; a head without one has nothing to lose.
    pub fn projection_lr_scale_beside(window: usize) -> f32 {
        if window > 0 { 0.05 } else { 0.5 }
    }
}

impl Default for AlignOptions {
    fn default() -> Self {
        Self {
            tokens: 200_000,
            tokens_per_step: 1024,
            lr: 8e-3,
            projection_lr_scale: Self::projection_lr_scale_beside(1),
            warmup: 10,
            final_lr: 0.05,
            clip: 1.0,
            heldout: Vec::new(),
            fisher: Vec::new(),
            out: PathBuf::new(),
            save_every_s: 120,
            save_every_steps: None,
            resume: false,
            metrics: None,
        }
    }
}

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlignMetric {
    /// Step of this run, from 1.
    pub step: u64,
    /// Tokens of this run so far.
    pub tokens: u64,
    /// Mean relative error ‖W_O(ô−o)‖²/‖W_O o‖² of all groups on this step's batch.
    pub error: f64,
    /// The same per layer.
    pub layers: Vec<f64>,
    /// Gradient norm per layer before clipping.
    pub grad_norms: Vec<f64>,
    /// Learning rate of new tensors.
    pub lr: f64,
    /// Tokens per second of this step.
    pub tokens_per_s: f64,
}

/// Trains `bank` (fresh from [`surgery::bank::init_bank`], or read for extension), measures held-out errors and `mixer-fisher`, writes it, and
/// returns it. Killed at any moment and resumed, it ends with the same bits as an uninterrupted run.
///
/// Loss of a group g: `Σ_t ‖W_O,g(ô−o)‖² / Σ_t ‖W_O,g o‖²`, summed over groups; layers are independent and clipped one by one. Of a fresh bank
/// the gains are first fitted by least squares on the longest sequence of the first batch. When the bank of a finished run is given again (not `resume`), its
/// moments and data position are taken from `<out>.state` if that file belongs to it; the schedule starts anew.
///
/// # Errors
/// [`TrainError::Argument`] when `base` is already a hybrid, `bank` is for another model, a setting is out of range or differs from the resumed
/// run's; [`TrainError::NonFinite`] with the batch in `<out>.nonfinite.json` and the state before it in `<out>.state`;
/// [`TrainError::Interrupted`] with the state saved; whatever the disk refuses.
pub fn align(
    exec: &Exec,
    base: &Model,
    bank: HeadBank,
    data: &mut SequenceStream,
    options: &AlignOptions,
    progress: &mut dyn Progress,
) -> Result<HeadBank> {
    check(base, &bank, options)?;
    let mut run = Run::start(exec, base, bank, data, options, progress)?;
    run.train(data, progress)?;
    run.measure(progress)
}

fn check(base: &Model, bank: &HeadBank, options: &AlignOptions) -> Result<()> {
    if base.plan.converted() > 0 {
        return Err(TrainError::Argument("align needs the base model, this one has converted groups".into()));
    }
    let expected = PlanModel::of(&base.config);
    if bank.info.model != expected {
        return Err(TrainError::Argument(format!(
            "the bank was made for another model: it has {}, this model has {expected}\nhint: train a bank for this model",
            bank.info.model
        )));
    }
    let positive = [("lr", options.lr), ("projection_lr_scale", options.projection_lr_scale)];
    if let Some((name, value)) = positive.into_iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
        return Err(TrainError::Argument(format!("{name} is {value}, expected a number not below 0")));
    }
    Ok(())
}

/// A training run: everything that is saved, and what it works with.
struct Run<'a> {
    exec: &'a Exec,
    options: &'a AlignOptions,
    aligner: Aligner<'a>,
    /// The bank's description at the start of this run.
    info: surgery::BankInfo,
    /// Steps of this run.
    step: u64,
    total: u64,
    /// Optimiser updates in all runs, for the moments' bias correction.
    updates: u64,
    sequences: usize,
    seq_len: usize,
    /// What may not differ on resume.
    settings: serde_json::Value,
    metrics: Option<MetricsLog>,
    saved_at: Instant,
}

impl<'a> Run<'a> {
    fn start(
        exec: &'a Exec,
        base: &'a Model,
        bank: HeadBank,
        data: &mut SequenceStream,
        options: &'a AlignOptions,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let seq_len = data.seq_len();
        let sequences = (options.tokens_per_step / seq_len).max(1);
        let aligner = Aligner::new(exec, base, &bank, Frozen::at_scale(options.projection_lr_scale))?;
        let total =
            if aligner.trainable() { options.tokens.div_ceil((sequences * seq_len) as u64) } else { 0 };
        let settings = state::settings(exec, &bank, data, options);
        let info = bank.info;
        let mut run = Self {
            exec,
            options,
            aligner,
            info,
            step: 0,
            total,
            updates: 0,
            sequences,
            seq_len,
            settings,
            metrics: None,
            saved_at: Instant::now(),
        };
        run.restore(data, progress)?;
        if let Some(path) = &options.metrics {
            run.metrics = Some(MetricsLog::open(path, run.step)?.0);
        }
        Ok(run)
    }

    fn tokens_per_step(&self) -> u64 {
        (self.sequences * self.seq_len) as u64
    }

    fn train(&mut self, data: &mut SequenceStream, progress: &mut dyn Progress) -> Result<()> {
        let schedule =
            Schedule { warmup: self.options.warmup, total: self.total, final_share: self.options.final_lr };
        let per_step = self.tokens_per_step();
        progress.start("align", self.total * per_step, "tokens");
        progress.resumed(self.step * per_step);
        let note_every = self.total.div_ceil(NOTES).max(1);
        while self.step < self.total {
            if progress.cancelled() {
                self.save(data.position())?;
                return Err(TrainError::Interrupted);
            }
            let began = Instant::now();
            let position = data.position();
            let batch = data.next_batch(self.sequences);
            let lr = f64::from(self.options.lr) * schedule.factor(self.step + 1);
            let metric = match self.advance(&batch, lr as f32) {
                Ok(metric) => {
                    AlignMetric { tokens_per_s: per_step as f64 / began.elapsed().as_secs_f64(), ..metric }
                }
                Err(error) => {
                    if matches!(error, TrainError::NonFinite { .. }) {
                        let path = with_suffix(&self.options.out, ".nonfinite.json");
                        let sequences: Vec<&[u32]> = batch.iter().collect();
                        save_offending_batch(&path, self.step + 1, &sequences)?;
                        self.save(position)?;
                    }
                    return Err(error);
                }
            };
            if let Some(log) = &mut self.metrics {
                log.push(&metric)?;
            }
            progress.advance(per_step, &format!("error {:.4}", metric.error));
            if self.step.is_multiple_of(note_every) || self.step == self.total {
                progress.note(&layer_note(&metric));
            }
            let by_steps =
                self.options.save_every_steps.is_some_and(|n| n > 0 && self.step.is_multiple_of(n));
            let by_time = self.saved_at.elapsed() >= Duration::from_secs(self.options.save_every_s);
            if by_steps || by_time || self.step == self.total {
                self.save(data.position())?;
            }
        }
        progress.finish();
        progress.note(&data.drawn_note());
        Ok(())
    }

    /// One optimiser step on `batch`; nothing changes when it is not finite.
    fn advance(&mut self, batch: &TokenBatch, lr: f32) -> Result<AlignMetric> {
        let fresh = self.info.tokens == 0 && self.step == 0;
        let errors = self.aligner.accumulate(self.exec, batch, fresh)?;
        let step = self.step + 1;
        let norms = self.aligner.layer_norms();
        for (layer, (error, norm)) in errors.iter().zip(&norms).enumerate() {
            if !error.is_finite() || !norm.is_finite() {
                let what = if error.is_finite() { "gradient" } else { "loss" };
                return Err(TrainError::NonFinite { step, what: format!("the {what} of layer {layer}") });
            }
        }
        self.updates += 1;
        let rates = StepRates {
            lr,
            projection_scale: self.options.projection_lr_scale,
            betas: BETAS,
            update: self.updates,
            clip: self.options.clip,
        };
        self.aligner.update(self.exec, &norms, &rates);
        self.step = step;
        Ok(AlignMetric {
            step,
            tokens: step * self.tokens_per_step(),
            error: errors.iter().sum::<f64>() / errors.len().max(1) as f64,
            layers: errors,
            grad_norms: norms,
            lr: f64::from(lr),
            tokens_per_s: 0.0,
        })
    }

    /// Measures what was trained and writes the bank.
    fn measure(self, progress: &mut dyn Progress) -> Result<HeadBank> {
        let Self { exec, options, aligner, mut info, step, sequences, seq_len, .. } = self;
        info.tokens += step * (sequences * seq_len) as u64;
        info.heldout_error = match options.heldout.is_empty() {
            true => Vec::new(),
            false => aligner.heldout_errors(exec, &options.heldout, progress)?,
        };
        let base = aligner.base();
        let mut bank = HeadBank { info, groups: aligner.into_heads() };
        if !options.fisher.is_empty() {
            let seed = bank.info.seed;
            bank.info.mixer_fisher = mixer_fisher(exec, base, &bank, &options.fisher, seed, progress)
                .map_err(|e| match e {
                    SurgeryError::Interrupted => TrainError::Interrupted,
                    other => other.into(),
                })?;
            bank.info.fisher_tokens = options.fisher.iter().map(Vec::len).sum();
        }
        bank.write(&options.out, &base.config)?;
        Ok(bank)
    }
}

/// Steps without files or schedule, to be timed.
pub(crate) struct Timed<'a> {
    aligner: Aligner<'a>,
    updates: u64,
    projection_scale: f32,
}

impl<'a> Timed<'a> {
    /// Starts from the heads of `bank`; `projection_scale` as in [`AlignOptions`].
    pub fn new(exec: &Exec, base: &'a Model, bank: &HeadBank, projection_scale: f32) -> Result<Self> {
        let aligner = Aligner::new(exec, base, bank, Frozen::at_scale(projection_scale))?;
        Ok(Self { aligner, updates: 0, projection_scale })
    }

    /// One optimiser step on `batch`.
    pub fn step(&mut self, exec: &Exec, batch: &TokenBatch, lr: f32) -> Result<()> {
        self.aligner.accumulate(exec, batch, false)?;
        self.updates += 1;
        let Self { projection_scale, updates: update, .. } = *self;
        let clip = AlignOptions::default().clip;
        let rates = StepRates { lr, projection_scale, betas: BETAS, update, clip };
        let norms = self.aligner.layer_norms();
        self.aligner.update(exec, &norms, &rates);
        Ok(())
    }
}

/// Relative error of every group of `bank` on `sequences`, `[layer][group]`: `Σ_t ‖W_O,g(ô−o)‖² / Σ_t ‖W_O,g o‖²`.
///
/// # Errors
/// [`TrainError::Model`] for tokens the base refuses; [`TrainError::Interrupted`].
pub fn heldout_errors(
    exec: &Exec,
    base: &Model,
    bank: &HeadBank,
    sequences: &[Vec<u32>],
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<f64>>> {
    Aligner::new(exec, base, bank, Frozen::Everything)?.heldout_errors(exec, sequences, progress)
}

fn layer_note(metric: &AlignMetric) -> String {
    let layers: Vec<String> = metric.layers.iter().map(|e| format!("{e:.3}")).collect();
    format!("step {} error {:.4}, by layer: {}", metric.step, metric.error, layers.join(" "))
}
