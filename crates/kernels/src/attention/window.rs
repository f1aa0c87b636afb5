//! One decoding step of a local window: every stored key is visible, so there is no mask and no split.

use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, STACK};
use half::f16;
use smallvec::{SmallVec, smallvec};

/// Stored rows in one pass: each head's sums are read and written once for all of them.
const ROWS: usize = 4;

/// Keys or values as a window stores them, `[n, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub enum WindowRows<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl WindowRows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }
}

/// A key and a value, `[head_dim]` each, that stand for tokens which the window no longer stores.
#[derive(Clone, Copy, Debug)]
pub struct WindowMean<'a> {
    /// Mean key.
    pub key: &'a [f32],
    /// Mean value.
    pub value: &'a [f32],
    /// It weighs `exp` of this times as much as one token of that key.
    pub log_weight: f32,
}

/// Softmax attention of one token's query heads over all `n` given keys, and over `mean` where there is one: `q` and `out` are
/// `[heads, head_dim]`, keys and values are shared by the heads; `lse` `[heads]` receives the log of each softmax denominator.
/// `scores` is a buffer; it only grows. Runs on the calling thread.
///
/// # Panics
/// When lengths do not fit, keys and values are stored differently, or there is no key.
pub fn window_step(
    exec: &Exec,
    scale: f32,
    q: &[f32],
    [keys, values]: [WindowRows<'_>; 2],
    mean: Option<WindowMean<'_>>,
    head_dim: usize,
    scores: &mut Vec<f32>,
    (out, lse): (&mut [f32], &mut [f32]),
) {
    assert!(head_dim > 0 && q.len().is_multiple_of(head_dim), "window: {} values of q", q.len());
    let rows = keys.len() / head_dim;
    assert!(rows > 0 && keys.len() == rows * head_dim, "window: {} values of keys", keys.len());
    check_len("values", values.len(), keys.len());
    check_len("out", out.len(), q.len());
    let heads = q.len() / head_dim;
    check_len("lse", lse.len(), heads);
    if let Some(mean) = &mean {
        check_len("mean key", mean.key.len(), head_dim);
        check_len("mean value", mean.value.len(), head_dim);
    }
    let columns = rows + usize::from(mean.is_some());
    if scores.len() < heads * columns {
        scores.resize(heads * columns, 0.0);
    }
    let step = Step { scale, head_dim, columns, q, mean };
    let scores = &mut scores[..heads * columns];
    match (keys, values) {
        (WindowRows::F32(keys), WindowRows::F32(values)) => {
            dispatch!(exec.isa(), |s| step.run(s, keys, values, scores, out, lse));
        }
        (WindowRows::F16(keys), WindowRows::F16(values)) => {
            dispatch!(exec.isa(), |s| step.run(s, keys, values, scores, out, lse));
        }
        _ => panic!("window: keys and values of two types"),
    }
}

/// A stored number type.
trait Stored: Copy {
    /// `values` as f32, in `buffer` where they are none.
    fn widened<'a, S: Simd>(s: S, values: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];
}

impl Stored for f32 {
    #[inline(always)]
    fn widened<'a, S: Simd>(_: S, values: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        values
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widened<'a, S: Simd>(s: S, values: &'a [f16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..values.len()];
        simd::widen(s, values, buffer);
        buffer
    }
}

/// What a step reads besides the window.
struct Step<'a> {
    scale: f32,
    head_dim: usize,
    /// Stored keys and the mean.
    columns: usize,
    q: &'a [f32],
    mean: Option<WindowMean<'a>>,
}

impl Step<'_> {
    #[inline(always)]
    fn run<S: Simd, T: Stored>(
        &self,
        s: S,
        keys: &[T],
        values: &[T],
        scores: &mut [f32],
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        let Step { scale, head_dim, columns, q, mean } = *self;
        let mut buffer: SmallVec<[f32; ROWS * STACK]> = smallvec![0.0; ROWS * head_dim];
        for (i, keys) in keys.chunks(ROWS * head_dim).enumerate() {
            let keys = T::widened(s, keys, &mut buffer);
            for (q, scores) in q.chunks_exact(head_dim).zip(scores.chunks_exact_mut(columns)) {
                for (score, key) in scores[i * ROWS..].iter_mut().zip(keys.chunks_exact(head_dim)) {
                    *score = scale * simd::dot(s, q, key);
                }
            }
        }
        for ((h, scores), lse) in scores.chunks_exact_mut(columns).enumerate().zip(lse) {
            if let Some(mean) = mean {
                let q = &q[h * head_dim..(h + 1) * head_dim];
                scores[columns - 1] = scale * simd::dot(s, q, mean.key) + mean.log_weight;
            }
            let max = simd::max(scores);
            scores.iter_mut().for_each(|score| *score = simd::exp(s, *score - max));
            let sum = simd::sum(s, scores);
            let inverse = 1.0 / sum;
            scores.iter_mut().for_each(|score| *score *= inverse);
            *lse = max + sum.ln();
        }
        out.fill(0.0);
        for (i, values) in values.chunks(ROWS * head_dim).enumerate() {
            let values = T::widened(s, values, &mut buffer);
            for (out, weights) in out.chunks_exact_mut(head_dim).zip(scores.chunks_exact(columns)) {
                let weights = &weights[i * ROWS..];
                match values.len() == ROWS * head_dim {
                    true => add_rows(s, weights, values, out),
                    false => {
                        for (&weight, value) in weights.iter().zip(values.chunks_exact(head_dim)) {
                            simd::axpy(s, weight, value, out);
                        }
                    }
                }
            }
        }
        if let Some(mean) = mean {
            for (out, weights) in out.chunks_exact_mut(head_dim).zip(scores.chunks_exact(columns)) {
                simd::axpy(s, weights[columns - 1], mean.value, out);
            }
        }
    }
}

/// Adds [`ROWS`] rows of `values`, each by its weight, to `out`.
#[inline(always)]
fn add_rows<S: Simd>(s: S, weights: &[f32], values: &[f32], out: &mut [f32]) {
    let width = out.len();
    let (a, rest) = values.split_at(width);
    let (b, rest) = rest.split_at(width);
    let (c, d) = rest.split_at(width);
    let &[wa, wb, wc, wd] = weights.first_chunk::<ROWS>().expect("a weight for each row");
    for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        let first = s.fma(wb, *b, s.fma(wa, *a, *out));
        *out = s.fma(wd, *d, s.fma(wc, *c, first));
    }
}
