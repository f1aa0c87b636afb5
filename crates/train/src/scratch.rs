//! Models from random weights, trained on labels at chosen positions. Knows parameters and gradients; knows nothing of tasks or files.

use crate::error::{Result, TrainError};
use crate::optim::{Moments, StepRule, clip_scale, sum_of_squares};
use kernels::Exec;
use kernels::loss::{IGNORED, cross_entropy_in_place};
use model::mixers::{self, HeadLayout, HeadTensors};
use model::{
    Grads, GroupMixer, HeadPlan, MixerSpec, Model, ModelConfig, NoObserver, ParamId, ParamStore, Tape,
    TokenBatch,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

#[cfg(test)]
mod tests;

/// Rows of logits in memory at once.
const LOGIT_ROWS: usize = 512;
/// The distance in tokens that the decays of new recurrent heads start from: as slow as they can start.
const START_DISTANCE: f32 = 128.0;

/// A model of random weights: matrices uniform with variance `1 / fan-in` (embeddings: `embedding_scale² / d_model`), biases of projections with a third
/// of that, norms 1. Every tensor has a random stream of its own.
///
/// # Errors
/// [`TrainError::Model`] for a configuration that is not valid.
pub fn random_model(config: &ModelConfig, embedding_scale: f32, seed: u64) -> Result<Model> {
    config.validate()?;
    let mut params = ParamStore::default();
    for (index, (name, shape)) in config.tensor_shapes().into_iter().enumerate() {
        let len = shape.iter().product();
        let mut data = match (shape.as_slice(), name.ends_with("bias")) {
            (_, true) => uniform(3 * config.d_model, len, seed, index as u64),
            (&[_, fan_in], _) => uniform(fan_in, len, seed, index as u64),
            _ => vec![1.0; len],
        };
        if name == "model.embed_tokens.weight" {
            data.iter_mut().for_each(|x| *x *= embedding_scale);
        }
        params.insert(name, shape, data);
    }
    Ok(Model::from_parts(config.clone(), HeadPlan::empty(config), params)?)
}

/// `len` values, uniform with variance `1 / fan_in`.
fn uniform(fan_in: usize, len: usize, seed: u64, stream: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let bound = (3.0 / fan_in as f32).sqrt();
    (0..len).map(|_| rng.random_range(-bound..=bound)).collect()
}

/// The model with fresh heads in the groups that `recurrent(layer, group)` names: projections as the model's own, convolutions random (variance
/// `1 / taps`), the slowest decay that heads start with, everything else as [`mixers::init`].
///
/// # Errors
/// [`TrainError::Model`] for a mixer that does not fit the model.
pub fn with_random_heads(
    model: &Model,
    spec: MixerSpec,
    recurrent: impl Fn(usize, usize) -> bool,
    seed: u64,
) -> Result<Model> {
    spec.validate(model.config.head_dim)?;
    let mut plan = HeadPlan::empty(&model.config);
    plan.mixer = Some(spec);
    for (l, layer) in plan.layers.iter_mut().enumerate() {
        for (g, group) in layer.groups.iter_mut().enumerate() {
            if recurrent(l, g) {
                group.mixer = GroupMixer::Recurrent;
            }
        }
    }
    plan.beta = plan.converted() as f64 / plan.total() as f64;
    let layout = HeadLayout::new(spec, &model.config);
    let distances = vec![START_DISTANCE; model.config.group_size()];
    let mut heads = |layer: usize, group: usize| {
        let index = (layer * model.config.kv_heads + group) as u64;
        let mut head = mixers::init(&layout, &model.base_group(layer, group), &distances, seed ^ index);
        randomise_convs(&layout, &mut head, seed, index);
        Ok(head)
    };
    Ok(model.with_plan(plan, &mut heads)?)
}

fn randomise_convs(layout: &HeadLayout, head: &mut HeadTensors, seed: u64, index: u64) {
    let tensors = layout.tensors();
    for (i, (info, values)) in tensors.iter().zip(&mut head.values).enumerate() {
        if info.name.ends_with("_conv.weight") {
            // Streams of the model's own tensors are far below.
            let stream = (1 << 40) + (index << 8) + i as u64;
            *values = uniform(layout.spec.d_conv, values.len(), seed, stream);
        }
    }
}

/// AdamW's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimiser {
    /// (β₁, β₂).
    pub betas: (f32, f32),
    /// Decoupled weight decay of every tensor.
    pub weight_decay: f32,
    /// Global gradient clip (0: none).
    pub clip: f32,
}

/// What a step computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LabelReport {
    /// Mean loss of the labelled positions, nats.
    pub loss: f64,
    /// Of them, those whose label is the most likely token.
    pub correct: usize,
    /// Labelled positions.
    pub labels: usize,
    /// Gradient norm before clipping; 0 without a backward pass.
    pub grad_norm: f64,
}

/// A parameter with its optimiser state.
pub(crate) struct Trained {
    pub id: ParamId,
    pub moments: Moments,
}

/// Trains every parameter that a model reads, on labels. The model is passed to every step and must be the same.
pub struct LabelTrainer<'a> {
    exec: &'a Exec,
    optimiser: Optimiser,
    pub(crate) trained: Vec<Trained>,
    pub(crate) steps: u64,
    grads: Grads,
    tape: Tape,
}

impl<'a> LabelTrainer<'a> {
    /// Nothing trained yet. Projections of recurrent groups that read their own copies instead are left out where a whole layer's are.
    pub fn new(exec: &'a Exec, model: &Model, optimiser: Optimiser) -> Self {
        let unread = unread(model);
        let ids: Vec<ParamId> =
            model.params.iter().map(|(id, _)| id).filter(|id| !unread.contains(id)).collect();
        let trained = ids
            .iter()
            .map(|&id| Trained { id, moments: Moments::zeros(model.params.data(id).len()) })
            .collect();
        let grads = Grads::zeros(&model.params, &ids);
        Self { exec, optimiser, trained, steps: 0, grads, tape: Tape::default() }
    }

    /// Optimiser steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Values that train.
    pub fn parameters(&self) -> usize {
        self.trained.iter().map(|t| t.moments.m.len()).sum()
    }

    /// One step on the mean loss of the labelled positions. `labels` has one entry per row of the batch, [`IGNORED`] where nothing is asked.
    ///
    /// # Errors
    /// [`TrainError::NonFinite`], then the model is unchanged; [`TrainError::Model`] for tokens the model refuses.
    ///
    /// # Panics
    /// When there are not as many labels as rows.
    pub fn step(
        &mut self,
        model: &mut Model,
        batch: &TokenBatch,
        labels: &[u32],
        lr: f32,
    ) -> Result<LabelReport> {
        let report = self.accumulate(model, batch, labels)?;
        let step = self.steps + 1;
        TrainError::check_finite(step, "the loss", report.loss)?;
        TrainError::check_finite(step, "the gradient norm", report.grad_norm)?;
        self.steps = step;
        let rule = StepRule {
            betas: self.optimiser.betas,
            weight_decay: self.optimiser.weight_decay,
            step,
            grad_scale: clip_scale(report.grad_norm, self.optimiser.clip),
        };
        for Trained { id, moments } in &mut self.trained {
            if let Some(grad) = self.grads.get(*id) {
                rule.apply(self.exec, lr, grad, model.params.data_mut(*id), moments);
            }
        }
        Ok(report)
    }

    /// Loss and gradients, without an update.
    fn accumulate(&mut self, model: &Model, batch: &TokenBatch, labels: &[u32]) -> Result<LabelReport> {
        let exec = self.exec;
        self.grads.clear();
        let hidden = model.forward_batch(exec, batch, &mut NoObserver, Some(&mut self.tape))?;
        let mut dhidden = vec![0.0; hidden.len()];
        let grads = &mut self.grads;
        let mut report = labelled(exec, model, &hidden, labels, |rows, h, dlogits| {
            let d = model.logits_backward(exec, h, dlogits, None, grads);
            let width = model.config.d_model;
            for (&row, d) in rows.iter().zip(d.chunks(width)) {
                dhidden[row * width..(row + 1) * width].copy_from_slice(d);
            }
        });
        model.backward(exec, batch, &self.tape, &dhidden, grads, &mut NoObserver, false);
        grads.settle();
        let tensors: Vec<&[f32]> = self.trained.iter().filter_map(|t| grads.get(t.id)).collect();
        report.grad_norm = sum_of_squares(exec, &tensors).sqrt();
        Ok(report)
    }
}

/// Loss and right answers of a model at the labelled positions of a batch.
///
/// # Errors
/// [`TrainError::Model`] for tokens the model refuses.
///
/// # Panics
/// When there are not as many labels as rows.
pub fn answered(exec: &Exec, model: &Model, batch: &TokenBatch, labels: &[u32]) -> Result<LabelReport> {
    let hidden = model.forward_batch(exec, batch, &mut NoObserver, None)?;
    Ok(labelled(exec, model, &hidden, labels, |_, _, _| {}))
}

/// Scores the labelled rows of `hidden` `[rows, d_model]`, in pieces, and hands each piece's rows, hidden states and gradient of the logits to
/// `backward`.
fn labelled(
    exec: &Exec,
    model: &Model,
    hidden: &[f32],
    labels: &[u32],
    mut backward: impl FnMut(&[usize], &[f32], &[f32]),
) -> LabelReport {
    let (vocab, width) = (model.config.vocab, model.config.d_model);
    assert_eq!(hidden.len(), labels.len() * width, "one label for each row");
    let asked: Vec<usize> = (0..labels.len()).filter(|&row| labels[row] != IGNORED).collect();
    let weight = 1.0 / asked.len().max(1) as f32;
    let (mut loss, mut correct) = (0.0, 0);
    let mut logits = Vec::new();
    for rows in asked.chunks(LOGIT_ROWS) {
        let h: Vec<f32> =
            rows.iter().flat_map(|row| &hidden[row * width..(row + 1) * width]).copied().collect();
        let targets: Vec<u32> = rows.iter().map(|&row| labels[row]).collect();
        model.logits_into(exec, &h, None, &mut logits);
        // The label's logit is the largest exactly when no other is larger.
        let best = |(row, &target): (&[f32], &u32)| row.iter().all(|&x| x <= row[target as usize]);
        correct += logits.chunks(vocab).zip(&targets).filter(|pair| best(*pair)).count();
        let mut nll = vec![0.0; rows.len()];
        cross_entropy_in_place(exec, &mut logits, vocab, &targets, weight, &mut nll);
        loss += nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        backward(rows, &h, &logits);
    }
    LabelReport { loss: loss / asked.len().max(1) as f64, correct, labels: asked.len(), grad_norm: 0.0 }
}

/// Base projections that nothing reads: those of layers whose groups are all recurrent with projections of their own.
fn unread(model: &Model) -> HashSet<ParamId> {
    let own =
        model.head_layout().is_some_and(|layout| layout.tensors().iter().any(|t| t.name == "q_proj.weight"));
    let groups = model.config.kv_heads;
    let whole = |layer: usize| own && (0..groups).all(|group| model.plan.is_converted(layer, group));
    let names = (0..model.config.layers)
        .filter(|&layer| whole(layer))
        .flat_map(|layer| ["q", "k", "v"].map(|p| format!("model.layers.{layer}.self_attn.{p}_proj.weight")));
    names.filter_map(|name| model.params.id(&name)).collect()
}
