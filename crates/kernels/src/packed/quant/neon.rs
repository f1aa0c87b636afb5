//! The registers of NEON, four rows each.

// With NEON in the baseline some intrinsics are safe to call, depending on the compiler.
#![allow(unused_unsafe)]

use std::arch::aarch64::*;

use super::lanes::Lanes;

/// NEON, which every aarch64 has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Neon;

// NEON is part of the target's baseline, so that its intrinsics may be used everywhere; memory operations rely on the
// trait's promise about pointers.

impl Lanes for Neon {
    const OUTS: usize = 4;
    const SIGNED: bool = true;
    type B = uint8x16_t;
    /// Rows 0 and 1, rows 2 and 3; each row in two parts that [`Lanes::total`] adds.
    type I = (int32x4_t, int32x4_t);
    type W = int32x4_t;
    type F = float32x4_t;

    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> uint8x16_t {
        // SAFETY: the caller's 16 bytes.
        unsafe { vld1q_u8(at) }
    }
    #[inline(always)]
    unsafe fn store(self, b: uint8x16_t, at: *mut u8) {
        // SAFETY: the caller's 16 bytes.
        unsafe { vst1q_u8(at, b) }
    }
    #[inline(always)]
    fn low(self, b: uint8x16_t) -> uint8x16_t {
        // SAFETY: baseline.
        unsafe { vandq_u8(b, vdupq_n_u8(15)) }
    }
    #[inline(always)]
    fn high(self, b: uint8x16_t) -> uint8x16_t {
        // SAFETY: baseline.
        unsafe { vshrq_n_u8::<4>(b) }
    }
    #[inline(always)]
    fn merge(self, b: uint8x16_t, plane: uint8x16_t, shift: i32, mask: u8) -> uint8x16_t {
        // SAFETY: baseline; negative counts shift right.
        unsafe { vorrq_u8(b, vandq_u8(vshlq_u8(plane, vdupq_n_s8(shift as i8)), vdupq_n_u8(mask))) }
    }
    #[inline(always)]
    fn start(self, x: i32) -> (int32x4_t, int32x4_t) {
        // SAFETY: baseline. Only one of a row's two parts starts at `x`.
        unsafe {
            let first = vreinterpretq_s32_u64(vdupq_n_u64(u64::from(x as u32)));
            (first, first)
        }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(
        self,
        acc: (int32x4_t, int32x4_t),
        codes: uint8x16_t,
        activations: i32,
    ) -> (int32x4_t, int32x4_t) {
        // SAFETY: baseline. A product of signed bytes fits in 16 bits: 128 · 127 < 2^15.
        unsafe {
            let codes = if BITS == 8 { veorq_u8(codes, vdupq_n_u8(128)) } else { codes };
            let w = vreinterpretq_s8_u8(codes);
            let a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
            let first = vmull_s8(vget_low_s8(w), vget_low_s8(a));
            let second = vmull_s8(vget_high_s8(w), vget_high_s8(a));
            (vpadalq_s16(acc.0, first), vpadalq_s16(acc.1, second))
        }
    }
    #[inline(always)]
    fn total(self, acc: (int32x4_t, int32x4_t)) -> float32x4_t {
        // SAFETY: baseline.
        unsafe { vcvtq_f32_s32(vpaddq_s32(acc.0, acc.1)) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> int32x4_t {
        // SAFETY: the caller's 4 bytes.
        let b = unsafe { at.cast::<[u8; 4]>().read() };
        let w = [i32::from(b[0]), i32::from(b[1]), i32::from(b[2]), i32::from(b[3])];
        // SAFETY: `w` has four values.
        unsafe { vld1q_s32(w.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> int32x4_t {
        // SAFETY: the caller's 4 bytes.
        let b = unsafe { at.cast::<[i8; 4]>().read() };
        let w = [i32::from(b[0]), i32::from(b[1]), i32::from(b[2]), i32::from(b[3])];
        // SAFETY: `w` has four values.
        unsafe { vld1q_s32(w.as_ptr()) }
    }
    #[inline(always)]
    fn bits(self, w: int32x4_t, shift: u32, mask: i32) -> int32x4_t {
        // SAFETY: baseline; negative counts shift right.
        unsafe { vandq_s32(vshlq_s32(w, vdupq_n_s32(-(shift as i32))), vdupq_n_s32(mask)) }
    }
    #[inline(always)]
    fn join(self, a: int32x4_t, b: int32x4_t, shift: u32) -> int32x4_t {
        // SAFETY: baseline.
        unsafe { vaddq_s32(a, vshlq_s32(b, vdupq_n_s32(shift as i32))) }
    }
    #[inline(always)]
    fn float(self, w: int32x4_t) -> float32x4_t {
        // SAFETY: baseline.
        unsafe { vcvtq_f32_s32(w) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: baseline.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> float32x4_t {
        let mut f = [0.0; 4];
        for (i, f) in f.iter_mut().enumerate() {
            // SAFETY: the caller's four times two bytes.
            *f = crate::quant::half_to_f32(unsafe { at.cast::<u16>().add(i).read_unaligned() });
        }
        // SAFETY: `f` has four values.
        unsafe { vld1q_f32(f.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_f32(self, at: *const f32) -> float32x4_t {
        // SAFETY: the caller's 16 bytes.
        unsafe { vld1q_f32(at) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: float32x4_t, at: *mut f32) {
        // SAFETY: the caller's 16 bytes.
        unsafe { vst1q_f32(at, v) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: baseline.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: baseline.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}
