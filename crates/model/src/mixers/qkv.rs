//! What `mamba2` and `gated-delta` share: short convs and norms before the recurrence, gain and gate after it.
//! The recurrences themselves are in their own modules.

use super::{Ctx, HeadCache, HeadDims, Linear, LinearGrads, Qkv, QkvTensors, gated_delta, mamba2, reborrow};
use super::{L2_EPS, ROWS_PER_TASK};
use crate::plan::RecurrentKind;
use kernels::conv::{short_conv, short_conv_backward};
use kernels::{MatMut, elementwise};

/// Which form of the recurrence runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Any number of tokens.
    Chunked,
    /// One token.
    Step,
}

/// Decay and input of the recurrence per token, `[T, decays]` each.
pub(super) struct Rates {
    /// `−softplus(x W_dtᵀ + b_dt)`.
    pub log_a: Vec<f32>,
    /// `mamba2`: `x W_inᵀ + b_in`; `gated-delta`: `beta`.
    pub input: Vec<f32>,
}

/// Projections of `x` that only the recurrence reads.
pub(super) struct Logits {
    /// `x W_zᵀ`, `[T, G·D]`.
    pub gate: Vec<f32>,
    /// `x W_dtᵀ + b_dt`, `[T, decays]`.
    pub dt: Vec<f32>,
    /// `x W_inᵀ + b_in` or `x W_βᵀ + b_β`, `[T, decays]`.
    pub input: Vec<f32>,
}

/// What the backward pass reads besides the raw projections.
pub(super) struct QkvSaved {
    rates: Rates,
    y: Vec<f32>,
    /// `σ(x W_zᵀ)`.
    gate: Vec<f32>,
}

/// Queries, keys and values right after the convs, and what the recurrence reads: q and k normalised as well.
struct Mixed {
    conv: Qkv,
    unit: Qkv,
}

/// Adds the recurrent branch of a chunk to `out`.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: &Qkv,
    logits: Logits,
    cache: &mut HeadCache,
    form: Form,
    out: &mut MatMut<'_>,
) -> QkvSaved {
    let Logits { mut gate, dt, input } = logits;
    let (rates, y) = recurrence(ctx, w, raw, dt, input, cache, form);
    let d_inner = ctx.env.layout.d_inner();
    elementwise::sigmoid_in_place(ctx.exec, &mut gate);
    let rows = y.chunks_exact(d_inner).zip(gate.chunks_exact(d_inner));
    for (t, (y, gate)) in rows.enumerate() {
        for (((o, y), g), gain) in out.row_mut(t).iter_mut().zip(y).zip(gate).zip(w.gain) {
            *o += 2.0 * gain * y * g;
        }
    }
    QkvSaved { rates, y, gate }
}

/// The recurrence's rates (from the logits `dt` and `input`) and its output `[T, G·D]` before gain and gate; advances conv tails and state.
pub(super) fn recurrence(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: &Qkv,
    dt: Vec<f32>,
    input: Vec<f32>,
    cache: &mut HeadCache,
    form: Form,
) -> (Rates, Vec<f32>) {
    let unit = mix(ctx, w, raw, &mut cache.tails).unit;
    let layout = &ctx.env.layout;
    let mut log_a = dt;
    log_a.iter_mut().for_each(|a| *a = -elementwise::softplus(*a));
    let mut rates = Rates { log_a, input };
    let mut y = vec![0.0; ctx.seq * layout.d_inner()];
    match layout.spec.recurrent {
        RecurrentKind::GatedDelta => {
            rates.input.iter_mut().for_each(|b| *b = elementwise::sigmoid(*b));
            gated_delta::forward(ctx, &unit, &rates, &mut cache.state, form, &mut y);
        }
        _ => mamba2::forward(ctx, w, &unit, &rates, &mut cache.state, form, &mut y),
    }
    (rates, y)
}

/// From dense `dout` `[T, G·D]`: adds to `d_raw`, to `dx` through the rate and gate projections, and to `grads` (all but the q, k, v
/// projections, which follow from `d_raw`).
pub(super) fn backward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: &Qkv,
    saved: &QkvSaved,
    dout: &[f32],
    d_raw: &mut Qkv,
    mut grads: Option<&mut QkvTensors<&mut [f32]>>,
    mut dx: Option<MatMut<'_>>,
) {
    let layout = &ctx.env.layout;
    let (dy, dz) = gate_backward(ctx, w, saved, dout, grads.as_mut().map(|g| &mut *g.gain));
    let gate_grads = LinearGrads { weight: grads.as_mut().map(|g| &mut *g.gate), bias: None };
    Linear::new(w.gate, None).backward(ctx, ctx.x, &dz, gate_grads, reborrow(&mut dx));

    let mut tails: Vec<Vec<f32>> = layout.tail_lens().into_iter().map(|n| vec![0.0; n]).collect();
    let mixed = mix(ctx, w, raw, &mut tails);
    let mut d_unit = Qkv::zeros(ctx.seq, layout.dims);
    let rates = &saved.rates;
    let mut d_rates = Rates { log_a: vec![0.0; rates.log_a.len()], input: vec![0.0; rates.input.len()] };
    match layout.spec.recurrent {
        RecurrentKind::GatedDelta => {
            gated_delta::backward(ctx, &mixed.unit, rates, &dy, &mut d_unit, &mut d_rates);
            for (d, beta) in d_rates.input.iter_mut().zip(&rates.input) {
                *d *= beta * (1.0 - beta);
            }
        }
        _ => {
            let dd_skip = grads.as_mut().and_then(|g| g.d_skip.as_deref_mut());
            mamba2::backward(ctx, w, &mixed.unit, rates, &dy, &mut d_unit, &mut d_rates, dd_skip);
        }
    }
    // d(−softplus(r))/dr = −σ(r), and σ(r) = 1 − exp(−softplus(r)).
    for (d, log_a) in d_rates.log_a.iter_mut().zip(&rates.log_a) {
        *d *= log_a.exp_m1();
    }
    let (dt_grads, input_grads) = match grads.as_mut() {
        Some(g) => (
            LinearGrads { weight: Some(&mut *g.dt), bias: Some(&mut *g.dt_bias) },
            LinearGrads { weight: Some(&mut *g.input), bias: Some(&mut *g.input_bias) },
        ),
        None => Default::default(),
    };
    Linear::new(w.dt, None).backward(ctx, ctx.x, &d_rates.log_a, dt_grads, reborrow(&mut dx));
    Linear::new(w.input, None).backward(ctx, ctx.x, &d_rates.input, input_grads, dx);
    mix_backward(ctx, w, raw, &mixed, d_unit, d_raw, grads);
}

/// Gradients of the recurrence's output and of the gate's logits; adds to the gain's.
fn gate_backward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    saved: &QkvSaved,
    dout: &[f32],
    d_gain: Option<&mut [f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let d_inner = ctx.env.layout.d_inner();
    let (y, gate) = (&saved.y, &saved.gate);
    if let Some(d_gain) = d_gain {
        let mut product = vec![0.0; dout.len()];
        ctx.exec.parallel_chunks(&mut product, ROWS_PER_TASK * d_inner, |task, product| {
            let at = task * ROWS_PER_TASK * d_inner;
            for (i, p) in product.iter_mut().enumerate() {
                *p = 2.0 * dout[at + i] * y[at + i] * gate[at + i];
            }
        });
        elementwise::add_column_sums(ctx.exec, &product, d_gain);
    }
    let mut dy = vec![0.0; dout.len()];
    let mut dz = vec![0.0; dout.len()];
    let rows = dy.chunks_exact_mut(d_inner).zip(dz.chunks_exact_mut(d_inner));
    for (t, (dy, dz)) in rows.enumerate() {
        let row = t * d_inner..(t + 1) * d_inner;
        let (dout, y, gate) = (&dout[row.clone()], &y[row.clone()], &gate[row]);
        for c in 0..d_inner {
            let d = 2.0 * dout[c] * w.gain[c] * gate[c];
            dy[c] = d;
            dz[c] = d * y[c] * (1.0 - gate[c]);
        }
    }
    (dy, dz)
}

fn mix(ctx: &Ctx<'_>, w: &QkvTensors<&[f32]>, raw: &Qkv, tails: &mut [Vec<f32>]) -> Mixed {
    let HeadDims { head_dim, .. } = ctx.env.layout.dims;
    let d_inner = ctx.env.layout.d_inner();
    let [q_tail, k_tail, v_tail] = tails else { panic!("three conv tails, found {}", tails.len()) };
    let conv = |x: &[f32], weight: &[f32], channels: usize, tail: &mut [f32]| {
        let mut out = vec![0.0; x.len()];
        short_conv(ctx.exec, x, weight, None, channels, tail, &mut out);
        out
    };
    let unit = |x: &[f32]| {
        let mut out = vec![0.0; x.len()];
        elementwise::l2_norm(ctx.exec, x, head_dim, L2_EPS, &mut out);
        out
    };
    let conv = Qkv {
        q: conv(&raw.q, w.q_conv, d_inner, q_tail),
        k: conv(&raw.k, w.k_conv, head_dim, k_tail),
        v: conv(&raw.v, w.v_conv, head_dim, v_tail),
    };
    let unit = Qkv { q: unit(&conv.q), k: unit(&conv.k), v: conv.v.clone() };
    Mixed { conv, unit }
}

fn mix_backward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: &Qkv,
    mixed: &Mixed,
    d_unit: Qkv,
    d_raw: &mut Qkv,
    grads: Option<&mut QkvTensors<&mut [f32]>>,
) {
    let HeadDims { head_dim, .. } = ctx.env.layout.dims;
    let d_inner = ctx.env.layout.d_inner();
    let unit_backward = |x: &[f32], dout: &[f32]| {
        let mut dx = vec![0.0; x.len()];
        elementwise::l2_norm_backward(ctx.exec, x, head_dim, L2_EPS, dout, &mut dx);
        dx
    };
    let conv_backward =
        |x, weight: &[f32], channels, dout: &[f32], dx: &mut [f32], dw: Option<&mut [f32]>| {
            let mut unwanted = Vec::new();
            let dw = dw.unwrap_or_else(|| {
                unwanted.resize(weight.len(), 0.0);
                &mut unwanted
            });
            short_conv_backward(ctx.exec, x, weight, channels, dout, dx, dw, None);
        };
    let (dq, dk) = (unit_backward(&mixed.conv.q, &d_unit.q), unit_backward(&mixed.conv.k, &d_unit.k));
    let (q_grad, k_grad, v_grad) = match grads {
        Some(g) => (Some(&mut *g.q_conv), Some(&mut *g.k_conv), Some(&mut *g.v_conv)),
        None => (None, None, None),
    };
    conv_backward(&raw.q, w.q_conv, d_inner, &dq, &mut d_raw.q, q_grad);
    conv_backward(&raw.k, w.k_conv, head_dim, &dk, &mut d_raw.k, k_grad);
    conv_backward(&raw.v, w.v_conv, head_dim, &d_unit.v, &mut d_raw.v, v_grad);
}
