//! How a quantised panel lies in memory: 16 rows, blocks of 32 columns, codes first, scales behind them.
//! Nothing is widened: a panel takes as many bytes as its 16 stored rows.

use crate::packed::PANEL;
use crate::quant::{Dtype, half_to_f32, scale_min};

/// Columns of a block.
pub(super) const BLOCK: usize = 32;
/// Columns of a super-block of the K types.
const SUPER: usize = 256;
/// Blocks of a super-block.
pub(super) const SUBS: usize = SUPER / BLOCK;
/// Bytes in which one quad of columns (16 rows × 4 columns) takes one byte per code.
pub(super) const LINE: usize = 64;
/// Bytes of 16 f16 values.
const HALVES: usize = 2 * PANEL;

/// One element type's panel.
///
/// Codes of a block: a *line* is 64 bytes, byte `4 · row + c`; quad `q` of columns is columns `4q..4q + 4`.
/// - 8 bits: line `q` holds quad `q`.
/// - otherwise line `i < 4` holds quad `i` in the low and quad `i + 4` in the high nibbles, and
///   - 5 bits: line 4 holds the fifth bit of quad `q` at bit `q`;
///   - 6 bits: line `4 + h` holds the two high bits of quad `4h + i` at bits `2i` and `2i + 1`.
///
/// Scales, all 16 rows of one kind side by side: per block f16 `d` (and `min`); per super-block of Q4_K and Q5_K f16
/// `d`, f16 `d_min`, eight times 16 bytes with the low nibbles of (scale, min) of sub-block `j`, four times 16 bytes
/// with the two high bits of scale and min of sub-block `j`, then of `j + 4`; of Q6_K f16 `d`, then 16 times 16 `i8`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Bits per code.
    pub bits: usize,
    /// What is subtracted from a stored (unsigned) code.
    pub zero: i32,
    /// Whether a minimum is added.
    pub min: bool,
    /// Scales per block and row.
    pub groups: usize,
    /// Blocks that share one set of scale bytes.
    pub unit: usize,
    /// Size of that set.
    pub unit_bytes: usize,
}

/// The layout of a quantised type.
pub(super) const fn layout(dtype: Dtype) -> Layout {
    let (bits, zero, min, groups, unit, unit_bytes) = match dtype {
        Dtype::Q8_0 => (8, 128, false, 1, 1, HALVES),
        Dtype::Q4_0 => (4, 8, false, 1, 1, HALVES),
        Dtype::Q4_1 => (4, 0, true, 1, 1, 2 * HALVES),
        Dtype::Q5_0 => (5, 16, false, 1, 1, HALVES),
        Dtype::Q5_1 => (5, 0, true, 1, 1, 2 * HALVES),
        Dtype::Q4K => (4, 0, true, 1, SUBS, 2 * HALVES + 12 * PANEL),
        Dtype::Q5K => (5, 0, true, 1, SUBS, 2 * HALVES + 12 * PANEL),
        Dtype::Q6K => (6, 32, false, 2, SUBS, HALVES + 16 * PANEL),
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => panic!("a plain type has no quantised panel"),
    };
    Layout { bits, zero, min, groups, unit, unit_bytes }
}

impl Layout {
    /// Bytes of the codes of one block.
    pub(super) const fn block_bytes(&self) -> usize {
        LINE * self.bits
    }
    /// Bytes of the scales of `blocks` blocks.
    pub(super) const fn scale_bytes(&self, blocks: usize) -> usize {
        blocks / self.unit * self.unit_bytes
    }
    /// Bytes of a panel of `blocks` blocks.
    pub(super) const fn panel_bytes(&self, blocks: usize) -> usize {
        blocks * self.block_bytes() + self.scale_bytes(blocks)
    }
}

/// Packs up to 16 stored rows of `cols` columns into a zeroed panel.
pub(in crate::packed) fn pack_panel(dtype: Dtype, cols: usize, rows: &[&[u8]], panel: &mut [u8]) {
    let layout = layout(dtype);
    let (codes, scales) = panel.split_at_mut(cols / BLOCK * layout.block_bytes());
    assert!(rows.len() <= PANEL, "{} rows in a panel", rows.len());
    for (r, row) in rows.iter().enumerate() {
        let (values, bytes) = dtype.block();
        let code_bytes = values / BLOCK * layout.block_bytes();
        for ((stored, codes), scales) in row
            .chunks_exact(bytes)
            .zip(codes.chunks_exact_mut(code_bytes))
            .zip(scales.chunks_exact_mut(layout.unit_bytes))
        {
            match dtype {
                Dtype::Q8_0 => pack_q8(r, stored, codes, scales),
                Dtype::Q4_0 => pack_legacy(r, &stored[..2], None, &stored[2..], codes, scales),
                Dtype::Q4_1 => pack_legacy(r, &stored[..4], None, &stored[4..], codes, scales),
                Dtype::Q5_0 => pack_legacy(r, &stored[..2], Some(&stored[2..6]), &stored[6..], codes, scales),
                Dtype::Q5_1 => pack_legacy(r, &stored[..4], Some(&stored[4..8]), &stored[8..], codes, scales),
                Dtype::Q4K => pack_k45(r, stored, None, &stored[16..], codes, scales),
                Dtype::Q5K => pack_k45(r, stored, Some(&stored[16..48]), &stored[48..], codes, scales),
                Dtype::Q6K => pack_q6(r, stored, codes, scales),
                Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("checked by layout"),
            }
        }
    }
}

/// Four bytes of `bytes`, number `index`.
#[inline(always)]
fn quad(bytes: &[u8], index: usize) -> u32 {
    let b = &bytes[4 * index..4 * index + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Writes row `r` of line `line`.
#[inline(always)]
fn put(codes: &mut [u8], line: usize, r: usize, quad: u32) {
    codes[LINE * line + 4 * r..][..4].copy_from_slice(&quad.to_le_bytes());
}

/// Writes f16 number `index` of row `r`.
#[inline(always)]
fn put_half(scales: &mut [u8], index: usize, r: usize, half: &[u8]) {
    scales[HALVES * index + 2 * r..][..2].copy_from_slice(&half[..2]);
}

const NIBBLES: u32 = 0x0f0f_0f0f;

fn pack_q8(r: usize, stored: &[u8], codes: &mut [u8], scales: &mut [u8]) {
    put_half(scales, 0, r, stored);
    for q in 0..8 {
        put(codes, q, r, quad(&stored[2..34], q) ^ 0x8080_8080);
    }
}

/// The stored nibbles of these types are already in the order of the lines.
fn pack_legacy(r: usize, halves: &[u8], high: Option<&[u8]>, qs: &[u8], codes: &mut [u8], scales: &mut [u8]) {
    for (i, half) in halves.chunks_exact(2).enumerate() {
        put_half(scales, i, r, half);
    }
    for i in 0..4 {
        put(codes, i, r, quad(qs, i));
    }
    if let Some(high) = high {
        let high = quad(high, 0);
        let mut plane = [0; 4];
        for (c, plane) in plane.iter_mut().enumerate() {
            // Bits c, c + 4, …, c + 28 move together.
            let x = high >> c & 0x1111_1111;
            let x = (x | x >> 3) & 0x0303_0303;
            let x = (x | x >> 6) & 0x000f_000f;
            *plane = (x | x >> 12) as u8;
        }
        put(codes, 4, r, u32::from_le_bytes(plane));
    }
}

fn pack_k45(r: usize, stored: &[u8], high: Option<&[u8]>, qs: &[u8], codes: &mut [u8], scales: &mut [u8]) {
    put_half(scales, 0, r, &stored[..2]);
    put_half(scales, 1, r, &stored[2..4]);
    let block_bytes = codes.len() / SUBS;
    for (j, codes) in codes.chunks_exact_mut(block_bytes).enumerate() {
        let (scale, min) = scale_min(&stored[4..16], j);
        let low = 2 * HALVES + PANEL * j + r;
        scales[low] = scale & 15 | min << 4;
        scales[2 * HALVES + PANEL * (SUBS + j % 4) + r] |= (scale >> 4 | min >> 4 << 2) << (4 * (j / 4));
        let (qs, shift) = (&qs[32 * (j / 2)..][..32], 4 * (j % 2));
        for i in 0..4 {
            let (first, second) = (quad(qs, i) >> shift & NIBBLES, quad(qs, i + 4) >> shift & NIBBLES);
            put(codes, i, r, first | second << 4);
        }
        if let Some(high) = high {
            let mut plane = 0;
            for q in 0..8 {
                plane |= (quad(high, q) >> j & 0x0101_0101) << q;
            }
            put(codes, 4, r, plane);
        }
    }
}

fn pack_q6(r: usize, stored: &[u8], codes: &mut [u8], scales: &mut [u8]) {
    put_half(scales, 0, r, &stored[208..]);
    for (i, &scale) in stored[192..208].iter().enumerate() {
        scales[HALVES + PANEL * i + r] = scale;
    }
    let block_bytes = codes.len() / SUBS;
    for (b, codes) in codes.chunks_exact_mut(block_bytes).enumerate() {
        let (half, quarter) = (b / 4, b % 4);
        let low = &stored[64 * half + 32 * (quarter % 2)..][..32];
        let high = &stored[128 + 32 * half..][..32];
        let shift = 4 * (quarter / 2);
        for i in 0..4 {
            put(codes, i, r, quad(low, i) >> shift & NIBBLES | (quad(low, i + 4) >> shift & NIBBLES) << 4);
        }
        for h in 0..2 {
            let mut plane = 0;
            for i in 0..4 {
                plane |= (quad(high, 4 * h + i) >> (2 * quarter) & 0x0303_0303) << (2 * i);
            }
            put(codes, 4 + h, r, plane);
        }
    }
}

/// Dequantises row `r` of a panel, bit for bit as its stored bytes.
pub(in crate::packed) fn row_f32(dtype: Dtype, cols: usize, panel: &[u8], r: usize, out: &mut [f32]) {
    let layout = layout(dtype);
    let (codes, scales) = panel.split_at(cols / BLOCK * layout.block_bytes());
    for (b, (out, codes)) in
        out.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(layout.block_bytes())).enumerate()
    {
        let unit = &scales[b / layout.unit * layout.unit_bytes..][..layout.unit_bytes];
        let (scale, min) = row_scales(dtype, unit, b % layout.unit, r);
        for (i, out) in out.iter_mut().enumerate() {
            let (q, at) = (i / 4, 4 * r + i % 4);
            let code = match layout.bits {
                8 => codes[LINE * q + at],
                bits => {
                    let nibble = codes[LINE * (q % 4) + at] >> (4 * (q / 4)) & 15;
                    let high = match bits {
                        4 => 0,
                        5 => codes[LINE * 4 + at] >> q & 1,
                        _ => codes[LINE * (4 + q / 4) + at] >> (2 * (q % 4)) & 3,
                    };
                    nibble | high << 4
                }
            };
            let value = scale[i / (BLOCK / 2)] * (i32::from(code) - layout.zero) as f32;
            *out = if layout.min { value + min } else { value };
        }
    }
}

/// Scales of both halves of block `b` of a unit, and its minimum.
fn row_scales(dtype: Dtype, unit: &[u8], b: usize, r: usize) -> ([f32; 2], f32) {
    let half = |index: usize| {
        let at = HALVES * index + 2 * r;
        half_to_f32(u16::from_le_bytes([unit[at], unit[at + 1]]))
    };
    match dtype {
        Dtype::Q4K | Dtype::Q5K => {
            let low = unit[2 * HALVES + PANEL * b + r];
            let high = unit[2 * HALVES + PANEL * (SUBS + b % 4) + r] >> (4 * (b / 4));
            let (scale, min) = (low & 15 | (high & 3) << 4, low >> 4 | (high & 12) << 2);
            ([half(0) * f32::from(scale); 2], -(half(1) * f32::from(min)))
        }
        Dtype::Q6K => {
            let scale = |group: usize| half(0) * f32::from(unit[HALVES + PANEL * (2 * b + group) + r] as i8);
            ([scale(0), scale(1)], 0.0)
        }
        Dtype::Q4_1 | Dtype::Q5_1 => ([half(0); 2], half(1)),
        _ => ([half(0); 2], 0.0),
    }
}
