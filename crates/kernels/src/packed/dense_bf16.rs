//! Tiles of BF16 panels and bfloat16 activations with `vdpbf16ps`.
//! Knows one group of panels; knows nothing of threads and outputs.

#![allow(clippy::needless_range_loop)] // Plain loops over registers and lanes stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;

use super::{PANEL, padded};
use crate::Isa;
use crate::isa::IsaLevel;

/// Rows and panels of the tile: 24 accumulators, three panels loaded, one broadcast folded into the instruction.
pub(super) const SHAPE: (usize, usize) = (8, 3);

/// `tile[r][p] = x[r] · panelᵀ` of packed BF16 panels lying one after another. `x`: `rows` rows `stride` apart, padded.
/// Products are summed in f32; subnormal inputs count as zero.
pub(super) fn tile(
    isa: Isa,
    cols: usize,
    weights: &[u16],
    panels: usize,
    x: &[u16],
    stride: usize,
    rows: usize,
    tile: &mut [f32],
) {
    assert!(isa.level() >= IsaLevel::Avx512Bf16, "{isa} has no bfloat16");
    let cols = padded(cols);
    assert!(weights.len() >= panels * cols * PANEL);
    assert!(rows == 0 || x.len() >= (rows - 1) * stride + cols);
    assert!(tile.len() >= rows * panels * PANEL);
    assert!(rows <= SHAPE.0 && panels <= SHAPE.1);
    let (w, x, tile) = (weights.as_ptr(), x.as_ptr(), tile.as_mut_ptr());
    macro_rules! rows {
        ($panels:literal) => {
            match rows {
                0 => {}
                1 => kernel::<1, $panels>(cols, w, x, stride, tile),
                2 => kernel::<2, $panels>(cols, w, x, stride, tile),
                3 => kernel::<3, $panels>(cols, w, x, stride, tile),
                4 => kernel::<4, $panels>(cols, w, x, stride, tile),
                5 => kernel::<5, $panels>(cols, w, x, stride, tile),
                6 => kernel::<6, $panels>(cols, w, x, stride, tile),
                7 => kernel::<7, $panels>(cols, w, x, stride, tile),
                _ => kernel::<8, $panels>(cols, w, x, stride, tile),
            }
        };
    }
    // SAFETY: an `Isa` of this level exists only after detection; the lengths were checked above.
    unsafe {
        match panels {
            0 => {}
            1 => rows!(1),
            2 => rows!(2),
            _ => rows!(3),
        }
    }
}

/// # Safety
/// The CPU has AVX-512 BF16. `w` holds `P` panels of `cols` columns (even) one after another, `x` `R` rows of `cols`
/// values, `tile` room for `[R][P][16]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn kernel<const R: usize, const P: usize>(
    cols: usize,
    w: *const u16,
    x: *const u16,
    stride: usize,
    tile: *mut f32,
) {
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    for col in (0..cols).step_by(2) {
        let mut b = [_mm512_setzero_si512(); P];
        // SAFETY: inside the panels and rows by the caller's promise.
        unsafe {
            for p in 0..P {
                b[p] = _mm512_loadu_si512(w.add((p * cols + col) * PANEL).cast());
            }
            for r in 0..R {
                let pair = x.add(r * stride + col).cast::<i32>().read_unaligned();
                let a = _mm512_set1_epi32(pair);
                for p in 0..P {
                    acc[r][p] = _mm512_dpbf16_ps(acc[r][p], bf16(a), bf16(b[p]));
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: `tile` has this room by the caller's promise.
            unsafe { _mm512_storeu_ps(tile.add((r * P + p) * PANEL), acc[r][p]) }
        }
    }
}

/// The same bits as pairs of bfloat16.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which any pattern is a value.
    unsafe { std::mem::transmute(v) }
}
