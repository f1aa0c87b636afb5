//! What `mamba2` and `gated-delta` share: short convs and norms before the recurrence, gain and gate after it.
//! The recurrences themselves are in their own modules.

use super::L2_EPS;
use super::{
    Ctx, HeadCache, HeadDims, Linear, LinearGrads, Qkv, QkvRef, QkvTensors, gated_delta, mamba2, reborrow,
    weighed,
};
use crate::plan::RecurrentKind;
use kernels::conv::{short_conv, short_conv_backward, short_conv_unit};
use kernels::gate::{add_gated, add_gated_backward, blend_gated, blend_gated_backward};
use kernels::gated_delta::DeltaSaved;
use kernels::{MatMut, MatRef, Reused, elementwise};

/// Which form of the recurrence runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Any number of tokens.
    Chunked,
    /// The same, keeping what the backward pass reads.
    Training,
    /// One token.
    Step,
}

impl Form {
    /// Of a chunk of `seq` tokens.
    pub fn of(seq: usize) -> Self {
        if seq == 1 { Self::Step } else { Self::Chunked }
    }
}

/// Decay and input of the recurrence per token, `[T, decays]` each.
pub(super) struct Rates {
    /// `−softplus(x W_dtᵀ + b_dt)`.
    pub log_a: Vec<f32>,
    /// `mamba2`: `x W_inᵀ + b_in`; `gated-delta`: `beta`.
    pub input: Vec<f32>,
}

/// Projections of `x` that only the recurrence reads.
#[derive(Clone, Copy)]
pub(super) struct Logits<'a> {
    /// `x W_zᵀ`, `[T, G·D]`.
    pub gate: MatRef<'a>,
    /// `x W_dtᵀ + b_dt`, `[T, decays]`.
    pub dt: MatRef<'a>,
    /// `x W_inᵀ + b_in` or `x W_βᵀ + b_β`, `[T, decays]`.
    pub input: MatRef<'a>,
    /// `x W_farᵀ + b_far` and the window's log denominators, `[T, G]` each, where dropped tokens are weighed.
    pub far: Option<[MatRef<'a>; 2]>,
}

/// What the backward pass reads besides the raw projections.
pub(super) struct QkvSaved {
    /// `x W_zᵀ`, `[T, G·D]`.
    pub gate: Reused,
    pub recurred: Recurred,
}

/// What the forward pass computes on its way: the rates, and the recurrence's output `[T, G·D]` before gain and gate.
pub(super) struct Recurred {
    rates: Rates,
    pub y: Reused,
    /// What the delta rule was solved with, in training.
    solved: Option<DeltaSaved>,
    /// The window's share `[T, G]`, where dropped tokens are weighed.
    keep: Option<Vec<f32>>,
}

/// Gradients of what the window contributes to a blend.
pub(super) struct WindowGrads {
    /// Of its output, `[T, G·D]`.
    pub out: Reused,
    /// Of its log denominators, `[T, G]`.
    pub lse: Vec<f32>,
}

/// Queries and keys right after the convs; queries and keys normalised, and values, as the recurrence reads them.
struct Mixed {
    conv_q: Reused,
    conv_k: Reused,
    unit: Qkv,
}

/// Adds the recurrent branch of a chunk to `out`, or blends it with what is there where dropped tokens are weighed.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: QkvRef<'_>,
    logits: Logits<'_>,
    cache: &mut HeadCache,
    form: Form,
    out: &mut MatMut<'_>,
) -> Recurred {
    let mut recurred = recurrence(ctx, w, raw, [logits.dt, logits.input], cache, form);
    match (&w.far, logits.far) {
        (Some(tensors), Some([far, lse])) => {
            let keep = weighed::keep(ctx, cache.seen, far, tensors.count, lse);
            blend_gated(ctx.exec, &recurred.y, logits.gate, w.gain, &keep, out.reborrow());
            recurred.keep = Some(keep);
        }
        (None, None) => add_gated(ctx.exec, &recurred.y, logits.gate, w.gain, out.reborrow()),
        _ => panic!("projections of another kind of head"),
    }
    recurred
}

/// The recurrence from the logits `dt` and `input`; advances conv tails and state.
pub(super) fn recurrence(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: QkvRef<'_>,
    [dt, input]: [MatRef<'_>; 2],
    cache: &mut HeadCache,
    form: Form,
) -> Recurred {
    let unit = unit(ctx, w, raw, &mut cache.tails);
    let layout = &ctx.env.layout;
    let mut log_a = dt.to_dense();
    log_a.iter_mut().for_each(|a| *a = -elementwise::softplus(*a));
    let mut rates = Rates { log_a, input: input.to_dense() };
    let (mut y, mut solved) = (Reused::new(ctx.seq * layout.d_inner()), None);
    match layout.spec.recurrent {
        RecurrentKind::GatedDelta => {
            rates.input.iter_mut().for_each(|b| *b = elementwise::sigmoid(*b));
            solved = gated_delta::forward(ctx, &unit, &rates, &mut cache.state, form, &mut y);
        }
        _ => mamba2::forward(ctx, w, &unit, &rates, &mut cache.state, form, &mut y),
    }
    Recurred { rates, y, solved, keep: None }
}

/// From dense `dout` `[T, G·D]`: adds to `d_raw`, to `dx` through the rate and gate projections, and to `grads` (all but the q, k, v
/// projections, which follow from `d_raw`). `window` is the window's output, dense. Returns the window's gradients where it does not simply get `dout`.
pub(super) fn backward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    raw: &Qkv,
    saved: &QkvSaved,
    (dout, window): (&[f32], Option<&[f32]>),
    d_raw: &mut Qkv,
    mut grads: Option<&mut QkvTensors<&mut [f32]>>,
    mut dx: Option<MatMut<'_>>,
) -> Option<WindowGrads> {
    let layout = &ctx.env.layout;
    let Recurred { rates, y, solved, keep } = &saved.recurred;
    let (mut dy, mut dz) = (Reused::new(dout.len()), Reused::new(dout.len()));
    let d_gain = grads.as_mut().map(|g| &mut *g.gain);
    let window_grads = match (&w.far, keep) {
        (Some(tensors), Some(keep)) => {
            let window = window.expect("a window beside what it drops");
            let (mut out, mut dkeep) = (Reused::new(dout.len()), vec![0.0; keep.len()]);
            let inputs = [y, &saved.gate, dout, window];
            let outputs = [&mut dy[..], &mut dz, &mut out];
            blend_gated_backward(ctx.exec, inputs, w.gain, keep, outputs, &mut dkeep, d_gain);
            let mut far_grads = grads.as_mut().and_then(|g| g.far.as_mut());
            let d_count = far_grads.as_mut().map(|g| &mut *g.count);
            let (dfar, lse) = weighed::backward(ctx, keep, &dkeep, d_count);
            let linear = match far_grads {
                Some(g) => LinearGrads { weight: Some(&mut *g.proj), bias: Some(&mut *g.bias) },
                None => LinearGrads::default(),
            };
            Linear::new(tensors.proj, None).backward(ctx, ctx.x, &dfar, linear, reborrow(&mut dx));
            Some(WindowGrads { out, lse })
        }
        _ => {
            add_gated_backward(ctx.exec, [y, &saved.gate, dout], w.gain, [&mut dy, &mut dz], d_gain);
            None
        }
    };
    let gate_grads = LinearGrads { weight: grads.as_mut().map(|g| &mut *g.gate), bias: None };
    Linear::new(w.gate, None).backward(ctx, ctx.x, &dz, gate_grads, reborrow(&mut dx));

    let mut tails: Vec<Vec<f32>> = layout.tail_lens().into_iter().map(|n| vec![0.0; n]).collect();
    let mixed = mix(ctx, w, raw.view(ctx.seq, layout.dims), &mut tails);
    let mut d_unit = Qkv::zeros(ctx.seq, layout.dims);
    let mut d_rates = Rates { log_a: vec![0.0; rates.log_a.len()], input: vec![0.0; rates.input.len()] };
    match layout.spec.recurrent {
        RecurrentKind::GatedDelta => {
            let solved = solved.as_ref().expect("saved by a forward pass of training");
            gated_delta::backward(ctx, &mixed.unit, rates, solved, &dy, &mut d_unit, &mut d_rates);
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
    window_grads
}

/// What the recurrence reads, in the fewest passes; advances the conv tails.
fn unit(ctx: &Ctx<'_>, w: &QkvTensors<&[f32]>, raw: QkvRef<'_>, tails: &mut [Vec<f32>]) -> Qkv {
    let head = (ctx.env.layout.dims.head_dim, L2_EPS);
    let [q_tail, k_tail, v_tail] = tails else { panic!("three conv tails, found {}", tails.len()) };
    let mut unit = Qkv::new(ctx.seq, ctx.env.layout.dims);
    short_conv_unit(ctx.exec, raw.q, w.q_conv, head, q_tail, &mut unit.q);
    short_conv_unit(ctx.exec, raw.k, w.k_conv, head, k_tail, &mut unit.k);
    short_conv(ctx.exec, raw.v, w.v_conv, None, v_tail, &mut unit.v);
    unit
}

/// [`unit`] with what its backward pass reads.
fn mix(ctx: &Ctx<'_>, w: &QkvTensors<&[f32]>, raw: QkvRef<'_>, tails: &mut [Vec<f32>]) -> Mixed {
    let head_dim = ctx.env.layout.dims.head_dim;
    let [q_tail, k_tail, v_tail] = tails else { panic!("three conv tails, found {}", tails.len()) };
    let mut unit = Qkv::new(ctx.seq, ctx.env.layout.dims);
    let (mut conv_q, mut conv_k) = (Reused::new(unit.q.len()), Reused::new(unit.k.len()));
    short_conv(ctx.exec, raw.q, w.q_conv, None, q_tail, &mut conv_q);
    short_conv(ctx.exec, raw.k, w.k_conv, None, k_tail, &mut conv_k);
    short_conv(ctx.exec, raw.v, w.v_conv, None, v_tail, &mut unit.v);
    elementwise::l2_norm(ctx.exec, &conv_q, head_dim, L2_EPS, &mut unit.q);
    elementwise::l2_norm(ctx.exec, &conv_k, head_dim, L2_EPS, &mut unit.k);
    Mixed { conv_q, conv_k, unit }
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
        let mut dx = Reused::zeros(x.len());
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
    let (dq, dk) = (unit_backward(&mixed.conv_q, &d_unit.q), unit_backward(&mixed.conv_k, &d_unit.k));
    let (q_grad, k_grad, v_grad) = match grads {
        Some(g) => (Some(&mut *g.q_conv), Some(&mut *g.k_conv), Some(&mut *g.v_conv)),
        None => (None, None, None),
    };
    conv_backward(&raw.q, w.q_conv, d_inner, &dq, &mut d_raw.q, q_grad);
    conv_backward(&raw.k, w.k_conv, head_dim, &dk, &mut d_raw.k, k_grad);
    conv_backward(&raw.v, w.v_conv, head_dim, &d_unit.v, &mut d_raw.v, v_grad);
}
