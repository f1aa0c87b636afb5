//! One decoding step of a local window: every stored key is visible, so there is no mask and no split.

use crate::Exec;
use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{self, Simd};

/// Softmax attention of one token's query heads over all `n` given keys: `q` and `out` are `[heads, head_dim]`, `keys` and `values`
/// `[n, head_dim]`, shared by the heads; `lse` `[heads]` receives the log of each softmax denominator. The last key weighs `exp(last_bias)` times as much as it would (0: like the others).
/// `scores` is a buffer; it only grows. Runs on the calling thread.
///
/// # Panics
/// When lengths do not fit, or there is no key.
pub fn window_step(
    exec: &Exec,
    (scale, last_bias): (f32, f32),
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    head_dim: usize,
    scores: &mut Vec<f32>,
    (out, lse): (&mut [f32], &mut [f32]),
) {
    assert!(head_dim > 0 && q.len().is_multiple_of(head_dim), "window: {} values of q", q.len());
    assert!(!keys.is_empty() && keys.len().is_multiple_of(head_dim), "window: {} values of keys", keys.len());
    check_len("values", values.len(), keys.len());
    check_len("out", out.len(), q.len());
    scores.resize(keys.len() / head_dim, 0.0);
    check_len("lse", lse.len(), q.len() / head_dim);
    for ((q, out), lse) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).zip(lse) {
        *lse = dispatch!(exec.isa(), |s| head(s, (scale, last_bias), q, keys, values, scores, out));
    }
}

#[inline(always)]
fn head<S: Simd>(
    s: S,
    (scale, last_bias): (f32, f32),
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) -> f32 {
    let head_dim = q.len();
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(head_dim)) {
        *score = scale * simd::dot(s, q, key);
    }
    if let Some(last) = scores.last_mut() {
        *last += last_bias;
    }
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = simd::exp(s, *score - max);
        sum += *score;
    }
    out.fill(0.0);
    let inverse = 1.0 / sum;
    for (&score, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
        simd::axpy(s, score * inverse, value, out);
    }
    max + sum.ln()
}
