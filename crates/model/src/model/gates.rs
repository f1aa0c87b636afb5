//! Gates between full and streaming attention: a base model whose head outputs are a mixture of both, and the gradient of the mixture.

use super::Model;
use super::batch::{LayerTape, Tape};
use super::tokens::{TokenBatch, rows_of};
use crate::error::Result;
use crate::observe::{GradObserver, NoObserver};
use crate::params::Grads;
use kernels::attention::{AttnMask, attention};
use kernels::elementwise::dot;
use kernels::{Exec, MatMut, MatRef};
use std::borrow::Cow;

/// One gate α per layer and KV group: its head outputs are `α · full + (1 − α) · streaming`, where streaming attention sees the last `window`
/// tokens and the first `sinks`. Source: DuoAttention, arXiv 2410.10819, equation 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Gates {
    /// α by layer and group.
    pub alpha: Vec<Vec<f32>>,
    /// Tokens that streaming attention sees, the query's own included.
    pub window: usize,
    /// First tokens that it always sees.
    pub sinks: usize,
}

/// What a gated layer's head outputs were mixed from.
pub(super) struct StreamingTape {
    alpha: Vec<f32>,
    window: usize,
    sinks: usize,
    /// `heads · head_dim`.
    width: usize,
    /// Head outputs of full attention, `[rows, heads · head_dim]`.
    full: Vec<f32>,
    /// Of streaming attention, likewise.
    out: Vec<f32>,
    /// Its log denominators, `[rows, heads]`.
    lse: Vec<f32>,
}

/// One softmax attention that a layer's head outputs are made of.
pub(super) struct Part<'a> {
    /// Window and sinks; `None`: everything.
    pub window: Option<(usize, usize)>,
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub dout: Cow<'a, [f32]>,
}

impl StreamingTape {
    /// Full and streaming attention, each with its share of the gradient of the head outputs.
    pub fn parts<'a>(&'a self, lse: &'a [f32], dout: &[f32]) -> Vec<Part<'a>> {
        let share = |factor: fn(f32) -> f32| {
            let mut dout = dout.to_vec();
            for (columns, &alpha) in
                dout.chunks_exact_mut(self.width / self.alpha.len()).zip(self.alpha.iter().cycle())
            {
                columns.iter_mut().for_each(|d| *d *= factor(alpha));
            }
            Cow::Owned(dout)
        };
        vec![
            Part { window: None, out: &self.full, lse, dout: share(|alpha| alpha) },
            Part {
                window: Some((self.window, self.sinks)),
                out: &self.out,
                lse: &self.lse,
                dout: share(|alpha| 1.0 - alpha),
            },
        ]
    }
}

impl Model {
    /// [`forward_batch`](Self::forward_batch) of the model whose head outputs are mixed by `gates`, with the tape that
    /// [`backward_gated`](Self::backward_gated) needs. Returns the final normed hidden states `[rows, d_model]`.
    ///
    /// # Errors
    /// As `forward_batch`.
    ///
    /// # Panics
    /// When a group is converted, there is not one gate per layer and KV group, or the tape is [`checkpointed`](Tape::checkpointed).
    pub fn forward_gated(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        gates: &Gates,
        tape: &mut Tape,
    ) -> Result<Vec<f32>> {
        assert_eq!(self.plan.converted(), 0, "gates are for base models");
        let fits = gates.alpha.iter().all(|layer| layer.len() == self.config.kv_heads);
        assert!(fits && gates.alpha.len() == self.config.layers, "one gate per layer and KV group");
        assert!(!tape.forgets(0), "gated layers are not run again");
        self.forward_pass(exec, batch, &mut NoObserver, Some(tape), (Some(gates), None))
    }

    /// Gradient of every gate, `[layer][group]`, from that of the final hidden states: `Σ_t γ_t · (full_t − streaming_t)` over the group's head
    /// outputs, γ their gradient in the mixed model.
    ///
    /// # Panics
    /// When `tape` was not filled by [`forward_gated`](Self::forward_gated) over this batch.
    pub fn backward_gated(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        tape: &Tape,
        dhidden: &[f32],
    ) -> Vec<Vec<f64>> {
        let mut observer = GateGradients { tape, batch, sums: vec![Vec::new(); self.config.layers] };
        for sums in &mut observer.sums {
            sums.resize(self.config.kv_heads, 0.0);
        }
        let mut none = Grads::zeros(&self.params, &[]);
        self.backward(exec, batch, tape, dhidden, &mut none, &mut observer, true);
        observer.sums
    }

    /// Computes a layer's streaming attention and mixes it into `memory.out`, which holds that of full attention.
    pub(super) fn mix_streaming(
        &self,
        exec: &Exec,
        layer: usize,
        batch: &TokenBatch,
        gates: &Gates,
        memory: &mut LayerTape,
    ) -> StreamingTape {
        let (groups, d) = (self.config.kv_heads, self.config.head_dim);
        let (width, kv_width) = (self.config.heads * d, groups * d);
        let shape = self.attn_shape(groups);
        let Gates { window, sinks, .. } = *gates;
        let alpha = gates.alpha[layer].clone();
        let full = memory.out.clone();
        let mut out = vec![0.0; full.len()];
        let mut lse = vec![0.0; batch.rows() * shape.q_heads];
        for (rows, out) in batch.ranges().zip(batch.split_mut(&mut out, width)) {
            let kv_pos: Vec<usize> = (0..rows.len()).collect();
            attention(
                exec,
                shape,
                AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks },
                rows_of(&memory.qkv.q, rows.clone(), width),
                rows_of(&memory.qkv.k, rows.clone(), kv_width),
                rows_of(&memory.qkv.v, rows.clone(), kv_width),
                MatMut::dense(out, rows.len(), width),
                Some(&mut lse[rows.start * shape.q_heads..rows.end * shape.q_heads]),
            );
        }
        let columns = width / groups;
        for ((mixed, streaming), &alpha) in
            memory.out.chunks_exact_mut(columns).zip(out.chunks_exact(columns)).zip(alpha.iter().cycle())
        {
            for (mixed, streaming) in mixed.iter_mut().zip(streaming) {
                *mixed = alpha * *mixed + (1.0 - alpha) * streaming;
            }
        }
        StreamingTape { alpha, window, sinks, width, full, out, lse }
    }
}

struct GateGradients<'a> {
    tape: &'a Tape,
    batch: &'a TokenBatch,
    sums: Vec<Vec<f64>>,
}

impl GradObserver for GateGradients<'_> {
    fn head_outputs(&mut self, layer: usize, sequence: usize, grad: MatRef<'_>) {
        let streaming = self.tape.layers[layer].streaming.as_ref().expect("a tape of a gated pass");
        let width = streaming.width;
        let columns = width / self.sums[layer].len();
        for (t, row) in self.batch.range(sequence).enumerate() {
            let parts = [&streaming.full, &streaming.out].map(|out| &out[row * width..(row + 1) * width]);
            for (group, sum) in self.sums[layer].iter_mut().enumerate() {
                let at = group * columns..(group + 1) * columns;
                let grad = &grad.row(t)[at.clone()];
                *sum += dot(grad, &parts[0][at.clone()]) - dot(grad, &parts[1][at]);
            }
        }
    }
}
