//! f32 matrices as bfloat16 operands of a product: rows for its left side, panels for its right side, each from a matrix
//! as it is or transposed. Knows rounding and layouts; knows nothing of products and threads.

#![allow(clippy::needless_range_loop)] // Plain loops over registers stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;

use super::{PANEL, padded};
use crate::{MatRef, Trans};

/// Rows of the left operand that one transposition makes.
const ROWS: usize = 16;
/// Values of the reduction that fill a register.
pub(super) const SPAN: usize = 32;
/// How many of `count` rows (or columns of panels) a task converts. Where they are columns of the matrix, neighbours share cache lines and pages:
/// many, but some tasks for every thread.
pub(super) fn together(columns: bool, count: usize, threads: usize) -> usize {
    const MOST: usize = 256;
    const TASKS_PER_THREAD: usize = 4;
    match columns {
        true => (count / (TASKS_PER_THREAD * threads)).next_multiple_of(ROWS).clamp(ROWS, MOST),
        false => ROWS,
    }
}
/// Floats per register.
const LANES: usize = 16;

/// The panels of `op(b)` `[k, n]` from `first` on that fill `out`, `stride` apart, each `[padded k / 2][16][2]`, zero padded; rounded to
/// nearest even, subnormal values to zero. Several at once, since their columns share the rows' cache lines and pages.
///
/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(crate) unsafe fn panels(b: MatRef<'_>, tb: Trans, first: usize, out: &mut [u16], stride: usize) {
    let (k, n) = tb.shape(b);
    let count = out.len().div_ceil(stride);
    assert!(stride >= padded(k) * PANEL && out.len() >= (count - 1) * stride + padded(k) * PANEL);
    let wide = |i: usize| PANEL.min(n - (first + i) * PANEL);
    let mut store = |panel: usize, at: usize, v: __m512i| {
        // SAFETY: 32 values of 2 bytes inside the padded `k` of a panel that `out` holds, checked above.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(panel * stride + at).cast(), v) };
    };
    match tb {
        Trans::No => {
            for pair in 0..padded(k) / 2 {
                for i in 0..count {
                    store(i, pair * SPAN, pairs_of_rows(b, 2 * pair, (first + i) * PANEL, wide(i), 1.0));
                }
            }
        }
        Trans::Yes => {
            for i in 0..count {
                for start in (0..padded(k)).step_by(SPAN) {
                    let mut pairs = [_mm512_setzero_si512(); PANEL];
                    for r in 0..wide(i) {
                        pairs[r] = pairs_of_row(b, (first + i) * PANEL + r, start, 1.0);
                    }
                    let columns = transpose(pairs);
                    for c in 0..PANEL {
                        store(i, start * PANEL + SPAN * c, columns[c]);
                    }
                }
            }
        }
    }
}

/// The rows of `alpha · op(a)` `[m, k]` from `first` on that fill `out`, each `[padded k]`, `stride` apart; as [`panels`].
///
/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(crate) unsafe fn rows(
    a: MatRef<'_>,
    ta: Trans,
    alpha: f32,
    first: usize,
    out: &mut [u16],
    stride: usize,
) {
    let (m, k) = ta.shape(a);
    let cols = padded(k);
    let total = out.len().div_ceil(stride).min(m - first);
    assert!(total == 0 || out.len() >= (total - 1) * stride + cols, "room for {total} rows of {cols}");
    for start in (0..cols).step_by(SPAN) {
        for block in (0..total).step_by(ROWS) {
            let count = ROWS.min(total - block);
            let mut pairs = [_mm512_setzero_si512(); ROWS];
            match ta {
                Trans::No => {
                    for r in 0..count {
                        pairs[r] = pairs_of_row(a, first + block + r, start, alpha);
                    }
                }
                Trans::Yes => pairs = transposed(a, start, first + block, count, alpha),
            }
            for r in 0..count {
                let at = (block + r) * stride + start;
                // SAFETY: `start + 32 <= cols` values of a row that `out` holds, checked above.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), pairs[r]) };
            }
        }
    }
}

/// 32 rows of `a` from `first` on (those that exist) as the values `first..first + 32` of the rows of `aᵀ`, which are `stride` apart; as
/// [`panels`].
///
/// # Safety
/// The CPU has AVX-512 with BF16. `out` has `a.cols()` rows with room for these values, the caller's alone.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(crate) unsafe fn columns(a: MatRef<'_>, first: usize, out: *mut u16, stride: usize) {
    for col in (0..a.cols()).step_by(ROWS) {
        let count = ROWS.min(a.cols() - col);
        let pairs = transposed(a, first, col, count, 1.0);
        for r in 0..count {
            // SAFETY: 32 values of a row of `out`, by the caller's promise.
            unsafe { _mm512_storeu_si512(out.add((col + r) * stride + first).cast(), pairs[r]) };
        }
    }
}

/// Rows `row..row + 32` of `count` columns from `col` on: one register a column.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn transposed(a: MatRef<'_>, row: usize, col: usize, count: usize, alpha: f32) -> [__m512i; ROWS] {
    let mut pairs = [_mm512_setzero_si512(); ROWS];
    for i in 0..SPAN / 2 {
        pairs[i] = pairs_of_rows(a, row + 2 * i, col, count, alpha);
    }
    transpose(pairs)
}

/// Pairs of neighbours of row `row` from column `col` on; beyond the row zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn pairs_of_row(x: MatRef<'_>, row: usize, col: usize, alpha: f32) -> __m512i {
    let low = load(x, row, col, LANES, alpha);
    let high = load(x, row, col + LANES, LANES, alpha);
    as_integers(_mm512_cvtne2ps_pbh(high, low))
}

/// Pairs (row `row`, the next one) of `count` columns from `col` on; beyond the matrix zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn pairs_of_rows(x: MatRef<'_>, row: usize, col: usize, count: usize, alpha: f32) -> __m512i {
    let low = load(x, row, col, count, alpha);
    let high = load(x, row + 1, col, count, alpha);
    interleaved(as_integers(_mm512_cvtne2ps_pbh(high, low)))
}

/// Sixteen values and sixteen more as pairs of one and one.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(crate) fn interleaved(values: __m512i) -> __m512i {
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(order, values)
}

/// Up to `count` values of row `row` from column `col` on, times `alpha`; zero where the matrix has none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
pub(super) fn load(x: MatRef<'_>, row: usize, col: usize, count: usize, alpha: f32) -> __m512 {
    if row >= x.rows() || col >= x.cols() {
        return _mm512_setzero_ps();
    }
    let count = count.min(x.cols() - col);
    let mask = if count >= LANES { u16::MAX } else { (1 << count) - 1 };
    // SAFETY: `count` values from this row and column on lie inside the view, whose constructor checked its slice; masked
    // lanes are not read.
    let v = unsafe { _mm512_maskz_loadu_ps(mask, x.data().as_ptr().add(row * x.row_stride() + col)) };
    _mm512_mul_ps(v, _mm512_set1_ps(alpha))
}

/// The 16 × 16 transpose of 32-bit lanes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut pairs, mut quads, mut out) = ([zero; 16], [zero; 16], [zero; 16]);
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Lane `l` of `quads[4g + j]` holds column `4l + j` of rows `4g..4g + 4`.
    for g in 0..4 {
        let p = 4 * g;
        quads[p] = _mm512_unpacklo_epi64(pairs[p], pairs[p + 2]);
        quads[p + 1] = _mm512_unpackhi_epi64(pairs[p], pairs[p + 2]);
        quads[p + 2] = _mm512_unpacklo_epi64(pairs[p + 1], pairs[p + 3]);
        quads[p + 3] = _mm512_unpackhi_epi64(pairs[p + 1], pairs[p + 3]);
    }
    for j in 0..4 {
        let (even_top, odd_top) = lanes(quads[j], quads[4 + j]);
        let (even_bottom, odd_bottom) = lanes(quads[8 + j], quads[12 + j]);
        (out[j], out[8 + j]) = lanes(even_top, even_bottom);
        (out[4 + j], out[12 + j]) = lanes(odd_top, odd_bottom);
    }
    out
}

/// The even and the odd 128-bit lanes of `a` then `b`.
#[target_feature(enable = "avx512f")]
#[inline]
fn lanes(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
}

/// The same bits.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(crate) fn as_integers(v: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of which any pattern is a value.
    unsafe { std::mem::transmute(v) }
}
