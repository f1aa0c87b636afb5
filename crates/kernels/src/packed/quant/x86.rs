//! The registers of AVX2, AVX-512 and AVX-512 VNNI.

use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());
/// Proof of AVX-512 F, BW, DQ, VL; with `VNNI` of that too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512<const VNNI: bool>(());

/// Runs `f` with AVX2 enabled.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<R>(f: impl FnOnce(Avx2) -> R) -> R {
    f(Avx2(()))
}
/// Runs `f` with AVX-512 enabled.
///
/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<R>(f: impl FnOnce(Avx512<false>) -> R) -> R {
    f(Avx512(()))
}
/// Runs `f` with AVX-512 VNNI enabled.
///
/// # Safety
/// The CPU has AVX-512 F, BW, DQ, VL, VNNI, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_vnni<R>(f: impl FnOnce(Avx512<true>) -> R) -> R {
    f(Avx512(()))
}

// In both implementations the token proves the features that the intrinsics need, and memory operations rely on the
// trait's promise about pointers; all are the unaligned forms.

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    const OUTS: usize = 16;
    const SIGNED: bool = !VNNI;
    type B = __m512i;
    type I = __m512i;
    type W = __m512i;
    type F = __m512;

    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> __m512i {
        // SAFETY: token; the caller's 64 bytes.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, b: __m512i, at: *mut u8) {
        // SAFETY: token; the caller's 64 bytes.
        unsafe { _mm512_storeu_si512(at.cast(), b) }
    }
    #[inline(always)]
    fn low(self, b: __m512i) -> __m512i {
        // SAFETY: token.
        unsafe { _mm512_and_si512(b, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high(self, b: __m512i) -> __m512i {
        // SAFETY: token.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(b), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn merge(self, b: __m512i, plane: __m512i, shift: i32, mask: u8) -> __m512i {
        // SAFETY: token.
        unsafe {
            let moved = if shift < 0 {
                _mm512_srl_epi16(plane, _mm_cvtsi32_si128(-shift))
            } else {
                _mm512_sll_epi16(plane, _mm_cvtsi32_si128(shift))
            };
            // b | moved & mask
            _mm512_ternarylogic_epi32::<0xf8>(b, moved, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    fn start(self, x: i32) -> __m512i {
        // SAFETY: token.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, acc: __m512i, codes: __m512i, activations: i32) -> __m512i {
        // SAFETY: token; VNNI is proved by its own token.
        unsafe {
            let a = _mm512_set1_epi32(activations);
            if VNNI {
                return _mm512_dpbusd_epi32(acc, codes, a);
            }
            let pairs = if BITS == 8 {
                // |w| · sign(w)·a, so that no pair exceeds 2 · 128 · 127 < 2^15.
                let w = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
                let a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
                _mm512_maddubs_epi16(_mm512_abs_epi8(w), a)
            } else {
                // A pair is at most 2 · 63 · 127 < 2^15.
                _mm512_maddubs_epi16(codes, a)
            };
            _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn total(self, acc: __m512i) -> __m512 {
        self.float(acc)
    }
    #[inline(always)]
    fn total_fine(self, first: __m512i, second: __m512i) -> __m512 {
        self.float(self.join(second, first, 8))
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> __m512i {
        // SAFETY: token; the caller's 16 bytes.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> __m512i {
        // SAFETY: token; the caller's 16 bytes.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    fn bits(self, w: __m512i, shift: u32, mask: i32) -> __m512i {
        // SAFETY: token.
        unsafe {
            let moved = _mm512_srl_epi32(w, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(moved, _mm512_set1_epi32(mask))
        }
    }
    #[inline(always)]
    fn join(self, a: __m512i, b: __m512i, shift: u32) -> __m512i {
        // SAFETY: token.
        unsafe { _mm512_add_epi32(a, _mm512_sll_epi32(b, _mm_cvtsi32_si128(shift as i32))) }
    }
    #[inline(always)]
    fn float(self, w: __m512i) -> __m512 {
        // SAFETY: token.
        unsafe { _mm512_cvtepi32_ps(w) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: token.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m512 {
        // SAFETY: token; the caller's 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f32(self, at: *const f32) -> __m512 {
        // SAFETY: token; the caller's 64 bytes.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m512, at: *mut f32) {
        // SAFETY: token; the caller's 64 bytes.
        unsafe { _mm512_storeu_ps(at, v) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: token.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: token.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn byte(self, b: __m512i, e: usize) -> __m512 {
        // SAFETY: token.
        unsafe {
            let moved = _mm512_srl_epi32(b, _mm_cvtsi32_si128(8 * e as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(255)))
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, even: __m512, odd: __m512, at: *mut u16) {
        // SAFETY: token; the caller's 64 bytes.
        unsafe {
            let rounded = |v: __m512| {
                let bits = _mm512_castps_si512(v);
                let lowest = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lowest)
            };
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            // even's upper half moved down, odd's kept: (even >> 16) | (odd & high).
            let pairs =
                _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(rounded(even)), rounded(odd), high);
            _mm512_storeu_si512(at.cast(), pairs);
        }
    }
}

impl Lanes for Avx2 {
    const OUTS: usize = 8;
    const SIGNED: bool = true;
    type B = __m256i;
    type I = __m256i;
    type W = __m256i;
    type F = __m256;

    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> __m256i {
        // SAFETY: token; the caller's 32 bytes.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, b: __m256i, at: *mut u8) {
        // SAFETY: token; the caller's 32 bytes.
        unsafe { _mm256_storeu_si256(at.cast(), b) }
    }
    #[inline(always)]
    fn low(self, b: __m256i) -> __m256i {
        // SAFETY: token.
        unsafe { _mm256_and_si256(b, _mm256_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high(self, b: __m256i) -> __m256i {
        // SAFETY: token.
        unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(b), _mm256_set1_epi8(15)) }
    }
    #[inline(always)]
    fn merge(self, b: __m256i, plane: __m256i, shift: i32, mask: u8) -> __m256i {
        // SAFETY: token.
        unsafe {
            let moved = if shift < 0 {
                _mm256_srl_epi16(plane, _mm_cvtsi32_si128(-shift))
            } else {
                _mm256_sll_epi16(plane, _mm_cvtsi32_si128(shift))
            };
            _mm256_or_si256(b, _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8)))
        }
    }
    #[inline(always)]
    fn start(self, x: i32) -> __m256i {
        // SAFETY: token.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, acc: __m256i, codes: __m256i, activations: i32) -> __m256i {
        // SAFETY: token.
        unsafe {
            let a = _mm256_set1_epi32(activations);
            let pairs = if BITS == 8 {
                // |w| · sign(w)·a, so that no pair exceeds 2 · 128 · 127 < 2^15.
                let w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
            } else {
                // A pair is at most 2 · 63 · 127 < 2^15.
                _mm256_maddubs_epi16(codes, a)
            };
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn total(self, acc: __m256i) -> __m256 {
        self.float(acc)
    }
    #[inline(always)]
    fn total_fine(self, first: __m256i, second: __m256i) -> __m256 {
        self.float(self.join(second, first, 8))
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> __m256i {
        // SAFETY: token; the caller's 8 bytes.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> __m256i {
        // SAFETY: token; the caller's 8 bytes.
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())) }
    }
    #[inline(always)]
    fn bits(self, w: __m256i, shift: u32, mask: i32) -> __m256i {
        // SAFETY: token.
        unsafe {
            let moved = _mm256_srl_epi32(w, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(moved, _mm256_set1_epi32(mask))
        }
    }
    #[inline(always)]
    fn join(self, a: __m256i, b: __m256i, shift: u32) -> __m256i {
        // SAFETY: token.
        unsafe { _mm256_add_epi32(a, _mm256_sll_epi32(b, _mm_cvtsi32_si128(shift as i32))) }
    }
    #[inline(always)]
    fn float(self, w: __m256i) -> __m256 {
        // SAFETY: token.
        unsafe { _mm256_cvtepi32_ps(w) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: token.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m256 {
        // SAFETY: token; the caller's 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f32(self, at: *const f32) -> __m256 {
        // SAFETY: token; the caller's 32 bytes.
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m256, at: *mut f32) {
        // SAFETY: token; the caller's 32 bytes.
        unsafe { _mm256_storeu_ps(at, v) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: token.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: token.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
