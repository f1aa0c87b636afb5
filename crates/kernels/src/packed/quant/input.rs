//! Activations as blocks of 8-bit codes, in one part or two.

use super::FINER;
use super::layout::BLOCK;
use crate::Isa;
use crate::isa::dispatch;

/// Largest code; −128 never occurs.
const MAX: f32 = 127.0;
/// Below this the reciprocal of a scale might overflow; such a block counts as zeros.
const SMALLEST: f32 = 1e-30;
/// Added to a float below 2^22, leaves it rounded to nearest even in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// Quantises one row of activations (a multiple of 32 values) into one part or more: `value ≈ Σ code · scale` over the
/// parts, each the 8-bit code of what the parts before it left. Codes lie from −127 to 127; every part has one scale and
/// one pair of sums (see [`halves`](super::halves)) per block; a part's scale is 1/256 of the one before. One part leaves up to
/// 1/254 of a block's largest magnitude, two 1/32512 of it. A block with NaN or infinity has scales that are not finite, so that its products are not finite either.
///
/// `codes` has rows of `stride` values, `scales` and `sums` of one value per block: a row for each part.
///
/// # Panics
/// When the outputs are too short.
pub(in crate::packed) fn quantize_activations(
    isa: Isa,
    x: &[f32],
    parts: usize,
    (codes, stride): (&mut [i8], usize),
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let blocks = x.len() / BLOCK;
    assert!(x.len() == blocks * BLOCK && x.len() <= stride, "{} values in blocks of {BLOCK}", x.len());
    assert!(codes.len() >= parts * stride && scales.len() >= parts * blocks && sums.len() >= parts * blocks);
    dispatch!(isa, quantize(x, parts, (codes, stride), scales, sums));
}

#[inline(always)]
fn quantize(
    x: &[f32],
    parts: usize,
    (codes, stride): (&mut [i8], usize),
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let blocks = x.len() / BLOCK;
    for b in 0..blocks {
        let mut rest = [0.0f32; BLOCK];
        rest.copy_from_slice(&x[BLOCK * b..BLOCK * (b + 1)]);
        // Magnitudes compare as integers, and NaN is larger than infinity.
        let mut largest = 0i32;
        for i in 0..BLOCK {
            largest = largest.max((rest[i].to_bits() & 0x7fff_ffff) as i32);
        }
        let largest = f32::from_bits(largest as u32);
        let (mut scale, mut inverse) = match largest {
            tiny if tiny < SMALLEST => (0.0, 0.0),
            _ => (largest / MAX, MAX / largest),
        };
        for part in 0..parts {
            let mut rounded = [0i32; BLOCK];
            for i in 0..BLOCK {
                let bits = (rest[i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
                rounded[i] = bits.clamp(-127, 127);
            }
            let (mut first, mut second) = (0, 0);
            for i in 0..BLOCK / 2 {
                first += rounded[i];
                second += rounded[i + BLOCK / 2];
            }
            let codes = &mut codes[part * stride + BLOCK * b..][..BLOCK];
            for i in 0..BLOCK {
                codes[i] = rounded[i] as i8;
                rest[i] -= rounded[i] as f32 * scale;
            }
            scales[part * blocks + b] = scale;
            sums[part * blocks + b] = first & 0xffff | second << 16;
            // What is left is at most half a step of this part; half a step and the largest code differ by one finer step.
            (scale, inverse) = (scale / FINER as f32, inverse * FINER as f32);
        }
    }
}
