//! Passes over whole vocabularies, written so that compilers vectorise them. Knows nothing of sampling.

/// Values per block of [`exp_blocks`].
pub(super) const BLOCK: usize = 64;
/// Independent maxima per pass.
const LANES: usize = 16;
/// Below this the exponential counts as 0: the last one whose power of two is a normal number, rounded.
const LEAST_EXPONENT: f64 = -708.0;

/// The larger one; the second when the first is NaN.
fn larger<T: Copy + PartialOrd>(a: T, b: T) -> T {
    if a > b { a } else { b }
}

/// The largest value, at least `least`. NaN is ignored.
pub(super) fn largest<T: Copy + PartialOrd>(values: &[T], least: T) -> T {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [least; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(value, *lane);
        }
    }
    lanes.iter().chain(rest).fold(least, |max, &value| larger(value, max))
}

/// Where the largest value is first; `None` when nothing is more than `least`.
pub(super) fn first_largest<T: Copy + PartialOrd>(values: &[T], least: T) -> Option<usize> {
    let mut best = (least, None);
    for (i, block) in values.chunks(8 * BLOCK).enumerate() {
        let max = largest(block, least);
        if max > best.0 {
            best = (max, Some(i * 8 * BLOCK));
        }
    }
    let start = best.1?;
    values[start..].iter().position(|&value| value == best.0).map(|i| start + i)
}

/// The first value that is NaN or +∞.
pub(super) fn position_of_broken(values: &[f32]) -> Option<usize> {
    let fine = |value: f32| value < f32::INFINITY;
    let mut blocks = values.chunks(8 * BLOCK);
    let all_fine = blocks.all(|block| block.iter().fold(true, |all, &value| all & fine(value)));
    if all_fine {
        return None;
    }
    values.iter().position(|&value| !fine(value))
}

/// `weights = exp((values − best) · scale)` and the sums of its blocks; `best` is the largest value, −∞ gives 0.
pub(super) fn exp_blocks(values: &[f64], best: f64, scale: f64, weights: &mut Vec<f64>, sums: &mut Vec<f64>) {
    weights.resize(values.len(), 0.0);
    sums.clear();
    for (values, weights) in values.chunks(BLOCK).zip(weights.chunks_mut(BLOCK)) {
        for (weight, value) in weights.iter_mut().zip(values) {
            *weight = exp((value - best) * scale);
        }
        let (chunks, rest) = weights.as_chunks::<8>();
        let mut lanes = [0.0; 8];
        for chunk in chunks {
            for (lane, weight) in lanes.iter_mut().zip(chunk) {
                *lane += weight;
            }
        }
        sums.push(lanes.iter().chain(rest).sum());
    }
}

/// `e^x` for `x ≤ 0` within a few units in the last place, 0 below [`LEAST_EXPONENT`]. No branches and no calls.
#[inline(always)]
fn exp(x: f64) -> f64 {
    // Adding this rounds to an integer, which then stands in the low bits.
    const ROUND: f64 = 6755399441055744.0; // 1.5 · 2⁵²
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let clamped = if x > LEAST_EXPONENT { x } else { LEAST_EXPONENT };
    let shifted = clamped * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's series: |r| ≤ ln 2 / 2, so the first term left out is below 2·10⁻¹⁷.
    let mut sum = 1.0 / 479_001_600.0 * r + 1.0 / 39_916_800.0;
    for factor in [
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        sum = sum * r + factor;
    }
    // 2ⁿ: the integer moves into the exponent's place.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x >= LEAST_EXPONENT { sum * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four units in the last place.
    const RELATIVE: f64 = 4.0 * f64::EPSILON;

    #[test]
    fn exponentials_and_their_sums() {
        for len in [0usize, 1, 63, 64, 65, 500] {
            let values: Vec<f64> = (0..len).map(|i| 3.0 - i as f64 * 1.4371).collect();
            let (mut weights, mut sums) = (vec![f64::NAN; 3], vec![f64::NAN]);
            exp_blocks(&values, 3.0, 0.9, &mut weights, &mut sums);
            assert_eq!((weights.len(), sums.len()), (len, len.div_ceil(BLOCK)));
            for (value, weight) in values.iter().zip(&weights) {
                let x = (value - 3.0) * 0.9;
                let expected = if x < LEAST_EXPONENT { 0.0 } else { x.exp() };
                assert!((weight - expected).abs() <= RELATIVE * expected, "{x}: {weight} {expected}");
            }
            for (block, sum) in weights.chunks(BLOCK).zip(&sums) {
                assert!((block.iter().sum::<f64>() - sum).abs() <= 1e-14 * sum);
            }
        }
        let mut weights = vec![];
        exp_blocks(&[f64::NEG_INFINITY, 0.0, -1e300], 0.0, 20.0, &mut weights, &mut vec![]);
        assert_eq!(weights, [0.0, 1.0, 0.0]);
    }

    #[test]
    fn the_first_of_the_largest() {
        for len in [1, 15, 16, 17, 511, 512, 513, 1500] {
            for at in [0, len / 2, len - 1] {
                let mut values = vec![-2.0f32; len];
                values[at..].fill(0.5);
                assert_eq!(first_largest(&values, f32::NEG_INFINITY), Some(at), "{len}");
                assert_eq!(largest(&values, f32::NEG_INFINITY), 0.5);
                assert_eq!(position_of_broken(&values), None);
                for broken in [f32::NAN, f32::INFINITY] {
                    values[at] = broken;
                    assert_eq!(position_of_broken(&values), Some(at));
                }
            }
        }
        assert_eq!(first_largest(&[f32::NEG_INFINITY; 3], f32::NEG_INFINITY), None);
        assert_eq!(first_largest::<f32>(&[], f32::NEG_INFINITY), None);
    }
}
