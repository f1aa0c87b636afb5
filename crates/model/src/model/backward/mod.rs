//! The backward pass: gradients of everything trainable, as far down as somebody needs them.

mod heads;

use super::Model;
use super::batch::{self, Forward, LayerTape, Tape};
use super::gates::Part;
use super::layout::Run;
use super::parts::{Block, pack, several};
use super::tokens::{RoundedSequences, TokenBatch, rows_of};
use crate::observe::{GradObserver, NoObserver};
use crate::params::{Grads, ParamId};
use kernels::attention::{AttnMask, AttnSaved, attention_backward};
use kernels::elementwise::{add_column_sums, rms_norm_backward};
use kernels::linear::{LayerInput, linear_backward};
use kernels::mlp::{MlpGrads, MlpScratch, mlp_backward};
use kernels::packed::{Shared, Uses};
use kernels::rope::Rotation;
use kernels::{Exec, MatMut, MatRef, Store};
use std::borrow::Cow;

/// What a layer's backward reads.
struct Pass<'a> {
    exec: &'a Exec,
    batch: &'a TokenBatch,
    /// Layer input `[rows, d_model]`.
    input: &'a [f32],
    /// What else the layer's forward pass left.
    memory: &'a LayerTape,
}

/// A layer's forward pass run again, where the tape keeps its input only; reused from layer to layer.
#[derive(Default)]
struct Replay {
    memory: LayerTape,
    h: Vec<f32>,
    scratch: batch::Scratch,
}

/// Buffers reused from layer to layer.
#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    rounded: Shared,
    forms: RoundedSequences,
    dx: Vec<f32>,
    mlp: MlpScratch,
    dout: Vec<f32>,
}

fn zeroed(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(len, 0.0);
    buffer
}

/// A linear layer of all groups: its weight `[n, k]`, and its input, which may be missing where the weight does not train.
#[derive(Clone, Copy)]
struct Layer<'a> {
    weight: ParamId,
    n: usize,
    k: usize,
    x: Option<LayerInput<'a>>,
}

/// A gradient to write as a matrix.
fn matrix(target: Option<(&mut [f32], Store)>, rows: usize, cols: usize) -> Option<(MatMut<'_>, Store)> {
    target.map(|(values, store)| (MatMut::dense(values, rows, cols), store))
}

fn add(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "gradient block sizes");
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// A backward pass that goes on when it is told to, so that a gradient can be used, and its memory be the next layer's, as soon as it is
/// complete. From [`Model::start_backward`].
pub struct BackwardPass<'a> {
    exec: &'a Exec,
    batch: &'a TokenBatch,
    tape: &'a Tape,
    /// Gradient of the residual stream, as far down as the pass is.
    dh: Vec<f32>,
    /// Where it ends; the number of layers when it goes through none.
    lowest: usize,
    /// Whether the embedding's gradient is wanted.
    below_layers: bool,
    next: Next,
    scratch: Scratch,
    replay: Replay,
}

/// What a [`BackwardPass`] does next.
#[derive(Clone, Copy)]
enum Next {
    /// Nothing but to report what is above the layers.
    Top,
    /// The layer below this one.
    Below(usize),
    End,
}

impl BackwardPass<'_> {
    /// Goes on to where more gradients are complete and tells whose (trainable or not); nothing at the end. Every parameter that the pass adds
    /// to is told once, and `model`'s values of it are not read again.
    pub fn advance(
        &mut self,
        model: &Model,
        grads: &mut Grads,
        observer: &mut dyn GradObserver,
    ) -> Option<Vec<ParamId>> {
        let layout = &model.layout;
        match self.next {
            Next::End => None,
            Next::Top => {
                self.next = Next::Below(model.config.layers);
                let output = (layout.output != layout.embed).then_some(layout.output);
                Some([layout.norm].into_iter().chain(output).collect())
            }
            Next::Below(above) => {
                let next = (self.lowest..above).rev().find(|&layer| !model.plan.is_skipped(layer));
                if let Some(layer) = next {
                    self.next = Next::Below(layer);
                    self.layer(model, layer, grads, observer);
                    return Some(model.layer_params(layer).collect());
                }
                self.next = Next::End;
                let grad = grads.get_mut(layout.embed)?;
                let d_model = model.config.d_model;
                for (&token, dh) in self.batch.tokens().iter().zip(self.dh.chunks_exact(d_model)) {
                    add(dh, &mut grad[token as usize * d_model..(token as usize + 1) * d_model]);
                }
                Some(vec![layout.embed])
            }
        }
    }

    fn layer(&mut self, model: &Model, layer: usize, grads: &mut Grads, observer: &mut dyn GradObserver) {
        let Self { exec, batch, tape, dh, scratch, replay, .. } = self;
        let (exec, batch, tape) = (*exec, *batch, *tape);
        let input = &tape.layers[layer].input;
        let again = tape.forgets(layer);
        if again {
            model.replay(exec, batch, layer, input, replay);
        }
        let memory = if again { &replay.memory } else { &tape.layers[layer] };
        let pass = Pass { exec, batch, input, memory };
        model.mlp_backward(&pass, layer, dh, grads, scratch);
        let below = self.below_layers || layer > self.lowest;
        model.attention_block_backward(&pass, layer, dh, grads, observer, below, scratch);
    }
}

impl Model {
    /// Backward of [`forward_batch`](Self::forward_batch) from the gradient of the final normed hidden states; adds to `grads`. Stops as
    /// soon as neither a trainable parameter nor (with `observe_all`) an observer needs more. The same inputs give the same
    /// bits.
    ///
    /// # Panics
    /// When `tape` was not filled by a complete forward pass over a batch of this shape, or `dhidden` has another size.
    pub fn backward(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        tape: &Tape,
        dhidden: &[f32],
        grads: &mut Grads,
        observer: &mut dyn GradObserver,
        observe_all: bool,
    ) {
        let mut pass = self.start_backward(exec, batch, tape, dhidden, grads, observe_all);
        while pass.advance(self, grads, observer).is_some() {}
    }

    /// [`backward`](Self::backward) in steps. The output projection's own gradient, which the caller made, should be in `grads` already.
    ///
    /// # Panics
    /// As [`backward`](Self::backward).
    pub fn start_backward<'a>(
        &self,
        exec: &'a Exec,
        batch: &'a TokenBatch,
        tape: &'a Tape,
        dhidden: &[f32],
        grads: &mut Grads,
        observe_all: bool,
    ) -> BackwardPass<'a> {
        let values = batch.rows() * self.config.d_model;
        assert_eq!(dhidden.len(), values, "gradient of {} rows", batch.rows());
        let mut pass = BackwardPass {
            exec,
            batch,
            tape,
            dh: vec![0.0; values],
            lowest: self.config.layers,
            below_layers: grads.wants(self.layout.embed),
            next: Next::End,
            scratch: Scratch::default(),
            replay: Replay::default(),
        };
        if values == 0 {
            return pass;
        }
        assert_eq!(tape.last.len(), values, "the tape does not hold a complete pass over this batch");
        pass.lowest = match pass.below_layers || observe_all {
            true => 0,
            false => (0..self.config.layers)
                .find(|&l| self.layer_params(l).any(|id| grads.wants(id)))
                .unwrap_or(self.config.layers),
        };
        let norm = self.layout.norm;
        let (weight, eps) = (self.params.data(norm), self.config.rms_eps);
        rms_norm_backward(exec, &tape.last, weight, eps, dhidden, &mut pass.dh, grads.get_mut(norm));
        pass.next = Next::Top;
        pass
    }

    /// Fills `replay.memory` with what the layer's forward pass over `input` would have left on a complete tape.
    fn replay(&self, exec: &Exec, batch: &TokenBatch, layer: usize, input: &[f32], replay: &mut Replay) {
        let Replay { memory, h, scratch } = replay;
        h.clear();
        h.extend_from_slice(input);
        let pass = Forward { exec, batch, record: true, gates: None, edits: None };
        self.attention_block(&pass, layer, h, memory, scratch, &mut NoObserver);
        self.mlp_again(exec, layer, h, &mut scratch.mlp, &mut memory.mlp);
    }

    /// Every parameter of a layer.
    fn layer_params(&self, layer: usize) -> impl Iterator<Item = ParamId> + '_ {
        let ids = &self.layout.layers[layer];
        let always = [ids.input_norm, ids.q, ids.k, ids.v, ids.o, ids.post_norm, ids.gate, ids.up, ids.down];
        let optional = [ids.q_bias, ids.k_bias, ids.v_bias, ids.q_norm, ids.k_norm];
        always.into_iter().chain(optional.into_iter().flatten()).chain(ids.heads.iter().flatten().copied())
    }

    /// Turns the gradient of the layer's output into that of the residual stream between attention and MLP.
    fn mlp_backward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        dh: &mut [f32],
        grads: &mut Grads,
        scratch: &mut Scratch,
    ) {
        let Pass { exec, batch, memory, .. } = *pass;
        let LayerTape { mid, mlp, .. } = memory;
        let ids = &self.layout.layers[layer];
        let (rows, d_model, d_ff) = (batch.rows(), self.config.d_model, self.config.d_ff);
        let Scratch { x, rounded, dx, mlp: buffers, .. } = scratch;
        let trains = [ids.gate, ids.up].iter().any(|&id| grads.wants(id));
        let x = trains.then(|| {
            self.norm(exec, mid, ids.post_norm, x);
            several(exec, x, d_model, rounded, Uses::WeightGrads)
        });
        dx.resize(rows * d_model, 0.0);
        let [gate, up, down] = grads.targets([ids.gate, ids.up, ids.down]);
        let wanted = MlpGrads {
            gate: matrix(gate, d_ff, d_model),
            up: matrix(up, d_ff, d_model),
            down: matrix(down, d_model, d_ff),
        };
        let (dy, to) = (MatRef::dense(dh, rows, d_model), MatMut::dense(dx, rows, d_model));
        mlp_backward(exec, x, self.mlp_weights(layer), mlp, dy, wanted, to, buffers);
        let norm = self.params.data(ids.post_norm);
        rms_norm_backward(exec, mid, norm, self.config.rms_eps, dx, dh, grads.get_mut(ids.post_norm));
    }

    /// Gradients of a linear layer's weight, where it trains, and of its input: `dx = dy · weight` (or `+=`).
    fn layer_backward(
        &self,
        exec: &Exec,
        layer: Layer<'_>,
        dy: &[f32],
        grads: &mut Grads,
        dx: &mut [f32],
        store: Store,
    ) {
        let Layer { weight, n, k, x } = layer;
        let rows = dy.len() / n;
        let dw = grads.target(weight).map(|(dw, store)| {
            let x = x.expect("the input of a layer that trains");
            (x, MatMut::dense(dw, n, k), store)
        });
        let weight = MatRef::dense(self.params.data(weight), n, k);
        let dx = (MatMut::dense(dx, rows, k), store);
        linear_backward(exec, weight, MatRef::dense(dy, rows, n), dw, Some(dx));
    }

    /// Turns the gradient between attention and MLP into that of the layer's input; `below`: whether anybody needs the latter.
    #[allow(clippy::too_many_arguments, reason = "private; the arguments are the pass's whole state")]
    fn attention_block_backward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        dh: &mut [f32],
        grads: &mut Grads,
        observer: &mut dyn GradObserver,
        below: bool,
        scratch: &mut Scratch,
    ) {
        let Pass { exec, batch, input, memory } = *pass;
        let ids = &self.layout.layers[layer];
        let (rows, d_model, width) =
            (batch.rows(), self.config.d_model, self.config.heads * self.config.head_dim);
        let Scratch { x, rounded, forms, dx, dout, .. } = scratch;
        dout.resize(rows * width, 0.0);
        let out = Some(MatRef::dense(&memory.out, rows, width).into());
        let o = Layer { weight: ids.o, n: d_model, k: width, x: out };
        self.layer_backward(exec, o, dh, grads, dout, Store::Overwrite);
        for (sequence, rows) in batch.ranges().enumerate() {
            observer.head_outputs(layer, sequence, rows_of(dout, rows, width));
        }
        let need_dx = below || grads.wants(ids.input_norm);
        let trains_qkv = [
            Some(ids.q),
            Some(ids.k),
            Some(ids.v),
            ids.q_bias,
            ids.k_bias,
            ids.v_bias,
            ids.q_norm,
            ids.k_norm,
        ]
        .into_iter()
        .flatten()
        .any(|id| grads.wants(id));
        let trains_heads = ids.heads.iter().flatten().any(|&id| grads.wants(id));
        if !(need_dx || trains_qkv || trains_heads) {
            return;
        }
        self.norm(exec, input, ids.input_norm, x);
        zeroed(dx, if need_dx { rows * d_model } else { 0 });
        if need_dx || trains_qkv {
            let x = match [ids.q, ids.k, ids.v].iter().any(|&id| grads.wants(id)) {
                true => several(exec, x, d_model, rounded, Uses::WeightGrads),
                false => MatRef::dense(x, rows, d_model).into(),
            };
            self.kept_backward(pass, layer, x, dout, grads, need_dx.then_some(&mut *dx));
        }
        self.converted_backward(pass, layer, x, dout, grads, need_dx.then_some(&mut *dx), forms);
        if need_dx {
            let norm = self.params.data(ids.input_norm);
            rms_norm_backward(exec, input, norm, self.config.rms_eps, dx, dh, grads.get_mut(ids.input_norm));
        }
    }

    /// Kept groups: softmax attention, RoPE, q/k norms, projections.
    fn kept_backward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        x: LayerInput<'_>,
        dout: &[f32],
        grads: &mut Grads,
        mut dx: Option<&mut Vec<f32>>,
    ) {
        let Pass { exec, batch, memory, .. } = *pass;
        let ids = &self.layout.layers[layer];
        if ids.kept == 0 {
            return;
        }
        let LayerTape { qkv, out, lse, streaming, .. } = memory;
        let (rows, groups) = (batch.rows(), self.config.kv_heads);
        let per_group = self.config.group_size() * self.config.head_dim;
        let (q_width, kv_width) = (ids.kept * per_group, ids.kept * self.config.head_dim);
        let shape = self.attn_shape(ids.kept);
        let [mut packed_out, mut packed_dout] = [Vec::new(), Vec::new()];
        let (out, dout) = if ids.kept == groups {
            (out.as_slice(), dout)
        } else {
            for (full, packed) in [(out.as_slice(), &mut packed_out), (dout, &mut packed_dout)] {
                packed.resize(rows * q_width, 0.0);
                pack(full, packed, &ids.runs, per_group, groups);
            }
            (packed_out.as_slice(), packed_dout.as_slice())
        };
        let [mut dq, mut dk, mut dv] = [q_width, kv_width, kv_width].map(|width| vec![0.0; rows * width]);
        let parts = match streaming {
            Some(streaming) => streaming.parts(lse, dout),
            None => vec![Part { window: None, out, lse, dout: Cow::Borrowed(dout) }],
        };
        for part in &parts {
            for rows in batch.ranges() {
                let saved = AttnSaved {
                    q: rows_of(&qkv.q, rows.clone(), q_width),
                    k: rows_of(&qkv.k, rows.clone(), kv_width),
                    v: rows_of(&qkv.v, rows.clone(), kv_width),
                    out: rows_of(part.out, rows.clone(), q_width),
                    lse: &part.lse[rows.start * shape.q_heads..rows.end * shape.q_heads],
                    dout: rows_of(&part.dout, rows.clone(), q_width),
                    dlse: None,
                };
                let [q, kv] = [q_width, kv_width].map(|width| rows.start * width..rows.end * width);
                let kv_pos: Vec<usize> = (0..rows.len()).collect();
                let mask = match part.window {
                    None => AttnMask::Causal { q_pos0: 0 },
                    Some((window, sinks)) => AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks },
                };
                attention_backward(exec, shape, mask, saved, &mut dq[q], &mut dk[kv.clone()], &mut dv[kv]);
            }
        }
        let [q_block, k_block, v_block] = self.blocks(layer);
        for (grad, width, norm, raw) in
            [(&mut dq, q_width, ids.q_norm, &qkv.q_raw), (&mut dk, kv_width, ids.k_norm, &qkv.k_raw)]
        {
            self.rotate(exec, grad, width, batch, Rotation::Inverse);
            if let Some(norm) = norm {
                let mut draw = vec![0.0; grad.len()];
                let weight = self.params.data(norm);
                rms_norm_backward(
                    exec,
                    raw,
                    weight,
                    self.config.rms_eps,
                    grad,
                    &mut draw,
                    grads.get_mut(norm),
                );
                *grad = draw;
            }
        }
        for (block, grad) in [(q_block, &dq), (k_block, &dk), (v_block, &dv)] {
            self.projection_backward(exec, &ids.runs, &block, x, grad, grads, dx.as_deref_mut());
        }
    }

    /// Packed projection of kept groups: gradients of its weight and bias rows and of its input.
    #[allow(clippy::too_many_arguments, reason = "private; the arguments are the pass's whole state")]
    fn projection_backward(
        &self,
        exec: &Exec,
        runs: &[Run],
        block: &Block,
        x: LayerInput<'_>,
        grad: &[f32],
        grads: &mut Grads,
        mut dx: Option<&mut Vec<f32>>,
    ) {
        let (rows, d_model) = (x.values.rows(), x.values.cols());
        let width = grad.len() / rows;
        let weight = self.params.data(block.weight);
        for run in runs {
            let (n, first) = (run.groups * block.rows, run.group * block.rows);
            let columns = MatRef::dense(grad, rows, width).columns(run.packed * block.rows, n);
            let w = first * d_model..(first + n) * d_model;
            let dw = match n * d_model == weight.len() {
                true => grads.target(block.weight),
                false => grads.get_mut(block.weight).map(|dw| (&mut dw[w.clone()], Store::Accumulate)),
            };
            let dw = dw.map(|(dw, store)| (x, MatMut::dense(dw, n, d_model), store));
            let dx = dx.as_deref_mut().map(|dx| (MatMut::dense(dx, rows, d_model), Store::Accumulate));
            linear_backward(exec, MatRef::dense(&weight[w], n, d_model), columns, dw, dx);
        }
        if let Some(target) = block.bias.and_then(|bias| grads.get_mut(bias)) {
            let mut sums = vec![0.0; width];
            add_column_sums(exec, grad, &mut sums);
            for run in runs {
                let (n, first, packed) =
                    (run.groups * block.rows, run.group * block.rows, run.packed * block.rows);
                add(&sums[packed..packed + n], &mut target[first..first + n]);
            }
        }
    }
}
