//! Stored bytes → f32 for every element type, block formats as in llama.cpp's `ggml-quants.c`.

use super::Dtype;

/// Converts `bytes` to f32 into `out`, bit for bit as llama.cpp's reference (no fused multiply-add), on the calling
/// thread: callers that want more threads split at whole blocks.
///
/// # Panics
/// When `bytes` is not exactly `out.len()` values of `dtype`.
pub fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let (block, block_bytes) = super::check(dtype, out.len(), bytes.len());
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F16 => each(bytes, out, |b| half_to_f32(u16::from_le_bytes(b))),
        Dtype::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        _ => {
            for (out, bytes) in out.chunks_exact_mut(block).zip(bytes.chunks_exact(block_bytes)) {
                dequantize_block(dtype, bytes, out);
            }
        }
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], load: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = load(*bytes);
    }
}

/// Two bytes as f16, widened; exact for every bit pattern but the payload of NaN. No branch, so that loops vectorise.
#[inline(always)]
pub(crate) fn half_to_f32(half: u16) -> f32 {
    /// 2^112, which moves f16's exponent range onto f32's; subnormals become normal on the way.
    const REBIAS: f32 = f32::from_bits(0x7780_0000);
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * REBIAS;
    // Exponent 31 of f16 (infinity, NaN) came out as 2^16 and more.
    let special = if magnitude >= 65_536.0 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | u32::from(half & 0x8000) << 16)
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn dequantize_block(dtype: Dtype, b: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("plain types have no blocks"),
        Dtype::Q8_0 => {
            let d = half_at(b, 0);
            for (o, &q) in out.iter_mut().zip(&b[2..]) {
                *o = d * f32::from(q as i8);
            }
        }
        Dtype::Q4_0 => {
            let d = half_at(b, 0);
            for (i, &q) in b[2..18].iter().enumerate() {
                out[i] = d * f32::from((q & 15) as i8 - 8);
                out[i + 16] = d * f32::from((q >> 4) as i8 - 8);
            }
        }
        Dtype::Q4_1 => {
            let (d, m) = (half_at(b, 0), half_at(b, 2));
            for (i, &q) in b[4..20].iter().enumerate() {
                out[i] = d * f32::from(q & 15) + m;
                out[i + 16] = d * f32::from(q >> 4) + m;
            }
        }
        Dtype::Q5_0 => {
            let d = half_at(b, 0);
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            for (i, &q) in b[6..22].iter().enumerate() {
                out[i] = d * f32::from(fifth_bit(q & 15, high, i) as i8 - 16);
                out[i + 16] = d * f32::from(fifth_bit(q >> 4, high, i + 16) as i8 - 16);
            }
        }
        Dtype::Q5_1 => {
            let (d, m) = (half_at(b, 0), half_at(b, 2));
            let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            for (i, &q) in b[8..24].iter().enumerate() {
                out[i] = d * f32::from(fifth_bit(q & 15, high, i)) + m;
                out[i + 16] = d * f32::from(fifth_bit(q >> 4, high, i + 16)) + m;
            }
        }
        Dtype::Q4K => {
            let (d, d_min) = (half_at(b, 0), half_at(b, 2));
            for (pair, (out, qs)) in out.chunks_exact_mut(64).zip(b[16..].chunks_exact(32)).enumerate() {
                for half in 0..2 {
                    let (scale, min) = scale_min(&b[4..16], 2 * pair + half);
                    let (d, m) = (d * f32::from(scale), d_min * f32::from(min));
                    for (o, &q) in out[32 * half..].iter_mut().zip(qs) {
                        *o = d * f32::from((q >> (4 * half)) & 15) - m;
                    }
                }
            }
        }
        Dtype::Q5K => {
            let (d, d_min) = (half_at(b, 0), half_at(b, 2));
            let high = &b[16..48];
            for (pair, (out, qs)) in out.chunks_exact_mut(64).zip(b[48..].chunks_exact(32)).enumerate() {
                for half in 0..2 {
                    let sub = 2 * pair + half;
                    let (scale, min) = scale_min(&b[4..16], sub);
                    let (d, m) = (d * f32::from(scale), d_min * f32::from(min));
                    for ((o, &q), &h) in out[32 * half..].iter_mut().zip(qs).zip(high) {
                        let q = ((q >> (4 * half)) & 15) | (((h >> sub) & 1) << 4);
                        *o = d * f32::from(q) - m;
                    }
                }
            }
        }
        Dtype::Q6K => {
            let d = half_at(b, 208);
            let scales = &b[192..208];
            for (half, out) in out.chunks_exact_mut(128).enumerate() {
                let (low, high) = (&b[64 * half..64 * half + 64], &b[128 + 32 * half..128 + 32 * half + 32]);
                for quarter in 0..4 {
                    for i in 0..32 {
                        let l = low[32 * (quarter % 2) + i] >> (4 * (quarter / 2)) & 15;
                        let h = high[i] >> (2 * quarter) & 3;
                        let scale = scales[8 * half + 2 * quarter + i / 16] as i8;
                        out[32 * quarter + i] = (d * f32::from(scale)) * f32::from((l | h << 4) as i8 - 32);
                    }
                }
            }
        }
    }
}

fn fifth_bit(nibble: u8, high: u32, index: usize) -> u8 {
    nibble | (((high >> index) & 1) as u8) << 4
}

/// The 6-bit scale and minimum of sub-block `j` (0 to 7), packed in 12 bytes (`get_scale_min_k4`).
pub(crate) fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4)
    }
}
