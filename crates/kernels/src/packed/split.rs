//! Products of f32 matrices on AMX tiles with 16 bits of mantissa: every factor is the sum of two bfloat16 values, and three of the four
//! products of parts are summed in f32, as one product along a reduction three times as long. A fraction of the time of f32 products where
//! bfloat16 alone is too coarse.

#![allow(clippy::needless_range_loop)] // Plain loops over registers stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::amx::{Configured, Operands, Out, panels_into};
use super::bf16::{SPAN, as_integers, interleaved, load, transpose};
use super::buffer::Lines;
use super::{PANEL, padded};
use crate::{Exec, IsaLevel, MatMut, MatRef, Store, Trans};

/// Parts along the reduction: high · high, high · low, low · high.
const PARTS: usize = 3;
/// Floats of a register, rows of a tile.
const LANES: usize = 16;
/// Below this many multiply-adds, or with fewer rows, columns or terms than a tile has, splitting costs more than it gains.
const MIN_WORK: usize = 32 * 1024;

/// Whether [`product`] can take an `[m, k] · [k, n]` on this instruction set, and pays.
pub(crate) fn pays(exec: &Exec, m: usize, n: usize, k: usize) -> bool {
    exec.isa().level() >= IsaLevel::Amx && m.min(n).min(k) >= LANES && m * n * k >= MIN_WORK
}

#[derive(Default)]
struct Scratch {
    rows: Lines,
    panels: Lines,
    out: Lines,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out = op(a) · op(b)` (or `+=`), on the calling thread. Relative errors of a term are about 2⁻¹⁶.
///
/// # Panics
/// When shapes do not fit, or without the instruction set that [`pays`] asks for.
pub(crate) fn product(
    exec: &Exec,
    mut out: MatMut<'_>,
    (a, ta): (MatRef<'_>, Trans),
    (b, tb): (MatRef<'_>, Trans),
    store: Store,
) {
    let ((m, k), (b_rows, n)) = (ta.shape(a), tb.shape(b));
    assert!(out.rows() == m && out.cols() == n && b_rows == k, "shapes of a product");
    assert!(exec.isa().level() >= IsaLevel::Amx, "{} has no tiles", exec.isa());
    let (rows, columns, cols) = (m.next_multiple_of(LANES), n.next_multiple_of(PANEL), PARTS * padded(k));
    let direct = rows == m && columns == n;
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { rows: x, panels, out: tile } = scratch;
        x.grow::<u16>(rows * cols);
        panels.grow::<u16>(columns * cols);
        // SAFETY: a CPU with AMX, or with its model in tests, has AVX-512 with BF16; the buffers have just been given this room.
        unsafe {
            split_rows(a, ta, &mut x.as_mut_slice()[..rows * cols]);
            split_panels(b, tb, &mut panels.as_mut_slice()[..columns * cols]);
        }
        tile.grow::<f32>(if direct { 0 } else { rows * columns });
        let (first, stride, to) = match direct {
            true => (out.data_mut().as_mut_ptr(), out.row_stride(), store),
            false => (tile.as_mut_slice::<f32>().as_mut_ptr(), columns, Store::Overwrite),
        };
        let configured = Configured::new();
        let operands = Operands {
            cols,
            weights: panels.as_slice(),
            panels: columns / PANEL,
            x: x.as_slice(),
            stride: cols,
            rows,
        };
        // SAFETY: the output, or the buffer, has whole tiles of `rows` and `columns`.
        unsafe { panels_into(&configured, operands, Out { first, stride, store: to }) };
        if direct {
            return;
        }
        for (i, from) in tile.as_slice::<f32>().chunks_exact(columns).take(m).enumerate() {
            let row = out.row_mut(i);
            match store {
                Store::Overwrite => row.copy_from_slice(&from[..n]),
                Store::Accumulate => row.iter_mut().zip(from).for_each(|(to, from)| *to += from),
            }
        }
    });
}

/// Rows of `op(a)`, each `high high low` of padded `k` values; `out` has whole tiles of rows, those beyond `m` are zeros.
///
/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn split_rows(a: MatRef<'_>, ta: Trans, out: &mut [u16]) {
    let (_, k) = ta.shape(a);
    let (part, stride) = (padded(k), PARTS * padded(k));
    for (block, out) in out.chunks_exact_mut(LANES * stride).enumerate() {
        let mut store = |row: usize, at: usize, v: __m512i| {
            // SAFETY: 32 values inside a row of the block.
            unsafe { _mm512_storeu_si512(out[row * stride + at..][..SPAN].as_mut_ptr().cast(), v) };
        };
        for start in (0..part).step_by(SPAN) {
            let zero = _mm512_setzero_si512();
            let (mut high, mut low) = ([zero; LANES], [zero; LANES]);
            for i in 0..LANES {
                (high[i], low[i]) = match ta {
                    Trans::No => of_row(a, block * LANES + i, start),
                    Trans::Yes => of_rows(a, start + 2 * i, block * LANES),
                };
            }
            if ta == Trans::Yes {
                (high, low) = (transpose(high), transpose(low));
            }
            for row in 0..LANES {
                store(row, start, high[row]);
                store(row, part + start, high[row]);
                store(row, 2 * part + start, low[row]);
            }
        }
    }
}

/// Panels of `op(b)`, each `high low high` of padded `k` pairs of rows; `out` has whole panels, columns beyond `n` are zeros.
///
/// # Safety
/// As [`split_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn split_panels(b: MatRef<'_>, tb: Trans, out: &mut [u16]) {
    let (k, _) = tb.shape(b);
    let part = padded(k) * PANEL;
    for (panel, out) in out.chunks_exact_mut(PARTS * part).enumerate() {
        let mut store = |at: usize, v: __m512i| {
            // SAFETY: 32 values inside the panel.
            unsafe { _mm512_storeu_si512(out[at..][..SPAN].as_mut_ptr().cast(), v) };
        };
        for start in (0..padded(k)).step_by(SPAN) {
            let zero = _mm512_setzero_si512();
            let (mut high, mut low) = ([zero; LANES], [zero; LANES]);
            for i in 0..LANES {
                (high[i], low[i]) = match tb {
                    Trans::No => of_rows(b, start + 2 * i, panel * PANEL),
                    Trans::Yes => of_row(b, panel * PANEL + i, start),
                };
            }
            if tb == Trans::Yes {
                (high, low) = (transpose(high), transpose(low));
            }
            for pair in 0..LANES {
                let at = start * PANEL + pair * SPAN;
                store(at, high[pair]);
                store(part + at, low[pair]);
                store(2 * part + at, high[pair]);
            }
        }
    }
}

/// Both parts of 32 values of a row, in their order.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn of_row(x: MatRef<'_>, row: usize, col: usize) -> (__m512i, __m512i) {
    split(load(x, row, col, LANES, 1.0), load(x, row, col + LANES, LANES, 1.0))
}

/// Both parts of 16 columns of two rows, in pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn of_rows(x: MatRef<'_>, row: usize, col: usize) -> (__m512i, __m512i) {
    let (high, low) = split(load(x, row, col, LANES, 1.0), load(x, row + 1, col, LANES, 1.0));
    (interleaved(high), interleaved(low))
}

/// `first second` rounded to bfloat16, and what that leaves, rounded as well.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn split(first: __m512, second: __m512) -> (__m512i, __m512i) {
    let high = as_integers(_mm512_cvtne2ps_pbh(second, first));
    let widened = |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    let first = _mm512_sub_ps(first, widened(_mm512_castsi512_si256(high)));
    let second = _mm512_sub_ps(second, widened(_mm512_extracti64x4_epi64::<1>(high)));
    (high, as_integers(_mm512_cvtne2ps_pbh(second, first)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive::gemm::gemm as naive;
    use crate::testing::{assert_close, execs_and_modelled_amx, noise, to_f64};

    /// Two roundings of 2⁻¹⁷ a term, times the root of the number of terms; one part alone would be off by a hundred times that.
    const TOLERANCE: f64 = 2e-5;

    #[test]
    fn products_of_parts_agree_with_naive_at_every_size() {
        for exec in execs_and_modelled_amx() {
            for (m, n, k) in
                [(64, 64, 64), (192, 64, 64), (16, 128, 32), (33, 47, 50), (100, 16, 17), (17, 300, 129)]
            {
                if !pays(&exec, m, n, k) {
                    continue;
                }
                let (a, b) = (noise(1, m * k), noise(2, k * n));
                for (ta, tb) in [
                    (Trans::No, Trans::No),
                    (Trans::No, Trans::Yes),
                    (Trans::Yes, Trans::No),
                    (Trans::Yes, Trans::Yes),
                ] {
                    let of = |x, rows, cols, trans| match trans {
                        Trans::No => MatRef::dense(x, rows, cols),
                        Trans::Yes => MatRef::dense(x, cols, rows),
                    };
                    let wanted = naive(m, n, k, &to_f64(&a), ta, &to_f64(&b), tb, 1.0);
                    for (store, old) in [(Store::Overwrite, f32::NAN), (Store::Accumulate, 1.0)] {
                        let stride = n + 3;
                        let mut out = vec![old; m * stride];
                        let to = MatMut::new(&mut out, m, n, stride);
                        product(&exec, to, (of(&a, m, k, ta), ta), (of(&b, k, n, tb), tb), store);
                        for (row, wanted) in out.chunks_exact(stride).zip(wanted.chunks_exact(n)) {
                            let offset = if store == Store::Accumulate { 1.0 } else { 0.0 };
                            let wanted: Vec<f64> = wanted.iter().map(|x| x + offset).collect();
                            assert_close("product", &row[..n], &wanted, TOLERANCE * (k as f64).sqrt());
                            assert!(row[n..].iter().all(|x| x.to_bits() == old.to_bits()), "beyond the row");
                        }
                    }
                }
            }
        }
    }
}
