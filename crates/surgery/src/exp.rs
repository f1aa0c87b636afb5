//! An exponential for rows of scores that the compiler can vectorise: no branches, no calls.

/// Arguments below this give `exp(EXP_MIN)`, the smallest power that is still a normal number.
pub const EXP_MIN: f32 = -87.0;

/// Adding and subtracting it rounds to an integer whose bits stand in the low mantissa.
const ROUND: f32 = 12_582_912.0;

/// `exp(x)` for `x ≤ 0` to 2 units in the last place; larger arguments are taken as 0, smaller than [`EXP_MIN`] as that.
/// `2^n · exp(r)`, `|r| ≤ ln 2 / 2`, with the degree-6 polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp_nonpositive(x: f32) -> f32 {
    let x = if x < EXP_MIN { EXP_MIN } else { x };
    let x = if x > 0.0 { 0.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two units in the last place of an f32.
    const TOLERANCE: f64 = 2.4e-7;

    #[test]
    fn agrees_with_f64_over_the_whole_range() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (found, expected) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < TOLERANCE, "exp({x}): {found}, expected {expected}");
        }
    }

    #[test]
    fn extremes_are_clamped() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(5.0), 1.0);
        assert!(exp_nonpositive(f32::NEG_INFINITY) < 2e-38 && exp_nonpositive(-1e30) > 0.0);
    }
}
