//! The sixteen lanes as one AVX-512 register and as two of AVX2.

use std::arch::x86_64::*;

use super::{LOWEST, Lanes, ROUND};
use crate::simd::{Avx2, Avx512, Simd};

// SAFETY of every block of this file: the token proves the instruction set (its constructor's contract); pointers
// follow the trait's contract, unaligned accesses are used throughout.

impl Lanes for Avx512 {
    type W = __m512;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat16(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load16(self, x: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(x) }
    }
    #[inline(always)]
    unsafe fn store16(self, v: __m512, out: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(out, v) }
    }
    #[inline(always)]
    unsafe fn pair16(self, x: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castpd_ps(_mm512_set1_pd(x.cast::<f64>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn f16(self, x: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.cast())) }
    }
    #[inline(always)]
    unsafe fn i8(self, x: *const i8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.cast()))) }
    }
    #[inline(always)]
    unsafe fn bf16(self, x: *const u16) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_loadu_si512(x.cast());
            let odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(odd)]
        }
    }
    #[inline(always)]
    fn fma16(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add16(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub16(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul16(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn max16(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn unzip(self, [a, b]: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
            [_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)]
        }
    }
    #[inline(always)]
    fn keep_first(self, v: __m512, n: usize, fill: f32) -> __m512 {
        let mask = if n < 16 { (1u16 << n) - 1 } else { u16::MAX };
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, v) }
    }
    #[inline(always)]
    fn fill_lanes(self, v: __m512, from: usize, to: usize, fill: f32) -> __m512 {
        let below = |n: usize| if n < 16 { (1u16 << n) - 1 } else { u16::MAX };
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(v, below(to) & !below(from), _mm512_set1_ps(fill)) }
    }
    #[inline(always)]
    fn exp2_with<const N: usize>(self, x: __m512, c: &[f32; N]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // -inf - -inf would be NaN. The second operand is returned when either is NaN.
            let x = _mm512_max_ps(_mm512_set1_ps(-1e30), x);
            // To the nearest integer; two additions are cheaper than the rounding instruction. Far below the range of results it
            // rounds to something coarser, which gives 0 all the same.
            let shifted = _mm512_add_ps(x, _mm512_set1_ps(ROUND));
            let n = _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND));
            let r = _mm512_sub_ps(x, n);
            let mut p = _mm512_set1_ps(c[N - 1]);
            let mut i = N - 1;
            while i > 0 {
                i -= 1;
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
            }
            _mm512_scalef_ps(p, n)
        }
    }
    #[inline(always)]
    fn max_lanes(self, v: &[__m512; 16], n: usize) -> __m512 {
        if n == 16 {
            return lanes_of_16(v, |a, b| self.max16(a, b));
        }
        let mut out = [f32::NEG_INFINITY; 16];
        for i in 0..n {
            out[i] = self.max_of(v[i]);
        }
        // SAFETY: see above.
        unsafe { self.load16(out.as_ptr()) }
    }
    #[inline(always)]
    fn sum_lanes(self, v: &[__m512; 16], n: usize) -> __m512 {
        if n == 16 {
            return lanes_of_16(v, |a, b| self.add16(a, b));
        }
        let mut out = [0.0; 16];
        for i in 0..n {
            out[i] = self.sum_of(v[i]);
        }
        // SAFETY: see above.
        unsafe { self.load16(out.as_ptr()) }
    }
    #[inline(always)]
    fn max_of(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    fn sum_of(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch may have any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Lane `i` of the result is `op` over all lanes of `v[i]`: a transposition that reduces as it goes.
#[inline(always)]
fn lanes_of_16(v: &[__m512; 16], op: impl Fn(__m512, __m512) -> __m512) -> __m512 {
    // SAFETY: see above; callers hold the token.
    unsafe {
        let mut quads = [v[0]; 4];
        for i in 0..4 {
            let [a, b, c, d] = [v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]];
            let ab = op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            quads[i] = op(low, high);
        }
        // Each of the four holds its four vectors in every 128-bit part.
        let halves = |a, b| op(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]))
    }
}

impl Lanes for Avx2 {
    type W = [__m256; 2];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat16(self, x: f32) -> [__m256; 2] {
        [self.splat(x); 2]
    }
    #[inline(always)]
    unsafe fn load16(self, x: *const f32) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
    }
    #[inline(always)]
    unsafe fn store16(self, v: [__m256; 2], out: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(out, v[0]);
            _mm256_storeu_ps(out.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn pair16(self, x: *const f32) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_castpd_ps(_mm256_set1_pd(x.cast::<f64>().read_unaligned())); 2] }
    }
    #[inline(always)]
    unsafe fn f16(self, x: *const u16) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(x.cast())), _mm256_cvtph_ps(_mm_loadu_si128(x.add(8).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn i8(self, x: *const i8) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.add(8).cast()))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn bf16(self, x: *const u16) -> [[__m256; 2]; 2] {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (_mm256_loadu_si256(x.cast()), _mm256_loadu_si256(x.add(16).cast()));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let even = [_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b)];
            let odd = [_mm256_and_si256(a, high), _mm256_and_si256(b, high)];
            [
                [_mm256_castsi256_ps(even[0]), _mm256_castsi256_ps(even[1])],
                [_mm256_castsi256_ps(odd[0]), _mm256_castsi256_ps(odd[1])],
            ]
        }
    }
    #[inline(always)]
    fn fma16(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn add16(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub16(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul16(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max16(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn unzip(self, [a, b]: [[__m256; 2]; 2]) -> [[__m256; 2]; 2] {
        // SAFETY: see above.
        unsafe {
            [
                [
                    sorted(_mm256_shuffle_ps::<0b10_00_10_00>(a[0], a[1])),
                    sorted(_mm256_shuffle_ps::<0b10_00_10_00>(b[0], b[1])),
                ],
                [
                    sorted(_mm256_shuffle_ps::<0b11_01_11_01>(a[0], a[1])),
                    sorted(_mm256_shuffle_ps::<0b11_01_11_01>(b[0], b[1])),
                ],
            ]
        }
    }
    #[inline(always)]
    fn keep_first(self, v: [__m256; 2], n: usize, fill: f32) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            let n = _mm256_set1_epi32(n.min(16) as i32);
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, lanes));
            let lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(8));
            let high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, lanes));
            let fill = _mm256_set1_ps(fill);
            [_mm256_blendv_ps(fill, v[0], low), _mm256_blendv_ps(fill, v[1], high)]
        }
    }
    #[inline(always)]
    fn fill_lanes(self, v: [__m256; 2], from: usize, to: usize, fill: f32) -> [__m256; 2] {
        let [low, high] = self.keep_first(v, from, fill);
        // SAFETY: see above.
        unsafe {
            let to = _mm256_set1_epi32(to.min(16) as i32);
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let first = _mm256_castsi256_ps(_mm256_cmpgt_epi32(to, lanes));
            let lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(8));
            let second = _mm256_castsi256_ps(_mm256_cmpgt_epi32(to, lanes));
            [_mm256_blendv_ps(v[0], low, first), _mm256_blendv_ps(v[1], high, second)]
        }
    }
    #[inline(always)]
    fn exp2_with<const N: usize>(self, x: [__m256; 2], c: &[f32; N]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [exp2_avx2(x[0], c), exp2_avx2(x[1], c)] }
    }
    #[inline(always)]
    fn max_of(self, v: [__m256; 2]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn sum_of(self, v: [__m256; 2]) -> f32 {
        self.sum(self.add(v[0], v[1]))
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch may have any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// The 64-bit quarters 0 2 1 3: what a shuffle within 128-bit halves left out of order.
///
/// # Safety
/// AVX2 is available.
#[inline(always)]
unsafe fn sorted(x: __m256) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe { _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(x))) }
}

/// # Safety
/// AVX2 and FMA are available.
#[inline(always)]
unsafe fn exp2_avx2<const N: usize>(x: __m256, c: &[f32; N]) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        let lowest = _mm256_set1_ps(LOWEST);
        let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, lowest);
        // The second operand is returned when either is NaN.
        let x = _mm256_max_ps(lowest, x);
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm256_sub_ps(x, n);
        let mut p = _mm256_set1_ps(c[N - 1]);
        let mut i = N - 1;
        while i > 0 {
            i -= 1;
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c[i]));
        }
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
        _mm256_and_ps(normal, _mm256_mul_ps(p, power))
    }
}
