//! Inference: tokens appended to cached sequences, a chunk of any size to one or a token to each of several.

use super::Model;
use super::batch::rows_of;
use super::parts::{MlpScratch, Qkv, copy_columns, unpack};
use crate::cache::{Cache, LayerCache, append};
use crate::error::{ModelError, Result};
use crate::mixers;
use kernels::attention::{AttnMask, AttnShape, attention};
use kernels::{Exec, MatMut, MatRef};

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
        self.check_append(tokens, cache)?;
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let h = self.append_tokens(exec, tokens, &mut [cache]);
        let skipped = match rows {
            LogitRows::All => 0,
            LogitRows::Last => tokens.len() - 1,
            LogitRows::None => return Ok(Vec::new()),
        };
        Ok(self.final_logits(exec, &h[skipped * self.config.d_model..]))
    }

    /// One decoding step of several sequences: appends `tokens[i]` to the sequence of `caches[i]`, which may have any lengths, and
    /// returns the logits that follow, `[n, vocab]`. Weights are read once for all sequences, so that a step of several costs little more
    /// than one of a single sequence. Row `i` is what [`forward`](Self::forward) gives for its sequence, up to the order of f32 sums, which
    /// depends on the number of rows. On error no cache has changed. No sequences give no logits.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), for any of the sequences.
    ///
    /// # Panics
    /// When there are not as many tokens as caches.
    pub fn decode_batch(&self, exec: &Exec, tokens: &[u32], caches: &mut [&mut Cache]) -> Result<Vec<f32>> {
        assert_eq!(tokens.len(), caches.len(), "one token for each sequence");
        for (token, cache) in tokens.chunks(1).zip(caches.iter()) {
            self.check_append(token, cache)?;
        }
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let h = self.append_tokens(exec, tokens, caches);
        Ok(self.final_logits(exec, &h))
    }

    fn check_append(&self, tokens: &[u32], cache: &Cache) -> Result<()> {
        if self.layout.cache != cache.shape {
            return Err(ModelError::Cache("made for a model of another shape or plan".into()));
        }
        self.check_tokens(tokens, cache.len, cache.len.saturating_add(tokens.len()))
    }

    /// Appends the same number of tokens to every sequence (`tokens` holds them sequence after sequence) and returns the residual stream
    /// after the last layer. Everything was checked.
    fn append_tokens(&self, exec: &Exec, tokens: &[u32], caches: &mut [&mut Cache]) -> Vec<f32> {
        let starts: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
        let mut h = self.embed(tokens);
        let mut scratch = Scratch::default();
        for layer in 0..self.config.layers {
            let memories = caches.iter_mut().map(|cache| &mut cache.layers[layer]).collect();
            self.infer_layer(exec, layer, &starts, &mut h, memories, &mut scratch);
        }
        for cache in caches.iter_mut() {
            cache.len += tokens.len() / starts.len();
        }
        h
    }

    /// Logits of rows of the last layer's output.
    fn final_logits(&self, exec: &Exec, h: &[f32]) -> Vec<f32> {
        let mut hidden = Vec::new();
        self.norm(exec, h, self.layout.norm, &mut hidden);
        self.logits(exec, &hidden)
    }

    /// One layer: everything that has no memory for all rows together, everything that has one for each sequence on its own.
    fn infer_layer(
        &self,
        exec: &Exec,
        layer: usize,
        starts: &[usize],
        h: &mut [f32],
        mut memories: Vec<&mut LayerCache>,
        scratch: &mut Scratch,
    ) {
        let ids = &self.layout.layers[layer];
        let (groups, rows) = (self.config.kv_heads, h.len() / self.config.d_model);
        let per_group = self.config.group_size() * self.config.head_dim;
        let Scratch { x, qkv, packed_out, out, mlp, gate, up } = scratch;
        self.norm(exec, h, ids.input_norm, x);
        out.resize(rows * groups * per_group, 0.0);
        if ids.kept > 0 {
            self.project(exec, layer, x, rows / starts.len(), starts, qkv);
            if ids.kept == groups {
                self.infer_kept(exec, ids.kept, starts, qkv, &mut memories, out);
            } else {
                packed_out.resize(rows * ids.kept * per_group, 0.0);
                self.infer_kept(exec, ids.kept, starts, qkv, &mut memories, packed_out);
                unpack(packed_out, out, &ids.runs, per_group, groups);
            }
        }
        self.infer_converted(exec, layer, x, memories, out);
        self.output_projection(exec, layer, out, h);
        self.mlp(exec, layer, h, mlp, gate, up);
    }

    /// Remembers keys and values of the kept groups and overwrites `out` `[rows, kept · group_size · head_dim]` with their attention.
    fn infer_kept(
        &self,
        exec: &Exec,
        kept: usize,
        starts: &[usize],
        qkv: &Qkv,
        memories: &mut [&mut LayerCache],
        out: &mut [f32],
    ) {
        let kv_width = kept * self.config.head_dim;
        let q_width = kv_width * self.config.group_size();
        let seq = out.len() / q_width / starts.len();
        let parts = memories.iter_mut().zip(out.chunks_mut(seq * q_width)).collect();
        exec.parallel_items(parts, |s, (memory, out)| {
            let kv = s * seq * kv_width..(s + 1) * seq * kv_width;
            append(&mut memory.k, &qkv.k[kv.clone()]);
            append(&mut memory.v, &qkv.v[kv]);
            attention(
                exec,
                self.attn_shape(kept),
                AttnMask::Causal { q_pos0: starts[s] },
                rows_of(&qkv.q, s, seq, q_width),
                MatRef::dense(&memory.k, starts[s] + seq, kv_width),
                MatRef::dense(&memory.v, starts[s] + seq, kv_width),
                MatMut::dense(out, seq, q_width),
                None,
            );
        });
    }

    /// Runs the converted groups of a layer on `x`; each fills its columns of `out`.
    fn infer_converted(
        &self,
        exec: &Exec,
        layer: usize,
        x: &[f32],
        memories: Vec<&mut LayerCache>,
        out: &mut [f32],
    ) {
        let converted = &self.layout.layers[layer].converted;
        let (d_model, width) = (self.config.d_model, self.config.heads * self.config.head_dim);
        let per_group = self.config.group_size() * self.config.head_dim;
        let (rows, sequences) = (x.len() / d_model, memories.len());
        let seq = rows / sequences;
        let env = |group| self.head_env(layer, group).expect("a converted group has a layout");
        let mut jobs = Vec::with_capacity(converted.len() * sequences);
        for (s, memory) in memories.into_iter().enumerate() {
            let caches = memory.heads.iter_mut().flatten();
            jobs.extend(converted.iter().zip(caches).map(|(&group, cache)| (group, s, cache)));
        }
        // Groups one after another: the sequences then find a group's weights in the CPU's cache.
        jobs.sort_by_key(|&(group, s, _)| (group, s));
        // A job per thread, unless that leaves most threads idle or a single token makes the hand-over cost more than it gains.
        if rows > 1 && jobs.len() > 1 && 2 * jobs.len() >= exec.threads() && exec.threads() > 1 {
            let single = exec.single();
            let outputs = exec.parallel_map_items(jobs, |_, (group, s, cache)| {
                let mut y = vec![0.0; seq * per_group];
                let target = MatMut::dense(&mut y, seq, per_group);
                mixers::forward(&single, &env(group), rows_of(x, s, seq, d_model), cache, target);
                (group, s, y)
            });
            for (group, s, y) in outputs {
                let out = &mut out[s * seq * width..(s + 1) * seq * width];
                copy_columns(&y, (0, per_group), out, (group * per_group, width), per_group);
            }
        } else {
            for (group, s, cache) in jobs {
                let columns = &mut out[s * seq * width + group * per_group..];
                let columns = MatMut::new(columns, seq, per_group, width);
                mixers::forward(exec, &env(group), rows_of(x, s, seq, d_model), cache, columns);
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
