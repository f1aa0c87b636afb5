//! Stages `distill` and `continue`: end-to-end training of a hybrid against its base, or on next tokens.

mod elastic;
mod lora;
mod losses;
mod state;
mod trainer;

#[cfg(test)]
mod tests;

pub use trainer::{StepReport, Trainer, check_base};

use crate::data::SequenceStream;
use crate::error::{Result, TrainError};
use crate::optim::{MomentType, Schedule};
use crate::state::{MetricsLog, save_offending_batch};
use kernels::Exec;
use model::plan::Elastic;
use model::{Model, Progress, TokenBatch};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What the loss is.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// `kl · KL(base ‖ hybrid) + ce · cross-entropy`.
    Distill {
        /// Weight of the divergence.
        kl: f32,
        /// Weight of the next-token loss.
        ce: f32,
    },
    /// Next-token loss only (the paper's).
    Continue,
}

/// Which parameters train besides the new heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trainable {
    /// New heads only.
    Heads,
    /// New heads and all norm weights.
    HeadsAndNorms,
    /// New heads, and low-rank updates of the given rank on o_proj and the MLP (merged when saved).
    Lora(usize),
    /// Everything.
    All,
}

/// Settings of [`heal`]; the defaults are the measured recipe.
#[derive(Clone, Debug)]
pub struct HealOptions {
    /// Loss.
    pub stage: Stage,
    /// What trains.
    pub trainable: Trainable,
    /// Tokens to train on.
    pub tokens: u64,
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Micro-batches per optimiser step.
    pub accumulate: usize,
    /// Peak learning rate of the new heads.
    pub lr: f32,
    /// Multiplier for their q, k, v projections.
    pub projection_lr_scale: f32,
    /// Multiplier for base weights, norms and LoRA.
    pub base_lr_scale: f32,
    /// AdamW (β₁, β₂).
    pub betas: (f32, f32),
    /// AdamW weight decay, of every trained tensor.
    pub weight_decay: f32,
    /// Linear warm-up steps.
    pub warmup: u64,
    /// Final learning rate as a share of the peak (cosine).
    pub final_lr: f32,
    /// Global gradient clip (0: none).
    pub clip: f32,
    /// Shares of KV groups to train for, one per step in rounds of shuffled order; none: the hybrid's own plan in every step.
    pub elastic: Vec<f64>,
    /// Seed of the LoRA initialisation and of the order of `elastic`.
    pub seed: u64,
    /// Of this many layers keep the input only and run them forward again in the backward pass ([`model::Tape::checkpointed`]): the same bits in
    /// less memory and more time. More than there are: of all.
    pub checkpointed_layers: usize,
    /// Update every parameter as soon as its gradient is complete and use that gradient's memory again: the same bits as without, for the memory
    /// of one layer's gradients (and the embedding's) instead of all. Needs `clip` 0, `accumulate` 1 and no low-rank updates.
    pub optimizer_in_backward: bool,
    /// What AdamW's moments are kept in, but for those of low-rank updates, which are small and in f32.
    pub moments: MomentType,
    /// Folder of the training state and `metrics.jsonl`; made when missing.
    pub state_dir: PathBuf,
    /// Seconds between states on disk.
    pub save_every_s: u64,
    /// Steps between states on disk, besides `save_every_s`.
    pub save_every_steps: Option<u64>,
    /// Continue from `state_dir`; without a state there, start at the beginning. Only the learning rate may differ from the
    /// interrupted run.
    pub resume: bool,
}

impl HealOptions {
    /// The scale of the copied projections' learning rate beside a window of this size, smaller where the window reads them too: its part of
    /// the head is the base's as long as they do not change.
    pub fn projection_lr_scale_beside(window: usize) -> f32 {
        if window > 0 { 0.03 } else { 0.3 }
    }

    /// The clip unless something else is asked for: none where updates in the backward pass leave no norm to clip by.
    pub fn default_clip(optimizer_in_backward: bool) -> f32 {
        if optimizer_in_backward { 0.0 } else { 1.0 }
    }
}

impl Default for HealOptions {
    fn default() -> Self {
        Self {
            stage: Stage::Distill { kl: 1.0, ce: 0.0 },
            trainable: Trainable::Heads,
            tokens: 50_000,
            batch: 2,
            accumulate: 1,
            lr: 2e-3,
            projection_lr_scale: Self::projection_lr_scale_beside(1),
            base_lr_scale: 0.05,
            betas: (0.9, 0.95),
            weight_decay: 0.0,
            warmup: 10,
            final_lr: 0.1,
            clip: Self::default_clip(false),
            elastic: Vec::new(),
            seed: 0,
            checkpointed_layers: 0,
            optimizer_in_backward: false,
            moments: MomentType::F32,
            state_dir: PathBuf::new(),
            save_every_s: 120,
            save_every_steps: None,
            resume: false,
        }
    }
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct HealMetric {
    /// Optimiser step, from 1.
    pub step: u64,
    /// Tokens so far.
    pub tokens: u64,
    /// Total loss.
    pub loss: f64,
    /// KL per token (distill).
    pub kl: Option<f64>,
    /// Next-token loss.
    pub ce: f64,
    /// Learning rate of the new heads.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// The budget that the step trained for, in an elastic run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Tokens per second.
    pub tokens_per_s: f64,
}

/// Trains `hybrid` in place (copying what it shares with `base`, which only [`Stage::Distill`] needs) and returns the metrics, those before an interruption included. Killed at
/// any moment and resumed with the hybrid it started from, it ends with the same bits as an uninterrupted run. At the end the hybrid's plan is marked
/// with the betas that the run trained for, or unmarked when that was the plan's only.
///
/// # Errors
/// [`TrainError::Argument`] when nothing would train, base and hybrid do not fit, or a setting differs from the resumed run's;
/// [`TrainError::Model`] for a budget that the hybrid's plan cannot be trained for;
/// [`TrainError::NonFinite`] with the batch in `nonfinite.json` and the state before it saved (`hybrid` holds it as well), or, when updates were
/// made in the backward pass, with the last state that was saved kept;
/// [`TrainError::Interrupted`] with the state saved; whatever the disk refuses.
pub fn heal(
    exec: &Exec,
    base: Option<&Model>,
    hybrid: &mut Model,
    data: &mut SequenceStream,
    options: &HealOptions,
    progress: &mut dyn Progress,
) -> Result<Vec<HealMetric>> {
    let mut run = Run::start(exec, base, hybrid, data, options, progress)?;
    run.train(hybrid, data, progress)?;
    hybrid.plan.elastic =
        (!options.elastic.is_empty()).then(|| Elastic { betas: elastic::sorted(&options.elastic) });
    Ok(run.metrics)
}

struct Run<'a> {
    options: &'a HealOptions,
    trainer: Trainer<'a>,
    total: u64,
    settings: serde_json::Value,
    log: MetricsLog,
    metrics: Vec<HealMetric>,
    saved_at: Instant,
}

impl<'a> Run<'a> {
    fn start(
        exec: &'a Exec,
        base: Option<&'a Model>,
        hybrid: &mut Model,
        data: &mut SequenceStream,
        options: &'a HealOptions,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        if options.batch == 0 || options.accumulate == 0 {
            return Err(TrainError::Argument("batch and accumulate must be at least 1".into()));
        }
        let settings = state::settings(exec, hybrid, data, options);
        let mut trainer = Trainer::new(exec, base, hybrid, options)?;
        state::restore(&mut trainer, hybrid, data, options, &settings, progress)?;
        let dir = &options.state_dir;
        std::fs::create_dir_all(dir)
            .map_err(|e| TrainError::File { path: dir.clone(), reason: e.to_string() })?;
        let (log, kept) = MetricsLog::open(&dir.join("metrics.jsonl"), trainer.steps())?;
        let metrics = kept.into_iter().filter_map(|line| serde_json::from_value(line).ok()).collect();
        let per_step = (options.batch * options.accumulate * data.seq_len()) as u64;
        let total = options.tokens.div_ceil(per_step);
        Ok(Self { options, trainer, total, settings, log, metrics, saved_at: Instant::now() })
    }

    fn train(
        &mut self,
        hybrid: &mut Model,
        data: &mut SequenceStream,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let options = self.options;
        let schedule = Schedule { warmup: options.warmup, total: self.total, final_share: options.final_lr };
        let per_step = (options.batch * options.accumulate * data.seq_len()) as u64;
        progress.start("heal", self.total * per_step, "tokens");
        progress.resumed(self.trainer.steps() * per_step);
        while self.trainer.steps() < self.total {
            if progress.cancelled() {
                self.save(hybrid, data.position())?;
                return Err(TrainError::Interrupted);
            }
            let (began, position) = (Instant::now(), data.position());
            let step = self.trainer.steps() + 1;
            let batches: Vec<TokenBatch> =
                (0..options.accumulate).map(|_| data.next_batch(options.batch)).collect();
            let lr = f64::from(options.lr) * schedule.factor(step);
            let report = match self.trainer.step(hybrid, &batches, lr as f32) {
                Ok(report) => report,
                Err(error) => {
                    if matches!(error, TrainError::NonFinite { .. }) {
                        let sequences: Vec<&[u32]> = batches.iter().flat_map(TokenBatch::iter).collect();
                        save_offending_batch(&options.state_dir.join("nonfinite.json"), step, &sequences)?;
                        // Updates in the backward pass may have been made in part.
                        if !options.optimizer_in_backward {
                            self.save(hybrid, position)?;
                        }
                    }
                    return Err(error);
                }
            };
            let metric = HealMetric {
                step,
                tokens: step * per_step,
                loss: report.loss,
                kl: report.kl,
                ce: report.ce,
                lr,
                grad_norm: report.grad_norm,
                beta: report.beta,
                tokens_per_s: per_step as f64 / began.elapsed().as_secs_f64(),
            };
            self.log.push(&metric)?;
            let kl = metric.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}"));
            let beta = metric.beta.map_or(String::new(), |beta| format!(", beta {beta}"));
            progress.advance(per_step, &format!("loss {:.4}{kl}{beta}", metric.loss));
            self.metrics.push(metric);
            let by_steps = options.save_every_steps.is_some_and(|n| n > 0 && step.is_multiple_of(n));
            let by_time = self.saved_at.elapsed() >= Duration::from_secs(options.save_every_s);
            if by_steps || by_time || step == self.total {
                self.save(hybrid, data.position())?;
            }
        }
        progress.finish();
        progress.note(&data.drawn_note());
        Ok(())
    }

    fn save(&mut self, hybrid: &Model, position: u64) -> Result<()> {
        state::save(&self.trainer, hybrid, position, self.options, &self.settings)?;
        self.saved_at = Instant::now();
        Ok(())
    }
}
