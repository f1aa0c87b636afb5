//! Rotary position embedding, Hugging Face's half-split convention (`rotate_half`).

use std::cell::RefCell;

use crate::isa::dispatch;
use crate::simd::Simd;
use crate::{Exec, MatMut};

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
    TABLE.with_borrow_mut(|slot| {
        let known = slot.as_ref().is_some_and(|(table, start)| {
            table.inv_freq == inv_freq && *start == pos0 && table.rows >= seq_len
        });
        if !known {
            let mut table = RopeTable::new(inv_freq);
            table.set(exec, pos0, seq_len);
            *slot = Some((table, pos0));
        }
        let (table, _) = slot.as_ref().expect("just filled");
        table.turn(exec, MatMut::dense(x, seq_len, width), head_dim, rotation);
    });
}

thread_local! {
    /// The last table that [`rope`] made on this thread, and its first position: every layer and head of a pass asks for the same or for
    /// fewer rows.
    static TABLE: RefCell<Option<(RopeTable, usize)>> = const { RefCell::new(None) };
}

/// Sine and cosine of the rows of one forward pass, made once and applied by every layer: the numbers of [`rope`],
/// forward. Buffers only grow.
#[derive(Clone, Debug)]
pub struct RopeTable {
    inv_freq: Vec<f64>,
    /// (sin, cos) of the offsets from an anchor, `[ANCHOR, head_dim / 2]`.
    offsets: Vec<(f64, f64)>,
    /// (sin, cos) of the anchor last used.
    anchor: Vec<(f64, f64)>,
    anchor_position: usize,
    rows: usize,
    /// `[rows, head_dim / 2]` each.
    sin: Vec<f32>,
    cos: Vec<f32>,
}

impl RopeTable {
    /// A table without rows for heads of `2 · inv_freq.len()` values.
    pub fn new(inv_freq: &[f64]) -> Self {
        let angles = |offset: usize| inv_freq.iter().map(move |f| (offset as f64 * f).sin_cos());
        Self {
            inv_freq: inv_freq.to_vec(),
            offsets: (0..ANCHOR).flat_map(angles).collect(),
            anchor: angles(0).collect(),
            anchor_position: 0,
            rows: 0,
            sin: Vec::new(),
            cos: Vec::new(),
        }
    }
    /// Rows at the consecutive positions `start..start + rows`.
    pub fn set(&mut self, exec: &Exec, start: usize, rows: usize) {
        self.fill(exec, rows, |t| start + t);
    }
    /// Row `t` at `positions[t]`, in any order: one row of each of several sequences.
    pub fn set_positions(&mut self, exec: &Exec, positions: &[usize]) {
        self.fill(exec, positions.len(), |t| positions[t]);
    }
    /// Number of rows set.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn fill(&mut self, exec: &Exec, rows: usize, position: impl Fn(usize) -> usize) {
        let half = self.inv_freq.len();
        self.rows = rows;
        if self.sin.len() < rows * half {
            self.sin.resize(rows * half, 0.0);
            self.cos.resize(rows * half, 0.0);
        }
        for t in 0..rows {
            let position = position(t);
            let base = position / ANCHOR * ANCHOR;
            if base != self.anchor_position {
                for (anchor, f) in self.anchor.iter_mut().zip(&self.inv_freq) {
                    *anchor = (base as f64 * f).sin_cos();
                }
                self.anchor_position = base;
            }
            let offsets = &self.offsets[(position - base) * half..][..half];
            let (sin, cos) = (&mut self.sin[t * half..][..half], &mut self.cos[t * half..][..half]);
            dispatch!(exec.isa(), compose(&self.anchor, offsets, sin, cos));
        }
    }

    /// Rotates `x` `[rows, n_heads · head_dim]` in place, row `t` by the table's row `t`. Panics when the sizes do not
    /// fit.
    pub fn rotate(&self, exec: &Exec, x: MatMut<'_>, head_dim: usize) {
        assert_eq!(x.rows(), self.rows, "rope table: rows");
        self.turn(exec, x, head_dim, Rotation::Forward);
    }

    /// [`rotate`](Self::rotate) in either direction, of up to as many rows as the table has.
    fn turn(&self, exec: &Exec, mut x: MatMut<'_>, head_dim: usize, rotation: Rotation) {
        /// Below this many values waking another thread costs more than it gains.
        const MIN_PARALLEL_VALUES: usize = 32 * 1024;
        /// Rows of a task.
        const ROWS: usize = 16;
        let half = self.inv_freq.len();
        assert_eq!(head_dim, 2 * half, "rope table: head_dim");
        let (rows, cols) = (x.rows(), x.cols());
        assert!(cols.is_multiple_of(head_dim.max(1)), "{cols} columns are not heads of {head_dim}");
        if rows == 0 || cols == 0 {
            return;
        }
        let stride = x.row_stride();
        let values = match rows {
            1 => &mut x.data_mut()[..cols],
            _ => &mut x.data_mut()[..(rows - 1) * stride + cols],
        };
        let run = |first: usize, block: &mut [f32]| {
            dispatch!(exec.isa(), |s| {
                for (t, row) in block.chunks_mut(stride.max(cols)).enumerate() {
                    let at = (first + t) * half;
                    let (sin, cos) = (&self.sin[at..][..half], &self.cos[at..][..half]);
                    match rotation {
                        Rotation::Forward => rotate::<_, false>(s, &mut row[..cols], sin, cos),
                        Rotation::Inverse => rotate::<_, true>(s, &mut row[..cols], sin, cos),
                    }
                }
            });
        };
        if rows * cols < MIN_PARALLEL_VALUES {
            run(0, values);
        } else {
            exec.parallel_chunks(values, ROWS * stride, |i, block| run(i * ROWS, block));
        }
    }
}

/// Sine and cosine of the sums of two angles.
#[inline(always)]
fn compose(anchor: &[(f64, f64)], offsets: &[(f64, f64)], sin: &mut [f32], cos: &mut [f32]) {
    for (((&(sa, ca), &(sb, cb)), sin), cos) in anchor.iter().zip(offsets).zip(sin).zip(cos) {
        *sin = (sa * cb + ca * sb) as f32;
        *cos = (ca * cb - sa * sb) as f32;
    }
}

/// Rotates every head of one row.
#[inline(always)]
fn rotate<S: Simd, const INVERSE: bool>(s: S, x: &mut [f32], sin: &[f32], cos: &[f32]) {
    for head in x.chunks_exact_mut(2 * sin.len()) {
        let (low, high) = head.split_at_mut(sin.len());
        for (((low, high), &sin), &cos) in low.iter_mut().zip(high).zip(sin).zip(cos) {
            let (a, b) = (*low, *high);
            let sin = if INVERSE { -sin } else { sin };
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
    fn the_table_gives_the_same_bits() {
        for exec in execs() {
            for (rows, heads, dim) in
                [(0, 2, 4), (1, 9, 64), (5, 3, 64), (65, 2, 6), (200, 9, 64), (17, 1, 80)]
            {
                let freq = frequencies(dim);
                let mut table = RopeTable::new(&freq);
                for start in [0, 63, 131_000] {
                    let (width, stride) = (heads * dim, heads * dim + 5);
                    let x = noise(1, rows * stride);
                    let want: Vec<Vec<f32>> = (0..rows)
                        .map(|t| {
                            let mut row = x[t * stride..][..width].to_vec();
                            rope(&exec, &mut row, dim, &freq, 1, start + t, Rotation::Forward);
                            row
                        })
                        .collect();
                    table.set(&exec, start, rows);
                    let mut got = x.clone();
                    table.rotate(&exec, MatMut::new(&mut got, rows, width, stride), dim);
                    for t in 0..rows {
                        assert_eq!(got[t * stride..][..width], want[t]);
                        assert_eq!(got[t * stride + width..][..5], x[t * stride + width..][..5]);
                    }
                    // Rows of other sequences, backwards.
                    let positions: Vec<usize> = (0..rows).rev().map(|t| start + t).collect();
                    table.set_positions(&exec, &positions);
                    assert_eq!(table.rows(), rows);
                    let mut got: Vec<f32> =
                        (0..rows).rev().flat_map(|t| x[t * stride..][..width].to_vec()).collect();
                    table.rotate(&exec, MatMut::dense(&mut got, rows, width), dim);
                    for (t, want) in want.iter().rev().enumerate() {
                        assert_eq!(got[t * width..][..width], want[..]);
                    }
                }
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
