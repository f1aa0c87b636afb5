//! Rotary position embedding, Hugging Face's half-split convention (`rotate_half`).

use crate::Exec;
use crate::isa::dispatch;
use crate::simd::Simd;

/// Direction of the rotation; the backward pass of one is the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// By `+position · frequency`.
    Forward,
    /// By `−position · frequency`.
    Inverse,
}

/// Positions between two whose sine and cosine are evaluated; the ones between are composed from two angles in f64. A
/// row's angle is a function of its absolute position alone, so that chunked and full calls agree bit for bit.
const ANCHOR: usize = 64;

/// Rotates `x` `[seq, n_heads · head_dim]` in place; row `t` has position `pos0 + t` and angle
/// `position · inv_freq[i]` for the pair `(i, i + head_dim / 2)` of every head. `inv_freq` has `head_dim / 2` values;
/// angles are formed in f64. Panics when the sizes do not fit. Source: arXiv 2104.09864, eq. 34.
pub fn rope(
    exec: &Exec,
    x: &mut [f32],
    head_dim: usize,
    inv_freq: &[f64],
    seq_len: usize,
    pos0: usize,
    rotation: Rotation,
) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "head_dim {head_dim} is not even");
    assert_eq!(inv_freq.len(), head_dim / 2, "rope: inv_freq");
    if x.is_empty() {
        return;
    }
    let fits = seq_len > 0 && x.len().is_multiple_of(seq_len * head_dim);
    assert!(fits, "{} values are not {seq_len} rows of heads of {head_dim}", x.len());
    let width = x.len() / seq_len;
    // (sin, cos) of every offset from an anchor that occurs.
    let offsets: Vec<Vec<(f64, f64)>> = (0..ANCHOR)
        .map(|offset| match (offset + ANCHOR - pos0 % ANCHOR) % ANCHOR < seq_len {
            true => inv_freq.iter().map(|f| (offset as f64 * f).sin_cos()).collect(),
            false => Vec::new(),
        })
        .collect();
    exec.parallel_chunks(x, ANCHOR * width, |chunk, x| {
        let mut anchor = (usize::MAX, Vec::new());
        let (mut sin, mut cos) = (vec![0.0f32; head_dim / 2], vec![0.0f32; head_dim / 2]);
        for (t, x) in x.chunks_exact_mut(width).enumerate() {
            let position = pos0 + chunk * ANCHOR + t;
            let base = position / ANCHOR * ANCHOR;
            if anchor.0 != base {
                anchor = (base, inv_freq.iter().map(|f| (base as f64 * f).sin_cos()).collect::<Vec<_>>());
            }
            for (i, (&(sa, ca), &(sb, cb))) in anchor.1.iter().zip(&offsets[position - base]).enumerate() {
                let sine = sa * cb + ca * sb;
                sin[i] = if rotation == Rotation::Forward { sine } else { -sine } as f32;
                cos[i] = (ca * cb - sa * sb) as f32;
            }
            dispatch!(exec.isa(), |s| rotate(s, x, &sin, &cos));
        }
    });
}

/// Rotates every head of one row.
#[inline(always)]
fn rotate<S: Simd>(s: S, x: &mut [f32], sin: &[f32], cos: &[f32]) {
    for head in x.chunks_exact_mut(2 * sin.len()) {
        let (low, high) = head.split_at_mut(sin.len());
        for (((low, high), &sin), &cos) in low.iter_mut().zip(high).zip(sin).zip(cos) {
            let (a, b) = (*low, *high);
            *low = s.fma(a, cos, -(b * sin));
            *high = s.fma(b, cos, a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::testing::{assert_close, execs, noise, to_f64};

    /// Two f32 products and the f32 rounding of sine and cosine.
    const TOLERANCE: f64 = 3e-7;

    fn frequencies(head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2).map(|i| 10000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    }

    #[test]
    fn agrees_with_naive_at_any_position() {
        for exec in execs() {
            for (seq, heads, dim) in
                [(0, 2, 4), (1, 3, 64), (63, 1, 2), (64, 2, 6), (65, 3, 64), (500, 1, 10)]
            {
                for pos0 in [0, 1, 63, 100, 131_000] {
                    let (x, freq) = (noise(1, seq * heads * dim), frequencies(dim));
                    for rotation in [Rotation::Forward, Rotation::Inverse] {
                        let mut got = x.clone();
                        rope(&exec, &mut got, dim, &freq, seq, pos0, rotation);
                        let want = naive::rope::rope(&to_f64(&x), dim, &freq, seq, pos0, rotation);
                        assert_close("rope", &got, &want, TOLERANCE);
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_and_threads_do_not_change_a_bit() {
        let (seq, dim) = (200, 64);
        let (x, freq) = (noise(1, seq * dim), frequencies(dim));
        for exec in execs() {
            let mut full = x.clone();
            rope(&exec.single(), &mut full, dim, &freq, seq, 7, Rotation::Forward);
            for chunk in [1, 63, 64, 65, 200] {
                let mut got = x.clone();
                for (i, part) in got.chunks_mut(chunk * dim).enumerate() {
                    let rows = part.len() / dim;
                    rope(&exec, part, dim, &freq, rows, 7 + i * chunk, Rotation::Forward);
                }
                assert_eq!(got, full);
            }
        }
    }

    #[test]
    fn the_inverse_undoes_the_rotation() {
        let (seq, dim) = (70, 16);
        let (x, freq) = (noise(1, seq * dim), frequencies(dim));
        for exec in execs() {
            let mut y = x.clone();
            rope(&exec, &mut y, dim, &freq, seq, 5, Rotation::Forward);
            assert_eq!(y.len(), x.len());
            rope(&exec, &mut y, dim, &freq, seq, 5, Rotation::Inverse);
            assert_close("inverse", &y, &to_f64(&x), 2.0 * TOLERANCE);
        }
    }
}
