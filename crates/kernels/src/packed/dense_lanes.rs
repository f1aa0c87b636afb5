//! Sixteen f32 lanes, one per output of a panel, on every instruction set: what the dense kernels are written in.
//! Knows registers and loads; knows no panel.

#![allow(clippy::needless_range_loop)] // Plain loops over registers and lanes stay inside the instruction set; iterator closures may not.

use crate::simd::{Portable, Simd};

/// Sixteen lanes. Loads read through pointers, so that hot loops have no bounds checks.
pub(super) trait Lanes: Simd {
    /// Sixteen `f32`.
    type W: Copy;
    /// Rows of activations of the f32 tile, chosen so that its accumulators fit the registers.
    const TILE_ROWS: usize;
    /// Panels of the f32 tile.
    const TILE_PANELS: usize;
    /// Rows of activations that a matrix-vector kernel takes at once.
    const VECTOR_ROWS: usize;
    /// All lanes 0.
    fn zero(self) -> Self::W;
    /// # Safety
    /// 16 values are readable at `p`.
    unsafe fn load16(self, p: *const f32) -> Self::W;
    /// # Safety
    /// 16 values are writable at `p`.
    unsafe fn store16(self, v: Self::W, p: *mut f32);
    /// All lanes `*p`.
    ///
    /// # Safety
    /// One value is readable at `p`.
    unsafe fn splat1(self, p: *const f32) -> Self::W;
    /// Even lanes `p[0]`, odd lanes `p[1]`.
    ///
    /// # Safety
    /// Two values are readable at `p`.
    unsafe fn splat2(self, p: *const f32) -> Self::W;
    /// `a · b + c`.
    fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W;
    /// `a + b`.
    fn add16(self, a: Self::W, b: Self::W) -> Self::W;
    /// The first and the second value of 16 pairs of bfloat16.
    ///
    /// # Safety
    /// 64 bytes are readable at `p`.
    unsafe fn bf16_pairs(self, p: *const u8) -> [Self::W; 2];
    /// 16 finite half-precision values in memory order.
    ///
    /// # Safety
    /// 32 bytes are readable at `p`.
    unsafe fn f16_values(self, p: *const u8) -> Self::W;
    /// The even and the odd values of two registers of eight pairs each.
    fn unzip(self, pairs: [Self::W; 2]) -> [Self::W; 2];
    /// Hints that the line at `p`, which may be any address, is read soon.
    fn prefetch(self, p: *const u8);
}

impl<const FUSED: bool> Lanes for Portable<FUSED> {
    type W = [f32; 16];
    const TILE_ROWS: usize = 4;
    const TILE_PANELS: usize = 1;
    const VECTOR_ROWS: usize = 2;
    #[inline(always)]
    fn zero(self) -> [f32; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn load16(self, p: *const f32) -> [f32; 16] {
        // SAFETY: the caller's promise; read unaligned.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store16(self, v: [f32; 16], p: *mut f32) {
        // SAFETY: the caller's promise; written unaligned.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat1(self, p: *const f32) -> [f32; 16] {
        // SAFETY: the caller's promise.
        [unsafe { *p }; 16]
    }
    #[inline(always)]
    unsafe fn splat2(self, p: *const f32) -> [f32; 16] {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (*p, *p.add(1)) };
        [a, b, a, b, a, b, a, b, a, b, a, b, a, b, a, b]
    }
    #[inline(always)]
    fn fma16(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        let mut v = c;
        for i in 0..16 {
            v[i] = self.fma(a[i], b[i], v[i]);
        }
        v
    }
    #[inline(always)]
    fn add16(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        let mut v = a;
        for i in 0..16 {
            v[i] += b[i];
        }
        v
    }
    #[inline(always)]
    unsafe fn bf16_pairs(self, p: *const u8) -> [[f32; 16]; 2] {
        // SAFETY: the caller's promise; read unaligned.
        let pairs = unsafe { p.cast::<[u32; 16]>().read_unaligned() };
        let mut values = [[0.0; 16]; 2];
        for i in 0..16 {
            let pair = u32::from_le(pairs[i]);
            values[0][i] = f32::from_bits(pair << 16);
            values[1][i] = f32::from_bits(pair & 0xffff_0000);
        }
        values
    }
    #[inline(always)]
    unsafe fn f16_values(self, p: *const u8) -> [f32; 16] {
        /// 2¹¹²: moves the exponent from half precision's bias to f32's; subnormal halves become normal by it.
        const REBIAS: f32 = f32::from_bits(0x7780_0000);
        // SAFETY: the caller's promise; read unaligned.
        let halves = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        let mut values = [0.0; 16];
        for i in 0..16 {
            let half = u32::from(u16::from_le(halves[i]));
            let magnitude = f32::from_bits((half & 0x7fff) << 13) * REBIAS;
            values[i] = f32::from_bits(magnitude.to_bits() | (half & 0x8000) << 16);
        }
        values
    }
    #[inline(always)]
    fn unzip(self, pairs: [[f32; 16]; 2]) -> [[f32; 16]; 2] {
        let mut values = [[0.0; 16]; 2];
        for i in 0..8 {
            for half in 0..2 {
                values[0][8 * half + i] = pairs[half][2 * i];
                values[1][8 * half + i] = pairs[half][2 * i + 1];
            }
        }
        values
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;
    use crate::simd::{Avx2, Avx512};

    impl Lanes for Avx512 {
        type W = __m512;
        const TILE_ROWS: usize = 8;
        const TILE_PANELS: usize = 3;
        const VECTOR_ROWS: usize = 4;
        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load16(self, p: *const f32) -> __m512 {
            // SAFETY: the token proves AVX-512; readable by the caller's promise.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store16(self, v: __m512, p: *mut f32) {
            // SAFETY: the token proves AVX-512; writable by the caller's promise.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn splat1(self, p: *const f32) -> __m512 {
            // SAFETY: the token proves AVX-512; readable by the caller's promise.
            unsafe { _mm512_set1_ps(*p) }
        }
        #[inline(always)]
        unsafe fn splat2(self, p: *const f32) -> __m512 {
            // SAFETY: the token proves AVX-512; readable by the caller's promise.
            unsafe { _mm512_castpd_ps(_mm512_set1_pd(p.cast::<f64>().read_unaligned())) }
        }
        #[inline(always)]
        fn fma16(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn add16(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn bf16_pairs(self, p: *const u8) -> [__m512; 2] {
            // SAFETY: the token proves AVX-512; readable by the caller's promise.
            unsafe {
                let pairs = _mm512_loadu_si512(p.cast());
                let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
                [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
            }
        }
        #[inline(always)]
        unsafe fn f16_values(self, p: *const u8) -> __m512 {
            // SAFETY: the token proves AVX-512; readable by the caller's promise.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        fn unzip(self, [a, b]: [__m512; 2]) -> [__m512; 2] {
            // SAFETY: the token proves AVX-512.
            unsafe {
                let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                [_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)]
            }
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    impl Lanes for Avx2 {
        type W = [__m256; 2];
        const TILE_ROWS: usize = 6;
        const TILE_PANELS: usize = 1;
        const VECTOR_ROWS: usize = 2;
        #[inline(always)]
        fn zero(self) -> [__m256; 2] {
            // SAFETY: the token proves AVX2.
            [unsafe { _mm256_setzero_ps() }; 2]
        }
        #[inline(always)]
        unsafe fn load16(self, p: *const f32) -> [__m256; 2] {
            // SAFETY: the token proves AVX2; readable by the caller's promise.
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn store16(self, v: [__m256; 2], p: *mut f32) {
            // SAFETY: the token proves AVX2; writable by the caller's promise.
            unsafe {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn splat1(self, p: *const f32) -> [__m256; 2] {
            // SAFETY: the token proves AVX2; readable by the caller's promise.
            [unsafe { _mm256_set1_ps(*p) }; 2]
        }
        #[inline(always)]
        unsafe fn splat2(self, p: *const f32) -> [__m256; 2] {
            // SAFETY: the token proves AVX2; readable by the caller's promise.
            [unsafe { _mm256_castpd_ps(_mm256_set1_pd(p.cast::<f64>().read_unaligned())) }; 2]
        }
        #[inline(always)]
        fn fma16(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn add16(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: the token proves AVX2.
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn bf16_pairs(self, p: *const u8) -> [[__m256; 2]; 2] {
            // SAFETY: the token proves AVX2; readable by the caller's promise.
            unsafe {
                let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
                let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
                let low = [_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b)];
                let high = [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)];
                [
                    [_mm256_castsi256_ps(low[0]), _mm256_castsi256_ps(low[1])],
                    [_mm256_castsi256_ps(high[0]), _mm256_castsi256_ps(high[1])],
                ]
            }
        }
        #[inline(always)]
        unsafe fn f16_values(self, p: *const u8) -> [__m256; 2] {
            // SAFETY: the token proves AVX2 and F16C; readable by the caller's promise.
            unsafe {
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())),
                ]
            }
        }
        #[inline(always)]
        fn unzip(self, [a, b]: [[__m256; 2]; 2]) -> [[__m256; 2]; 2] {
            // SAFETY: the token proves AVX2.
            unsafe {
                // Within 128-bit halves a shuffle leaves the middle two quarters swapped.
                let even = |v: [__m256; 2]| fix(_mm256_shuffle_ps::<0x88>(v[0], v[1]));
                let odd = |v: [__m256; 2]| fix(_mm256_shuffle_ps::<0xdd>(v[0], v[1]));
                [[even(a), even(b)], [odd(a), odd(b)]]
            }
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    /// Swaps the middle two quarters.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[inline(always)]
    unsafe fn fix(v: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(_mm256_castps_pd(v))) }
    }
}
