//! Quantised panels: packing, decoding, products with 8-bit activations.
//! Knows one panel of 16 rows; knows nothing of threads and outputs.
#![allow(clippy::needless_range_loop, reason = "iterators' closures may lose the instruction set's features")]

mod body;
mod input;
mod lanes;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use input::quantize_activations;
pub(super) use layout::{pack_panel, row_f32};

use crate::quant::Dtype;
use crate::{Isa, IsaLevel};
use body::Format;
use lanes::Lanes;
use layout::{BLOCK, layout};

/// Parts of a row of activations of [`matvec`]: 16-bit activations at the cost of a second integer product, which hardly
/// shows beside waiting for the weights (docs/log).
pub(super) const FINE: usize = 2;

/// Steps of a part per step of the part before it; a power of two, so that sums of products combine as integers.
const FINER: i32 = 256;

/// Activations in blocks of 32 columns of 8-bit codes, each row in one part ([`tile`]) or [`FINE`] ([`matvec`]), which lie one after
/// another as if they were rows; row `r` of them starts at `r * stride` (codes) and `r * blocks` (the others).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks<'a> {
    /// `[rows][stride]`, from −127 to 127.
    pub codes: &'a [i8],
    /// Values per row of `codes` including padding (zeros): a multiple of 64.
    pub stride: usize,
    /// `[rows][blocks]`: value = code · scale, summed over the parts.
    pub scales: &'a [f32],
    /// `[rows][blocks]`: sums of the block's codes, see [`halves`].
    pub sums: &'a [i32],
    /// Blocks of 32 columns per row.
    pub blocks: usize,
}

/// The sums of the first and of the last 16 codes of a block (16 · 127 fits in 16 bits).
#[inline(always)]
fn halves(sums: i32) -> (i32, i32) {
    (i32::from(sums as i16), sums >> 16)
}

/// Bytes of one panel of 16 rows (the driver rounds it up to whole cache lines).
pub(super) fn panel_bytes(dtype: Dtype, cols: usize) -> usize {
    layout(dtype).panel_bytes(cols / BLOCK)
}

/// `rows` (1 to 4) rows of activations, each in [`FINE`] parts, from `row` on, times one packed panel, into `tile` `[rows][16]`.
///
/// # Panics
/// When a slice is too short for that.
#[allow(clippy::too_many_arguments)]
pub(super) fn matvec(
    isa: Isa,
    dtype: Dtype,
    cols: usize,
    panel: &[u8],
    x: Blocks<'_>,
    row: usize,
    rows: usize,
    tile: &mut [f32],
) {
    assert!(panel.len() >= panel_bytes(dtype, cols), "panel of {} bytes", panel.len());
    check(cols, &x, FINE * row, FINE * rows);
    assert!(tile.len() >= 16 * rows, "tile of {} values", tile.len());
    run(isa, dtype, MatVec { panel, x, row, rows, tile });
}

/// Most rows and panels that one call of [`tile`] takes.
pub(super) fn tile_shape(isa: Isa, _dtype: Dtype) -> (usize, usize) {
    match isa.level() {
        IsaLevel::Scalar => SHAPE_SCALAR,
        IsaLevel::Avx2 | IsaLevel::Neon => SHAPE_SMALL,
        _ => SHAPE_LARGE,
    }
}

/// For 32 registers of 16 rows: 12 integer and 12 float accumulators.
const SHAPE_LARGE: (usize, usize) = (6, 2);
/// For 16 registers.
const SHAPE_SMALL: (usize, usize) = (3, 2);
/// For arrays in memory.
const SHAPE_SCALAR: (usize, usize) = (2, 1);

/// Bytes of one panel after [`expand`], a multiple of 64.
pub(super) fn expanded_bytes(_isa: Isa, dtype: Dtype, cols: usize) -> usize {
    body::expanded_bytes(layout(dtype), cols / BLOCK)
}

/// Unpacks a panel once for all row tiles of a task, in whatever layout [`tile`] likes. `scratch` is cache-line aligned
/// and holds garbage.
///
/// # Panics
/// When a slice is too short or `scratch` is not aligned.
pub(super) fn expand(isa: Isa, dtype: Dtype, cols: usize, panel: &[u8], scratch: &mut [u8]) {
    let blocks = cols / BLOCK;
    assert!(panel.len() >= panel_bytes(dtype, cols), "panel of {} bytes", panel.len());
    assert!(scratch.len() >= expanded_bytes(isa, dtype, cols), "scratch of {} bytes", scratch.len());
    assert!(scratch.as_ptr().cast::<f32>().is_aligned());
    run(isa, dtype, Expand { panel, blocks, scratch });
}

/// `rows` rows of activations from `row` on, times `panels` expanded panels lying one after another, into `tile`
/// `[rows][panels][16]`.
///
/// # Panics
/// When a slice is too short, or there are more rows or panels than [`tile_shape`] allows.
#[allow(clippy::too_many_arguments)]
pub(super) fn tile(
    isa: Isa,
    dtype: Dtype,
    cols: usize,
    expanded: &[u8],
    panels: usize,
    x: Blocks<'_>,
    row: usize,
    rows: usize,
    tile: &mut [f32],
) {
    assert!(expanded.len() >= panels * expanded_bytes(isa, dtype, cols), "{} bytes expanded", expanded.len());
    assert!(expanded.as_ptr().cast::<f32>().is_aligned());
    check(cols, &x, row, rows);
    assert!(tile.len() >= 16 * rows * panels, "tile of {} values", tile.len());
    let (most_rows, most_panels) = tile_shape(isa, dtype);
    assert!(rows <= most_rows && panels <= most_panels, "{rows} rows, {panels} panels");
    if rows > 0 && panels > 0 {
        run(isa, dtype, Tile { expanded, panels, x, row, rows, tile });
    }
}

/// Dequantises a panel to a dense bf16 panel `[cols / 2][16][2]` for AMX (`cols` is a multiple of 32: there is no
/// padding). `scratch` holds garbage.
///
/// # Panics
/// When a slice is too short.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(super) fn expand_bf16(isa: Isa, dtype: Dtype, cols: usize, panel: &[u8], scratch: &mut [u16]) {
    assert!(panel.len() >= panel_bytes(dtype, cols), "panel of {} bytes", panel.len());
    let scratch = &mut scratch[..16 * cols];
    run(isa, dtype, ExpandBf16 { panel, blocks: cols / BLOCK, scratch });
}

/// Panics unless `x` has those rows of that length.
fn check(cols: usize, x: &Blocks<'_>, row: usize, rows: usize) {
    let end = row + rows;
    assert!(
        x.blocks * BLOCK == cols
            && cols <= x.stride
            && x.codes.len() >= end * x.stride
            && x.scales.len() >= end * x.blocks
            && x.sums.len() >= end * x.blocks,
        "rows {row}+{rows} of {cols} columns in {} codes, {} scales, {} sums",
        x.codes.len(),
        x.scales.len(),
        x.sums.len()
    );
}

/// A kernel with its arguments, to be compiled for each instruction set and element type.
trait Kernel {
    /// Runs it; `P` registers make up 16 rows. Implementations are `#[inline(always)]`.
    fn run<S: Lanes, F: Format, const P: usize>(self, s: S);
}

struct MatVec<'a> {
    panel: &'a [u8],
    x: Blocks<'a>,
    row: usize,
    rows: usize,
    tile: &'a mut [f32],
}
impl Kernel for MatVec<'_> {
    #[inline(always)]
    fn run<S: Lanes, F: Format, const P: usize>(self, s: S) {
        let Self { panel, x, row, rows, tile } = self;
        // SAFETY: the lengths were checked by `matvec`, its only caller.
        unsafe {
            match rows {
                0 => {}
                1 => body::matvec::<S, F, 1, P>(s, panel, &x, row, tile),
                2 => body::matvec::<S, F, 2, P>(s, panel, &x, row, tile),
                3 => body::matvec::<S, F, 3, P>(s, panel, &x, row, tile),
                4 => body::matvec::<S, F, 4, P>(s, panel, &x, row, tile),
                _ => panic!("{rows} rows; at most 4"),
            }
        }
    }
}

struct Expand<'a> {
    panel: &'a [u8],
    blocks: usize,
    scratch: &'a mut [u8],
}
impl Kernel for Expand<'_> {
    #[inline(always)]
    fn run<S: Lanes, F: Format, const P: usize>(self, s: S) {
        // SAFETY: lengths and alignment were checked by `expand`, its only caller.
        unsafe { body::expand::<S, F, P>(s, self.panel, self.blocks, self.scratch) }
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct ExpandBf16<'a> {
    panel: &'a [u8],
    blocks: usize,
    scratch: &'a mut [u16],
}
impl Kernel for ExpandBf16<'_> {
    #[inline(always)]
    fn run<S: Lanes, F: Format, const P: usize>(self, s: S) {
        // SAFETY: the lengths were checked by `expand_bf16`, its only caller.
        unsafe { body::expand_bf16::<S, F, P>(s, self.panel, self.blocks, self.scratch) }
    }
}

struct Tile<'a> {
    expanded: &'a [u8],
    panels: usize,
    x: Blocks<'a>,
    row: usize,
    rows: usize,
    tile: &'a mut [f32],
}
impl Kernel for Tile<'_> {
    #[inline(always)]
    fn run<S: Lanes, F: Format, const P: usize>(self, s: S) {
        let Self { expanded, panels, x, row, rows, tile } = self;
        // SAFETY: lengths, alignment and shape were checked by `tile`, its only caller; one of the arms has the
        // instruction set's `tile_shape`, the others are for fewer rows or panels.
        unsafe {
            match (P, rows, panels) {
                (1, ..=3, 1) => body::tile::<S, F, 3, 1, P>(s, expanded, &x, row, rows, tile),
                (1, ..=3, _) => body::tile::<S, F, 3, 2, P>(s, expanded, &x, row, rows, tile),
                (1, _, 1) => body::tile::<S, F, 6, 1, P>(s, expanded, &x, row, rows, tile),
                (1, _, _) => body::tile::<S, F, 6, 2, P>(s, expanded, &x, row, rows, tile),
                (_, _, 1) => body::tile::<S, F, 3, 1, P>(s, expanded, &x, row, rows, tile),
                (_, _, _) => body::tile::<S, F, 3, 2, P>(s, expanded, &x, row, rows, tile),
            }
        }
    }
}

/// Compiles `kernel` for the element type and the instruction set, and runs it.
fn run(isa: Isa, dtype: Dtype, kernel: impl Kernel) {
    match dtype {
        Dtype::Q8_0 => run_format::<body::Q8_0>(isa, kernel),
        Dtype::Q4_0 => run_format::<body::Q4_0>(isa, kernel),
        Dtype::Q4_1 => run_format::<body::Q4_1>(isa, kernel),
        Dtype::Q5_0 => run_format::<body::Q5_0>(isa, kernel),
        Dtype::Q5_1 => run_format::<body::Q5_1>(isa, kernel),
        Dtype::Q4K => run_format::<body::Q4K>(isa, kernel),
        Dtype::Q5K => run_format::<body::Q5K>(isa, kernel),
        Dtype::Q6K => run_format::<body::Q6K>(isa, kernel),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => panic!("{} is not quantised", dtype.name()),
    }
}

fn run_format<F: Format>(isa: Isa, kernel: impl Kernel) {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        level if level >= IsaLevel::Avx512Vnni => {
            // SAFETY: an `Isa` of this or a higher level exists only after `IsaLevel::is_supported` found VNNI and AVX-512.
            unsafe {
                x86::run_vnni(
                    #[inline(always)]
                    |s| kernel.run::<_, F, 1>(s),
                )
            }
        }
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx512 => {
            // SAFETY: an `Isa` of this level exists only after `IsaLevel::is_supported` found AVX-512 F, BW, DQ and VL.
            unsafe {
                x86::run_avx512(
                    #[inline(always)]
                    |s| kernel.run::<_, F, 1>(s),
                )
            }
        }
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx2 => {
            // SAFETY: an `Isa` of this level exists only after `IsaLevel::is_supported` found AVX2, FMA and F16C.
            unsafe {
                x86::run_avx2(
                    #[inline(always)]
                    |s| kernel.run::<_, F, 2>(s),
                )
            }
        }
        #[cfg(target_arch = "aarch64")]
        IsaLevel::Neon => kernel.run::<_, F, 4>(neon::Neon),
        _ => kernel.run::<_, F, 1>(lanes::Scalar),
    }
}
