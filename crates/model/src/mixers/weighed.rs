//! Dropped tokens weighed: the recurrence answers for what the window no longer shows, with the share of the softmax that it would have.
//!
//! Attention to everything is `keep · local + (1 − keep) · rest`, with `keep = σ(lse − far)`: `lse` is the log of the window's softmax
//! denominator, `far` that of the dropped tokens. The first is at hand, the second is estimated from the layer input and the number `N` of
//! dropped tokens: `far = x W_farᵀ + b_far + far_count · ln N`, one value per query head. While nothing is dropped, `keep` is 1 and the head is the base's.

use super::Ctx;
use super::merged::dropped_at;
use kernels::{MatRef, elementwise};

/// Shares of the softmax below this are rounding.
const SMALLEST_SHARE: f64 = 1e-6;

/// `keep` for a query at `position`, before which `N ≥ 1` tokens were dropped; 1 when `N` is 0.
pub(super) fn keep_at(dropped: usize, count: f32, far: f32, lse: f32) -> f32 {
    if dropped == 0 { 1.0 } else { elementwise::sigmoid(lse - far - count * (dropped as f32).ln()) }
}

/// `keep` `[T, G]` for the queries from position `seen` on; `far` are the logits `x W_farᵀ + b_far`, `count` is `far_count`.
pub(super) fn keep(ctx: &Ctx<'_>, seen: usize, far: MatRef<'_>, count: &[f32], lse: MatRef<'_>) -> Vec<f32> {
    let mut keep = Vec::with_capacity(far.rows() * count.len());
    for t in 0..far.rows() {
        let dropped = dropped(ctx, seen + t);
        let heads = far.row(t).iter().zip(lse.row(t)).zip(count);
        keep.extend(heads.map(|((&far, &lse), &count)| keep_at(dropped, count, far, lse)));
    }
    keep
}

/// Gradients of the logits `[T, G]`, and of the window's log denominators, which are their negative; adds to `dcount`. From position 0 on.
pub(super) fn backward(
    ctx: &Ctx<'_>,
    keep: &[f32],
    dkeep: &[f32],
    mut dcount: Option<&mut [f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let heads = ctx.env.layout.dims.q_heads;
    // 1 where nothing is dropped: then no gradient.
    let dfar: Vec<f32> = keep.iter().zip(dkeep).map(|(keep, d)| -keep * (1.0 - keep) * d).collect();
    if let Some(dcount) = &mut dcount {
        for (t, row) in dfar.chunks_exact(heads).enumerate() {
            let log = (dropped(ctx, t).max(1) as f32).ln();
            dcount.iter_mut().zip(row).for_each(|(sum, d)| *sum += log * d);
        }
    }
    let dlse = dfar.iter().map(|d| -d).collect();
    (dfar, dlse)
}

/// `b_far` and `far_count` per query head: the weighted least squares line over `ln N` through the true log weights of the dropped tokens less
/// `logits`; slopes between 0 and 1, both 0 where nothing is dropped. `lse` and `total` are the log denominators of the window and of everything, `[T, G]` all.
pub(super) fn fit(ctx: &Ctx<'_>, logits: &[f32], lse: &[f32], total: &[f32]) -> [Vec<f32>; 2] {
    let heads = ctx.env.layout.dims.q_heads;
    let (mut bias, mut count) = (vec![0.0; heads], vec![0.0; heads]);
    for head in 0..heads {
        // Of weight, x, y, x², xy.
        let mut sums = [0.0f64; 5];
        for t in 0..ctx.seq {
            let (dropped, at) = (dropped(ctx, t), t * heads + head);
            let share = -f64::from(lse[at] - total[at]).exp_m1();
            if dropped == 0 || share <= SMALLEST_SHARE {
                continue;
            }
            let (x, y) = ((dropped as f64).ln(), f64::from(total[at] - logits[at]) + share.ln());
            sums.iter_mut().zip([1.0, x, y, x * x, x * y]).for_each(|(sum, term)| *sum += share * term);
        }
        let [weight, x, y, xx, xy] = sums;
        if weight == 0.0 {
            continue;
        }
        let variance = xx / weight - (x / weight).powi(2);
        let covariance = xy / weight - x / weight * (y / weight);
        let slope = if variance > 1e-6 { (covariance / variance).clamp(0.0, 1.0) } else { 0.0 };
        count[head] = slope as f32;
        bias[head] = ((y - slope * x) / weight) as f32;
    }
    [bias, count]
}

/// Tokens that the query at `position` no longer sees.
pub(super) fn dropped(ctx: &Ctx<'_>, position: usize) -> usize {
    let spec = &ctx.env.layout.spec;
    dropped_at(spec.window, spec.sinks, position)
}
