//! Products with f32 activations: few rows straight from packed F32, F16 and BF16 panels, more rows by f32 tiles.
//! Knows one group of panels; knows nothing of threads and outputs.

#![allow(clippy::needless_range_loop)] // Plain loops over registers and lanes stay inside the instruction set; iterator closures may not.

use super::dense_lanes::Lanes;
use super::{PANEL, padded};
use crate::Isa;
use crate::isa::dispatch;
use crate::quant::Dtype;

/// How far ahead of the loads the packed bytes are prefetched: measured, half as much loses a fifth of the bandwidth
/// that one thread reaches, and twice as much gains nothing.
const PREFETCH_BYTES: usize = 12 * 1024;

/// How two neighbouring columns of a panel are stored and multiplied.
trait Pair {
    /// Bytes of two columns.
    const BYTES: usize;
    /// Two registers that hold two columns of 16 rows.
    ///
    /// # Safety
    /// `BYTES` bytes are readable at `p`.
    unsafe fn load<L: Lanes>(l: L, p: *const u8) -> [L::W; 2];
    /// The factors of those registers.
    ///
    /// # Safety
    /// Two values are readable at `x`.
    unsafe fn factors<L: Lanes>(l: L, x: *const f32) -> [L::W; 2];
    /// The 16 outputs.
    fn finish<L: Lanes>(l: L, acc: [L::W; 2]) -> L::W;
    /// The two columns.
    fn columns<L: Lanes>(l: L, loaded: [L::W; 2]) -> [L::W; 2];
}

struct F32;
struct F16;
struct Bf16;

impl Pair for F32 {
    const BYTES: usize = 128;
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, p: *const u8) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { [l.load16(p.cast()), l.load16(p.add(64).cast())] }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(l: L, x: *const f32) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { [l.splat1(x), l.splat1(x.add(1))] }
    }
    #[inline(always)]
    fn finish<L: Lanes>(l: L, acc: [L::W; 2]) -> L::W {
        l.add16(acc[0], acc[1])
    }
    #[inline(always)]
    fn columns<L: Lanes>(_l: L, loaded: [L::W; 2]) -> [L::W; 2] {
        loaded
    }
}

impl Pair for Bf16 {
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, p: *const u8) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { l.bf16_pairs(p) }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(l: L, x: *const f32) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { [l.splat1(x), l.splat1(x.add(1))] }
    }
    #[inline(always)]
    fn finish<L: Lanes>(l: L, acc: [L::W; 2]) -> L::W {
        l.add16(acc[0], acc[1])
    }
    #[inline(always)]
    fn columns<L: Lanes>(_l: L, loaded: [L::W; 2]) -> [L::W; 2] {
        loaded
    }
}

impl Pair for F16 {
    const BYTES: usize = 64;
    /// Converted in memory order: eight rows' pairs per register, so that one conversion serves one multiplication.
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, p: *const u8) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        unsafe { [l.f16_values(p), l.f16_values(p.add(32))] }
    }
    #[inline(always)]
    unsafe fn factors<L: Lanes>(l: L, x: *const f32) -> [L::W; 2] {
        // SAFETY: the caller's promise.
        [unsafe { l.splat2(x) }; 2]
    }
    #[inline(always)]
    fn finish<L: Lanes>(l: L, acc: [L::W; 2]) -> L::W {
        let [even, odd] = l.unzip(acc);
        l.add16(even, odd)
    }
    #[inline(always)]
    fn columns<L: Lanes>(l: L, loaded: [L::W; 2]) -> [L::W; 2] {
        l.unzip(loaded)
    }
}

/// `tile[r] = x[r] · panelᵀ` for up to 4 rows. `x`: `rows` rows `stride` apart, padded; `tile` `[rows][16]`.
///
/// A row's result does not depend on the number of rows.
pub(super) fn matvec(
    isa: Isa,
    dtype: Dtype,
    cols: usize,
    panel: &[u8],
    x: &[f32],
    stride: usize,
    rows: usize,
    tile: &mut [f32],
) {
    let cols = padded(cols);
    assert_eq!(panel.len(), cols * PANEL * dtype.block().1);
    assert!(rows == 0 || x.len() >= (rows - 1) * stride + cols);
    assert!(tile.len() >= rows * PANEL);
    let mut at = 0;
    while at < rows {
        let (x, tile) = (&x[at * stride..], &mut tile[at * PANEL..]);
        // SAFETY: the lengths were checked above; `matvec_rows` takes at most `rows - at` rows.
        at += dispatch!(isa, |l| unsafe {
            match dtype {
                Dtype::F32 => matvec_rows::<_, F32>(l, panel, cols, x, stride, rows - at, tile),
                Dtype::F16 => matvec_rows::<_, F16>(l, panel, cols, x, stride, rows - at, tile),
                _ => matvec_rows::<_, Bf16>(l, panel, cols, x, stride, rows - at, tile),
            }
        });
    }
}

/// As many rows as fit the registers; returns how many.
///
/// # Safety
/// As [`matvec_kernel`], for `rows` rows.
#[inline(always)]
unsafe fn matvec_rows<L: Lanes, P: Pair>(
    l: L,
    panel: &[u8],
    cols: usize,
    x: &[f32],
    stride: usize,
    rows: usize,
    tile: &mut [f32],
) -> usize {
    let rows = rows.min(L::VECTOR_ROWS);
    let (panel, x, tile) = (panel.as_ptr(), x.as_ptr(), tile.as_mut_ptr());
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => matvec_kernel::<L, P, 1>(l, panel, cols, x, stride, tile),
            2 => matvec_kernel::<L, P, 2>(l, panel, cols, x, stride, tile),
            3 => matvec_kernel::<L, P, 3>(l, panel, cols, x, stride, tile),
            _ => matvec_kernel::<L, P, 4>(l, panel, cols, x, stride, tile),
        }
    }
    rows
}

/// # Safety
/// `panel` has `cols` columns (a multiple of [`PAD`](super::PAD)), `x` `R` rows of as many values, `tile` room for
/// `[R][16]`.
#[inline(always)]
unsafe fn matvec_kernel<L: Lanes, P: Pair, const R: usize>(
    l: L,
    panel: *const u8,
    cols: usize,
    x: *const f32,
    stride: usize,
    tile: *mut f32,
) {
    if R > L::VECTOR_ROWS {
        return;
    }
    // One panel at a time, one stream of memory; two pairs of columns in flight per row, so that four independent sums
    // hide the latency of the multiply-add.
    let mut acc = [[[l.zero(); 2]; R]; 2];
    let mut p = panel;
    for col in (0..cols).step_by(4) {
        for half in 0..2 {
            // SAFETY: `cols` is a multiple of 4, so both pairs lie inside the panel and the rows.
            unsafe {
                l.prefetch(p.wrapping_add(PREFETCH_BYTES));
                if P::BYTES > 64 {
                    l.prefetch(p.wrapping_add(PREFETCH_BYTES + 64));
                }
                let w = P::load(l, p);
                for r in 0..R {
                    let f = P::factors(l, x.add(r * stride + col + 2 * half));
                    acc[half][r][0] = l.fma16(w[0], f[0], acc[half][r][0]);
                    acc[half][r][1] = l.fma16(w[1], f[1], acc[half][r][1]);
                }
                p = p.add(P::BYTES);
            }
        }
    }
    for r in 0..R {
        let sum = [l.add16(acc[0][r][0], acc[1][r][0]), l.add16(acc[0][r][1], acc[1][r][1])];
        // SAFETY: `tile` has `R` rows of 16.
        unsafe { l.store16(P::finish(l, sum), tile.add(r * PANEL)) }
    }
}

/// Widens a packed F16 or BF16 panel to f32 `[padded cols][16]`, or copies an F32 one.
pub(super) fn widen(isa: Isa, dtype: Dtype, cols: usize, panel: &[u8], out: &mut [f32]) {
    let cols = padded(cols);
    assert_eq!(panel.len(), cols * PANEL * dtype.block().1);
    assert!(out.len() >= cols * PANEL);
    // SAFETY: the lengths were checked above.
    dispatch!(isa, |l| unsafe {
        match dtype {
            Dtype::F32 => widen_panel::<_, F32>(l, cols, panel.as_ptr(), out.as_mut_ptr()),
            Dtype::F16 => widen_panel::<_, F16>(l, cols, panel.as_ptr(), out.as_mut_ptr()),
            _ => widen_panel::<_, Bf16>(l, cols, panel.as_ptr(), out.as_mut_ptr()),
        }
    });
}

/// # Safety
/// `panel` and `out` have `cols` columns, an even number.
#[inline(always)]
unsafe fn widen_panel<L: Lanes, P: Pair>(l: L, cols: usize, panel: *const u8, out: *mut f32) {
    for pair in 0..cols / 2 {
        // SAFETY: inside by the caller's promise.
        unsafe {
            let [a, b] = P::columns(l, P::load(l, panel.add(pair * P::BYTES)));
            l.store16(a, out.add(2 * pair * PANEL));
            l.store16(b, out.add((2 * pair + 1) * PANEL));
        }
    }
}

/// Rows and panels of the f32 tile.
pub(super) fn tile_shape(isa: Isa) -> (usize, usize) {
    fn shape<L: Lanes>(_l: L) -> (usize, usize) {
        (L::TILE_ROWS, L::TILE_PANELS)
    }
    dispatch!(isa, |l| shape(l))
}

/// `tile[r][p] = x[r] · panelᵀ` of f32 panels lying one after another. `x`: `rows` rows `stride` apart, padded.
pub(super) fn tile(
    isa: Isa,
    cols: usize,
    weights: &[f32],
    panels: usize,
    x: &[f32],
    stride: usize,
    rows: usize,
    tile: &mut [f32],
) {
    let cols = padded(cols);
    assert!(weights.len() >= panels * cols * PANEL);
    assert!(rows == 0 || x.len() >= (rows - 1) * stride + cols);
    assert!(tile.len() >= rows * panels * PANEL);
    let (w, x, tile) = (weights.as_ptr(), x.as_ptr(), tile.as_mut_ptr());
    // SAFETY: the lengths were checked above.
    dispatch!(isa, |l| unsafe { tile_rows(l, cols, w, panels, x, stride, rows, tile) });
}

/// # Safety
/// As [`tile_kernel`], with `rows` and `panels` at most the shape of `L`.
#[inline(always)]
unsafe fn tile_rows<L: Lanes>(
    l: L,
    cols: usize,
    w: *const f32,
    panels: usize,
    x: *const f32,
    stride: usize,
    rows: usize,
    tile: *mut f32,
) {
    assert!(rows <= L::TILE_ROWS && panels <= L::TILE_PANELS, "tile of {rows} rows, {panels} panels");
    macro_rules! rows {
        ($panels:literal) => {
            match rows {
                0 => {}
                1 => tile_kernel::<L, 1, $panels>(l, cols, w, x, stride, tile),
                2 => tile_kernel::<L, 2, $panels>(l, cols, w, x, stride, tile),
                3 => tile_kernel::<L, 3, $panels>(l, cols, w, x, stride, tile),
                4 => tile_kernel::<L, 4, $panels>(l, cols, w, x, stride, tile),
                5 => tile_kernel::<L, 5, $panels>(l, cols, w, x, stride, tile),
                6 => tile_kernel::<L, 6, $panels>(l, cols, w, x, stride, tile),
                7 => tile_kernel::<L, 7, $panels>(l, cols, w, x, stride, tile),
                _ => tile_kernel::<L, 8, $panels>(l, cols, w, x, stride, tile),
            }
        };
    }
    // SAFETY: the caller's promise.
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
/// `w` holds `P` panels of `cols` columns one after another, `x` `R` rows of `cols` values, `tile` room for `[R][P][16]`.
#[inline(always)]
unsafe fn tile_kernel<L: Lanes, const R: usize, const P: usize>(
    l: L,
    cols: usize,
    w: *const f32,
    x: *const f32,
    stride: usize,
    tile: *mut f32,
) {
    if R > L::TILE_ROWS || P > L::TILE_PANELS {
        return;
    }
    let mut acc = [[l.zero(); P]; R];
    for col in 0..cols {
        let mut b = [l.zero(); P];
        // SAFETY: inside the panels and rows by the caller's promise.
        unsafe {
            for p in 0..P {
                b[p] = l.load16(w.add((p * cols + col) * PANEL));
            }
            for r in 0..R {
                let a = l.splat1(x.add(r * stride + col));
                for p in 0..P {
                    acc[r][p] = l.fma16(a, b[p], acc[r][p]);
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: `tile` has this room by the caller's promise.
            unsafe { l.store16(acc[r][p], tile.add((r * P + p) * PANEL)) }
        }
    }
}
