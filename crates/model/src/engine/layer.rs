//! One layer of the engine: packed weights and its pass over the rows of one or several sequences.

use super::windows::Columns;
use super::workspace::Workspace;
use crate::cache::LayerCache;
use crate::mixers::{
    self, BaseGroup, HeadCache, HeadEnv, HeadInputs, HeadLayout, HeadView, StepInputs, StepScratch,
    StepWeights,
};
use crate::plan::RecurrentKind;
use kernels::kv::{AttendJob, KvType};
use kernels::packed::{Packed, Product, matmul, matmul_swiglu};
use kernels::{Exec, MatMut, MatRef, Precision, Store, elementwise};
use smallvec::SmallVec;
use std::ops::Range;
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
    /// Of the sequences' caches.
    pub kv_type: KvType,
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
                window: None,
                lse: None,
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
        let columns = Columns::new(&layout, self.converted.len());
        let windows = layout.rotated_width() > 0;
        if windows {
            self.rotate_windows(pass, columns, ws);
        }
        // No sequence is without rows.
        if ws.positions.len() == memories.len() && self.converted.iter().all(|group| group.step.is_some()) {
            return self.step(pass, &layout, columns, ws, memories);
        }
        if windows {
            self.attend_windows(pass, &layout, columns, ws, memories);
        } else {
            for row in ws.heads.chunks_exact_mut(width) {
                self.converted.iter().for_each(|c| row[c.group * per_group..][..per_group].fill(0.0));
            }
        }
        let mut heads = ws.heads.as_mut_slice();
        let (projected, starts, window_lse) = (&ws.projected, &ws.starts, &ws.window_lse);
        let (weighs, per_lse) = (layout.weighs(), config.group_size());
        let mut jobs = Vec::with_capacity(memories.len());
        for (s, memory) in memories.iter_mut().enumerate() {
            let rows = starts[s]..starts[s + 1];
            let out = heads.split_off_mut(..rows.len() * width).expect("rows of all sequences");
            jobs.push((rows, memory, out));
        }
        let run = |inner: &Exec, (rows, memory, out): (Range<usize>, &mut &mut LayerCache, &mut [f32])| {
            for (i, (group, cache)) in
                self.converted.iter().zip(memory.heads.iter_mut().flatten()).enumerate()
            {
                let inputs = HeadInputs::from_projections(&layout, |b| {
                    let Block { segment, column, width } = group.blocks[b];
                    let stride = self.segments[segment].weight.rows();
                    let from = &projected[segment][rows.start * stride + column..];
                    MatRef::new(from, rows.len(), width, stride)
                });
                let env = self.head_env(pass, layout, group);
                let out = &mut out[group.group * per_group..];
                let out = MatMut::new(out, rows.len(), per_group, width);
                let lse = weighs.then(|| {
                    let stride = self.converted.len() * per_lse;
                    MatRef::new(&window_lse[rows.start * stride + i * per_lse..], rows.len(), per_lse, stride)
                });
                mixers::recur_projected(inner, &env, inputs, lse, cache, out);
            }
        };
        let inner = |exec: Exec| exec.with_precision(pass.precision).expect("a precision that this CPU has");
        if jobs.len() < exec.threads() {
            let inner = inner(exec.clone());
            jobs.into_iter().for_each(|job| run(&inner, job));
        } else {
            let inner = inner(exec.single());
            exec.parallel_items(jobs, |_, job| run(&inner, job));
        }
    }

    /// One token of every sequence through the converted groups.
    fn step(
        &self,
        pass: &Pass<'_>,
        layout: &HeadLayout,
        columns: Columns,
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
        let (windows, recurrent) = (layout.rotated_width() > 0, layout.spec.recurrent != RecurrentKind::None);
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
            let row = s * columns.stride();
            let (rotated_q, rotated_k) = match windows {
                false => (&[][..], &[][..]),
                true => (
                    &rotated[row + columns.q(i)..][..per_group],
                    &rotated[row + columns.k(i)..][..config.head_dim],
                ),
            };
            let rate = |b| if recurrent { block(b) } else { &[] };
            let far = if layout.weighs() { block(3) } else { &[] };
            let inputs = StepInputs {
                gate: rate(0),
                dt: rate(1),
                input: rate(2),
                far,
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

    /// What the passes of a converted group read.
    pub(super) fn head_env<'a>(
        &'a self,
        pass: &Pass<'a>,
        layout: HeadLayout,
        group: &'a ConvertedGroup,
    ) -> HeadEnv<'a> {
        HeadEnv {
            layout,
            weights: HeadView { values: group.tensors.iter().map(Vec::as_slice).collect() },
            base: self.base_group(pass.config),
            inv_freq: pass.inv_freq,
        }
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

/// Adds `input · weightᵀ` to the residual stream.
fn accumulate(exec: &Exec, input: &kernels::packed::Input, weight: &Packed, h: &mut [f32], rows: usize) {
    let out = MatMut::dense(h, rows, weight.rows());
    matmul(exec, input, &mut [Product { weight, bias: None, out, store: Store::Accumulate }]);
}

/// RMS norm of every head of strided rows, in place.
pub(super) fn norm_heads(
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
