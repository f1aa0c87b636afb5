//! How stored values become lanes: a step is the pair of neighbouring reduction indices of 16 outputs.

use super::lanes::Lanes;

/// A stored type. `load` gives the 32 values of a step as two vectors, in an order of the type's own: `coefficients` are
/// what they are multiplied by, `fold` adds up the accumulators of both into the 16 outputs.
pub(super) trait Format {
    /// Bytes of a step.
    const BYTES: usize;
    /// Values of a pair when a stored line is, as it is, a line of [`Dot`](super::dot::Dot) with such pairs.
    const DIRECT: Option<usize>;
    /// The 32 values are `out0 even, out0 odd, out1 even, …`, else the 16 even ones and the 16 odd ones.
    const INTERLEAVED: bool;
    /// # Safety
    /// `BYTES` bytes are readable at `line`.
    unsafe fn load<S: Lanes>(s: S, line: *const u8) -> [S::W; 2];

    /// # Safety
    /// 2 values are readable at `x`.
    #[inline(always)]
    unsafe fn coefficients<S: Lanes>(s: S, x: *const f32) -> [S::W; 2] {
        if Self::INTERLEAVED {
            // SAFETY: the caller's contract.
            let pair = unsafe { s.pair16(x) };
            [pair, pair]
        } else {
            // SAFETY: the caller's contract.
            unsafe { [s.splat16(*x), s.splat16(*x.add(1))] }
        }
    }
    #[inline(always)]
    fn fold<S: Lanes>(s: S, acc: [S::W; 2]) -> S::W {
        let [even, odd] = Self::natural(s, acc);
        s.add16(even, odd)
    }
    /// The even and the odd values of what `load` gave.
    #[inline(always)]
    fn natural<S: Lanes>(s: S, loaded: [S::W; 2]) -> [S::W; 2] {
        if Self::INTERLEAVED { s.unzip(loaded) } else { loaded }
    }
}

/// Two lines of 16 `f32`.
pub(super) struct F32;
/// A line of 16 pairs of half-precision values.
pub(super) struct F16;
/// A line of 16 pairs of bfloat16 values.
pub(super) struct Bf16;
/// Half a line of 16 pairs of 8-bit codes.
pub(super) struct Q8;

impl Format for F32 {
    const BYTES: usize = 128;
    const DIRECT: Option<usize> = Some(1);
    const INTERLEAVED: bool = false;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, line: *const u8) -> [S::W; 2] {
        // SAFETY: the caller's contract.
        unsafe { [s.load16(line.cast()), s.load16(line.add(64).cast())] }
    }
}
impl Format for F16 {
    const BYTES: usize = 64;
    const DIRECT: Option<usize> = None;
    const INTERLEAVED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, line: *const u8) -> [S::W; 2] {
        // SAFETY: the caller's contract.
        unsafe { [s.f16(line.cast()), s.f16(line.add(32).cast())] }
    }
}
impl Format for Bf16 {
    const BYTES: usize = 64;
    const DIRECT: Option<usize> = Some(2);
    const INTERLEAVED: bool = false;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, line: *const u8) -> [S::W; 2] {
        // SAFETY: the caller's contract.
        unsafe { s.bf16(line.cast()) }
    }
}
impl Format for Q8 {
    const BYTES: usize = 32;
    const DIRECT: Option<usize> = None;
    const INTERLEAVED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, line: *const u8) -> [S::W; 2] {
        // SAFETY: the caller's contract.
        unsafe { [s.i8(line.cast()), s.i8(line.add(16).cast())] }
    }
}

/// Bytes of the largest step.
pub(super) const MAX_STEP: usize = 128;

/// Copies a step with the odd values zero: the last value of an odd number of keys, without the unused slot beside it.
///
/// # Safety
/// `F::BYTES` bytes are readable at `line`.
#[inline(always)]
pub(super) unsafe fn even_half<F: Format>(line: *const u8, out: &mut [u8; MAX_STEP]) {
    let value = F::BYTES / 32;
    // SAFETY: the caller's contract.
    let line = unsafe { std::slice::from_raw_parts(line, F::BYTES) };
    out.fill(0);
    if value == 4 {
        out[..64].copy_from_slice(&line[..64]);
        return;
    }
    for (out, pair) in out.chunks_exact_mut(2 * value).zip(line.chunks_exact(2 * value)) {
        out[..value].copy_from_slice(&pair[..value]);
    }
}
