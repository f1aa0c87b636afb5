//! One optimiser step of end-to-end training: losses, gradients, clipping, update. Knows batches; knows nothing of files or schedules.

use super::elastic::Budgets;
use super::lora::{Factors, TARGETS};
use super::losses::{Counts, LossSums, Losses};
use super::{HealOptions, Trainable};
use crate::error::{Result, TrainError};
use crate::optim::{AnyMoments, MomentType, Moments, StepRule, clip_scale, sum_of_squares};
use kernels::Exec;
use model::mixers::TensorClass;
use model::plan::PlanModel;
use model::{Grads, HeadPlan, Model, ModelConfig, NoObserver, ParamId, ParamStore, Tape, TokenBatch};
use std::collections::{HashMap, HashSet};

/// Values of a gradient whose squares one task sums, where there are not many gradients at once.
const NORM_PIECE: usize = 1 << 18;

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
    betas: (f32, f32),
    weight_decay: f32,
    clip: f32,
    base_lr_scale: f32,
    optimizer_in_backward: bool,
    steps: u64,
    /// The budgets of an elastic run.
    budgets: Option<Budgets>,
    pub(super) full: Vec<Full>,
    pub(super) low_rank: Vec<LowRank>,
    /// W₀ of the low-rank updates, shared with whoever else holds it; nothing without them, since holding it keeps a copy of what trains.
    original: ParamStore,
    grads: Grads,
    tape: Tape,
    losses: Losses,
}

impl<'a> Trainer<'a> {
    /// Prepares to train what `options.trainable` says; uses its loss, optimiser and seed settings only. [`Stage::Distill`](super::Stage::Distill) needs the base.
    ///
    /// # Errors
    /// [`TrainError::Argument`] when nothing would train, a base is missing, or is not a model the hybrid could be made of;
    /// [`TrainError::Model`] for betas of an elastic run that the hybrid's plan cannot be run at or that leave some of its heads untrained.
    pub fn new(exec: &'a Exec, base: Option<&Model>, hybrid: &Model, options: &HealOptions) -> Result<Self> {
        if let Some(base) = base {
            check_base(&base.config, &hybrid.config)?;
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
        if options.optimizer_in_backward {
            check_in_backward(options)?;
        }
        let ids: Vec<ParamId> = full.iter().map(|f| f.id).chain(low_rank.iter().map(|l| l.id)).collect();
        let grads = match options.optimizer_in_backward {
            true => Grads::on_demand(&hybrid.params, &ids),
            false => Grads::zeros(&hybrid.params, &ids),
        };
        Ok(Self {
            exec,
            betas: options.betas,
            weight_decay: options.weight_decay,
            clip: options.clip,
            base_lr_scale: options.base_lr_scale,
            optimizer_in_backward: options.optimizer_in_backward,
            steps: 0,
            budgets,
            original: if low_rank.is_empty() { ParamStore::default() } else { hybrid.params.clone() },
            full,
            low_rank,
            grads,
            tape: Tape::checkpointed(options.checkpointed_layers),
            losses: Losses::new(exec, options.stage, base)?,
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
    /// [`TrainError::NonFinite`], then `hybrid` is unchanged, except by a gradient in a step that updates in its backward pass: that leaves
    /// `hybrid` and the trainer half updated. [`TrainError::Model`] for tokens the model refuses.
    ///
    /// # Panics
    /// When the trainer updates in its backward pass and gets more than one batch.
    pub fn step(&mut self, hybrid: &mut Model, batches: &[TokenBatch], lr: f32) -> Result<StepReport> {
        let step = self.steps + 1;
        let swap = |budgets: &mut Option<Budgets>, hybrid: &mut Model| {
            budgets.iter_mut().for_each(|budgets| budgets.swap(hybrid, step));
        };
        swap(&mut self.budgets, hybrid);
        let report = match (self.optimizer_in_backward, batches) {
            (false, _) => self.accumulate(hybrid, batches),
            (true, [batch]) => self.update_in_backward(hybrid, batch, lr),
            (true, _) => {
                panic!("a step that updates in its backward pass has one batch, not {}", batches.len())
            }
        };
        swap(&mut self.budgets, hybrid);
        let report = StepReport { beta: self.budgets.as_ref().map(|b| b.beta(step)), ..report? };
        TrainError::check_finite(step, "the loss", report.loss)?;
        TrainError::check_finite(step, "the gradient norm", report.grad_norm)?;
        self.steps = step;
        if self.grads.wants(hybrid.output_param()) {
            self.losses.output_changes();
        }
        if self.optimizer_in_backward {
            return Ok(report);
        }
        let rule = self.rule(step, clip_scale(report.grad_norm, self.clip));
        let plan = self.budgets.as_ref().map(|budgets| budgets.plan(step));
        for full in &mut self.full {
            if let Some(grad) = self.grads.get(full.id).filter(|_| full.is_active(plan)) {
                full.update(self.exec, rule, lr, grad, &mut hybrid.params);
            }
        }
        let lr = lr * self.base_lr_scale;
        for LowRank { factors, grads, moments_a, moments_b, .. } in &mut self.low_rank {
            rule.apply(self.exec, lr, &grads.a, &mut factors.a, moments_a);
            rule.apply(self.exec, lr, &grads.b, &mut factors.b, moments_b);
        }
        self.merge(hybrid);
        Ok(report)
    }

    /// What the updates of `step` share.
    fn rule(&self, step: u64, grad_scale: f32) -> StepRule {
        StepRule { betas: self.betas, weight_decay: self.weight_decay, step, grad_scale }
    }

    /// Loss and gradients of `batches`, without an update.
    pub(super) fn accumulate(&mut self, hybrid: &Model, batches: &[TokenBatch]) -> Result<StepReport> {
        self.grads.clear();
        let counts = Counts::of(batches);
        let mut sums = LossSums::default();
        for batch in batches {
            let Self { exec, tape, grads, losses, .. } = self;
            let dhidden = losses.backpropagate(exec, hybrid, batch, counts, (tape, grads), &mut sums)?;
            hybrid.backward(exec, batch, tape, &dhidden, grads, &mut NoObserver, false);
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
        Ok(self.losses.report(sums, counts, grad_norm))
    }

    /// Loss, gradients and update of one batch: every parameter is updated as soon as its gradient is complete, in whose memory the next layer's
    /// is computed.
    fn update_in_backward(&mut self, hybrid: &mut Model, batch: &TokenBatch, lr: f32) -> Result<StepReport> {
        let step = self.steps + 1;
        self.grads.clear();
        let counts = Counts::of(std::slice::from_ref(batch));
        let mut sums = LossSums::default();
        let pass = (&mut self.tape, &mut self.grads);
        let dhidden = self.losses.backpropagate(self.exec, hybrid, batch, counts, pass, &mut sums)?;
        TrainError::check_finite(step, "the loss", self.losses.report(sums, counts, 0.0).loss)?;
        let rule = self.rule(step, 1.0);
        // The hybrid's plan is that of the step until the caller takes it out again.
        let plan = self.budgets.as_ref().map(|_| &hybrid.plan);
        let active = self.full.iter().enumerate().filter(|(_, full)| full.is_active(plan));
        let mut places: HashMap<ParamId, usize> = active.map(|(place, full)| (full.id, place)).collect();
        let Self { exec, tape, grads, full, .. } = self;
        let mut squares = 0.0;
        let mut update = |places: Vec<usize>, grads: &mut Grads, hybrid: &mut Model| {
            for &place in &places {
                // Zeros where nothing was added.
                grads.get_mut(full[place].id);
            }
            let gradients = places.iter().filter_map(|&place| grads.get(full[place].id));
            let pieces: Vec<&[f32]> = gradients.flat_map(|gradient| gradient.chunks(NORM_PIECE)).collect();
            squares += sum_of_squares(exec, &pieces);
            TrainError::check_finite(step, "the gradient norm", squares)?;
            for place in places {
                let full = &mut full[place];
                if let Some(grad) = grads.get(full.id) {
                    full.update(exec, rule, lr, grad, &mut hybrid.params);
                }
                grads.release(full.id);
            }
            Ok::<_, TrainError>(())
        };
        let mut pass = hybrid.start_backward(exec, batch, tape, &dhidden, grads, false);
        while let Some(complete) = pass.advance(hybrid, grads, &mut NoObserver) {
            update(complete.iter().filter_map(|id| places.remove(id)).collect(), grads, hybrid)?;
        }
        // What this pass did not come by: skipped layers, and those below the lowest that trains.
        let mut rest: Vec<usize> = places.into_values().collect();
        rest.sort_unstable();
        update(rest, grads, hybrid)?;
        Ok(self.losses.report(sums, counts, squares.sqrt()))
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

    /// Whether it trains in a step under this plan of an elastic run, if it is one.
    fn is_active(&self, plan: Option<&HeadPlan>) -> bool {
        match (plan, self.group) {
            (Some(plan), Some((layer, group))) => plan.is_converted(layer, group),
            _ => true,
        }
    }

    fn update(&mut self, exec: &Exec, rule: StepRule, lr: f32, grad: &[f32], params: &mut ParamStore) {
        self.updates += 1;
        let rule = StepRule { step: self.updates, ..rule };
        rule.apply_any(exec, lr * self.lr_scale, grad, params.data_mut(self.id), &mut self.moments);
    }
}

/// Whether a hybrid of this configuration can have been made of a base of that.
///
/// # Errors
/// [`TrainError::Argument`].
pub fn check_base(base: &ModelConfig, hybrid: &ModelConfig) -> Result<()> {
    let (ours, theirs) = (PlanModel::of(hybrid), PlanModel::of(base));
    if ours == theirs && hybrid.vocab == base.vocab {
        return Ok(());
    }
    Err(TrainError::Argument(format!(
        "the hybrid was not made of this base: expected {ours} and a vocabulary of {}, found {theirs} and {}\n\
         hint: give the model that was converted",
        hybrid.vocab, base.vocab
    )))
}

/// Whether updates can be made in the backward pass, where the gradient as a whole is never there.
fn check_in_backward(options: &HealOptions) -> Result<()> {
    let refused = if options.clip != 0.0 {
        "the norm that clipping needs is known at its end\nhint: turn clipping off (0)"
    } else if options.accumulate > 1 {
        "gradients of several micro-batches would have to be kept\nhint: accumulate 1"
    } else if matches!(options.trainable, Trainable::Lora(_)) {
        "low-rank updates have small gradients of their own\nhint: leave it out, or train whole weights"
    } else {
        return Ok(());
    };
    Err(TrainError::Argument(format!("no updates in the backward pass: {refused}")))
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
