//! The multiply-add of the prefill tiles: `f32` lanes anywhere, bfloat16 pairs where the CPU has them, in vectors or in AMX
//! tiles (`amx.rs`). A line is 64 bytes: sixteen outputs of one reduction index, or of a pair of them; a coefficient is 4 bytes.

#![allow(
    clippy::needless_range_loop,
    reason = "register tiles are indexed by row and panel; closures would lose the features"
)]

use super::format::Format;
use super::lanes::Lanes;

/// Query rows of a register tile.
const ROWS: usize = 6;
/// Most query rows of a tile of any kind.
pub(super) const MAX_ROWS: usize = 16;

/// How a tile multiplies.
pub(super) trait Dot: Copy {
    type L: Lanes;
    /// A line in a register.
    type Line: Copy;
    /// A coefficient in every lane.
    type Coefficient: Copy;
    /// Reduction indices of a line.
    const PAIR: usize;
    /// Query rows of a tile, at most [`MAX_ROWS`].
    const ROWS: usize = ROWS;
    /// Lines that one operation reduces; the last operation of a reduction reads all of them, so that lines and coefficients
    /// beyond the end have to be zero up to there.
    const STEPS: usize = 1;

    fn lanes(self) -> Self::L;
    /// # Safety
    /// 16 values are readable at `line`.
    unsafe fn line(self, line: *const u32) -> Self::Line;
    /// # Safety
    /// `x` is readable.
    unsafe fn coefficient(self, x: *const u32) -> Self::Coefficient;
    fn dot(self, acc: <Self::L as Lanes>::W, line: Self::Line, x: Self::Coefficient)
    -> <Self::L as Lanes>::W;
    /// Writes 16 coefficients, which take `16 / PAIR` words.
    /// # Safety
    /// They are writable at `out`.
    unsafe fn store_coefficients(self, v: <Self::L as Lanes>::W, out: *mut u32);
    /// [`store_coefficients`](Self::store_coefficients) of 32 values.
    /// # Safety
    /// They are writable at `out`.
    #[inline(always)]
    unsafe fn store_pair(self, v: <Self::L as Lanes>::W, w: <Self::L as Lanes>::W, out: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe {
            self.store_coefficients(v, out);
            self.store_coefficients(w, out.add(16 / Self::PAIR));
        }
    }
    /// Writes a loaded step as `2 / PAIR` lines.
    /// # Safety
    /// They are writable at `out`.
    unsafe fn store_step<F: Format>(self, loaded: [<Self::L as Lanes>::W; 2], out: *mut u32);
    /// 2^x as accurately as the coefficients are.
    fn exp2(self, x: <Self::L as Lanes>::W) -> <Self::L as Lanes>::W;

    /// `out[row, panel] = Σ_step a[row, step] · b[panel, step]` for `ROWS` rows and any number of panels of 16; with `keep`, plus
    /// `keep[row] · out[row, panel]`.
    ///
    /// # Safety
    /// `a` has `ROWS` rows of `steps` words `a_stride` apart, `b` has panels of `steps` lines `b_stride` words apart, both padded to
    /// whole `STEPS`; `out` has `ROWS` rows of `16 · panels` values `out_stride` apart.
    #[inline(always)]
    unsafe fn tiles(
        self,
        steps: usize,
        panels: usize,
        a: (*const u32, usize),
        (b, b_stride): (*const u32, usize),
        (out, out_stride): (*mut f32, usize),
        keep: Option<&[f32; MAX_ROWS]>,
    ) {
        // SAFETY: the caller's contract; panels `at..` stay within `panels`.
        unsafe {
            let mut at = 0;
            while at < panels {
                let (b, out) = ((b.add(at * b_stride), b_stride), (out.add(16 * at), out_stride));
                let n = if Self::L::MANY_REGISTERS { (panels - at).min(4) } else { 1 };
                match n {
                    1 => tile::<Self, 1>(self, steps, a, b, out, keep),
                    2 => tile::<Self, 2>(self, steps, a, b, out, keep),
                    3 => tile::<Self, 3>(self, steps, a, b, out, keep),
                    _ => tile::<Self, 4>(self, steps, a, b, out, keep),
                }
                at += n;
            }
        }
    }
}

/// `f32` throughout.
#[derive(Clone, Copy)]
pub(super) struct Float<L>(pub(super) L);

impl<L: Lanes> Dot for Float<L> {
    type L = L;
    type Line = L::W;
    type Coefficient = L::W;
    const PAIR: usize = 1;

    #[inline(always)]
    fn lanes(self) -> L {
        self.0
    }
    #[inline(always)]
    unsafe fn line(self, line: *const u32) -> L::W {
        // SAFETY: the caller's contract.
        unsafe { self.0.load16(line.cast()) }
    }
    #[inline(always)]
    unsafe fn coefficient(self, x: *const u32) -> L::W {
        // SAFETY: the caller's contract.
        self.0.splat16(unsafe { *x.cast::<f32>() })
    }
    #[inline(always)]
    fn dot(self, acc: L::W, line: L::W, x: L::W) -> L::W {
        self.0.fma16(line, x, acc)
    }
    #[inline(always)]
    unsafe fn store_coefficients(self, v: L::W, out: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { self.0.store16(v, out.cast()) }
    }
    #[inline(always)]
    unsafe fn store_step<F: Format>(self, loaded: [L::W; 2], out: *mut u32) {
        let [even, odd] = F::natural(self.0, loaded);
        // SAFETY: the caller's contract.
        unsafe {
            self.0.store16(even, out.cast());
            self.0.store16(odd, out.add(16).cast());
        }
    }
    #[inline(always)]
    fn exp2(self, x: L::W) -> L::W {
        self.0.exp2(x)
    }
}

/// [`Dot::tiles`] for 6 rows and `P` panels, in registers.
///
/// # Safety
/// As [`Dot::tiles`].
#[inline(always)]
unsafe fn tile<D: Dot, const P: usize>(
    d: D,
    steps: usize,
    (a, a_stride): (*const u32, usize),
    (b, b_stride): (*const u32, usize),
    (out, out_stride): (*mut f32, usize),
    keep: Option<&[f32; MAX_ROWS]>,
) {
    let s = d.lanes();
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[s.splat16(0.0); P]; ROWS];
        if let Some(keep) = keep {
            for r in 0..ROWS {
                for p in 0..P {
                    acc[r][p] = s.mul16(s.load16(out.add(r * out_stride + 16 * p)), s.splat16(keep[r]));
                }
            }
        }
        for step in 0..steps {
            let mut lines = [d.line(b.add(step * 16)); P];
            for p in 1..P {
                lines[p] = d.line(b.add(p * b_stride + step * 16));
            }
            for r in 0..ROWS {
                let x = d.coefficient(a.add(r * a_stride + step));
                for p in 0..P {
                    acc[r][p] = d.dot(acc[r][p], lines[p], x);
                }
            }
        }
        for r in 0..ROWS {
            for p in 0..P {
                s.store16(acc[r][p], out.add(r * out_stride + 16 * p));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Bf16Pairs;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Dot, Format};
    use crate::kv::lanes::Lanes;
    use crate::simd::Avx512;

    /// 2^r on |r| ≤ 1/2, constant first, exact at 0; relative minimax error 1.0e-4, a twentieth of bfloat16's rounding.
    const EXP2: [f32; 4] = [1.0, 0.693_282_9, 0.242_210_96, 0.055_008_93];

    /// Proof of AVX-512 with BF16: products of bfloat16 pairs summed in `f32`.
    #[derive(Clone, Copy)]
    pub(in crate::kv) struct Bf16Pairs(Avx512);

    impl Bf16Pairs {
        /// # Safety
        /// The CPU has AVX-512 F, BW, DQ, VL, BF16, AVX2 and FMA.
        #[inline(always)]
        pub(in crate::kv) unsafe fn new() -> Self {
            // SAFETY: the caller's contract.
            Self(unsafe { Avx512::new() })
        }
    }

    impl Dot for Bf16Pairs {
        type L = Avx512;
        type Line = __m512bh;
        type Coefficient = __m512bh;
        const PAIR: usize = 2;

        #[inline(always)]
        fn lanes(self) -> Avx512 {
            self.0
        }
        #[inline(always)]
        unsafe fn line(self, line: *const u32) -> __m512bh {
            // SAFETY: the token proves the instructions (its constructor's contract); the caller's contract.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(line.cast())) }
        }
        #[inline(always)]
        unsafe fn coefficient(self, x: *const u32) -> __m512bh {
            // SAFETY: the token proves the instructions; the caller's contract.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*x as i32)) }
        }
        #[inline(always)]
        fn dot(self, acc: __m512, line: __m512bh, x: __m512bh) -> __m512 {
            // SAFETY: the token proves the instructions.
            unsafe { _mm512_dpbf16_ps(acc, line, x) }
        }
        #[inline(always)]
        unsafe fn store_coefficients(self, v: __m512, out: *mut u32) {
            // SAFETY: the token proves the instructions; the caller's contract.
            unsafe {
                let v = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
                _mm256_storeu_si256(out.cast(), v);
            }
        }
        #[inline(always)]
        unsafe fn store_pair(self, v: __m512, w: __m512, out: *mut u32) {
            // SAFETY: the token proves the instructions; the caller's contract.
            unsafe {
                let v = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(w, v));
                _mm512_storeu_si512(out.cast(), v);
            }
        }
        #[inline(always)]
        unsafe fn store_step<F: Format>(self, [low, high]: [__m512; 2], out: *mut u32) {
            assert!(F::INTERLEAVED, "stored bfloat16 lines are used directly");
            // SAFETY: the token proves the instructions; the caller's contract.
            unsafe {
                let v = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out.cast(), v);
            }
        }
        #[inline(always)]
        fn exp2(self, x: __m512) -> __m512 {
            self.0.exp2_with(x, &EXP2)
        }
    }
}
