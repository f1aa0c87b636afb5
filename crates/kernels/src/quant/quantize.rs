//! f32 → stored bytes for the plain types and the types with blocks of 32, as llama.cpp's reference quantisers do it:
//! the scale comes from the extremes, every value is rounded to the nearest code.

use half::{bf16, f16};

use super::Dtype;
use super::quantize_k::{quantize_k45, quantize_q6};

/// Converts `values` to `dtype` into `out`, on the calling thread. Values should be finite; the largest f16 is the
/// largest scale, so that quantised types saturate from about 65504 · (number of codes) on. A block of zeros stays zero.
///
/// # Panics
/// When `out` is not exactly the bytes of `values.len()` values in whole blocks.
pub fn quantize(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    let (block, bytes) = super::check(dtype, values.len(), out.len());
    match dtype {
        Dtype::F32 => each(values, out, |v| v.to_le_bytes()),
        Dtype::F16 => each(values, out, |v| f16::from_f32(v).to_le_bytes()),
        Dtype::BF16 => each(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        _ => {
            for (values, out) in values.chunks_exact(block).zip(out.chunks_exact_mut(bytes)) {
                quantize_block(dtype, values, out);
            }
        }
    }
}

fn each<const N: usize>(values: &[f32], out: &mut [u8], store: impl Fn(f32) -> [u8; N]) {
    for (&value, out) in values.iter().zip(out.chunks_exact_mut(N)) {
        out.copy_from_slice(&store(value));
    }
}

fn quantize_block(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("plain types have no blocks"),
        Dtype::Q8_0 => {
            // Magnitudes compare as integers, which vectorises.
            let largest = values.iter().fold(0, |m, v| m.max(v.to_bits() as i32 & 0x7fff_ffff));
            let largest = f32::from_bits(largest as u32);
            let (d, inverse) = scale_f16(largest / 127.0);
            out[..2].copy_from_slice(&d);
            for (q, &v) in out[2..].iter_mut().zip(values) {
                // Nearest, halves away from zero.
                *q = (v * inverse + 0.5f32.copysign(v)).clamp(-127.0, 127.0) as i32 as u8;
            }
        }
        Dtype::Q4_0 | Dtype::Q5_0 => {
            let (levels, bits) = if dtype == Dtype::Q4_0 { (16, 4) } else { (32, 5) };
            let extreme = values.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
            let (d, inverse) = scale_f16(-extreme / (levels / 2) as f32);
            out[..2].copy_from_slice(&d);
            let offset = (levels / 2) as f32 + 0.5;
            store_codes(values, levels, bits, &mut out[2..], |v| v * inverse + offset);
        }
        Dtype::Q4_1 | Dtype::Q5_1 => {
            let (levels, bits) = if dtype == Dtype::Q4_1 { (16, 4) } else { (32, 5) };
            let low = values.iter().copied().fold(f32::INFINITY, f32::min);
            // What the stored minimum cannot reach is cut off.
            let low = low.clamp(f16::MIN.to_f32(), f16::MAX.to_f32());
            let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // Halves, because the difference of two large values may overflow.
            let (d, inverse) = scale_f16((high / 2.0 - low / 2.0) / (levels - 1) as f32 * 2.0);
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&to_f16(low));
            store_codes(values, levels, bits, &mut out[4..], |v| (v - low) * inverse + 0.5);
        }
        Dtype::Q4K | Dtype::Q5K => quantize_k45(dtype, values, out),
        Dtype::Q6K => quantize_q6(values, out),
    }
}

/// Codes of 32 values: the fifth bits first (5 bits only), then nibbles of value `i` and `i + 16` in one byte.
fn store_codes(values: &[f32], levels: usize, bits: u32, out: &mut [u8], position: impl Fn(f32) -> f32) {
    let mut high = 0u32;
    let mut codes = [0u8; 32];
    for (i, (code, &v)) in codes.iter_mut().zip(values).enumerate() {
        *code = (position(v) as u8).min(levels as u8 - 1);
        high |= u32::from(*code >> 4) << i;
    }
    let nibbles = if bits == 5 {
        out[..4].copy_from_slice(&high.to_le_bytes());
        &mut out[4..]
    } else {
        out
    };
    for (i, nibble) in nibbles.iter_mut().enumerate() {
        *nibble = codes[i] & 15 | codes[i + 16] << 4;
    }
}

/// `x` as f16 of the same sign, at most the largest finite one.
fn to_f16(x: f32) -> [u8; 2] {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_le_bytes()
}

/// A scale as f16 and the reciprocal that codes are made with: that of the exact scale as in the reference, but of the
/// stored one where the two differ much (f16 subnormals, overflow); 0 when nothing is left of the scale.
pub(super) fn scale_f16(d: f32) -> ([u8; 2], f32) {
    let bytes = to_f16(d);
    let stored = f16::from_le_bytes(bytes).to_f32();
    let near = (stored - d).abs() <= d.abs() * NEAR;
    (
        bytes,
        if stored == 0.0 {
            0.0
        } else if near {
            1.0 / d
        } else {
            1.0 / stored
        },
    )
}

/// Relative rounding error of a normal f16: half a unit of 2^-10.
const NEAR: f32 = 1.0 / 2048.0;
