//! Sixteen `f32` lanes on every instruction set: the vocabulary of the attention loops.

#![allow(
    clippy::needless_range_loop,
    reason = "register tiles are indexed by row and panel; closures would lose the features"
)]

use crate::quant::half_to_f32;
use crate::simd::{Portable, Simd};

/// 2^r on |r| ≤ 1/2, constant first, exact at 0; relative minimax error 9.2e-8.
#[allow(clippy::approx_constant, reason = "a minimax coefficient near ln 2, not ln 2")]
const EXP2: [f32; 6] = [1.0, 0.693_147, 0.240_222_43, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
/// 1.5 · 2²³: adding it rounds to the nearest integer and leaves that integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;
/// Exponents from here on give a normal power of two.
const LOWEST: f32 = -126.0;

/// Sixteen lanes of an instruction set; the pointers follow the contracts of plain reads and writes, unaligned.
pub(crate) trait Lanes: Simd {
    /// Sixteen `f32`.
    type W: Copy;
    /// Enough registers for tiles of 6 × 4 vectors, else of 6 × 1.
    const MANY_REGISTERS: bool;

    fn splat16(self, x: f32) -> Self::W;
    /// # Safety
    /// 16 values are readable at `x`.
    unsafe fn load16(self, x: *const f32) -> Self::W;
    /// # Safety
    /// 16 values are writable at `out`.
    unsafe fn store16(self, v: Self::W, out: *mut f32);
    /// `x0 x1 x0 x1 …`
    /// # Safety
    /// 2 values are readable at `x`.
    unsafe fn pair16(self, x: *const f32) -> Self::W;
    /// Sixteen half-precision values.
    /// # Safety
    /// 16 values are readable at `x`.
    unsafe fn f16(self, x: *const u16) -> Self::W;
    /// Sixteen 8-bit integers.
    /// # Safety
    /// 16 values are readable at `x`.
    unsafe fn i8(self, x: *const i8) -> Self::W;
    /// The even and the odd ones of 32 bfloat16 values.
    /// # Safety
    /// 32 values are readable at `x`.
    unsafe fn bf16(self, x: *const u16) -> [Self::W; 2];
    fn fma16(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W;
    fn add16(self, a: Self::W, b: Self::W) -> Self::W;
    fn sub16(self, a: Self::W, b: Self::W) -> Self::W;
    fn mul16(self, a: Self::W, b: Self::W) -> Self::W;
    /// Lane-wise maximum; what it gives for NaN is open.
    fn max16(self, a: Self::W, b: Self::W) -> Self::W;
    /// The even and the odd ones of the 32 values `a b`.
    fn unzip(self, ab: [Self::W; 2]) -> [Self::W; 2];
    /// Lanes from `n` on become `fill`.
    fn keep_first(self, v: Self::W, n: usize, fill: f32) -> Self::W;
    /// Lanes `from..to` become `fill`.
    fn fill_lanes(self, v: Self::W, from: usize, to: usize, fill: f32) -> Self::W;
    /// 2^x with the polynomial `c`: results below the normal range may be 0, `-inf` gives 0, NaN stays NaN.
    fn exp2_with<const N: usize>(self, x: Self::W, c: &[f32; N]) -> Self::W;
    fn max_of(self, v: Self::W) -> f32;
    fn sum_of(self, v: Self::W) -> f32;
    /// Lane `i < n` is the maximum of all lanes of `v[i]`; the others are `-inf`.
    #[inline(always)]
    fn max_lanes(self, v: &[Self::W; 16], n: usize) -> Self::W {
        let mut out = [f32::NEG_INFINITY; 16];
        for i in 0..n {
            out[i] = self.max_of(v[i]);
        }
        // SAFETY: sixteen values.
        unsafe { self.load16(out.as_ptr()) }
    }
    /// Lane `i < n` is the sum of all lanes of `v[i]`; the others are 0.
    #[inline(always)]
    fn sum_lanes(self, v: &[Self::W; 16], n: usize) -> Self::W {
        let mut out = [0.0; 16];
        for i in 0..n {
            out[i] = self.sum_of(v[i]);
        }
        // SAFETY: sixteen values.
        unsafe { self.load16(out.as_ptr()) }
    }
    /// Asks for the cache line at `p`, which need not be readable.
    fn prefetch(self, p: *const u8);

    /// 2^x to about 2 ulp.
    #[inline(always)]
    fn exp2(self, x: Self::W) -> Self::W {
        self.exp2_with(x, &EXP2)
    }
}

impl<const FUSED: bool> Lanes for Portable<FUSED> {
    type W = [f32; 16];
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat16(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load16(self, x: *const f32) -> [f32; 16] {
        // SAFETY: the caller's contract.
        unsafe { x.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store16(self, v: [f32; 16], out: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { out.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn pair16(self, x: *const f32) -> [f32; 16] {
        // SAFETY: the caller's contract.
        let [a, b] = unsafe { x.cast::<[f32; 2]>().read_unaligned() };
        [a, b, a, b, a, b, a, b, a, b, a, b, a, b, a, b]
    }
    #[inline(always)]
    unsafe fn f16(self, x: *const u16) -> [f32; 16] {
        // SAFETY: the caller's contract.
        let x = unsafe { x.cast::<[u16; 16]>().read_unaligned() };
        let mut v = [0.0; 16];
        for (v, x) in v.iter_mut().zip(x) {
            *v = half_to_f32(x);
        }
        v
    }
    #[inline(always)]
    unsafe fn i8(self, x: *const i8) -> [f32; 16] {
        // SAFETY: the caller's contract.
        let x = unsafe { x.cast::<[i8; 16]>().read_unaligned() };
        let mut v = [0.0; 16];
        for (v, x) in v.iter_mut().zip(x) {
            *v = f32::from(x);
        }
        v
    }
    #[inline(always)]
    unsafe fn bf16(self, x: *const u16) -> [[f32; 16]; 2] {
        // SAFETY: the caller's contract.
        let x = unsafe { x.cast::<[[u16; 2]; 16]>().read_unaligned() };
        let mut v = [[0.0; 16]; 2];
        for (i, x) in x.iter().enumerate() {
            v[0][i] = f32::from_bits(u32::from(x[0]) << 16);
            v[1][i] = f32::from_bits(u32::from(x[1]) << 16);
        }
        v
    }
    #[inline(always)]
    fn fma16(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        let mut v = c;
        for i in 0..16 {
            v[i] = self.fma(a[i], b[i], c[i]);
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
    fn sub16(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        let mut v = a;
        for i in 0..16 {
            v[i] -= b[i];
        }
        v
    }
    #[inline(always)]
    fn mul16(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        let mut v = a;
        for i in 0..16 {
            v[i] *= b[i];
        }
        v
    }
    #[inline(always)]
    fn max16(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        let mut v = a;
        for i in 0..16 {
            v[i] = if b[i] > a[i] { b[i] } else { a[i] };
        }
        v
    }
    #[inline(always)]
    fn unzip(self, [a, b]: [[f32; 16]; 2]) -> [[f32; 16]; 2] {
        let mut v = [[0.0; 16]; 2];
        for i in 0..8 {
            v[0][i] = a[2 * i];
            v[1][i] = a[2 * i + 1];
            v[0][i + 8] = b[2 * i];
            v[1][i + 8] = b[2 * i + 1];
        }
        v
    }
    #[inline(always)]
    fn keep_first(self, v: [f32; 16], n: usize, fill: f32) -> [f32; 16] {
        let mut v = v;
        for (i, v) in v.iter_mut().enumerate() {
            *v = if i < n { *v } else { fill };
        }
        v
    }
    #[inline(always)]
    fn fill_lanes(self, v: [f32; 16], from: usize, to: usize, fill: f32) -> [f32; 16] {
        let mut v = v;
        for (i, v) in v.iter_mut().enumerate() {
            *v = if i < from || i >= to { *v } else { fill };
        }
        v
    }
    #[inline(always)]
    fn exp2_with<const N: usize>(self, x: [f32; 16], c: &[f32; N]) -> [f32; 16] {
        let mut v = x;
        for v in &mut v {
            // NaN fails the comparison and passes through.
            let x = if *v < LOWEST { LOWEST } else { *v };
            let shifted = x + ROUND;
            let r = x - (shifted - ROUND);
            let mut p = c[N - 1];
            let mut i = N - 1;
            while i > 0 {
                i -= 1;
                p = self.fma(p, r, c[i]);
            }
            let n = shifted.to_bits().wrapping_sub(ROUND.to_bits());
            let power = f32::from_bits(n.wrapping_add(127) << 23);
            *v = if *v < LOWEST { 0.0 } else { p * power };
        }
        v
    }
    #[inline(always)]
    fn max_of(self, v: [f32; 16]) -> f32 {
        let mut best = v[0];
        for x in v {
            best = if x > best { x } else { best };
        }
        best
    }
    #[inline(always)]
    fn sum_of(self, v: [f32; 16]) -> f32 {
        let mut half = [0.0; 8];
        for i in 0..8 {
            half[i] = v[i] + v[i + 8];
        }
        self.sum(half)
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
mod x86;
