//! The heads in training: loss, gradient and update of every group. Knows one batch at a time; knows nothing of files or schedules.

use super::inputs::{Collector, LayerInputs};
use crate::error::{Result, TrainError};
use crate::optim::{Moments, StepRule, clip_scale};
use crate::teacher::teacher;
use kernels::elementwise::tensor_dot;
use kernels::{Exec, MatMut, MatRef, Reused, Store, Trans, gemm, mixed_gemm};
use model::mixers::{self, HeadEnv, HeadLayout, HeadTensors, TensorClass};
use model::{Engine, Model, ModelError, Progress, TokenBatch};
use surgery::HeadBank;

/// Tasks per thread that a run over several layers should have at least.
const TASKS_PER_THREAD: usize = 8;

/// One group in training.
pub(super) struct GroupTrainer {
    pub weights: HeadTensors,
    /// Empty for frozen tensors, as are the gradients.
    pub moments: Vec<Moments>,
    grads: HeadTensors,
    /// Relative error on the last batch.
    error: f64,
    /// Sum of squares of the gradient.
    norm2: f64,
    /// `W_O,gᵀ W_O,g` `[G·D, G·D]`: the loss needs no more of W_O.
    gram: Vec<f32>,
}

/// All groups of all layers.
pub(super) struct Aligner<'a> {
    base: &'a Model,
    /// The base again, for its layers' inputs and outputs.
    teacher: Engine,
    layout: HeadLayout,
    /// `G·D`.
    width: usize,
    pub groups: Vec<Vec<GroupTrainer>>,
    scales: Vec<TensorClass>,
}

/// What is not trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frozen {
    Nothing,
    /// The copied q, k and v projections.
    Projections,
    Everything,
}

impl Frozen {
    /// Nothing that would be trained at a rate of 0.
    pub fn at_scale(projection_lr_scale: f32) -> Self {
        if projection_lr_scale == 0.0 { Self::Projections } else { Self::Nothing }
    }

    fn contains(self, class: TensorClass) -> bool {
        match self {
            Self::Nothing => false,
            Self::Projections => class == TensorClass::Projection,
            Self::Everything => true,
        }
    }
}

/// Settings of one update.
pub(super) struct StepRates {
    pub lr: f32,
    pub projection_scale: f32,
    pub betas: (f32, f32),
    pub update: u64,
    pub clip: f32,
}

/// What a task of [`Aligner::accumulate`] reads.
struct GroupContext<'a> {
    base: &'a Model,
    layout: HeadLayout,
    width: usize,
    fit: bool,
}

impl<'a> Aligner<'a> {
    /// Starts from the heads of `bank`, with zero moments; `frozen` tensors stay as they are.
    pub fn new(exec: &Exec, base: &'a Model, bank: &HeadBank, frozen: Frozen) -> Result<Self> {
        let config = &base.config;
        let layout = bank.layout(config);
        let width = config.group_size() * config.head_dim;
        let infos = layout.tensors();
        let trained: Vec<usize> = infos
            .iter()
            .map(|t| if frozen.contains(t.class) { 0 } else { t.shape.iter().product() })
            .collect();
        let mut groups = Vec::with_capacity(config.layers);
        for (layer, heads) in bank.groups.iter().enumerate() {
            let w_o = output_projection(base, layer)?;
            let grams =
                exec.parallel_map(heads.len(), |g| gram(&exec.single(), w_o.columns(g * width, width)));
            let trainers = heads.iter().zip(grams).map(|(head, gram)| GroupTrainer {
                weights: head.clone(),
                moments: trained.iter().map(|&len| Moments::zeros(len)).collect(),
                grads: HeadTensors { values: trained.iter().map(|&len| vec![0.0; len]).collect() },
                error: 0.0,
                norm2: 0.0,
                gram,
            });
            groups.push(trainers.collect());
        }
        Ok(Self {
            base,
            teacher: teacher(exec, base)?,
            layout,
            width,
            groups,
            scales: infos.iter().map(|t| t.class).collect(),
        })
    }

    /// Whether the heads have tensors at all (training-free ones do not).
    pub fn trainable(&self) -> bool {
        !self.scales.is_empty()
    }

    pub fn layout(&self) -> &HeadLayout {
        &self.layout
    }

    pub fn base(&self) -> &'a Model {
        self.base
    }

    pub fn into_heads(self) -> Vec<Vec<HeadTensors>> {
        self.groups.into_iter().map(|layer| layer.into_iter().map(|g| g.weights).collect()).collect()
    }

    fn context(&self, fit: bool) -> GroupContext<'a> {
        GroupContext { base: self.base, layout: self.layout, width: self.width, fit }
    }

    fn layers_at_once(&self, exec: &Exec) -> usize {
        let per_layer = self.base.config.kv_heads;
        (TASKS_PER_THREAD * exec.threads()).div_ceil(per_layer).clamp(1, self.base.config.layers)
    }

    /// Runs the base over `batch` and computes every group's error and gradient; with `fit`, sets what is fitted first. Returns the mean
    /// relative error per layer. Weights do not change but for those.
    pub fn accumulate(&mut self, exec: &Exec, batch: &TokenBatch, fit: bool) -> Result<Vec<f64>> {
        let at_once = self.layers_at_once(exec);
        let context = self.context(fit);
        let groups = &mut self.groups;
        let mut run = |layers: &[LayerInputs]| {
            let first = layers.first().map_or(0, |l| l.layer);
            let items: Vec<(usize, usize, &mut GroupTrainer)> = groups[first..first + layers.len()]
                .iter_mut()
                .enumerate()
                .flat_map(|(i, layer)| layer.iter_mut().enumerate().map(move |(g, group)| (i, g, group)))
                .collect();
            let single = exec.single();
            exec.parallel_items(items, |_, (i, g, group)| {
                group.accumulate(&single, &context, &layers[i], g);
            });
        };
        let mut collector = Collector::new(exec, batch, at_once, &mut run);
        self.teacher.observe(exec, batch, &mut |layer, x, out| collector.push(layer, x, out))?;
        collector.finish();
        Ok(self
            .groups
            .iter()
            .map(|l| l.iter().map(|g| g.error).sum::<f64>() / l.len().max(1) as f64)
            .collect())
    }

    /// Gradient norm of every layer.
    pub fn layer_norms(&self) -> Vec<f64> {
        self.groups.iter().map(|layer| layer.iter().map(|g| g.norm2).sum::<f64>().sqrt()).collect()
    }

    /// AdamW on every group, clipped by its layer's norm.
    pub fn update(&mut self, exec: &Exec, norms: &[f64], rates: &StepRates) {
        let scales = &self.scales;
        let items: Vec<(f32, &mut GroupTrainer)> = self
            .groups
            .iter_mut()
            .zip(norms)
            .flat_map(|(layer, &norm)| layer.iter_mut().map(move |g| (clip_scale(norm, rates.clip), g)))
            .collect();
        let single = exec.single();
        exec.parallel_items(items, |_, (grad_scale, group)| {
            let rule = StepRule { betas: rates.betas, weight_decay: 0.0, step: rates.update, grad_scale };
            let tensors =
                group.weights.values.iter_mut().zip(&group.grads.values).zip(&mut group.moments).zip(scales);
            for (((param, grad), moments), class) in tensors.filter(|(((_, grad), _), _)| !grad.is_empty()) {
                let scale = match class {
                    TensorClass::Projection => rates.projection_scale,
                    TensorClass::New => 1.0,
                };
                rule.apply(&single, rates.lr * scale, grad, param, moments);
            }
        });
    }

    /// Relative error of every group over `sequences`, each run on its own.
    pub fn heldout_errors(
        &self,
        exec: &Exec,
        sequences: &[Vec<u32>],
        progress: &mut dyn Progress,
    ) -> Result<Vec<Vec<f64>>> {
        let at_once = self.layers_at_once(exec);
        let context = self.context(false);
        let mut sums: Vec<Vec<(f64, f64)>> = self.groups.iter().map(|l| vec![(0.0, 0.0); l.len()]).collect();
        progress.start("held-out error", sequences.len() as u64, "sequences");
        for sequence in sequences {
            if progress.cancelled() {
                return Err(TrainError::Interrupted);
            }
            let batch = TokenBatch::one(sequence);
            let mut run = |layers: &[LayerInputs]| {
                let per_layer = context.base.config.kv_heads;
                let single = exec.single();
                let parts = exec.parallel_map(layers.len() * per_layer, |task| {
                    let (inputs, g) = (&layers[task / per_layer], task % per_layer);
                    self.groups[inputs.layer][g].measure(&single, &context, inputs, g)
                });
                for (task, (error, reference)) in parts.into_iter().enumerate() {
                    let sum = &mut sums[layers[task / per_layer].layer][task % per_layer];
                    *sum = (sum.0 + error, sum.1 + reference);
                }
            };
            let mut collector = Collector::new(exec, &batch, at_once, &mut run);
            self.teacher.observe(exec, &batch, &mut |layer, x, out| collector.push(layer, x, out))?;
            collector.finish();
            progress.advance(1, "");
        }
        progress.finish();
        Ok(sums.iter().map(|l| l.iter().map(|&(e, r)| relative(e, r)).collect()).collect())
    }
}

impl GroupContext<'_> {
    fn env<'b>(&'b self, layer: usize, group: usize, weights: &'b HeadTensors) -> HeadEnv<'b> {
        HeadEnv {
            layout: self.layout,
            weights: weights.view(),
            base: self.base.base_group(layer, group),
            inv_freq: self.base.inv_freq(),
        }
    }
}

impl GroupTrainer {
    /// Error and gradient over all sequences of a batch.
    fn accumulate(&mut self, exec: &Exec, context: &GroupContext<'_>, inputs: &LayerInputs, group: usize) {
        let width = context.width;
        let target = |s| inputs.out(s).columns(group * width, width);
        let reference: f64 = (0..inputs.sequences()).map(|s| self.times_gram(exec, target(s)).0).sum();
        if context.fit {
            let longest = inputs.longest();
            let env = context.env(inputs.layer, group, &self.weights);
            let fitted = mixers::fit(exec, &env, inputs.x(longest).values, target(longest));
            if fitted.iter().flat_map(|(_, values)| values).all(|v| v.is_finite()) {
                fitted.into_iter().for_each(|(tensor, values)| self.weights.values[tensor] = values);
            }
        }
        self.grads.values.iter_mut().for_each(|g| g.fill(0.0));
        let env = context.env(inputs.layer, group, &self.weights);
        let mut error = 0.0;
        // 2 / reference, and no gradient where the base's output is exactly zero.
        let scale = if reference == 0.0 { 0.0 } else { (2.0 / reference) as f32 };
        for s in 0..inputs.sequences() {
            let x = inputs.x(s);
            let seq = x.values.rows();
            let mut diff = Reused::new(seq * width);
            let saved = mixers::forward_train(exec, &env, x, MatMut::dense(&mut diff, seq, width));
            subtract(&mut diff, target(s));
            let (squares, mut products) = self.times_gram(exec, MatRef::dense(&diff, seq, width));
            error += squares;
            products.iter_mut().for_each(|p| *p *= scale);
            let dout = MatRef::dense(&products, seq, width);
            mixers::backward(exec, &env, x, &saved, dout, Some(&mut self.grads), None, None);
        }
        self.error = relative(error, reference);
        self.norm2 = self.grads.values.iter().map(|g| tensor_dot(exec.isa(), g, g)).sum();
    }

    /// Squared error and squared reference of one sequence.
    fn measure(
        &self,
        exec: &Exec,
        context: &GroupContext<'_>,
        inputs: &LayerInputs,
        group: usize,
    ) -> (f64, f64) {
        let (seq, width) = (inputs.x(0).values.rows(), context.width);
        let target = inputs.out(0).columns(group * width, width);
        let env = context.env(inputs.layer, group, &self.weights);
        let mut diff = Reused::new(seq * width);
        mixers::forward_train(exec, &env, inputs.x(0), MatMut::dense(&mut diff, seq, width));
        subtract(&mut diff, target);
        let (error, _) = self.times_gram(exec, MatRef::dense(&diff, seq, width));
        (error, self.times_gram(exec, target).0)
    }

    /// `Σ_t ‖W_O,g v_t‖²`, and the rows `v_tᵀ W_O,gᵀ W_O,g` that it is the sum of dot products with; `values` and they are `[seq, G·D]`.
    fn times_gram(&self, exec: &Exec, values: MatRef<'_>) -> (f64, Reused) {
        let (rows, width) = (values.rows(), values.cols());
        let mut products = Reused::new(rows * width);
        let (out, gram) =
            (MatMut::dense(&mut products, rows, width), MatRef::dense(&self.gram, width, width));
        mixed_gemm(exec, out, values, Trans::No, gram, Trans::No, 1.0, Store::Overwrite);
        let pairs = products.chunks_exact(width).enumerate();
        let squares = pairs.map(|(t, row)| tensor_dot(exec.isa(), row, values.row(t))).sum();
        (squares, products)
    }
}

/// `error / reference`; 0 where both vanish.
fn relative(error: f64, reference: f64) -> f64 {
    if error == 0.0 { 0.0 } else { error / reference }
}

fn subtract(values: &mut [f32], from: MatRef<'_>) {
    for (t, row) in values.chunks_exact_mut(from.cols()).enumerate() {
        row.iter_mut().zip(from.row(t)).for_each(|(v, o)| *v -= o);
    }
}

/// W_O of a layer, `[d_model, heads · head_dim]`.
fn output_projection(base: &Model, layer: usize) -> Result<MatRef<'_>> {
    let (rows, cols) = (base.config.d_model, base.config.heads * base.config.head_dim);
    let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
    match base.params.id(&name) {
        Some(id) => Ok(MatRef::dense(base.params.data(id), rows, cols)),
        None => Err(ModelError::Param { name, expected: vec![rows, cols], found: "nothing".into() }.into()),
    }
}

fn gram(exec: &Exec, w: MatRef<'_>) -> Vec<f32> {
    let width = w.cols();
    let mut out = vec![0.0; width * width];
    gemm(exec, MatMut::dense(&mut out, width, width), w, Trans::Yes, w, Trans::No, 1.0, Store::Overwrite);
    out
}
