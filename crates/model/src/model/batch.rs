//! Whole sequences from position 0: the forward pass of analysis and training, and the output projection.

use super::Model;
use super::gates::{Gates, StreamingTape};
use super::intervene::Edits;
use super::parts::{MlpScratch, Qkv, copy_columns, unpack};
use super::tokens::{RoundedSequences, TokenBatch, rows_of};
use crate::error::Result;
use crate::mixers::{self, HeadSaved, LayerInput};
use crate::observe::{AttnView, LayerObserver};
use crate::params::{Grads, ParamId};
use kernels::attention::{AttnMask, attention};
use kernels::elementwise::copy;
use kernels::linear::{LayerWeight, RoundedWeight, linear, linear_backward};
use kernels::mlp::MlpActivations;
use kernels::packed::Uses;
use kernels::{Exec, MatMut, MatRef, Store};

/// Activations that a backward pass needs. Reuse one over steps: its buffers stay.
#[derive(Default)]
pub struct Tape {
    pub(super) layers: Vec<LayerTape>,
    /// Input of the final norm; empty until a pass ran through all layers.
    pub(super) last: Vec<f32>,
    /// This many of the lowest layers keep their input only.
    inputs_only: usize,
}

impl Tape {
    /// A tape on which the lowest `layers` layers (all, where there are no more) keep their input alone; the backward pass runs each of them
    /// forward again (activation checkpointing). The gradients are the same bits, for the time of their forward pass and the memory of one
    /// layer's activations instead of theirs.
    pub fn checkpointed(layers: usize) -> Self {
        Self { inputs_only: layers, ..Self::default() }
    }

    /// Whether `layer` keeps its input only.
    pub(super) fn forgets(&self, layer: usize) -> bool {
        layer < self.inputs_only
    }

    /// The residual stream `[rows, d_model]` that came into `layer`, or, for the number of layers, out of the last one.
    ///
    /// # Panics
    /// For more layers than the last pass had.
    pub fn residual(&self, layer: usize) -> &[f32] {
        match layer == self.layers.len() {
            true => &self.last,
            false => &self.layers[layer].input,
        }
    }
}

/// What one layer leaves behind; everything else is recomputed from it.
#[derive(Default)]
pub(super) struct LayerTape {
    /// Layer input `[rows, d_model]`.
    pub input: Vec<f32>,
    /// Residual stream between attention and MLP.
    pub mid: Vec<f32>,
    pub qkv: Qkv,
    /// Head outputs in head order, `[rows, heads · head_dim]`.
    pub out: Vec<f32>,
    /// Log denominators of kept groups, `[rows, kept · group_size]`.
    pub lse: Vec<f32>,
    pub mlp: MlpActivations,
    /// Of converted groups, all sequences of a group in a row.
    pub saved: Vec<HeadSaved>,
    /// Of gated layers: what `out` was mixed from.
    pub streaming: Option<StreamingTape>,
}

/// What every layer of a pass reads.
#[derive(Clone, Copy)]
pub(super) struct Forward<'a> {
    pub exec: &'a Exec,
    pub batch: &'a TokenBatch,
    /// Whether the layer's memory is for a backward pass.
    pub record: bool,
    pub gates: Option<&'a Gates>,
    pub edits: Option<&'a Edits<'a>>,
}

#[derive(Default)]
pub(super) struct Scratch {
    x: Vec<f32>,
    packed_out: Vec<f32>,
    pub mlp: MlpScratch,
    /// Of `x`, for converted groups.
    forms: RoundedSequences,
    /// Full-width queries, keys and values for observers of layers with converted groups.
    wide: [Vec<f32>; 3],
}

impl Model {
    /// Whole sequences from position 0, with observers and, when `tape` is given, everything the backward pass needs. Returns the
    /// final normed hidden states `[rows, d_model]`, sequence after sequence.
    ///
    /// # Errors
    /// [`crate::ModelError::Token`] (with the position in the whole batch) and [`crate::ModelError::Context`].
    pub fn forward_batch(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        observer: &mut dyn LayerObserver,
        tape: Option<&mut Tape>,
    ) -> Result<Vec<f32>> {
        self.forward_pass(exec, batch, observer, tape, (None, None))
    }

    /// [`forward_batch`](Self::forward_batch), gated where `gates` are given; of one sequence with changes where `edits` are.
    pub(super) fn forward_pass(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        observer: &mut dyn LayerObserver,
        tape: Option<&mut Tape>,
        (gates, edits): (Option<&Gates>, Option<&Edits<'_>>),
    ) -> Result<Vec<f32>> {
        self.check_tokens(batch.tokens(), 0, batch.longest())?;
        let mut own = LayerTape::default();
        let mut tape = tape;
        if let Some(tape) = tape.as_deref_mut() {
            tape.layers.resize_with(self.config.layers, LayerTape::default);
            tape.last.clear();
        }
        let mut h = self.embed(batch.tokens());
        if h.is_empty() {
            return Ok(h);
        }
        let mut scratch = Scratch::default();
        for layer in 0..self.config.layers {
            let record = tape.as_deref().is_some_and(|tape| !tape.forgets(layer));
            let pass = Forward { exec, batch, record, gates, edits };
            let memory = match tape.as_deref_mut() {
                Some(tape) => {
                    copy(
                        exec,
                        rows_of(&h, 0..batch.rows(), self.config.d_model),
                        &mut tape.layers[layer].input,
                    );
                    if record { &mut tape.layers[layer] } else { &mut own }
                }
                None => &mut own,
            };
            if self.plan.is_skipped(layer) {
                continue;
            }
            self.attention_block(&pass, layer, &mut h, memory, &mut scratch, observer);
            self.mlp(exec, layer, &mut h, &mut scratch.mlp, &mut memory.mlp);
            for (sequence, rows) in batch.ranges().enumerate() {
                observer.residual(layer, sequence, rows_of(&h, rows, self.config.d_model));
            }
        }
        let mut hidden = Vec::new();
        self.norm(exec, &h, self.layout.norm, &mut hidden);
        if let Some(tape) = tape {
            tape.last = h;
        }
        Ok(hidden)
    }

    /// Adds the attention block of a layer to `h` `[rows, d_model]`.
    pub(super) fn attention_block(
        &self,
        pass: &Forward<'_>,
        layer: usize,
        h: &mut [f32],
        memory: &mut LayerTape,
        scratch: &mut Scratch,
        observer: &mut dyn LayerObserver,
    ) {
        let Forward { exec, batch, record, gates, edits } = *pass;
        self.attention_outputs(exec, layer, batch, h, memory, scratch, record, edits);
        memory.streaming = gates.map(|gates| self.mix_streaming(exec, layer, batch, gates, memory));
        if observer.wants(layer) {
            self.show(layer, batch, memory, scratch, observer);
        }
        self.output_projection(exec, layer, &memory.out, h);
        if record {
            copy(exec, rows_of(h, 0..batch.rows(), self.config.d_model), &mut memory.mid);
        }
    }

    /// Head outputs of a layer, kept and converted groups, into `memory.out`; the block input stays in `scratch.x`.
    #[allow(clippy::too_many_arguments, reason = "private; the arguments are the pass's whole state")]
    fn attention_outputs(
        &self,
        exec: &Exec,
        layer: usize,
        batch: &TokenBatch,
        h: &[f32],
        memory: &mut LayerTape,
        scratch: &mut Scratch,
        record: bool,
        edits: Option<&Edits<'_>>,
    ) {
        let ids = &self.layout.layers[layer];
        let (groups, rows) = (self.config.kv_heads, batch.rows());
        let per_group = self.config.group_size() * self.config.head_dim;
        let Scratch { x, packed_out, mlp, forms, .. } = scratch;
        let LayerTape { qkv, out, lse, saved, .. } = memory;
        self.norm(exec, h, ids.input_norm, x);
        out.resize(rows * groups * per_group, 0.0);
        let turn = edits.and_then(|edits| edits.turn.as_ref());
        self.project(exec, layer, x, batch, turn, qkv, &mut mlp.rounded);
        if ids.kept > 0 {
            let shape = self.attn_shape(ids.kept);
            let (q_width, kv_width) = (ids.kept * per_group, ids.kept * self.config.head_dim);
            let all_kept = ids.kept == groups;
            packed_out.resize(if all_kept { 0 } else { rows * q_width }, 0.0);
            lse.resize(if record { rows * shape.q_heads } else { 0 }, 0.0);
            let target = if all_kept { &mut *out } else { &mut *packed_out };
            for (rows, target) in batch.ranges().zip(batch.split_mut(target, q_width)) {
                attention(
                    exec,
                    shape,
                    AttnMask::Causal { q_pos0: 0 },
                    rows_of(&qkv.q, rows.clone(), q_width),
                    rows_of(&qkv.k, rows.clone(), kv_width),
                    rows_of(&qkv.v, rows.clone(), kv_width),
                    MatMut::dense(target, rows.len(), q_width),
                    record.then(|| &mut lse[rows.start * shape.q_heads..rows.end * shape.q_heads]),
                );
            }
            if !all_kept {
                unpack(packed_out, out, &ids.runs, per_group, groups);
            }
        }
        if let Some(edits) = edits {
            self.edit_outputs(exec, layer, edits, qkv, out);
        }
        saved.clear();
        self.converted_outputs(exec, layer, batch, x, out, record.then_some((saved, forms)));
    }

    /// Converted groups of a layer, every (group, sequence) on its own thread; with `saved`, keeps what their backward needs.
    fn converted_outputs(
        &self,
        exec: &Exec,
        layer: usize,
        batch: &TokenBatch,
        x: &[f32],
        out: &mut [f32],
        saved: Option<(&mut Vec<HeadSaved>, &mut RoundedSequences)>,
    ) {
        let converted = &self.layout.layers[layer].converted;
        let per_group = self.config.group_size() * self.config.head_dim;
        let width = self.config.heads * self.config.head_dim;
        let (sequences, d_model) = (batch.sequences(), self.config.d_model);
        let (saved, forms) = saved.unzip();
        let record = saved.is_some();
        let jobs = converted.len() * sequences;
        let inner = if jobs == 1 { exec.clone() } else { exec.single() };
        let forms = forms.filter(|_| jobs > 0).map(|forms| {
            forms.set(exec, MatRef::dense(x, batch.rows(), d_model), batch, Uses::Linear);
            &*forms
        });
        let outputs = exec.parallel_map(jobs, |job| {
            let (group, s) = (converted[job / sequences], job % sequences);
            let env = self.head_env(layer, group).expect("a converted group has a layout");
            let x = rows_of(x, batch.range(s), d_model);
            let mut y = vec![0.0; x.rows() * per_group];
            let target = MatMut::dense(&mut y, x.rows(), per_group);
            let saved = if record {
                let x = LayerInput { values: x, shared: forms.and_then(|forms| forms.get(s)) };
                Some(mixers::forward_train(&inner, &env, x, target))
            } else {
                mixers::forward(&inner, &env, x, &mut env.layout.new_cache(), target);
                None
            };
            (y, saved)
        });
        let mut kept_for_backward = Vec::with_capacity(if record { jobs } else { 0 });
        for (job, (y, job_saved)) in outputs.into_iter().enumerate() {
            let (group, s) = (converted[job / sequences], job % sequences);
            let rows = batch.range(s);
            let rows = &mut out[rows.start * width..rows.end * width];
            copy_columns(&y, (0, per_group), rows, (group * per_group, width), per_group);
            kept_for_backward.extend(job_saved);
        }
        if let Some(saved) = saved {
            *saved = kept_for_backward;
        }
    }

    /// Shows a layer to the observer, sequence by sequence.
    fn show(
        &self,
        layer: usize,
        batch: &TokenBatch,
        memory: &LayerTape,
        scratch: &mut Scratch,
        observer: &mut dyn LayerObserver,
    ) {
        let ids = &self.layout.layers[layer];
        let (groups, head_dim) = (self.config.kv_heads, self.config.head_dim);
        let per_group = self.config.group_size() * head_dim;
        let Scratch { x, wide, .. } = scratch;
        let packed = [(&memory.qkv.q, per_group), (&memory.qkv.k, head_dim), (&memory.qkv.v, head_dim)];
        let full = if ids.kept == groups {
            packed.map(|(values, _)| values.as_slice())
        } else {
            for (target, (values, per_group)) in wide.iter_mut().zip(packed) {
                target.clear();
                target.resize(batch.rows() * groups * per_group, 0.0);
                unpack(values, target, &ids.runs, per_group, groups);
            }
            [wide[0].as_slice(), wide[1].as_slice(), wide[2].as_slice()]
        };
        for (sequence, rows) in batch.ranges().enumerate() {
            let part = |values, width| rows_of(values, rows.clone(), width);
            observer.attention(AttnView {
                layer,
                sequence,
                x: part(x, self.config.d_model),
                q: part(full[0], groups * per_group),
                k: part(full[1], groups * head_dim),
                v: part(full[2], groups * head_dim),
                out: part(&memory.out, groups * per_group),
            });
        }
    }

    /// `[rows, vocab]` logits of final hidden states.
    pub fn logits(&self, exec: &Exec, hidden: &[f32]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.logits_into(exec, hidden, None, &mut logits);
        logits
    }

    /// The output projection `[vocab, d_model]`.
    pub fn output_weight(&self) -> MatRef<'_> {
        MatRef::dense(self.params.data(self.layout.output), self.config.vocab, self.config.d_model)
    }

    /// The parameter of [`output_weight`](Self::output_weight): the embedding's where they are tied.
    pub fn output_param(&self) -> ParamId {
        self.layout.output
    }

    /// [`logits`](Self::logits) into a buffer that is reused from call to call; `rounded` is of [`output_weight`](Self::output_weight).
    pub fn logits_into(
        &self,
        exec: &Exec,
        hidden: &[f32],
        rounded: Option<&RoundedWeight>,
        logits: &mut Vec<f32>,
    ) {
        let (d_model, vocab) = (self.config.d_model, self.config.vocab);
        let rows = hidden.len() / d_model;
        logits.resize(rows * vocab, 0.0);
        let weight = LayerWeight { values: self.output_weight(), rounded };
        let x = MatRef::dense(hidden, rows, d_model);
        linear(exec, x.into(), weight, MatMut::dense(logits, rows, vocab), Store::Overwrite);
    }

    /// Backward of [`logits_into`](Self::logits_into) for some rows: adds to the output projection's gradient (when trainable) and returns the
    /// gradient of `hidden`.
    pub fn logits_backward(
        &self,
        exec: &Exec,
        hidden: &[f32],
        dlogits: &[f32],
        rounded: Option<&RoundedWeight>,
        grads: &mut Grads,
    ) -> Vec<f32> {
        let (d_model, vocab) = (self.config.d_model, self.config.vocab);
        let rows = hidden.len() / d_model;
        let mut dhidden = vec![0.0; hidden.len()];
        let weight = LayerWeight { values: self.output_weight(), rounded };
        let dx = (MatMut::dense(&mut dhidden, rows, d_model), Store::Overwrite);
        let x = MatRef::dense(hidden, rows, d_model);
        let dw = grads.target(self.layout.output);
        let dw = dw.map(|(dw, store)| (x.into(), MatMut::dense(dw, vocab, d_model), store));
        linear_backward(exec, weight, MatRef::dense(dlogits, rows, vocab), dw, Some(dx));
        dhidden
    }
}
