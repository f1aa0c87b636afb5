//! f32 → Q4_K, Q5_K, Q6_K: super-blocks of 256 values whose sub-blocks have small integer scales.
//! Scales are searched as in llama.cpp's reference: candidates around the obvious one, each refined by weighted least
//! squares for the codes it leads to, the best of them kept.
#![allow(clippy::needless_range_loop, reason = "several arrays, lane by lane")]

use half::f16;

use super::Dtype;
use super::quantize::scale_f16;

/// Values of a sub-block of Q4_K and Q5_K.
const SUB: usize = 32;
/// Values of a sub-block of Q6_K.
const SUB6: usize = 16;

/// Values that are summed side by side, so that the sums vectorise.
const LANES: usize = 4;

/// Nearest integer, ties to even, as a float; for values between −2^22 and 2^22. Unlike the standard function it needs
/// no instruction beyond the baseline.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23
    (x + ROUND) - ROUND
}

/// The nearest of the codes from `low` to `high`.
#[inline(always)]
fn code(x: f32, low: f32, high: f32) -> f32 {
    // Comparisons and not `clamp`, because these are single instructions.
    let x = if x > low { x } else { low };
    nearest(if x < high { x } else { high })
}

fn sum(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d] = lanes;
    (a + b) + (c + d)
}

fn stored(half: [u8; 2]) -> f32 {
    f16::from_le_bytes(half).to_f32()
}

/// How the scale and minimum of a sub-block are searched: candidate `i` of `0..=steps` has
/// `levels + first + 0.1 · i` steps over the range of the values.
struct Search {
    levels: f32,
    first: f32,
    steps: usize,
}

/// One super-block of Q4_K or Q5_K: `x ≈ d · scale · code − d_min · min`, scale and min of 6 bits per 32 values.
pub(super) fn quantize_k45(dtype: Dtype, x: &[f32], out: &mut [u8]) {
    let search = match dtype {
        Dtype::Q4K => Search { levels: 15.0, first: -1.0, steps: 20 },
        _ => Search { levels: 31.0, first: -0.5, steps: 15 },
    };
    let (mut scales, mut mins) = ([0.0f32; 8], [0.0f32; 8]);
    for (j, x) in x.as_chunks().0.iter().enumerate() {
        (scales[j], mins[j]) = search.run(x);
    }
    let (d, scale_codes) = six_bits(&scales);
    let (d_min, min_codes) = six_bits(&mins);
    out[..2].copy_from_slice(&d);
    out[2..4].copy_from_slice(&d_min);
    pack_six_bits(&scale_codes, &min_codes, &mut out[4..16]);

    let mut codes = [0u8; 256];
    for (j, (codes, x)) in codes.chunks_exact_mut(SUB).zip(x.chunks_exact(SUB)).enumerate() {
        let d = stored(d) * f32::from(scale_codes[j]);
        let min = stored(d_min) * f32::from(min_codes[j]);
        if d != 0.0 {
            for (code, &x) in codes.iter_mut().zip(x) {
                *code = self::code((x + min) / d, 0.0, search.levels) as u8;
            }
        }
    }
    let nibbles = if dtype == Dtype::Q5K {
        for i in 0..32 {
            out[16 + i] = 0;
            for (j, codes) in codes.chunks_exact(SUB).enumerate() {
                out[16 + i] |= (codes[i] >> 4) << j;
            }
        }
        &mut out[48..]
    } else {
        &mut out[16..]
    };
    for (nibbles, codes) in nibbles.chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        for (i, nibble) in nibbles.iter_mut().enumerate() {
            *nibble = codes[i] & 15 | codes[i + 32] << 4;
        }
    }
}

/// Non-negative values as 6-bit multiples of one f16.
fn six_bits(values: &[f32; 8]) -> ([u8; 2], [u8; 8]) {
    let largest = values.iter().fold(0.0f32, |m, &v| m.max(v));
    let (d, inverse) = scale_f16(largest / 63.0);
    let mut codes = [0; 8];
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = self::code(value * inverse, 0.0, 63.0) as u8;
    }
    (d, codes)
}

/// The inverse of [`scale_min`](super::scale_min).
fn pack_six_bits(scales: &[u8; 8], mins: &[u8; 8], out: &mut [u8]) {
    for j in 0..4 {
        out[j] = scales[j] | scales[j + 4] >> 4 << 6;
        out[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        out[j + 8] = scales[j + 4] & 15 | mins[j + 4] << 4;
    }
}

impl Search {
    /// Scale and (negated) minimum of 32 values, both not negative.
    fn run(&self, x: &[f32; SUB]) -> (f32, f32) {
        let low = x.iter().copied().fold(0.0f32, f32::min);
        let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let range = high - low;
        if range <= f32::MIN_POSITIVE || !range.is_finite() {
            // Constant and not positive, or beyond what f16 scales can hold anyway.
            return (if range.is_finite() { 0.0 } else { f32::MAX }, -low);
        }
        let mut squares = 0.0;
        for &x in x {
            squares += x * x;
        }
        // Large values weigh more, small ones not nothing.
        let offset = (squares / SUB as f32).sqrt();
        let (mut weights, mut sum_w, mut sum_x) = ([0.0f32; SUB], 0.0, 0.0);
        for (weight, &x) in weights.iter_mut().zip(x) {
            *weight = offset + x.abs();
            sum_w += *weight;
            sum_x += *weight * x;
        }
        let levels = self.levels;
        let error = |scale: f32, min: f32, inverse: f32| {
            let mut error = [0.0; LANES];
            for (x, weights) in x.as_chunks().0.iter().zip(weights.as_chunks().0) {
                let (x, weights): (&[f32; LANES], &[f32; LANES]) = (x, weights);
                for l in 0..LANES {
                    let code = code(inverse * (x[l] - low), 0.0, levels);
                    let difference = scale * code + min - x[l];
                    error[l] += weights[l] * difference * difference;
                }
            }
            sum(error)
        };
        let mut best = (range / self.levels, low);
        let mut best_error = error(best.0, low, self.levels / range);
        for step in 0..=self.steps {
            let inverse = (self.levels + self.first + 0.1 * step as f32) / range;
            let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            for (x, weights) in x.as_chunks().0.iter().zip(weights.as_chunks().0) {
                let (x, weights): (&[f32; LANES], &[f32; LANES]) = (x, weights);
                for l in 0..LANES {
                    let code = code(inverse * (x[l] - low), 0.0, levels);
                    sum_l[l] += weights[l] * code;
                    sum_l2[l] += weights[l] * code * code;
                    sum_xl[l] += weights[l] * code * x[l];
                }
            }
            let (sum_l, sum_l2, sum_xl) = (sum(sum_l), sum(sum_l2), sum(sum_xl));
            let determinant = sum_w * sum_l2 - sum_l * sum_l;
            if determinant <= 0.0 {
                continue;
            }
            let mut scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if min > 0.0 {
                (scale, min) = (sum_xl / sum_l2, 0.0);
            }
            let error = error(scale, min, inverse);
            if error < best_error {
                (best_error, best) = (error, (scale, min));
            }
        }
        (best.0, -best.1)
    }
}

/// One super-block of Q6_K: `x ≈ d · scale · code`, scale of 8 bits per 16 values, codes from −32 to 31.
pub(super) fn quantize_q6(x: &[f32], out: &mut [u8]) {
    let mut scales = [0.0f32; 16];
    for (scale, x) in scales.iter_mut().zip(x.chunks_exact(SUB6)) {
        *scale = search_q6(x);
    }
    let extreme = scales.iter().fold(0.0f32, |m, &s| if s.abs() > m.abs() { s } else { m });
    let (d, inverse) = scale_f16(extreme / -128.0);
    out[208..].copy_from_slice(&d);
    let mut codes = [0u8; 256];
    for (j, (codes, x)) in codes.chunks_exact_mut(SUB6).zip(x.chunks_exact(SUB6)).enumerate() {
        let scale = code(scales[j] * inverse, -128.0, 127.0) as i8;
        out[192 + j] = scale as u8;
        let d = stored(d) * f32::from(scale);
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = if d == 0.0 { 32 } else { (self::code(x / d, -32.0, 31.0) + 32.0) as u8 };
        }
    }
    for half in 0..2 {
        let code = |quarter: usize, i: usize| codes[128 * half + 32 * quarter + i];
        for i in 0..32 {
            for k in 0..2 {
                out[64 * half + 32 * k + i] = code(k, i) & 15 | code(k + 2, i) << 4;
            }
            out[128 + 32 * half + i] =
                code(0, i) >> 4 | code(1, i) >> 4 << 2 | code(2, i) >> 4 << 4 | code(3, i) >> 4 << 6;
        }
    }
}

/// The scale of 16 values that fits them best when large values weigh more (weights x²).
fn search_q6(x: &[f32]) -> f32 {
    let extreme = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if extreme.abs() < 1e-15 {
        return 0.0;
    }
    // Squares of squares must neither overflow nor vanish: values relative to the extreme.
    let mut unit = [0.0f32; SUB6];
    for (unit, &x) in unit.iter_mut().zip(x) {
        *unit = x / extreme;
    }
    let fit = |inverse: f32| {
        let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
        for unit in unit.as_chunks::<LANES>().0 {
            for l in 0..LANES {
                let (u, code) = (unit[l], code(inverse * unit[l], -32.0, 31.0));
                sum_xl[l] += u * u * u * code;
                sum_l2[l] += u * u * code * code;
            }
        }
        (sum(sum_xl), sum(sum_l2))
    };
    let (sum_xl, sum_l2) = fit(-32.0);
    let mut scale = sum_xl / sum_l2;
    let mut best = scale * sum_xl;
    for step in -9..=9 {
        let (sum_xl, sum_l2) = fit(-(32.0 + 0.1 * step as f32));
        if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
            scale = sum_xl / sum_l2;
            best = scale * sum_xl;
        }
    }
    scale * extreme
}
