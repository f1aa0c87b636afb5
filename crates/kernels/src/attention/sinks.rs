//! Few sinks that the window has left, in f32 beside whatever the windows are multiplied in. A sink takes most of many rows' weight, and rounding
//! its key would shift all their scores the same way; besides, so few keys are too thin for tiles.

use super::mask::Visible;
use super::{AttnMask, AttnShape};
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, MatRef};

/// Up to this many sinks are multiplied in f32; more are keys like all others.
pub(super) const FEW: usize = 4;
/// Query positions per task.
const POSITIONS: usize = 64;

/// Adds the sinks that the window of each query has left to the attention over windows in `out`, with the log denominators `lse`.
pub(super) fn add(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    [q, k, v]: [MatRef<'_>; 3],
    out: MatMut<'_>,
    lse: &mut [f32],
) {
    let mut rows: Vec<(&mut [f32], &mut [f32])> =
        out.into_rows().into_iter().zip(lse.chunks_mut(shape.q_heads)).collect();
    let AttnShape { head_dim, scale, .. } = shape;
    exec.parallel_items(rows.chunks_mut(POSITIONS).collect(), |task, rows| {
        dispatch!(exec.isa(), |s| {
            for (i, (out, lse)) in rows.iter_mut().enumerate() {
                let position = task * POSITIONS + i;
                let Visible { sinks, .. } = mask.visible(position, k.rows());
                let heads = q.row(position).chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
                for (head, ((q, out), lse)) in heads.zip(lse.iter_mut()).enumerate() {
                    let column = head / shape.group() * head_dim;
                    let few = [k, v].map(|mat| mat.columns(column, head_dim).rows_at(0, sinks.end));
                    add_row(s, scale, q, few, out, lse);
                }
            }
        });
    });
}

/// Adds the keys `k` and values `v`, at most [`FEW`], to the attention of one query.
#[inline(always)]
fn add_row<S: Simd>(s: S, scale: f32, q: &[f32], [k, v]: [MatRef<'_>; 2], out: &mut [f32], lse: &mut f32) {
    let (mut weights, mut top) = ([0.0; FEW], *lse);
    for (sink, score) in weights.iter_mut().enumerate().take(k.rows()) {
        *score = scale * simd::dot(s, q, k.row(sink));
        top = top.max(*score);
    }
    if top == f32::NEG_INFINITY || k.rows() == 0 {
        return;
    }
    let keep = simd::exp(s, *lse - top);
    let mut sum = keep;
    for weight in weights.iter_mut().take(k.rows()) {
        *weight = simd::exp(s, *weight - top);
        sum += *weight;
    }
    for x in out.iter_mut() {
        *x *= keep / sum;
    }
    for (sink, weight) in weights.iter().enumerate().take(k.rows()) {
        simd::axpy(s, weight / sum, v.row(sink), out);
    }
    *lse = top + sum.ln();
}

/// One KV head's sinks and the sums of their gradients, `[sinks, head_dim]` each.
pub(super) struct FewSinks {
    keys: Vec<f32>,
    values: Vec<f32>,
    pub(super) d_keys: Vec<f32>,
    pub(super) d_values: Vec<f32>,
}

impl FewSinks {
    /// `keys` and `values` `[sinks, head_dim]`.
    pub(super) fn new(keys: MatRef<'_>, values: MatRef<'_>) -> Self {
        let (keys, values) = (keys.to_dense(), values.to_dense());
        let [d_keys, d_values] = [&keys, &values].map(|values| vec![0.0; values.len()]);
        Self { keys, values, d_keys, d_values }
    }

    /// Adds what the first `sinks` give one row: the query's gradient to `dq`, keys' and values' to the sums. `lse` and `delta` are the row's log
    /// denominator and the mean of its weights' gradients.
    #[inline(always)]
    pub(super) fn add<S: Simd>(
        &mut self,
        s: S,
        scale: f32,
        sinks: usize,
        [q, dout]: [&[f32]; 2],
        [lse, delta]: [f32; 2],
        dq: &mut [f32],
    ) {
        let width = q.len();
        for at in (0..sinks).map(|sink| sink * width..(sink + 1) * width) {
            let (key, value) = (&self.keys[at.clone()], &self.values[at.clone()]);
            let weight = simd::exp(s, scale * simd::dot(s, q, key) - lse);
            let d_score = scale * weight * (simd::dot(s, dout, value) - delta);
            simd::axpy(s, weight, dout, &mut self.d_values[at.clone()]);
            simd::axpy(s, d_score, q, &mut self.d_keys[at]);
            simd::axpy(s, d_score, key, dq);
        }
    }
}
