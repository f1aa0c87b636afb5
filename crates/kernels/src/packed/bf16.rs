//! f32 matrices as bfloat16 operands of a product: rows for its left side, panels for its right side, each from a matrix
//! as it is or transposed. Knows rounding and layouts; knows nothing of products and threads.

#![allow(clippy::needless_range_loop)] // Plain loops over registers stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;

use super::{PANEL, padded};
use crate::{MatRef, Trans};

/// Rows of the left operand that are converted together.
pub(super) const ROWS: usize = 16;
/// Values of the reduction that fill a register.
const SPAN: usize = 32;
/// Floats per register.
const LANES: usize = 16;

/// Panel `panel` of `op(b)` `[k, n]` as `[padded k / 2][16][2]`, zero padded; rounded to nearest even, subnormal values to zero.
///
/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn panel(b: MatRef<'_>, tb: Trans, panel: usize, out: &mut [u16]) {
    let (k, n) = tb.shape(b);
    let first = panel * PANEL;
    let wide = PANEL.min(n - first);
    let out = &mut out[..padded(k) * PANEL];
    match tb {
        Trans::No => {
            for (pair, out) in out.chunks_exact_mut(SPAN).enumerate() {
                let v = pairs_of_rows(b, 2 * pair, first, wide, 1.0);
                // SAFETY: 32 values of 2 bytes.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
            }
        }
        Trans::Yes => {
            for (block, out) in out.chunks_exact_mut(SPAN * PANEL).enumerate() {
                let mut pairs = [_mm512_setzero_si512(); PANEL];
                for r in 0..wide {
                    pairs[r] = pairs_of_row(b, first + r, block * SPAN, 1.0);
                }
                let columns = transpose(pairs);
                for i in 0..PANEL {
                    // SAFETY: 16 times 32 values of 2 bytes.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(SPAN * i).cast(), columns[i]) };
                }
            }
        }
    }
}

/// Rows `first..first + 16` (those that exist) of `alpha · op(a)` `[m, k]`, each `[padded k]`, `stride` apart; as [`panel`].
///
/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn rows(
    a: MatRef<'_>,
    ta: Trans,
    alpha: f32,
    first: usize,
    out: &mut [u16],
    stride: usize,
) {
    let (m, k) = ta.shape(a);
    let (count, cols) = (ROWS.min(m - first), padded(k));
    assert!(count == 0 || out.len() >= (count - 1) * stride + cols, "room for {count} rows of {cols}");
    for start in (0..cols).step_by(SPAN) {
        let mut pairs = [_mm512_setzero_si512(); ROWS];
        match ta {
            Trans::No => {
                for r in 0..count {
                    pairs[r] = pairs_of_row(a, first + r, start, alpha);
                }
            }
            Trans::Yes => {
                for i in 0..SPAN / 2 {
                    pairs[i] = pairs_of_rows(a, start + 2 * i, first, count, alpha);
                }
                pairs = transpose(pairs);
            }
        }
        for r in 0..count {
            // SAFETY: `start + 32 <= cols` values of row `r`, checked above.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(r * stride + start).cast(), pairs[r]) };
        }
    }
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
    // Lower halves of the 32-bit lanes from `low`, upper ones from `high`.
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(order, as_integers(_mm512_cvtne2ps_pbh(high, low)))
}

/// Up to `count` values of row `row` from column `col` on, times `alpha`; zero where the matrix has none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn load(x: MatRef<'_>, row: usize, col: usize, count: usize, alpha: f32) -> __m512 {
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
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
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
fn as_integers(v: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of which any pattern is a value.
    unsafe { std::mem::transmute(v) }
}
