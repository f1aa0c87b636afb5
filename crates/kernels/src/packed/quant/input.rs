//! Activations as 8-bit blocks.

use super::layout::BLOCK;
use crate::Isa;
use crate::isa::dispatch;

/// Largest code; −128 never occurs.
const MAX: f32 = 127.0;
/// Below this the reciprocal of a scale might overflow; such a block counts as zeros.
const SMALLEST: f32 = 1e-30;
/// Added to a float below 2^22, leaves it rounded to nearest even in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// Quantises one row of activations (a multiple of 32 values): `value ≈ code · scale`, codes from −127 to 127, one
/// scale (largest magnitude / 127) and one pair of sums (see [`halves`](super::halves)) per block. A block with NaN or
/// infinity has a scale that is not finite, so that its products are not finite either.
///
/// # Panics
/// When the outputs are too short.
pub(in crate::packed) fn quantize_activations(
    isa: Isa,
    x: &[f32],
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let blocks = x.len() / BLOCK;
    assert!(x.len() == blocks * BLOCK, "{} values in blocks of {BLOCK}", x.len());
    let (codes, scales, sums) = (&mut codes[..x.len()], &mut scales[..blocks], &mut sums[..blocks]);
    dispatch!(isa, quantize(x, codes, scales, sums));
}

#[inline(always)]
fn quantize(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    for b in 0..scales.len() {
        let x = &x[BLOCK * b..BLOCK * (b + 1)];
        let codes = &mut codes[BLOCK * b..BLOCK * (b + 1)];
        // Magnitudes compare as integers, and NaN is larger than infinity.
        let mut largest = 0i32;
        for i in 0..BLOCK {
            largest = largest.max((x[i].to_bits() & 0x7fff_ffff) as i32);
        }
        let largest = f32::from_bits(largest as u32);
        let (scale, inverse) = match largest {
            tiny if tiny < SMALLEST => (0.0, 0.0),
            _ => (largest / MAX, MAX / largest),
        };
        let mut rounded = [0i32; BLOCK];
        for i in 0..BLOCK {
            let bits = (x[i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            rounded[i] = bits.clamp(-127, 127);
        }
        let (mut first, mut second) = (0, 0);
        for i in 0..BLOCK / 2 {
            first += rounded[i];
            second += rounded[i + BLOCK / 2];
        }
        for i in 0..BLOCK {
            codes[i] = rounded[i] as i8;
        }
        scales[b] = scale;
        sums[b] = first & 0xffff | second << 16;
    }
}
