//! The local branch: softmax attention over the last `window` tokens and the first `sinks`, rotary positions and norms as in the base.

use super::merged::{DroppedSums, Means};
use super::{BaseGroup, BaseGroupGrads, Ctx, HeadCache, HeadDims, Qkv};
use crate::plan::Dropped;
use kernels::attention::{AttnMask, AttnSaved, AttnShape, attention, attention_backward};
use kernels::rope::{Rotation, rope};
use kernels::{MatMut, MatRef, Reused, elementwise};

/// What the backward pass reads besides the raw projections.
pub(super) struct LocalSaved {
    /// Queries after norm and RoPE.
    q: Reused,
    /// Keys after norm and RoPE.
    k: Reused,
    /// With the compensation tokens, as `lse`.
    out: Reused,
    lse: Vec<f32>,
    /// Of the dropped tokens, where they are averaged.
    means: Option<Means>,
}

/// Overwrites `out` with the attention of a chunk that continues the sequence of `cache`, and updates its ring and sums; queries and keys are
/// rotated. Returns the log denominators `[T, G]` where dropped tokens are averaged or weighed.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    [q, k]: [&[f32]; 2],
    v: &[f32],
    cache: &mut HeadCache,
    mut out: MatMut<'_>,
) -> Option<Vec<f32>> {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    let (seq, seen) = (ctx.seq, cache.seen);
    let (keys, values) = cache.ring.followed_by(seen, k, v);
    let kv_pos: Vec<usize> = cache.ring.positions(seen).chain(seen..seen + seq).collect();
    let forgotten = ctx.env.layout.spec.dropped == Dropped::Forgotten;
    let mut lse = (!forgotten).then(|| vec![0.0; seq * q_heads]);
    attention(
        ctx.exec,
        shape(ctx),
        mask(ctx, seen, &kv_pos),
        MatRef::dense(q, seq, q_heads * head_dim),
        MatRef::dense(&keys, kv_pos.len(), head_dim),
        MatRef::dense(&values, kv_pos.len(), head_dim),
        out.reborrow(),
        lse.as_deref_mut(),
    );
    if let (Some(sums), Some(lse)) = (&mut cache.dropped, &mut lse) {
        let spec = &ctx.env.layout.spec;
        let held = kv_pos.len() - seq;
        let means = sums.advance((spec.window, spec.sinks), (seen, seq), held, &keys, &values);
        merge(ctx, &means, q, out, lse);
    }
    cache.ring.push(seen, MatRef::dense(k, seq, head_dim), MatRef::dense(v, seq, head_dim));
    lse
}

/// Adds the compensation tokens to the attention of a chunk.
fn merge(ctx: &Ctx<'_>, means: &Means, q: &[f32], mut out: MatMut<'_>, lse: &mut [f32]) {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    let scale = shape(ctx).scale;
    let rows = q.chunks_exact(q_heads * head_dim).zip(lse.chunks_exact_mut(q_heads));
    for (t, (q, lse)) in rows.enumerate() {
        let heads = out.row_mut(t)[..q_heads * head_dim].chunks_exact_mut(head_dim);
        for ((q, out), lse) in q.chunks_exact(head_dim).zip(heads).zip(lse) {
            means.merge(t, scale, q, out, lse);
        }
    }
}

/// [`forward`] of a whole sequence, keeping what [`backward`] needs.
pub(super) fn forward_train(ctx: &Ctx<'_>, raw: &Qkv, mut out: MatMut<'_>) -> LocalSaved {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    let seq = ctx.seq;
    let [q, k] = rotated(ctx, raw, 0);
    let kv_pos: Vec<usize> = (0..seq).collect();
    let mut dense = Reused::new(seq * q_heads * head_dim);
    let mut lse = vec![0.0; seq * q_heads];
    attention(
        ctx.exec,
        shape(ctx),
        mask(ctx, 0, &kv_pos),
        MatRef::dense(&q, seq, q_heads * head_dim),
        MatRef::dense(&k, seq, head_dim),
        MatRef::dense(&raw.v, seq, head_dim),
        MatMut::dense(&mut dense, seq, q_heads * head_dim),
        Some(&mut lse),
    );
    let spec = &ctx.env.layout.spec;
    let means = (spec.dropped == Dropped::Averaged).then(|| {
        let means = DroppedSums::new(head_dim).advance((spec.window, spec.sinks), (0, seq), 0, &k, &raw.v);
        merge(ctx, &means, &q, MatMut::dense(&mut dense, seq, q_heads * head_dim), &mut lse);
        means
    });
    for (t, row) in dense.chunks_exact(q_heads * head_dim).enumerate() {
        out.row_mut(t).copy_from_slice(row);
    }
    LocalSaved { q, k, out: dense, lse, means }
}

/// Log denominators `[T, G]` of causal attention to everything, of a sequence from its start.
pub(super) fn log_denominators(ctx: &Ctx<'_>, [q, k]: [&[f32]; 2], v: &[f32]) -> Vec<f32> {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    let (seq, d_inner) = (ctx.seq, q_heads * head_dim);
    let (mut out, mut lse) = (Reused::new(seq * d_inner), vec![0.0; seq * q_heads]);
    attention(
        ctx.exec,
        shape(ctx),
        AttnMask::Causal { q_pos0: 0 },
        MatRef::dense(q, seq, d_inner),
        MatRef::dense(k, seq, head_dim),
        MatRef::dense(v, seq, head_dim),
        MatMut::dense(&mut out, seq, d_inner),
        Some(&mut lse),
    );
    lse
}

impl LocalSaved {
    /// The branch's output, dense `[T, G·D]`, and the log denominators `[T, G]`.
    pub fn attended(&self) -> (&[f32], &[f32]) {
        (&self.out, &self.lse)
    }
}

/// Adds to `d_raw`, and to the wanted norm gradients; from those of the output and, where they are read, of the log denominators.
pub(super) fn backward(
    ctx: &Ctx<'_>,
    raw: &Qkv,
    saved: &LocalSaved,
    (dout, dlse): (&[f32], Option<&[f32]>),
    d_raw: &mut Qkv,
    base_grads: Option<&mut BaseGroupGrads>,
) {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    let (seq, d_inner) = (ctx.seq, q_heads * head_dim);
    let kv_pos: Vec<usize> = (0..seq).collect();
    let (mut dq, mut dk) = (Reused::zeros(raw.q.len()), Reused::zeros(raw.k.len()));
    let inputs = AttnSaved {
        q: MatRef::dense(&saved.q, seq, d_inner),
        k: MatRef::dense(&saved.k, seq, head_dim),
        v: MatRef::dense(&raw.v, seq, head_dim),
        out: MatRef::dense(&saved.out, seq, d_inner),
        lse: &saved.lse,
        dout: MatRef::dense(dout, seq, d_inner),
        dlse,
    };
    attention_backward(ctx.exec, shape(ctx), mask(ctx, 0, &kv_pos), inputs, &mut dq, &mut dk, &mut d_raw.v);
    if let Some(means) = &saved.means {
        let sizes = (ctx.env.layout.spec.window, shape(ctx).scale);
        means.backward(sizes, (&saved.q, &saved.out, &saved.lse, dout), (&mut dq, &mut dk, &mut d_raw.v));
    }
    let (inv_freq, base) = (ctx.env.inv_freq, &ctx.env.base);
    rope(ctx.exec, &mut dq, head_dim, inv_freq, seq, 0, Rotation::Inverse);
    rope(ctx.exec, &mut dk, head_dim, inv_freq, seq, 0, Rotation::Inverse);
    let (q_norm, k_norm) = match base_grads {
        Some(grads) => (grads.q_norm.as_deref_mut(), grads.k_norm.as_deref_mut()),
        None => (None, None),
    };
    norm_backward(ctx, base, base.q_norm, &raw.q, &dq, &mut d_raw.q, q_norm);
    norm_backward(ctx, base, base.k_norm, &raw.k, &dk, &mut d_raw.k, k_norm);
}

fn norm_backward(
    ctx: &Ctx<'_>,
    base: &BaseGroup<'_>,
    weight: Option<&[f32]>,
    x: &[f32],
    dout: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    match weight {
        Some(weight) => {
            elementwise::rms_norm_backward(ctx.exec, x, weight, base.norm_eps, dout, dx, dweight);
        }
        None => elementwise::axpy(ctx.exec, 1.0, dout, dx),
    }
}

/// Queries and keys after the base's norms and RoPE, the first row at position `pos0`.
pub(super) fn rotated(ctx: &Ctx<'_>, raw: &Qkv, pos0: usize) -> [Reused; 2] {
    let base = &ctx.env.base;
    let one = |raw: &[f32], norm: Option<&[f32]>| {
        let mut rotated = Reused::new(raw.len());
        match norm {
            Some(weight) => elementwise::rms_norm(ctx.exec, raw, weight, base.norm_eps, &mut rotated),
            None => rotated.copy_from_slice(raw),
        }
        let (head_dim, seq) = (ctx.env.layout.dims.head_dim, ctx.seq);
        rope(ctx.exec, &mut rotated, head_dim, ctx.env.inv_freq, seq, pos0, Rotation::Forward);
        rotated
    };
    [one(&raw.q, base.q_norm), one(&raw.k, base.k_norm)]
}

fn shape(ctx: &Ctx<'_>) -> AttnShape {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    AttnShape { q_heads, kv_heads: 1, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
}

fn mask<'a>(ctx: &Ctx<'_>, q_pos0: usize, kv_pos: &'a [usize]) -> AttnMask<'a> {
    let spec = &ctx.env.layout.spec;
    AttnMask::Local { q_pos0, kv_pos, window: spec.window, sinks: spec.sinks }
}
