//! Pieces of the batched forward pass. Activations are `[rows, features]`; "packed" columns are those of
//! a layer's kept groups only, in order.

use super::Model;
use super::layout::Run;
use super::tokens::TokenBatch;
use crate::params::ParamId;
use kernels::attention::AttnShape;
use kernels::elementwise::{add_bias, rms_norm};
use kernels::linear::{LayerInput, linear};
use kernels::mlp::{self, MlpActivations, MlpWeights};
use kernels::packed::{Shared, Uses};
use kernels::rope::{RopeTable, Rotation, rope};
use kernels::{Exec, MatMut, MatRef, Store};

/// Attention inputs of a layer's kept groups, packed.
#[derive(Default)]
pub(super) struct Qkv {
    /// `[rows, kept · group_size · head_dim]`, after norm and RoPE.
    pub q: Vec<f32>,
    /// `[rows, kept · head_dim]`, after norm and RoPE.
    pub k: Vec<f32>,
    /// `[rows, kept · head_dim]`.
    pub v: Vec<f32>,
    /// `q` before norm and RoPE; empty without q/k norms.
    pub q_raw: Vec<f32>,
    /// `k` before norm and RoPE; likewise.
    pub k_raw: Vec<f32>,
}

/// Which tensor of a layer, for per-group row blocks.
pub(super) struct Block {
    pub weight: ParamId,
    pub bias: Option<ParamId>,
    /// Rows of one group.
    pub rows: usize,
}

/// `out (+)= x · wᵀ` of dense matrices, `w` `[n, k]`.
pub(super) fn linear_rows(
    exec: &Exec,
    x: &[f32],
    w: &[f32],
    out: &mut [f32],
    rows: usize,
    n: usize,
    store: Store,
) {
    let (x, w) = (MatRef::dense(x, rows, w.len() / n), MatRef::dense(w, n, w.len() / n));
    linear(exec, x.into(), w, MatMut::dense(out, rows, n), store);
}

/// `x` `[rows, k]` as the input of several linear layers or of their weights' gradients, rounded in `memory` where that pays.
pub(super) fn several<'a>(
    exec: &Exec,
    x: &'a [f32],
    k: usize,
    memory: &'a mut Shared,
    uses: Uses,
) -> LayerInput<'a> {
    let values = MatRef::dense(x, x.len() / k, k);
    LayerInput { values, shared: memory.set(exec, values, uses) }
}

/// Copies `cols` columns between row-major matrices of `rows` rows; `(start, width)` of source and destination.
pub(super) fn copy_columns(
    src: &[f32],
    (src_start, src_width): (usize, usize),
    dst: &mut [f32],
    (dst_start, dst_width): (usize, usize),
    cols: usize,
) {
    for (from, to) in src.chunks_exact(src_width).zip(dst.chunks_exact_mut(dst_width)) {
        to[dst_start..dst_start + cols].copy_from_slice(&from[src_start..src_start + cols]);
    }
}

/// Copies packed columns into full-width ones (`per_group` columns each group) or back.
pub(super) fn unpack(packed: &[f32], full: &mut [f32], runs: &[Run], per_group: usize, groups: usize) {
    let kept: usize = runs.iter().map(|r| r.groups).sum();
    for run in runs {
        let (from, to) = (run.packed * per_group, run.group * per_group);
        copy_columns(
            packed,
            (from, kept * per_group),
            full,
            (to, groups * per_group),
            run.groups * per_group,
        );
    }
}

/// The reverse of [`unpack`].
pub(super) fn pack(full: &[f32], packed: &mut [f32], runs: &[Run], per_group: usize, groups: usize) {
    let kept: usize = runs.iter().map(|r| r.groups).sum();
    for run in runs {
        let (from, to) = (run.group * per_group, run.packed * per_group);
        copy_columns(
            full,
            (from, groups * per_group),
            packed,
            (to, kept * per_group),
            run.groups * per_group,
        );
    }
}

impl Model {
    /// Query, key and value blocks of a layer.
    pub(super) fn blocks(&self, layer: usize) -> [Block; 3] {
        let ids = &self.layout.layers[layer];
        let (d, q_rows) = (self.config.head_dim, self.config.group_size() * self.config.head_dim);
        [
            Block { weight: ids.q, bias: ids.q_bias, rows: q_rows },
            Block { weight: ids.k, bias: ids.k_bias, rows: d },
            Block { weight: ids.v, bias: ids.v_bias, rows: d },
        ]
    }

    /// One projection of all kept groups, packed.
    fn project_block(&self, exec: &Exec, layer: usize, block: &Block, x: LayerInput<'_>, out: &mut Vec<f32>) {
        let ids = &self.layout.layers[layer];
        let (d_model, width) = (self.config.d_model, ids.kept * block.rows);
        let rows = x.values.rows();
        out.resize(rows * width, 0.0);
        let weight = self.params.data(block.weight);
        for run in &ids.runs {
            let (n, first) = (run.groups * block.rows, run.group * block.rows);
            let w = MatRef::dense(&weight[first * d_model..(first + n) * d_model], n, d_model);
            let columns = MatMut::new(&mut out[run.packed * block.rows..], rows, n, width);
            linear(exec, x, w, columns, Store::Overwrite);
        }
        if let Some(bias) = block.bias {
            let mut packed = vec![0.0; width];
            pack(self.params.data(bias), &mut packed, &ids.runs, block.rows, self.config.kv_heads);
            add_bias(exec, &packed, out);
        }
    }

    /// Queries, keys and values of all kept groups; `x` holds the rows of `batch`, at the positions of `turn` where given.
    pub(super) fn project(
        &self,
        exec: &Exec,
        layer: usize,
        x: &[f32],
        batch: &TokenBatch,
        turn: Option<&RopeTable>,
        qkv: &mut Qkv,
        rounded: &mut Shared,
    ) {
        let ids = &self.layout.layers[layer];
        if ids.kept == 0 {
            *qkv = Qkv::default();
            return;
        }
        let Qkv { q, k, v, q_raw, k_raw } = qkv;
        let x = several(exec, x, self.config.d_model, rounded, Uses::Linear);
        let [q_block, k_block, v_block] = self.blocks(layer);
        self.project_block(exec, layer, &v_block, x, v);
        for (block, norm, raw, out) in [(&q_block, ids.q_norm, q_raw, q), (&k_block, ids.k_norm, k_raw, k)] {
            if let Some(norm) = norm {
                self.project_block(exec, layer, block, x, raw);
                out.resize(raw.len(), 0.0);
                rms_norm(exec, raw, self.params.data(norm), self.config.rms_eps, out);
            } else {
                raw.clear();
                self.project_block(exec, layer, block, x, out);
            }
            let width = ids.kept * block.rows;
            match turn {
                Some(table) => {
                    table.rotate(exec, MatMut::dense(out, batch.rows(), width), self.config.head_dim)
                }
                None => self.rotate(exec, out, width, batch, Rotation::Forward),
            }
        }
    }

    /// RoPE of the rows of `batch`, `width` values each.
    pub(super) fn rotate(
        &self,
        exec: &Exec,
        x: &mut [f32],
        width: usize,
        batch: &TokenBatch,
        rotation: Rotation,
    ) {
        let (head_dim, inv_freq) = (self.config.head_dim, &self.layout.inv_freq);
        exec.parallel_items(batch.split_mut(x, width), |s, sequence| {
            rope(exec, sequence, head_dim, inv_freq, batch.range(s).len(), 0, rotation);
        });
    }

    /// The shape of an attention call over `kept` packed groups.
    pub(super) fn attn_shape(&self, kept: usize) -> AttnShape {
        AttnShape {
            q_heads: kept * self.config.group_size(),
            kv_heads: kept,
            head_dim: self.config.head_dim,
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
        }
    }

    /// Embedding rows of `tokens`, `[tokens, d_model]`.
    pub(super) fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let d_model = self.config.d_model;
        let table = self.params.data(self.layout.embed);
        let mut h = Vec::with_capacity(tokens.len() * d_model);
        for &token in tokens {
            h.extend_from_slice(&table[token as usize * d_model..(token as usize + 1) * d_model]);
        }
        h
    }

    /// RMSNorm with parameter `weight`.
    pub(super) fn norm(&self, exec: &Exec, x: &[f32], weight: ParamId, out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        rms_norm(exec, x, self.params.data(weight), self.config.rms_eps, out);
    }

    /// Gate, up and down projections of a layer.
    pub(super) fn mlp_weights(&self, layer: usize) -> MlpWeights<'_> {
        let (ids, d_model, d_ff) = (&self.layout.layers[layer], self.config.d_model, self.config.d_ff);
        MlpWeights {
            gate: MatRef::dense(self.params.data(ids.gate), d_ff, d_model),
            up: MatRef::dense(self.params.data(ids.up), d_ff, d_model),
            down: MatRef::dense(self.params.data(ids.down), d_model, d_ff),
        }
    }

    /// Adds the MLP block to `h` `[rows, d_model]`, and keeps what its backward pass reads.
    pub(super) fn mlp(
        &self,
        exec: &Exec,
        layer: usize,
        h: &mut [f32],
        scratch: &mut MlpScratch,
        activations: &mut MlpActivations,
    ) {
        let (d_model, weights) = (self.config.d_model, self.mlp_weights(layer));
        let MlpScratch { x, rounded, buffers } = scratch;
        self.norm(exec, h, self.layout.layers[layer].post_norm, x);
        let x = several(exec, x, d_model, rounded, Uses::Linear);
        let out = MatMut::dense(h, x.values.rows(), d_model);
        mlp::mlp(exec, x, weights, activations, buffers, Some(out));
    }

    /// Keeps what [`mlp`](Self::mlp) keeps; `h` stays as it is.
    pub(super) fn mlp_again(
        &self,
        exec: &Exec,
        layer: usize,
        h: &[f32],
        scratch: &mut MlpScratch,
        activations: &mut MlpActivations,
    ) {
        let MlpScratch { x, rounded, buffers } = scratch;
        self.norm(exec, h, self.layout.layers[layer].post_norm, x);
        let x = several(exec, x, self.config.d_model, rounded, Uses::Linear);
        mlp::mlp(exec, x, self.mlp_weights(layer), activations, buffers, None);
    }

    /// Adds `out · W_Oᵀ` to `h`.
    pub(super) fn output_projection(&self, exec: &Exec, layer: usize, out: &[f32], h: &mut [f32]) {
        let d_model = self.config.d_model;
        let weight = self.params.data(self.layout.layers[layer].o);
        linear_rows(exec, out, weight, h, h.len() / d_model, d_model, Store::Accumulate);
    }
}

/// Buffers of [`Model::mlp`] that nobody reads afterwards.
#[derive(Default)]
pub(super) struct MlpScratch {
    /// Block input after the norm.
    pub x: Vec<f32>,
    /// The same, rounded.
    pub rounded: Shared,
    pub buffers: mlp::MlpScratch,
}
