//! Inference: tokens appended to a cached sequence, in chunks of any size.

use super::Model;
use super::parts::{MlpScratch, Qkv, copy_columns, unpack};
use crate::cache::{Cache, LayerCache, append};
use crate::error::{ModelError, Result};
use crate::mixers;
use kernels::attention::{AttnMask, AttnShape, attention};
use kernels::{Exec, MatMut, MatRef};
use std::sync::{Mutex, PoisonError};

/// Which logits a cached forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// `[n, vocab]`.
    All,
    /// `[1, vocab]`, of the last token.
    Last,
    /// Empty.
    None,
}

#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    qkv: Qkv,
    packed_out: Vec<f32>,
    out: Vec<f32>,
    mlp: MlpScratch,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Model {
    /// Inference: appends `tokens` to the cached sequence (prefill chunk or single step). On error the cache is unchanged.
    /// No tokens give no logits.
    ///
    /// # Errors
    /// [`ModelError::Token`], [`ModelError::Context`], and [`ModelError::Cache`] for a cache of a model with another shape
    /// or plan.
    pub fn forward(
        &self,
        exec: &Exec,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
    ) -> Result<Vec<f32>> {
        if self.layout.cache != cache.shape {
            return Err(ModelError::Cache("made for a model of another shape or plan".into()));
        }
        self.check_tokens(tokens, cache.len, cache.len.saturating_add(tokens.len()))?;
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let mut h = self.embed(tokens);
        let mut scratch = Scratch::default();
        let pos0 = cache.len;
        for (layer, memory) in cache.layers.iter_mut().enumerate() {
            self.infer_layer(exec, layer, pos0, &mut h, memory, &mut scratch);
        }
        cache.len += tokens.len();
        let skipped = match rows {
            LogitRows::All => 0,
            LogitRows::Last => tokens.len() - 1,
            LogitRows::None => return Ok(Vec::new()),
        };
        self.norm(exec, &h[skipped * self.config.d_model..], self.layout.norm, &mut scratch.x);
        Ok(self.logits(exec, &scratch.x))
    }

    fn infer_layer(
        &self,
        exec: &Exec,
        layer: usize,
        pos0: usize,
        h: &mut [f32],
        memory: &mut LayerCache,
        scratch: &mut Scratch,
    ) {
        let ids = &self.layout.layers[layer];
        let (groups, rows) = (self.config.kv_heads, h.len() / self.config.d_model);
        let per_group = self.config.group_size() * self.config.head_dim;
        let Scratch { x, qkv, packed_out, out, mlp, gate, up } = scratch;
        self.norm(exec, h, ids.input_norm, x);
        out.resize(rows * groups * per_group, 0.0);
        if ids.kept > 0 {
            self.project(exec, layer, x, (rows, rows, pos0), qkv);
            append(&mut memory.k, &qkv.k);
            append(&mut memory.v, &qkv.v);
            let all_kept = ids.kept == groups;
            if !all_kept {
                packed_out.resize(rows * ids.kept * per_group, 0.0);
            }
            let target = if all_kept { &mut *out } else { &mut *packed_out };
            let (len, kv_width) = (pos0 + rows, ids.kept * self.config.head_dim);
            attention(
                exec,
                self.attn_shape(ids.kept),
                AttnMask::Causal { q_pos0: pos0 },
                MatRef::dense(&qkv.q, rows, ids.kept * per_group),
                MatRef::dense(&memory.k, len, kv_width),
                MatRef::dense(&memory.v, len, kv_width),
                MatMut::dense(target, rows, ids.kept * per_group),
                None,
            );
            if !all_kept {
                unpack(packed_out, out, &ids.runs, per_group, groups);
            }
        }
        self.infer_converted(exec, layer, x, memory, out);
        self.output_projection(exec, layer, out, h);
        self.mlp(exec, layer, h, mlp, gate, up);
    }

    /// Runs the converted groups of a layer on `x`; each fills its columns of `out`.
    fn infer_converted(
        &self,
        exec: &Exec,
        layer: usize,
        x: &[f32],
        memory: &mut LayerCache,
        out: &mut [f32],
    ) {
        let converted = &self.layout.layers[layer].converted;
        let (d_model, width) = (self.config.d_model, self.config.heads * self.config.head_dim);
        let per_group = self.config.group_size() * self.config.head_dim;
        let rows = x.len() / d_model;
        let x = MatRef::dense(x, rows, d_model);
        let env = |group| self.head_env(layer, group).expect("a converted group has a layout");
        let caches = memory.heads.iter_mut().flatten();
        // A group per thread, unless that leaves most threads idle or a single token makes the hand-over cost more than it gains.
        if rows > 1 && converted.len() > 1 && 2 * converted.len() >= exec.threads() && exec.threads() > 1 {
            let caches: Vec<_> = caches.map(Mutex::new).collect();
            let single = exec.single();
            let outputs = exec.parallel_map(caches.len(), |i| {
                let mut y = vec![0.0; rows * per_group];
                let mut cache = caches[i].lock().unwrap_or_else(PoisonError::into_inner);
                mixers::forward(
                    &single,
                    &env(converted[i]),
                    x,
                    &mut cache,
                    MatMut::dense(&mut y, rows, per_group),
                );
                y
            });
            for (y, group) in outputs.iter().zip(converted) {
                copy_columns(y, (0, per_group), out, (group * per_group, width), per_group);
            }
        } else {
            for (cache, &group) in caches.zip(converted) {
                let columns = MatMut::new(&mut out[group * per_group..], rows, per_group, width);
                mixers::forward(exec, &env(group), x, cache, columns);
            }
        }
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
}
