//! One layer of the engine: packed weights and its pass over the rows of one or several sequences.

use super::workspace::Workspace;
use crate::cache::LayerCache;
use crate::mixers::{
    self, BaseGroup, HeadCache, HeadEnv, HeadInputs, HeadLayout, HeadView, StepInputs, StepScratch,
    StepWeights,
};
use crate::plan::RecurrentKind;
use kernels::kv::AttendJob;
use kernels::packed::{Packed, Product, matmul, matmul_swiglu};
use kernels::{Exec, MatMut, MatRef, Precision, Store, elementwise};
use smallvec::SmallVec;
use weights::ModelConfig;

/// Projections of the layer input that are stored in one type: one product.
#[derive(Debug)]
pub(super) struct Segment {
    pub weight: Packed,
    /// One value per row, zero where the part has no bias.
    pub bias: Option<Vec<f32>>,
}

/// Columns of a segment's output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub segment: usize,
    pub column: usize,
    pub width: usize,
}

/// Attention of the kept groups, one after another in each block.
#[derive(Debug)]
pub(super) struct Kept {
    pub q: Block,
    pub k: Block,
    pub v: Block,
    /// First column of each kept group in the layer's head outputs.
    pub out_columns: Vec<usize>,
}

/// A converted group.
#[derive(Debug)]
pub(super) struct ConvertedGroup {
    pub group: usize,
    /// In the order of [`HeadLayout::projections`].
    pub blocks: Vec<Block>,
    /// In the order of [`HeadLayout::tensors`]; projections of the layer input are empty.
    pub tensors: Vec<Vec<f32>>,
    /// Of single tokens, where the mixer has such a form.
    pub step: Option<StepWeights>,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub input_norm: Vec<f32>,
    pub segments: Vec<Segment>,
    pub kept: Option<Kept>,
    pub converted: Vec<ConvertedGroup>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub o: Packed,
    pub post_norm: Vec<f32>,
    pub gate: Packed,
    pub up: Packed,
    pub down: Packed,
}

/// What every layer reads besides its weights.
pub(super) struct Pass<'a> {
    pub exec: &'a Exec,
    /// Of the products inside converted groups, when several tokens go through them together.
    pub precision: Precision,
    pub config: &'a ModelConfig,
    pub head: Option<HeadLayout>,
    pub inv_freq: &'a [f64],
}

impl Layer {
    /// Packed bytes.
    pub fn bytes(&self) -> usize {
        let segments: usize = self.segments.iter().map(|s| s.weight.bytes()).sum();
        segments + [&self.o, &self.gate, &self.up, &self.down].map(Packed::bytes).iter().sum::<usize>()
    }

    /// Head outputs of the residual stream `ws.h` into `ws.heads`, the layer's input into `ws.input`; advances every sequence's memory.
    pub fn mix(&self, pass: &Pass<'_>, ws: &mut Workspace, memories: &mut [&mut LayerCache]) {
        let Pass { exec, config, .. } = *pass;
        let (d_model, width) = (config.d_model, config.heads * config.head_dim);
        let rows = ws.h.len() / d_model;
        let eps = config.rms_eps;

        let weights: SmallVec<[&Packed; 4]> = self.segments.iter().map(|s| &s.weight).collect();
        ws.input.set_rms_norm(exec, MatRef::dense(&ws.h, rows, d_model), &self.input_norm, eps, &weights);
        ws.projected.resize_with(self.segments.len().max(ws.projected.len()), Vec::new);
        let mut products: SmallVec<[Product<'_>; 4]> = SmallVec::new();
        for (segment, out) in self.segments.iter().zip(&mut ws.projected) {
            let n = segment.weight.rows();
            out.resize(rows * n, 0.0);
            products.push(Product {
                weight: &segment.weight,
                bias: segment.bias.as_deref(),
                out: MatMut::dense(out, rows, n),
                store: Store::Overwrite,
            });
        }
        matmul(exec, &ws.input, &mut products);
        drop(products);

        ws.heads.resize(rows * width, 0.0);
        self.attend(pass, ws, memories);
        self.recur(pass, ws, memories);
    }

    /// Adds what the head outputs and then the feed-forward give to the residual stream.
    pub fn finish(&self, pass: &Pass<'_>, ws: &mut Workspace) {
        let Pass { exec, config, .. } = *pass;
        let (d_model, width) = (config.d_model, config.heads * config.head_dim);
        let rows = ws.h.len() / d_model;
        let eps = config.rms_eps;
        ws.input.set(exec, MatRef::dense(&ws.heads, rows, width), &[&self.o]);
        accumulate(exec, &ws.input, &self.o, &mut ws.h, rows);
        let post = MatRef::dense(&ws.h, rows, d_model);
        ws.input.set_rms_norm(exec, post, &self.post_norm, eps, &[&self.gate, &self.up]);
        let d_ff = self.gate.rows();
        ws.active.resize(rows * d_ff, 0.0);
        matmul_swiglu(exec, &ws.input, &self.gate, &self.up, MatMut::dense(&mut ws.active, rows, d_ff));
        ws.input.set(exec, MatRef::dense(&ws.active, rows, d_ff), &[&self.down]);
        accumulate(exec, &ws.input, &self.down, &mut ws.h, rows);
    }

    /// Attention of the kept groups into their columns of `ws.heads`.
    fn attend(&self, pass: &Pass<'_>, ws: &mut Workspace, memories: &mut [&mut LayerCache]) {
        let Some(kept) = &self.kept else { return };
        let Pass { exec, config, .. } = *pass;
        let head_dim = config.head_dim;
        let rows = ws.positions.len();
        let width = config.heads * head_dim;
        for (block, norm) in [(kept.q, &self.q_norm), (kept.k, &self.k_norm)] {
            let stride = self.segments[block.segment].weight.rows();
            let values = &mut ws.projected[block.segment][block.column..];
            if let Some(norm) = norm {
                norm_heads(exec, values, (rows, block.width, stride), norm, config.rms_eps, &mut ws.normed);
            }
            ws.rope.rotate(exec, MatMut::new(values, rows, block.width, stride), head_dim);
        }
        let view = |block: Block, s: usize| {
            let stride = self.segments[block.segment].weight.rows();
            let rows = ws.starts[s]..ws.starts[s + 1];
            let values = &ws.projected[block.segment][rows.start * stride + block.column..];
            MatRef::new(values, rows.len(), block.width, stride)
        };
        for (s, memory) in memories.iter_mut().enumerate() {
            let kv = memory.kv.as_mut().expect("a layer with kept groups has keys and values");
            kv.append(exec, view(kept.k, s), view(kept.v, s));
        }
        let mut jobs: SmallVec<[AttendJob<'_>; 4]> = SmallVec::new();
        let mut heads = ws.heads.as_mut_slice();
        for (s, memory) in memories.iter().enumerate() {
            let seq = ws.starts[s + 1] - ws.starts[s];
            let out = heads.split_off_mut(..seq * width).expect("rows of all sequences");
            jobs.push(AttendJob {
                store: memory.kv.as_ref().expect("appended to above"),
                q: view(kept.q, s),
                out: MatMut::dense(out, seq, width),
                out_columns: &kept.out_columns,
            });
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        kernels::kv::attend(exec, config.group_size(), scale, &mut jobs, &mut ws.attend);
    }

    /// The converted groups into their columns of `ws.heads`.
    fn recur(&self, pass: &Pass<'_>, ws: &mut Workspace, memories: &mut [&mut LayerCache]) {
        let Some(layout) = pass.head.filter(|_| !self.converted.is_empty()) else { return };
        let Pass { exec, config, .. } = *pass;
        let (width, per_group) = (config.heads * config.head_dim, layout.d_inner());
        self.rotate_windows(pass, &layout, ws);
        // No sequence is without rows.
        if ws.positions.len() == memories.len() && self.converted.iter().all(|group| group.step.is_some()) {
            return self.step(pass, &layout, ws, memories);
        }
        let rotated_width = layout.rotated_width();
        let stride = self.converted.len() * rotated_width;
        let mut jobs = Vec::with_capacity(self.converted.len() * memories.len());
        for (s, memory) in memories.iter_mut().enumerate() {
            let caches = memory.heads.iter_mut().flatten();
            let groups = self.converted.iter().enumerate();
            jobs.extend(groups.zip(caches).map(|((i, group), cache)| (i, group, s, cache)));
        }
        let inner = if jobs.len() == 1 { exec.clone() } else { exec.single() };
        let inner = inner.with_precision(pass.precision).expect("a precision that this CPU has");
        let outputs = exec.parallel_map_items(jobs, |_, (i, group, s, cache)| {
            let rows = ws.rows(s);
            let seq = rows.len();
            let mut inputs = HeadInputs::from_projections(&layout, |b| self.columns(group.blocks[b], s, ws));
            if rotated_width > 0 {
                let rows = &ws.rotated[rows.start * stride..rows.end * stride];
                let columns = |start, width| dense(rows, stride, i * rotated_width + start, width);
                inputs = inputs.with_rotated(columns(0, per_group), columns(per_group, config.head_dim));
            }
            let env = HeadEnv {
                layout,
                weights: HeadView { values: group.tensors.iter().map(Vec::as_slice).collect() },
                base: self.base_group(config),
                inv_freq: pass.inv_freq,
            };
            let mut y = vec![0.0; seq * per_group];
            let target = MatMut::dense(&mut y, seq, per_group);
            mixers::forward_projected(&inner, &env, inputs, cache, target);
            (group.group, s, y)
        });
        for (group, s, y) in outputs {
            let rows = ws.rows(s);
            let rows = ws.heads[rows.start * width..rows.end * width].chunks_exact_mut(width);
            for (out, y) in rows.zip(y.chunks_exact(per_group)) {
                out[group * per_group..][..per_group].copy_from_slice(y);
            }
        }
    }

    /// Queries and keys of all windows after norm and RoPE into `ws.rotated`, one group after another in every row.
    fn rotate_windows(&self, pass: &Pass<'_>, layout: &HeadLayout, ws: &mut Workspace) {
        let (width, per_group) = (layout.rotated_width(), layout.d_inner());
        if width == 0 {
            return;
        }
        let Pass { exec, config, .. } = *pass;
        let (rows, stride) = (ws.positions.len(), self.converted.len() * width);
        ws.rotated.resize(rows * stride, 0.0);
        for (i, group) in self.converted.iter().enumerate() {
            let [.., q, k, _] = group.blocks[..] else { panic!("a window has queries, keys and values") };
            for (block, start) in [(q, i * width), (k, i * width + per_group)] {
                let source = self.segments[block.segment].weight.rows();
                let from = ws.projected[block.segment].chunks_exact(source);
                for (to, from) in ws.rotated.chunks_exact_mut(stride).zip(from) {
                    to[start..start + block.width].copy_from_slice(&from[block.column..][..block.width]);
                }
            }
            for (norm, start, columns) in
                [(&self.q_norm, i * width, per_group), (&self.k_norm, i * width + per_group, config.head_dim)]
            {
                if let Some(norm) = norm {
                    let values = &mut ws.rotated[start..];
                    norm_heads(exec, values, (rows, columns, stride), norm, config.rms_eps, &mut ws.normed);
                }
            }
        }
        ws.rope.rotate(exec, MatMut::dense(&mut ws.rotated, rows, stride), config.head_dim);
    }

    /// One token of every sequence through the converted groups.
    fn step(
        &self,
        pass: &Pass<'_>,
        layout: &HeadLayout,
        ws: &mut Workspace,
        memories: &mut [&mut LayerCache],
    ) {
        let Pass { exec, config, .. } = *pass;
        let (width, per_group) = (config.heads * config.head_dim, layout.d_inner());
        let count = self.converted.len() * memories.len();
        ws.steps.resize_with(count.max(ws.steps.len()), StepScratch::default);
        let mut jobs: SmallVec<[StepJob<'_>; 8]> = SmallVec::with_capacity(count);
        let mut scratches = ws.steps.iter_mut();
        for (s, (memory, row)) in memories.iter_mut().zip(ws.heads.chunks_exact_mut(width)).enumerate() {
            let mut caches = memory.heads.iter_mut().flatten();
            for (group, out) in row.chunks_exact_mut(per_group).enumerate() {
                let Some(i) = self.converted.iter().position(|c| c.group == group) else { continue };
                let cache = caches.next().expect("a cache for every converted group");
                let scratch = scratches.next().expect("a buffer for every job");
                jobs.push(StepJob { i, s, cache, scratch, out });
            }
        }
        let (projected, rotated) = (&ws.projected, &ws.rotated);
        let (rotated_width, recurrent) =
            (layout.rotated_width(), layout.spec.recurrent != RecurrentKind::None);
        let single = exec.single();
        exec.parallel_chunks(&mut jobs, 1, |_, job| {
            let StepJob { i, s, cache, scratch, out } = &mut job[0];
            let (i, s) = (*i, *s);
            let group = &self.converted[i];
            let block = |b: usize| {
                let Block { segment, column, width } = group.blocks[b];
                let stride = self.segments[segment].weight.rows();
                &projected[segment][s * stride + column..][..width]
            };
            let last = group.blocks.len();
            let at = (s * self.converted.len() + i) * rotated_width;
            let (rotated_q, rotated_k) = match rotated_width {
                0 => (&[][..], &[][..]),
                n => rotated[at..at + n].split_at(per_group),
            };
            let rate = |b| if recurrent { block(b) } else { &[] };
            let inputs = StepInputs {
                gate: rate(0),
                dt: rate(1),
                input: rate(2),
                q: block(last - 3),
                k: block(last - 2),
                v: block(last - 1),
                rotated_q,
                rotated_k,
            };
            let step = group.step.as_ref().expect("checked by the caller");
            step.step(&single, inputs, cache, scratch, out);
        });
    }

    /// A block of sequence `s`, dense `[seq, width]`.
    fn columns(&self, block: Block, s: usize, ws: &Workspace) -> Vec<f32> {
        let (stride, rows) = (self.segments[block.segment].weight.rows(), ws.rows(s));
        let rows = &ws.projected[block.segment][rows.start * stride..rows.end * stride];
        dense(rows, stride, block.column, block.width)
    }

    /// What a head reads of the base besides projections: the norms.
    fn base_group(&self, config: &ModelConfig) -> BaseGroup<'_> {
        BaseGroup {
            q_proj: &[],
            k_proj: &[],
            v_proj: &[],
            q_bias: None,
            k_bias: None,
            v_bias: None,
            q_norm: self.q_norm.as_deref(),
            k_norm: self.k_norm.as_deref(),
            norm_eps: config.rms_eps,
        }
    }
}

/// One token of one group of one sequence.
struct StepJob<'a> {
    /// Index among the layer's converted groups.
    i: usize,
    /// Sequence.
    s: usize,
    cache: &'a mut HeadCache,
    scratch: &'a mut StepScratch,
    out: &'a mut [f32],
}

/// Columns `start..start + width` of rows of `stride` values.
fn dense(rows: &[f32], stride: usize, start: usize, width: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows.len() / stride * width);
    for row in rows.chunks_exact(stride) {
        values.extend_from_slice(&row[start..start + width]);
    }
    values
}

/// Adds `input · weightᵀ` to the residual stream.
fn accumulate(exec: &Exec, input: &kernels::packed::Input, weight: &Packed, h: &mut [f32], rows: usize) {
    let out = MatMut::dense(h, rows, weight.rows());
    matmul(exec, input, &mut [Product { weight, bias: None, out, store: Store::Accumulate }]);
}

/// RMS norm of every head of strided rows, in place.
fn norm_heads(
    exec: &Exec,
    values: &mut [f32],
    (rows, width, stride): (usize, usize, usize),
    weight: &[f32],
    eps: f32,
    scratch: &mut [Vec<f32>; 2],
) {
    let [dense, normed] = scratch;
    dense.clear();
    for t in 0..rows {
        dense.extend_from_slice(&values[t * stride..t * stride + width]);
    }
    normed.resize(dense.len(), 0.0);
    elementwise::rms_norm(exec, dense, weight, eps, normed);
    for (t, row) in normed.chunks_exact(width).enumerate() {
        values[t * stride..t * stride + width].copy_from_slice(row);
    }
}
