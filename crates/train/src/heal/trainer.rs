//! One optimiser step of end-to-end training: losses, gradients, clipping, update. Knows batches; knows nothing of files or schedules.

use super::elastic::Budgets;
use super::lora::{Factors, TARGETS};
use super::{HealOptions, Stage, Trainable};
use crate::error::{Result, TrainError};
use crate::optim::{AnyMoments, MomentType, Moments, StepRule, clip_scale, sum_of_squares};
use crate::teacher::teacher;
use kernels::linear::RoundedWeight;
use kernels::loss::{cross_entropy, kl_divergence};
use kernels::{Exec, Store};
use model::mixers::TensorClass;
use model::plan::PlanModel;
use model::{Engine, Grads, Model, NoObserver, ParamId, ParamStore, Tape, TokenBatch};
use std::collections::HashSet;

/// Rows of logits in memory at once.
const LOGIT_ROWS: usize = 256;
/// A target that counts for no loss.
const IGNORED: u32 = u32::MAX;

/// What an optimiser step computed, means over its tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Total loss.
    pub loss: f64,
    /// KL(base ‖ hybrid), when distilling.
    pub kl: Option<f64>,
    /// Next-token loss.
    pub ce: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// The budget that the step trained for, in an elastic run.
    pub beta: Option<f64>,
}

/// A parameter that trains as it is.
pub(super) struct Full {
    pub id: ParamId,
    pub lr_scale: f32,
    pub moments: AnyMoments,
    /// Layer and group of a new head's tensor.
    group: Option<(usize, usize)>,
    /// Updates so far: the steps in which its group, if any, was recurrent.
    updates: u64,
}

/// A parameter that trains through a low-rank update.
pub(super) struct LowRank {
    pub id: ParamId,
    pub factors: Factors,
    grads: Factors,
    pub moments_a: Moments,
    pub moments_b: Moments,
}

/// Optimiser state and buffers of a hybrid in training. The hybrid itself is passed to every step and must be the same.
pub struct Trainer<'a> {
    exec: &'a Exec,
    /// The base, when it teaches.
    teacher: Option<Engine>,
    stage: Stage,
    betas: (f32, f32),
    weight_decay: f32,
    clip: f32,
    base_lr_scale: f32,
    steps: u64,
    /// The budgets of an elastic run.
    budgets: Option<Budgets>,
    pub(super) full: Vec<Full>,
    pub(super) low_rank: Vec<LowRank>,
    /// W₀ of the low-rank updates, shared with whoever else holds it; nothing without them, since holding it keeps a copy of what trains.
    original: ParamStore,
    grads: Grads,
    tape: Tape,
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
    gradient: Vec<f32>,
    /// Losses.
    values: Vec<f32>,
}

impl<'a> Trainer<'a> {
    /// Prepares to train what `options.trainable` says; uses its loss, optimiser and seed settings only.
    ///
    /// # Errors
    /// [`TrainError::Argument`] when nothing would train, or `base` is not a model the hybrid could be made of;
    /// [`TrainError::Model`] for betas of an elastic run that the hybrid's plan cannot be run at or that leave some of its heads untrained.
    pub fn new(exec: &'a Exec, base: &Model, hybrid: &Model, options: &HealOptions) -> Result<Self> {
        let (ours, theirs) = (PlanModel::of(&hybrid.config), PlanModel::of(&base.config));
        if ours != theirs || hybrid.config.vocab != base.config.vocab {
            return Err(TrainError::Argument(format!(
                "the hybrid was not made of this base: expected {ours} and a vocabulary of {}, found {theirs} and {}\n\
                 hint: give the model that was converted",
                hybrid.config.vocab, base.config.vocab
            )));
        }
        let mut full = head_params(hybrid, options.projection_lr_scale, options.moments);
        let heads: HashSet<ParamId> = full.iter().map(|f| f.id).collect();
        let others = hybrid.params.iter().filter(|(id, _)| !heads.contains(id));
        let base_param = |id, len| Full::new(id, len, options.base_lr_scale, options.moments);
        let mut low_rank = Vec::new();
        match options.trainable {
            Trainable::Heads => {}
            Trainable::HeadsAndNorms => {
                let norms = others.filter(|(_, p)| p.name.ends_with("norm.weight"));
                full.extend(norms.map(|(id, p)| base_param(id, p.data().len())));
            }
            Trainable::All => full.extend(others.map(|(id, p)| base_param(id, p.data().len()))),
            Trainable::Lora(0) => return Err(TrainError::Argument("a LoRA rank is at least 1".into())),
            Trainable::Lora(rank) => {
                for (id, param) in others.filter(|(_, p)| TARGETS.iter().any(|t| p.name.ends_with(t))) {
                    let [rows, cols] = param.shape[..] else { continue };
                    let factors = Factors::init(rank, rows, cols, options.seed, low_rank.len() as u64);
                    low_rank.push(LowRank::new(id, factors));
                }
            }
        }
        if full.is_empty() && low_rank.is_empty() {
            return Err(TrainError::Argument(
                "nothing to train: the model has no new heads with weights\nhint: train norms, LoRA or everything".into(),
            ));
        }
        let budgets = Budgets::new(hybrid, &options.elastic, options.seed)?;
        if options.trainable == Trainable::Heads
            && let Some(budgets) = &budgets
        {
            budgets.check_heads()?;
        }
        let ids: Vec<ParamId> = full.iter().map(|f| f.id).chain(low_rank.iter().map(|l| l.id)).collect();
        Ok(Self {
            exec,
            teacher: match options.stage {
                Stage::Distill { .. } => Some(teacher(exec, base)?),
                Stage::Continue => None,
            },
            stage: options.stage,
            betas: options.betas,
            weight_decay: options.weight_decay,
            clip: options.clip,
            base_lr_scale: options.base_lr_scale,
            steps: 0,
            budgets,
            original: if low_rank.is_empty() { ParamStore::default() } else { hybrid.params.clone() },
            full,
            low_rank,
            grads: Grads::zeros(&hybrid.params, &ids),
            tape: if options.checkpoint_activations { Tape::checkpointed() } else { Tape::default() },
            logits: LogitBuffers::default(),
            output: None,
            output_is_current: false,
        })
    }

    /// Optimiser steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes up the count of a saved run, whose tensors the caller has put in place.
    pub(super) fn resume_at(&mut self, hybrid: &mut Model, steps: u64) {
        self.steps = steps;
        for full in &mut self.full {
            full.updates = match (&self.budgets, full.group) {
                (Some(budgets), Some(group)) => budgets.turns(steps, group),
                _ => steps,
            };
        }
        self.merge(hybrid);
    }

    /// One step on the mean loss of `batches` (gradients accumulate over them) with learning rate `lr` for new heads. In an elastic run the
    /// hybrid computes under the plan of the step's beta, and heads of groups that this plan keeps do not change, nor do their moments.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`], then `hybrid` is unchanged; [`TrainError::Model`] for tokens the model refuses.
    pub fn step(&mut self, hybrid: &mut Model, batches: &[TokenBatch], lr: f32) -> Result<StepReport> {
        let step = self.steps + 1;
        let swap = |budgets: &mut Option<Budgets>, hybrid: &mut Model| {
            budgets.iter_mut().for_each(|budgets| budgets.swap(hybrid, step));
        };
        swap(&mut self.budgets, hybrid);
        let report = self.accumulate(hybrid, batches);
        swap(&mut self.budgets, hybrid);
        let report = StepReport { beta: self.budgets.as_ref().map(|b| b.beta(step)), ..report? };
        for (what, value) in [("the loss", report.loss), ("the gradient norm", report.grad_norm)] {
            if !value.is_finite() {
                return Err(TrainError::NonFinite { step, what: what.into() });
            }
        }
        self.steps = step;
        let rule = StepRule {
            betas: self.betas,
            weight_decay: self.weight_decay,
            step,
            grad_scale: clip_scale(report.grad_norm, self.clip),
        };
        let plan = self.budgets.as_ref().map(|budgets| budgets.plan(step));
        for Full { id, lr_scale, moments, group, updates } in &mut self.full {
            let active = match (plan, *group) {
                (Some(plan), Some((layer, group))) => plan.is_converted(layer, group),
                _ => true,
            };
            if let Some(grad) = self.grads.get(*id).filter(|_| active) {
                *updates += 1;
                let rule = StepRule { step: *updates, ..rule };
                rule.apply_any(self.exec, lr * *lr_scale, grad, hybrid.params.data_mut(*id), moments);
            }
        }
        self.output_is_current &= !self.grads.wants(hybrid.output_param());
        let lr = lr * self.base_lr_scale;
        for LowRank { factors, grads, moments_a, moments_b, .. } in &mut self.low_rank {
            rule.apply(self.exec, lr, &grads.a, &mut factors.a, moments_a);
            rule.apply(self.exec, lr, &grads.b, &mut factors.b, moments_b);
        }
        self.merge(hybrid);
        Ok(report)
    }

    /// Loss and gradients of `batches`, without an update.
    pub(super) fn accumulate(&mut self, hybrid: &Model, batches: &[TokenBatch]) -> Result<StepReport> {
        self.grads.clear();
        let rows: usize = batches.iter().map(TokenBatch::rows).sum();
        let targets: usize =
            batches.iter().flat_map(TokenBatch::iter).map(|s| s.len().saturating_sub(1)).sum();
        let (mut kl_sum, mut ce_sum) = (0.0, 0.0);
        for batch in batches {
            let (kl, ce) = self.backpropagate(hybrid, batch, rows, targets)?;
            (kl_sum, ce_sum) = (kl_sum + kl, ce_sum + ce);
        }
        self.grads.settle();
        for LowRank { id, factors, grads, .. } in &mut self.low_rank {
            if let Some(dw) = self.grads.get(*id) {
                factors.backward(self.exec, dw, grads);
            }
        }
        let mut tensors: Vec<&[f32]> = self.full.iter().filter_map(|f| self.grads.get(f.id)).collect();
        for low_rank in &self.low_rank {
            tensors.extend([low_rank.grads.a.as_slice(), low_rank.grads.b.as_slice()]);
        }
        let grad_norm = sum_of_squares(self.exec, &tensors).sqrt();
        let ce = ce_sum / targets.max(1) as f64;
        let (loss, kl) = match self.stage {
            Stage::Continue => (ce, None),
            Stage::Distill { kl: kl_weight, ce: ce_weight } => {
                let kl = kl_sum / rows.max(1) as f64;
                (f64::from(kl_weight) * kl + f64::from(ce_weight) * ce, Some(kl))
            }
        };
        Ok(StepReport { loss, kl, ce, grad_norm, beta: None })
    }

    /// Forward and backward of one micro-batch; `rows` and `targets` are counts of the whole step. Returns summed KL and summed next-token loss.
    fn backpropagate(
        &mut self,
        hybrid: &Model,
        batch: &TokenBatch,
        rows: usize,
        targets: usize,
    ) -> Result<(f64, f64)> {
        let exec = self.exec;
        let (vocab, d_model) = (hybrid.config.vocab, hybrid.config.d_model);
        let teacher = match &self.teacher {
            Some(engine) => Some((engine, engine.observe(exec, batch, &mut |_, _, _| {})?)),
            None => None,
        };
        let (kl_weight, ce_weight) = match self.stage {
            Stage::Distill { kl, ce } => (kl / rows.max(1) as f32, ce / targets.max(1) as f32),
            Stage::Continue => (0.0, 1.0 / targets.max(1) as f32),
        };
        let hidden = hybrid.forward_batch(exec, batch, &mut NoObserver, Some(&mut self.tape))?;
        let labels = next_tokens(batch);
        if !std::mem::replace(&mut self.output_is_current, true) {
            match &mut self.output {
                Some(rounded) => rounded.set(exec, hybrid.output_weight()),
                None => self.output = RoundedWeight::new(exec, hybrid.output_weight()),
            }
        }
        let output = self.output.as_ref();
        let mut dhidden = Vec::with_capacity(hidden.len());
        let (mut kl_sum, mut ce_sum) = (0.0, 0.0);
        let LogitBuffers { own: logits, teacher: wanted, gradient: dlogits, values } = &mut self.logits;
        for (chunk, labels) in labels.chunks(LOGIT_ROWS).enumerate() {
            let range = chunk * LOGIT_ROWS * d_model..(chunk * LOGIT_ROWS + labels.len()) * d_model;
            let h = &hidden[range.clone()];
            hybrid.logits_into(exec, h, output, logits);
            dlogits.resize(logits.len(), 0.0);
            values.resize(labels.len(), 0.0);
            let next_token = teacher.is_none() || ce_weight != 0.0;
            let gradient = next_token.then_some(dlogits.as_mut_slice());
            cross_entropy(exec, logits, vocab, labels, ce_weight, values, gradient);
            ce_sum += values.iter().map(|&v| f64::from(v)).sum::<f64>();
            if let Some((engine, hidden)) = &teacher {
                engine.logits_into(exec, &hidden[range], wanted);
                let store = if next_token { Store::Accumulate } else { Store::Overwrite };
                kl_divergence(exec, wanted, logits, vocab, kl_weight, values, Some((dlogits, store)));
                kl_sum += values.iter().map(|&v| f64::from(v)).sum::<f64>();
            }
            dhidden.extend(hybrid.logits_backward(exec, h, dlogits, output, &mut self.grads));
        }
        hybrid.backward(exec, batch, &self.tape, &dhidden, &mut self.grads, &mut NoObserver, false);
        Ok((kl_sum, ce_sum))
    }

    /// Writes `W₀ + s·B·A` of every low-rank update into the hybrid.
    fn merge(&self, hybrid: &mut Model) {
        for LowRank { id, factors, .. } in &self.low_rank {
            factors.merge(self.exec, self.original.data(*id), hybrid.params.data_mut(*id));
        }
    }

    #[cfg(test)]
    pub(super) fn low_rank_grads(&self, index: usize) -> &Factors {
        &self.low_rank[index].grads
    }
}

impl Full {
    fn new(id: ParamId, len: usize, lr_scale: f32, moments: MomentType) -> Self {
        Self { id, lr_scale, moments: AnyMoments::zeros(len, moments), group: None, updates: 0 }
    }
}

impl LowRank {
    fn new(id: ParamId, factors: Factors) -> Self {
        let grads = Factors::zeros(factors.rank, factors.rows, factors.cols);
        let (moments_a, moments_b) = (Moments::zeros(factors.a.len()), Moments::zeros(factors.b.len()));
        Self { id, factors, grads, moments_a, moments_b }
    }
}

/// The new tensors of converted groups, in layer and group order.
fn head_params(hybrid: &Model, projection_lr_scale: f32, moments: MomentType) -> Vec<Full> {
    let Some(layout) = hybrid.head_layout() else { return Vec::new() };
    let infos = layout.tensors();
    let mut out = Vec::new();
    for layer in 0..hybrid.config.layers {
        for group in 0..hybrid.config.kv_heads {
            for (&id, info) in hybrid.head_param_ids(layer, group).iter().zip(&infos) {
                let scale = match info.class {
                    TensorClass::Projection => projection_lr_scale,
                    TensorClass::New => 1.0,
                };
                let full = Full::new(id, hybrid.params.data(id).len(), scale, moments);
                out.push(Full { group: Some((layer, group)), ..full });
            }
        }
    }
    out
}

/// The token each position predicts; the last of a sequence predicts none.
pub(super) fn next_tokens(batch: &TokenBatch) -> Vec<u32> {
    let sequences = batch.iter().filter(|sequence| !sequence.is_empty());
    sequences.flat_map(|sequence| sequence[1..].iter().copied().chain(std::iter::once(IGNORED))).collect()
}
