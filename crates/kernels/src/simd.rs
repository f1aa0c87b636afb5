//! The vector token that [`dispatch!`](crate::isa) hands to kernels, and the exponential they share.
//! Knows registers and lanes; knows nothing of matrices.

use crate::quant::half_to_f32;
use half::f16;

/// Proof of an instruction set inside a dispatched body, with its scalar and vector operations.
pub(crate) trait Simd: Copy {
    /// One vector register.
    type V: Copy;
    /// `f32` lanes of [`Simd::V`].
    const LANES: usize;
    /// `a · b + c`, fused where the instruction set has it.
    fn fma(self, a: f32, b: f32, c: f32) -> f32;
    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The first `LANES` values of `x`. Panics when there are fewer.
    fn load(self, x: &[f32]) -> Self::V;
    /// The first `LANES` values of `x`, widened. Panics when there are fewer.
    fn load_f16(self, x: &[f16]) -> Self::V;
    /// Writes the first `LANES` values of `out`. Panics when there are fewer.
    fn store(self, v: Self::V, out: &mut [f32]);
    /// Lane-wise sum.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// Lane-wise product.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// Lane-wise `a · b + c`.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of all lanes, in a fixed order.
    fn sum(self, v: Self::V) -> f32;
}

/// Plain arrays, vectorised by the compiler as far as the baseline allows. `FUSED`: the target has fused multiply-add.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable<const FUSED: bool>;

impl<const FUSED: bool> Simd for Portable<FUSED> {
    type V = [f32; 8];
    const LANES: usize = 8;
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        if FUSED { a.mul_add(b, c) } else { a * b + c }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> [f32; 8] {
        let mut v = [0.0; 8];
        v.copy_from_slice(&x[..8]);
        v
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> [f32; 8] {
        let mut v = [0.0; 8];
        v.iter_mut().zip(&x[..8]).for_each(|(v, x)| *v = half_to_f32(x.to_bits()));
        v
    }
    #[inline(always)]
    fn store(self, v: [f32; 8], out: &mut [f32]) {
        out[..8].copy_from_slice(&v);
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        let mut v = a;
        v.iter_mut().zip(b).for_each(|(v, b)| *v += b);
        v
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        let mut v = a;
        v.iter_mut().zip(b).for_each(|(v, b)| *v *= b);
        v
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        let mut v = c;
        v.iter_mut().zip(a).zip(b).for_each(|((v, a), b)| *v = self.fma(a, b, *v));
        v
    }
    #[inline(always)]
    fn sum(self, v: [f32; 8]) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::Simd;

    /// Proof that AVX-512 F/BW/DQ/VL and FMA may be used here.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512(());
    /// Proof that AVX2, FMA and F16C may be used here.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2(());

    impl Avx512 {
        /// # Safety
        /// The CPU has AVX-512 F, BW, DQ, VL, AVX2 and FMA.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }
    impl Avx2 {
        /// # Safety
        /// The CPU has AVX2, FMA and F16C.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        #[inline(always)]
        fn fma(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: the token proves AVX-512 (its constructor's contract).
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32]) -> __m512 {
            let x = &x[..16];
            // SAFETY: the token proves AVX-512; `x` has 16 values (sliced above), unaligned loads are allowed.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn load_f16(self, x: &[f16]) -> __m512 {
            let x = &x[..16];
            // SAFETY: the token proves AVX-512; `x` has 16 values of two bytes (sliced above), unaligned loads are allowed.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn store(self, v: __m512, out: &mut [f32]) {
            let out = &mut out[..16];
            // SAFETY: the token proves AVX-512; `out` has 16 values (sliced above), unaligned stores are allowed.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_reduce_add_ps(v) }
        }
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        fn fma(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            // SAFETY: the token proves AVX2 (its constructor's contract).
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32]) -> __m256 {
            let x = &x[..8];
            // SAFETY: the token proves AVX2; `x` has 8 values (sliced above), unaligned loads are allowed.
            unsafe { _mm256_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn load_f16(self, x: &[f16]) -> __m256 {
            let x = &x[..8];
            // SAFETY: the token proves F16C; `x` has 8 values of two bytes (sliced above), unaligned loads are allowed.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn store(self, v: __m256, out: &mut [f32]) {
            let out = &mut out[..8];
            // SAFETY: the token proves AVX2; `out` has 8 values (sliced above), unaligned stores are allowed.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the token proves AVX2.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn sum(self, v: __m256) -> f32 {
            let mut lanes = [0.0f32; 8];
            self.store(v, &mut lanes);
            super::Portable::<true>.sum(lanes)
        }
    }
}

/// Sum over equal-length slices of the product of their values, with independent accumulators in a fixed order.
#[inline(always)]
fn sum_of_products<S: Simd, const N: usize>(s: S, x: [&[f32]; N]) -> f32 {
    let n = x[0].len();
    assert!(x.iter().all(|x| x.len() == n));
    let product = |at: usize, acc: S::V| -> S::V {
        let mut loaded = [s.splat(0.0); N];
        for (loaded, x) in loaded.iter_mut().zip(&x) {
            *loaded = s.load(&x[at..]);
        }
        match N {
            1 => s.add(acc, loaded[0]),
            2 => s.mul_add(loaded[0], loaded[1], acc),
            _ => {
                let mut left = loaded[0];
                for &factor in &loaded[1..N - 1] {
                    left = s.mul(left, factor);
                }
                s.mul_add(left, loaded[N - 1], acc)
            }
        }
    };
    let mut acc = [s.splat(0.0); 4];
    let mut at = 0;
    while at + 4 * S::LANES <= n {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = product(at + i * S::LANES, *acc);
        }
        at += 4 * S::LANES;
    }
    while at + S::LANES <= n {
        acc[0] = product(at, acc[0]);
        at += S::LANES;
    }
    let mut sum = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    for i in at..n {
        sum += x.iter().fold(1.0, |p, x| p * x[i]);
    }
    sum
}

/// `out = x`, of the same length.
#[inline(always)]
pub(crate) fn widen<S: Simd>(s: S, x: &[f16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let whole = x.len() / S::LANES * S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        s.store(s.load_f16(&x[at..]), &mut out[at..]);
    }
    for (out, x) in out[whole..].iter_mut().zip(&x[whole..]) {
        *out = half_to_f32(x.to_bits());
    }
}

/// Sum of the values.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    sum_of_products(s, [x])
}

/// Sum of products of two slices of the same length.
#[inline(always)]
pub(crate) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    sum_of_products(s, [a, b])
}

/// Sum of products of three slices of the same length.
#[inline(always)]
pub(crate) fn dot3<S: Simd>(s: S, a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    sum_of_products(s, [a, b, c])
}

/// `y += alpha · x`. `x` and `y` have the same length.
#[inline(always)]
pub(crate) fn axpy<S: Simd>(s: S, alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, &x) in y.iter_mut().zip(x) {
        *y = s.fma(alpha, x, *y);
    }
}

/// The largest value, `-inf` when empty; NaN values are skipped.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; 16];
    let mut chunks = x.chunks_exact(16);
    for chunk in &mut chunks {
        for (acc, &x) in acc.iter_mut().zip(chunk) {
            *acc = if x > *acc { x } else { *acc };
        }
    }
    let mut best = acc.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for &x in chunks.remainder() {
        best = if x > best { x } else { best };
    }
    best
}

/// `e^x` to about 1 ulp, in straight-line code that vectorises: `-inf` and very negative values give 0, large ones
/// `+inf`, NaN stays NaN, results below the normal range are subnormal.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: f32) -> f32 {
    /// Beyond this the result overflows to infinity through the scaling below.
    const HIGH: f32 = 89.0;
    /// Below this the result rounds to zero.
    const LOW: f32 = -104.0;
    /// 1.5 · 2²³: adding it rounds to the nearest integer and leaves that integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 split so that `n · LN2_HIGH` is exact for |n| < 2⁹.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // NaN fails both comparisons and passes through.
    let x = if x > HIGH { HIGH } else { x };
    let x = if x < LOW { LOW } else { x };
    let shifted = s.fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = s.fma(n, -LN2_HIGH, x);
    let r = s.fma(n, -LN2_LOW, r);
    // Cephes expf: e^r = 1 + r + r² p(r) on |r| ≤ ln2 / 2.
    let mut p = 1.987_569_1e-4;
    p = s.fma(p, r, 1.398_199_9e-3);
    p = s.fma(p, r, 8.333_452e-3);
    p = s.fma(p, r, 4.166_579_6e-2);
    p = s.fma(p, r, 1.666_666_5e-1);
    p = s.fma(p, r, 0.5);
    let y = s.fma(p, r * r, r) + 1.0;
    // 2^n in two factors, so that subnormal results and the overflow to infinity come out by themselves.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    y * power(half) * power(n.wrapping_sub(half))
}

/// Logistic function from [`exp`]; large magnitudes saturate, NaN stays NaN.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: f32) -> f32 {
    // e^-x overflows to infinity for very negative x, and 1 / inf = 0 is the right limit.
    1.0 / (1.0 + exp(s, -x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::isa::dispatch;

    /// Cephes' polynomial with an exact reduction stays below this.
    const EXP_ULPS: f64 = 2.0;

    fn exp_all(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len()];
        dispatch!(isa, |s| {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = exp(s, x);
            }
        });
        out
    }

    #[test]
    fn exp_is_accurate_over_the_whole_range() {
        let x: Vec<f32> = (0..400_000).map(|i| -105.0 + i as f32 * (195.0 / 400_000.0)).collect();
        for isa in Isa::available() {
            for (&x, y) in x.iter().zip(exp_all(isa, &x)) {
                let exact = f64::from(x).exp();
                if exact > f64::from(f32::MAX) {
                    assert_eq!(y, f32::INFINITY, "{isa} exp({x})");
                    continue;
                }
                let rounded = exact as f32;
                let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                let ulp = if ulp.is_finite() { ulp } else { f64::from(f32::EPSILON) * exact };
                assert!(
                    (f64::from(y) - exact).abs() <= EXP_ULPS * ulp,
                    "{isa} exp({x}) = {y}, exact {exact}"
                );
            }
        }
    }

    #[test]
    fn exp_keeps_special_values() {
        let x = [f32::NEG_INFINITY, -1e30, -104.0, 0.0, -0.0, 89.0, 1e30, f32::INFINITY, f32::NAN];
        for isa in Isa::available() {
            let y = exp_all(isa, &x);
            assert_eq!(
                y[..8],
                [0.0, 0.0, 0.0, 1.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY],
                "{isa}"
            );
            assert!(y[8].is_nan());
        }
    }

    #[test]
    fn reductions_agree_with_plain_sums() {
        for n in [0, 1, 7, 15, 16, 17, 63, 64, 65, 500] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
            let exact: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            for isa in Isa::available() {
                let fast = dispatch!(isa, |s| dot(s, &a, &b));
                assert!((f64::from(fast) - exact).abs() < 1e-5 * (n as f64 + 1.0), "{isa} {n}");
                let fast = dispatch!(isa, |s| dot3(s, &a, &b, &vec![2.0; n]));
                assert!((f64::from(fast) - 2.0 * exact).abs() < 2e-5 * (n as f64 + 1.0), "{isa} {n}");
                let plain: f64 = a.iter().copied().map(f64::from).sum();
                let fast = dispatch!(isa, |s| sum(s, &a));
                assert!((f64::from(fast) - plain).abs() < 1e-5 * (n as f64 + 1.0), "{isa} {n}");
                let best = dispatch!(isa, max(&a));
                assert_eq!(best, a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }
}
