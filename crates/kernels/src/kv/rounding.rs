//! From `f32` to the stored types, in straight-line code that vectorises.

/// Nearest f16, ties to even; finite values beyond the range saturate. Straight-line code that vectorises.
#[inline(always)]
pub(super) fn to_f16(x: f32) -> u16 {
    const LARGEST: u32 = 65504.0f32.to_bits();
    const INFINITY: u32 = f32::INFINITY.to_bits();
    /// Bits of the smallest normal half, 2⁻¹⁴.
    const NORMAL: u32 = (127 - 14) << 23;
    /// Adding 1/2 to a smaller value rounds it to a multiple of 2⁻²⁴ and leaves the multiple in the low bits.
    const HALF: f32 = 0.5;
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let clamped = if magnitude > LARGEST { LARGEST } else { magnitude };
    // Rebias the exponent and round at bit 13.
    let odd = (clamped >> 13) & 1;
    let normal = clamped.wrapping_add(0xc800_0fff).wrapping_add(odd) >> 13;
    let small = (f32::from_bits(magnitude) + HALF).to_bits().wrapping_sub(HALF.to_bits());
    let finite = if magnitude < NORMAL { small } else { normal };
    let special = if magnitude > INFINITY { 0x7e00 } else { 0x7c00 };
    let value = if magnitude >= INFINITY { special } else { finite };
    (value | (bits >> 31 << 15)) as u16
}

/// Nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    ((if x.is_nan() { bits | 0x0040_0000 } else { rounded }) >> 16) as u16
}

/// 8-bit codes of a row; returns the scale, NaN when a value is not finite. Straight-line loops that vectorise.
#[inline(always)]
pub(super) fn quantize(x: &[f32], codes: &mut [i8]) -> f32 {
    /// 1.5 · 2²³: adding it rounds to the nearest integer and leaves that integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // Magnitudes order like their bits, with what is not finite last.
    let mut largest = 0;
    for &x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        codes.fill(0);
        return f32::NAN;
    }
    let scale = largest / 127.0;
    // The quotient overflows for values near the smallest, which are as good as 0.
    let inverse = 127.0 / largest;
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + ROUND).to_bits() as i8;
    }
    scale
}
