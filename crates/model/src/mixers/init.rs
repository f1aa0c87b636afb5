//! Starting values of new heads, and what is fitted on one sequence.

use super::{BaseGroup, Ctx, Form, HeadDims, HeadEnv, HeadLayout, HeadTensors, MambaTensors};
use super::{Linear, Projections, QkvTensors, local, qkv, weighed};
use crate::plan::RecurrentKind;
use kernels::{Exec, MatMut, MatRef, elementwise};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mean attention distances, in tokens, are clamped to this range before they become a decay.
const DISTANCE_RANGE: (f32, f32) = (2.0, 128.0);
/// Mamba-1's Δ starts log-uniform in this range…
const DELTA_RANGE: (f32, f32) = (1e-3, 1e-1);
/// …and never below this.
const DELTA_FLOOR: f32 = 1e-4;

/// Starting values: attention-initialised for `mamba2` and `gated-delta` (projections copied from the base, identity convs, decay from
/// `mean_distance` per query head clamped to 2..128, gate 0, gain 1), the usual random Mamba-1 initialisation (seeded) for `mamba`.
///
/// `mean_distance` has one value per query head (ignored by `mamba` and `none`); `gated-delta`, with one decay per group, takes the mean
/// of the clamped values. Weights of the rate projections, `in_scale`, `beta` biases, `d_skip` and all of `far` start at 0. Panics when lengths do not fit.
pub fn init(layout: &HeadLayout, base: &BaseGroup<'_>, mean_distance: &[f32], seed: u64) -> HeadTensors {
    let mut tensors = layout.zeros();
    let slices = tensors.values.iter_mut().map(Vec::as_mut_slice);
    match layout.spec.recurrent {
        RecurrentKind::None => {}
        RecurrentKind::Mamba => init_mamba(layout, MambaTensors::new(slices), seed),
        RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {
            init_from_attention(layout, base, mean_distance, QkvTensors::new(layout, slices));
        }
    }
    tensors
}

fn init_from_attention(
    layout: &HeadLayout,
    base: &BaseGroup<'_>,
    mean_distance: &[f32],
    w: QkvTensors<&mut [f32]>,
) {
    let HeadDims { q_heads, .. } = layout.dims;
    assert_eq!(mean_distance.len(), q_heads, "one mean distance per query head of the group");
    assert!(mean_distance.iter().all(|d| d.is_finite()), "mean distances must be finite: {mean_distance:?}");
    w.q.copy_from_slice(base.q_proj);
    w.k.copy_from_slice(base.k_proj);
    w.v.copy_from_slice(base.v_proj);
    let biases = [(w.q_bias, base.q_bias), (w.k_bias, base.k_bias), (w.v_bias, base.v_bias)];
    for (own, base) in biases {
        if let Some(own) = own {
            own.copy_from_slice(base.expect("the base of a biased layout has biases"));
        }
    }
    let d_conv = layout.spec.d_conv;
    for conv in [w.q_conv, w.k_conv, w.v_conv] {
        conv.chunks_exact_mut(d_conv).for_each(|taps| taps[d_conv - 1] = 1.0);
    }
    let clamped: Vec<f32> =
        mean_distance.iter().map(|d| d.clamp(DISTANCE_RANGE.0, DISTANCE_RANGE.1)).collect();
    match layout.spec.recurrent {
        RecurrentKind::GatedDelta => {
            let mean = clamped.iter().sum::<f32>() / q_heads as f32;
            w.dt_bias[0] = inverse_softplus(1.0 / mean);
        }
        _ => w.dt_bias.iter_mut().zip(&clamped).for_each(|(b, d)| *b = inverse_softplus(1.0 / d)),
    }
    w.gain.fill(1.0);
}

/// As in the reference implementation of arXiv 2312.00752 (`mamba_simple.py`).
fn init_mamba(layout: &HeadLayout, w: MambaTensors<&mut [f32]>, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let d_state = layout.spec.d_state;
    let mut uniform = |values: &mut [f32], fan_in: usize| {
        let bound = 1.0 / (fan_in as f32).sqrt();
        values.iter_mut().for_each(|v| *v = rng.random_range(-bound..=bound));
    };
    uniform(w.in_proj, layout.dims.d_model);
    uniform(w.conv, layout.spec.d_conv);
    uniform(w.conv_bias, layout.spec.d_conv);
    uniform(w.x_proj, layout.d_inner());
    uniform(w.dt, layout.dt_rank());
    let (low, high) = (DELTA_RANGE.0.ln(), DELTA_RANGE.1.ln());
    for bias in w.dt_bias {
        *bias = inverse_softplus(rng.random_range(low..=high).exp().max(DELTA_FLOOR));
    }
    for row in w.a_log.chunks_exact_mut(d_state) {
        row.iter_mut().enumerate().for_each(|(n, a)| *a = ((n + 1) as f32).ln());
    }
    w.d.fill(1.0);
}

/// `ln(e^y − 1)` for `y > 0`.
fn inverse_softplus(y: f32) -> f32 {
    y + (-(-y).exp_m1()).ln()
}

/// What is fitted to one sequence before a new head trains: tensors by their index in [`HeadLayout::tensors`], with their values. `x` is the sequence
/// from its start, `target` `[T, G·D]` the base's output. Empty for mixers without a gain.
///
/// - `far_proj.bias` and `far_count` (where dropped tokens are weighed), per query head: the line over `ln N` closest to the true log weights of the
///   dropped tokens, rows weighted by their share of the softmax; its slope between 0 and 1.
/// - `out_gain`, per query head by least squares so that the recurrent branch best explains `target − local(x)`: `⟨y,t⟩/⟨y,y⟩` with `y` the recurrence's
///   output before gain and gate (a new head's gate is 1), repeated for the head's channels; 1 where `y` is 0. Both branches are weighed where dropped tokens are.
pub fn fit(exec: &Exec, env: &HeadEnv<'_>, x: MatRef<'_>, target: MatRef<'_>) -> Vec<(usize, Vec<f32>)> {
    let layout = &env.layout;
    match layout.spec.recurrent {
        RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {}
        RecurrentKind::None | RecurrentKind::Mamba => return Vec::new(),
    }
    let ctx = Ctx::new(exec, env, x);
    let HeadDims { q_heads, head_dim, .. } = layout.dims;
    let (seq, d_inner) = (x.rows(), q_heads * head_dim);
    assert_eq!((target.rows(), target.cols()), (seq, d_inner), "target shape");
    let w = QkvTensors::new(layout, env.weights.values.iter().copied());
    let raw = Projections::of_head(&w).forward(&ctx);
    let mut kept = vec![0.0; seq * d_inner];
    let mut cache = layout.new_cache();
    let mut fitted = Vec::new();
    let mut keep = vec![1.0; seq * q_heads];
    if layout.has_local() {
        let out = MatMut::dense(&mut kept, seq, d_inner);
        let [q, k] = local::rotated(&ctx, &raw, 0);
        let lse = local::forward(&ctx, [&q, &k], &raw.v, &mut cache, out);
        if let (Some(far), Some(lse)) = (&w.far, lse) {
            let total = local::log_denominators(&ctx, [&q, &k], &raw.v);
            let mut logits = Linear::new(far.proj, None).forward(&ctx, x, q_heads);
            let [bias, count] = weighed::fit(&ctx, &logits, &lse, &total);
            elementwise::add_bias(exec, &bias, &mut logits);
            keep = weighed::keep(&ctx, 0, ctx.per_head(&logits), &count, ctx.per_head(&lse));
            kept.chunks_exact_mut(head_dim)
                .zip(&keep)
                .for_each(|(row, keep)| row.iter_mut().for_each(|x| *x *= keep));
            fitted.extend([("far_proj.bias", bias), ("far_count", count)]);
        }
    }
    let decays = layout.decays();
    let dt = Linear::new(w.dt, Some(w.dt_bias)).forward(&ctx, x, decays);
    let input = Linear::new(w.input, Some(w.input_bias)).forward(&ctx, x, decays);
    let (raw, rates) = (raw.view(seq, layout.dims), [&dt, &input].map(|x| MatRef::dense(x, seq, decays)));
    let mut y = qkv::recurrence(&ctx, &w, raw, rates, &mut cache, Form::Chunked).y;
    if layout.weighs() {
        let heads = y.chunks_exact_mut(head_dim).zip(&keep);
        heads.for_each(|(row, keep)| row.iter_mut().for_each(|y| *y *= 1.0 - keep));
    }
    let mut gain = Vec::with_capacity(d_inner);
    let mut rest = vec![0.0; head_dim];
    for head in 0..q_heads {
        let (mut explained, mut power) = (0.0, 0.0);
        for t in 0..seq {
            let from = t * d_inner + head * head_dim;
            let (y, kept) = (&y[from..from + head_dim], &kept[from..from + head_dim]);
            let target = &target.row(t)[head * head_dim..(head + 1) * head_dim];
            rest.iter_mut().zip(target).zip(kept).for_each(|((r, t), kept)| *r = t - kept);
            explained += elementwise::dot(y, &rest);
            power += elementwise::dot(y, y);
        }
        let fitted = if power > 0.0 { (explained / power) as f32 } else { 1.0 };
        gain.extend(std::iter::repeat_n(fitted, head_dim));
    }
    fitted.push(("out_gain", gain));
    let tensors = layout.tensors();
    let index = |name| tensors.iter().position(|t| t.name == name).expect("a tensor of this layout");
    fitted.into_iter().map(|(name, values)| (index(name), values)).collect()
}
