//! The quantised kernels, written once over [`Lanes`]: decoding, products straight off a panel, products of an expanded
//! panel. Knows layouts and registers; knows nothing of threads.

use super::lanes::Lanes;
use super::layout::{BLOCK, LINE, Layout, SUBS, layout};
use super::{Blocks, FINE, FINER};
use crate::packed::PANEL;
use crate::quant::Dtype;

/// Quads of columns per block.
const QUADS: usize = BLOCK / 4;
/// How far ahead of the block in work codes are asked for; scales, which lie behind a panel's codes, a panel ahead.
const AHEAD: usize = 8192;

/// An element type as a type, so that everything that depends on it is known at compile time.
pub(super) trait Format: Copy {
    /// The element type.
    const DTYPE: Dtype;
    /// Its layout.
    const LAYOUT: Layout = layout(Self::DTYPE);
}

macro_rules! formats {
    ($($name:ident),*) => {$(
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name;
        impl Format for $name {
            const DTYPE: Dtype = Dtype::$name;
        }
    )*};
}
formats!(Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K);

/// The codes of one block for the rows from byte `4 · row` of a line on, one register per quad.
///
/// # Safety
/// `at` points to the block's codes plus the byte offset of a register within a line.
#[inline(always)]
unsafe fn codes<S: Lanes, F: Format>(s: S, at: *const u8) -> [S::B; QUADS] {
    // SAFETY: a block has `bits` lines, and every index below is less than that.
    unsafe {
        let first = s.load(at);
        let mut out = [first; QUADS];
        if F::LAYOUT.bits == 8 {
            for (q, out) in out.iter_mut().enumerate() {
                *out = s.load(at.add(LINE * q));
            }
            return out;
        }
        for i in 0..4 {
            let line = s.load(at.add(LINE * i));
            out[i] = s.low(line);
            out[i + 4] = s.high(line);
        }
        if F::LAYOUT.bits == 5 {
            let plane = s.load(at.add(LINE * 4));
            for q in 0..QUADS {
                out[q] = s.merge(out[q], plane, 4 - q as i32, 0x10);
            }
        }
        if F::LAYOUT.bits == 6 {
            for h in 0..2 {
                let plane = s.load(at.add(LINE * (4 + h)));
                for i in 0..4 {
                    out[4 * h + i] = s.merge(out[4 * h + i], plane, 4 - 2 * i as i32, 0x30);
                }
            }
        }
        out
    }
}

/// The scales of both halves of block `b` and its minimum, for the rows from `row` on.
///
/// # Safety
/// `scales` points to the scales of a panel with more than `b` blocks, `row + OUTS <= 16`.
#[inline(always)]
unsafe fn scales<S: Lanes, F: Format>(s: S, scales: *const u8, b: usize, row: usize) -> ([S::F; 2], S::F) {
    let layout = F::LAYOUT;
    // SAFETY: the offsets follow `Layout`, all within `unit_bytes`.
    unsafe {
        let unit = scales.add(b / layout.unit * layout.unit_bytes);
        let d = s.load_f16(unit.add(2 * row));
        let sub = b % layout.unit;
        match F::DTYPE {
            Dtype::Q4K | Dtype::Q5K => {
                let d_min = s.load_f16(unit.add(2 * PANEL + 2 * row));
                let packed = unit.add(4 * PANEL + row);
                let low = s.load_u8(packed.add(PANEL * sub));
                let high = s.load_u8(packed.add(PANEL * (SUBS + sub % 4)));
                let shift = 4 * (sub / 4) as u32;
                let scale = s.join(s.bits(low, 0, 15), s.bits(high, shift, 3), 4);
                let min = s.join(s.bits(low, 4, 15), s.bits(high, shift + 2, 3), 4);
                let scale = s.mul(d, s.float(scale));
                ([scale; 2], s.mul(s.mul(d_min, s.splat(-1.0)), s.float(min)))
            }
            Dtype::Q6K => {
                let groups = unit.add(2 * PANEL + row + 2 * PANEL * sub);
                let first = s.mul(d, s.float(s.load_i8(groups)));
                let second = s.mul(d, s.float(s.load_i8(groups.add(PANEL))));
                ([first, second], d)
            }
            _ if layout.min => ([d; 2], s.load_f16(unit.add(2 * PANEL + 2 * row))),
            _ => ([d; 2], d),
        }
    }
}

/// What the codes' dot product starts from so that the zero point is accounted for: one value per group of columns.
#[inline(always)]
fn starts<S: Lanes>(layout: Layout, sums: i32) -> [i32; 2] {
    let zero = if layout.bits == 8 && S::SIGNED { 0 } else { layout.zero };
    let (first, second) = super::halves(sums);
    match layout.groups {
        1 => [-zero * (first + second), 0],
        _ => [-zero * first, -zero * second],
    }
}

/// One row of activations, by pointers.
#[derive(Clone, Copy)]
struct Row {
    codes: *const i8,
    scales: *const f32,
    sums: *const i32,
}

impl Row {
    /// Row `row` of `x`, which exists.
    #[inline(always)]
    fn of(x: &Blocks<'_>, row: usize) -> Self {
        Self {
            codes: x.codes[row * x.stride..].as_ptr(),
            scales: x.scales[row * x.blocks..].as_ptr(),
            sums: x.sums[row * x.blocks..].as_ptr(),
        }
    }
    /// Four codes.
    ///
    /// # Safety
    /// Quad `quad` exists.
    #[inline(always)]
    unsafe fn quad(self, quad: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { self.codes.add(4 * quad).cast::<i32>().read_unaligned() }
    }
}

/// `M` rows of activations, each in [`FINE`] parts, times one panel; `P` registers make up 16 rows of weights.
///
/// # Safety
/// The panel has `x.blocks` blocks, `x` has both parts of rows `row..row + M`, `tile` has `16 · M` values.
#[inline(always)]
pub(super) unsafe fn matvec<S: Lanes, F: Format, const M: usize, const P: usize>(
    s: S,
    panel: &[u8],
    x: &Blocks<'_>,
    row: usize,
    tile: &mut [f32],
) {
    let layout = F::LAYOUT;
    let blocks = x.blocks;
    let mut rows = [[Row::of(x, FINE * row); FINE]; M];
    for (r, parts) in rows.iter_mut().enumerate() {
        for (part, out) in parts.iter_mut().enumerate() {
            *out = Row::of(x, FINE * (row + r) + part);
        }
    }
    let mut sums = [[s.splat(0.0); P]; M];
    // SAFETY: blocks, rows and registers stay below the counts that the caller vouches for.
    unsafe {
        let start = panel.as_ptr();
        let scale_bytes = start.add(blocks * layout.block_bytes());
        for b in 0..blocks {
            let block = start.add(b * layout.block_bytes());
            let ahead = block.wrapping_add(AHEAD);
            for i in 0..layout.block_bytes() / LINE {
                s.prefetch(ahead.wrapping_add(LINE * i));
            }
            s.prefetch(scale_bytes.wrapping_add(b * layout.unit_bytes / layout.unit + panel.len()));
            for p in 0..P {
                let codes = codes::<S, F>(s, block.add(4 * S::OUTS * p));
                let (scale, min) = scales::<S, F>(s, scale_bytes, b, S::OUTS * p);
                for r in 0..M {
                    let [high, low] = rows[r];
                    let (high_sums, low_sums) = (*high.sums.add(b), *low.sums.add(b));
                    let (high_starts, low_starts) =
                        (starts::<S>(layout, high_sums), starts::<S>(layout, low_sums));
                    // Of the second part, that is of `FINER · first + second`.
                    let d = *low.scales.add(b);
                    for g in 0..layout.groups {
                        let (mut first, mut second) = (s.start(high_starts[g]), s.start(low_starts[g]));
                        for q in 0..QUADS / layout.groups {
                            let q = q + g * QUADS / 2;
                            first = dot::<S, F>(s, first, codes[q], high.quad(QUADS * b + q));
                            second = dot::<S, F>(s, second, codes[q], low.quad(QUADS * b + q));
                        }
                        sums[r][p] =
                            s.fma(s.total_fine(first, second), s.mul(scale[g], s.splat(d)), sums[r][p]);
                    }
                    if layout.min {
                        let sum = |sums| super::halves(sums).0 + super::halves(sums).1;
                        let total = FINER * sum(high_sums) + sum(low_sums);
                        sums[r][p] = s.fma(min, s.splat(d * total as f32), sums[r][p]);
                    }
                }
            }
        }
        for r in 0..M {
            for p in 0..P {
                s.store_f32(sums[r][p], tile.as_mut_ptr().add(PANEL * r + S::OUTS * p));
            }
        }
    }
}

/// [`Lanes::dot`] with the size of the format's codes.
#[inline(always)]
fn dot<S: Lanes, F: Format>(s: S, acc: S::I, codes: S::B, activations: i32) -> S::I {
    match F::LAYOUT.bits {
        8 => s.dot::<8>(acc, codes, activations),
        _ => s.dot::<6>(acc, codes, activations),
    }
}

/// Bytes of a panel after [`expand`]: one byte per code, then f32 scales, then f32 minimums.
pub(super) const fn expanded_bytes(layout: Layout, blocks: usize) -> usize {
    let floats = layout.groups + layout.min as usize;
    blocks * (LINE * QUADS + 4 * PANEL * floats)
}

/// Unpacks a panel: per block 8 lines of codes; per block f32 scales of 16 rows (two for two groups); per block minimums.
///
/// # Safety
/// The panel has `blocks` blocks, `out` has [`expanded_bytes`] and is aligned for f32.
#[inline(always)]
pub(super) unsafe fn expand<S: Lanes, F: Format, const P: usize>(
    s: S,
    panel: &[u8],
    blocks: usize,
    out: &mut [u8],
) {
    let layout = F::LAYOUT;
    // SAFETY: as the caller vouches.
    unsafe {
        let scale_bytes = panel.as_ptr().add(blocks * layout.block_bytes());
        let out_codes = out.as_mut_ptr();
        let out_scales = out_codes.add(blocks * LINE * QUADS).cast::<f32>();
        let out_mins = out_scales.add(blocks * PANEL * layout.groups);
        for b in 0..blocks {
            let block = panel.as_ptr().add(b * layout.block_bytes());
            for p in 0..P {
                let codes = codes::<S, F>(s, block.add(4 * S::OUTS * p));
                for q in 0..QUADS {
                    s.store(codes[q], out_codes.add(LINE * (QUADS * b + q) + 4 * S::OUTS * p));
                }
                let (scale, min) = scales::<S, F>(s, scale_bytes, b, S::OUTS * p);
                for g in 0..layout.groups {
                    s.store_f32(scale[g], out_scales.add(PANEL * (layout.groups * b + g) + S::OUTS * p));
                }
                if layout.min {
                    s.store_f32(min, out_mins.add(PANEL * b + S::OUTS * p));
                }
            }
        }
    }
}

/// `M` rows of activations times `N` expanded panels into `tile` `[M][N][16]`, of which `count` rows are wanted: the
/// others repeat the last one.
///
/// # Safety
/// `expanded` holds `N` panels of `x.blocks` blocks, `x` has rows `row..row + count`, `tile` has `count · N · 16` values,
/// `1 <= count <= M`.
#[inline(always)]
pub(super) unsafe fn tile<S: Lanes, F: Format, const M: usize, const N: usize, const P: usize>(
    s: S,
    expanded: &[u8],
    x: &Blocks<'_>,
    row: usize,
    count: usize,
    tile: &mut [f32],
) {
    let layout = F::LAYOUT;
    let blocks = x.blocks;
    let bytes = expanded_bytes(layout, blocks);
    let mut rows = [Row::of(x, row); M];
    for (r, out) in rows.iter_mut().enumerate() {
        *out = Row::of(x, row + r.min(count - 1));
    }
    for p in 0..P {
        let mut sums = [[s.splat(0.0); N]; M];
        // SAFETY: blocks, rows, panels and registers stay below the counts that the caller vouches for.
        unsafe {
            let start = expanded.as_ptr().add(4 * S::OUTS * p);
            let scales = start.add(blocks * LINE * QUADS).cast::<f32>();
            let mins = scales.add(blocks * PANEL * layout.groups);
            for b in 0..blocks {
                for g in 0..layout.groups {
                    let mut acc = [[s.start(0); N]; M];
                    for r in 0..M {
                        let start = starts::<S>(layout, *rows[r].sums.add(b))[g];
                        for n in 0..N {
                            acc[r][n] = s.start(start);
                        }
                    }
                    for q in 0..QUADS / layout.groups {
                        let q = QUADS * b + q + g * QUADS / 2;
                        let mut codes = [s.load(start.add(LINE * q)); N];
                        for n in 1..N {
                            codes[n] = s.load(start.add(bytes * n + LINE * q));
                        }
                        for r in 0..M {
                            let a = rows[r].quad(q);
                            for n in 0..N {
                                acc[r][n] = dot::<S, F>(s, acc[r][n], codes[n], a);
                            }
                        }
                    }
                    for n in 0..N {
                        let at = scales.byte_add(bytes * n).add(PANEL * (layout.groups * b + g));
                        let scale = s.load_f32(at);
                        for r in 0..M {
                            let d = s.splat(*rows[r].scales.add(b));
                            sums[r][n] = s.fma(s.total(acc[r][n]), s.mul(scale, d), sums[r][n]);
                        }
                    }
                }
                if layout.min {
                    for n in 0..N {
                        let min = s.load_f32(mins.byte_add(bytes * n).add(PANEL * b));
                        for r in 0..M {
                            let (first, second) = super::halves(*rows[r].sums.add(b));
                            let offset = *rows[r].scales.add(b) * (first + second) as f32;
                            sums[r][n] = s.fma(min, s.splat(offset), sums[r][n]);
                        }
                    }
                }
            }
            // A loop to `count` would index the registers and so force them into memory.
            for r in 0..M {
                if r < count {
                    for n in 0..N {
                        s.store_f32(sums[r][n], tile.as_mut_ptr().add(PANEL * (N * r + n) + S::OUTS * p));
                    }
                }
            }
        }
    }
}

/// Dequantises a panel into bf16 pairs `[cols / 2][16][2]`, rounded to nearest even.
///
/// # Safety
/// The panel has `blocks` blocks.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(super) unsafe fn expand_bf16<S: Lanes, F: Format, const P: usize>(
    s: S,
    panel: &[u8],
    blocks: usize,
    out: &mut [u16],
) {
    let layout = F::LAYOUT;
    let (one, zero) = (s.splat(1.0), s.splat(-(layout.zero as f32)));
    for (b, out) in out.chunks_exact_mut(BLOCK * PANEL).take(blocks).enumerate() {
        // SAFETY: as the caller vouches; the offsets stay within this block's `16 · BLOCK` outputs.
        unsafe {
            let block = panel.as_ptr().add(b * layout.block_bytes());
            let scale_bytes = panel.as_ptr().add(blocks * layout.block_bytes());
            for p in 0..P {
                let codes = codes::<S, F>(s, block.add(4 * S::OUTS * p));
                let (scales, min) = scales::<S, F>(s, scale_bytes, b, S::OUTS * p);
                for q in 0..QUADS {
                    for half in 0..2 {
                        let mut values = [one; 2];
                        for e in 0..2 {
                            // Rounded after the product and after the sum, as dequantisation is.
                            let code = s.fma(s.byte(codes[q], 2 * half + e), one, zero);
                            values[e] = s.mul(scales[2 * q / QUADS], code);
                            if layout.min {
                                values[e] = s.fma(values[e], one, min);
                            }
                        }
                        let at = 4 * PANEL * q + 2 * PANEL * half + 2 * S::OUTS * p;
                        s.store_pairs(values[0], values[1], out.as_mut_ptr().add(at));
                    }
                }
            }
        }
    }
}
