//! The registers that the quantised kernels are written in: bytes, 32-bit integers and floats of [`Lanes::OUTS`] rows.
//! Knows instructions; knows no layout.

/// Proof of an instruction set, with the few operations that quantised products need.
///
/// Everything is `#[inline(always)]` and must be used inside a function that has the features enabled.
///
/// # Safety
/// Every `unsafe` method reads or writes exactly one register at its pointer, whatever its alignment: `4 · OUTS` bytes,
/// `2 · OUTS` for [`Lanes::load_f16`], `OUTS` for [`Lanes::load_u8`] and [`Lanes::load_i8`].
pub(super) trait Lanes: Copy {
    /// Rows of weights per register.
    const OUTS: usize;
    /// Whether [`Lanes::dot`] takes 8-bit codes minus 128 instead of the codes themselves.
    const SIGNED: bool;
    /// Four codes of every row.
    type B: Copy;
    /// Accumulator of integer dot products.
    type I: Copy;
    /// One 32-bit integer per row.
    type W: Copy;
    /// One float per row.
    type F: Copy;

    /// Loads four bytes per row.
    unsafe fn load(self, at: *const u8) -> Self::B;
    /// Stores four bytes per row.
    unsafe fn store(self, b: Self::B, at: *mut u8);
    /// The low nibble of every byte.
    fn low(self, b: Self::B) -> Self::B;
    /// The high nibble of every byte.
    fn high(self, b: Self::B) -> Self::B;
    /// `b | (plane shifted left by `shift`, right if negative) & mask`, byte by byte.
    fn merge(self, b: Self::B, plane: Self::B, shift: i32, mask: u8) -> Self::B;

    /// Accumulator that holds `x` for every row.
    fn start(self, x: i32) -> Self::I;
    /// Adds the dot products of the four codes of every row with four activations (from −127 to 127).
    /// `BITS` is the size of the codes.
    fn dot<const BITS: usize>(self, acc: Self::I, codes: Self::B, activations: i32) -> Self::I;
    /// The accumulated integers as floats.
    fn total(self, acc: Self::I) -> Self::F;

    /// `256 · first + second` as floats, at most 2^31 in magnitude.
    #[inline(always)]
    fn total_fine(self, first: Self::I, second: Self::I) -> Self::F {
        self.fma(self.total(first), self.splat(super::FINER as f32), self.total(second))
    }

    /// One unsigned byte per row.
    unsafe fn load_u8(self, at: *const u8) -> Self::W;
    /// One signed byte per row.
    unsafe fn load_i8(self, at: *const u8) -> Self::W;
    /// `(w shifted right by `shift`) & mask`.
    fn bits(self, w: Self::W, shift: u32, mask: i32) -> Self::W;
    /// `a + (b << shift)`.
    fn join(self, a: Self::W, b: Self::W, shift: u32) -> Self::W;
    /// The integers as floats.
    fn float(self, w: Self::W) -> Self::F;

    /// All rows `x`.
    fn splat(self, x: f32) -> Self::F;
    /// One f16 per row.
    unsafe fn load_f16(self, at: *const u8) -> Self::F;
    /// One f32 per row.
    unsafe fn load_f32(self, at: *const f32) -> Self::F;
    /// Writes one f32 per row.
    unsafe fn store_f32(self, v: Self::F, at: *mut f32);
    /// Product.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Asks for the cache line at `at`, which may lie anywhere.
    fn prefetch(self, at: *const u8);

    /// Byte `e` of the four of every row, as a float.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn byte(self, b: Self::B, e: usize) -> Self::F {
        let mut bytes = [0u8; 64];
        let mut floats = [0.0f32; 16];
        // SAFETY: a register holds at most 16 rows, so the arrays take the store and give the load.
        unsafe {
            self.store(b, bytes.as_mut_ptr());
            for r in 0..Self::OUTS {
                floats[r] = f32::from(bytes[4 * r + e]);
            }
            self.load_f32(floats.as_ptr())
        }
    }
    /// Writes two bf16 per row, rounded to nearest even.
    ///
    /// # Safety
    /// `at` has room for `2 · OUTS` values.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    unsafe fn store_pairs(self, even: Self::F, odd: Self::F, at: *mut u16) {
        let mut floats = [[0.0f32; 16]; 2];
        // SAFETY: a register holds at most 16 rows; the caller's room.
        unsafe {
            self.store_f32(even, floats[0].as_mut_ptr());
            self.store_f32(odd, floats[1].as_mut_ptr());
            for r in 0..Self::OUTS {
                for (e, floats) in floats.iter().enumerate() {
                    let bits = floats[r].to_bits();
                    at.add(2 * r + e).write(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16);
                }
            }
        }
    }
}

/// Plain arrays of one whole line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar;

impl Lanes for Scalar {
    const OUTS: usize = 16;
    const SIGNED: bool = false;
    type B = [u8; 64];
    type I = [i32; 16];
    type W = [i32; 16];
    type F = [f32; 16];

    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> [u8; 64] {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[u8; 64]>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, b: [u8; 64], at: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[u8; 64]>().write(b) }
    }
    #[inline(always)]
    fn low(self, mut b: [u8; 64]) -> [u8; 64] {
        for b in &mut b {
            *b &= 15;
        }
        b
    }
    #[inline(always)]
    fn high(self, mut b: [u8; 64]) -> [u8; 64] {
        for b in &mut b {
            *b >>= 4;
        }
        b
    }
    #[inline(always)]
    fn merge(self, mut b: [u8; 64], plane: [u8; 64], shift: i32, mask: u8) -> [u8; 64] {
        for i in 0..64 {
            let moved = if shift < 0 { plane[i] >> -shift } else { plane[i] << shift };
            b[i] |= moved & mask;
        }
        b
    }
    #[inline(always)]
    fn start(self, x: i32) -> [i32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, mut acc: [i32; 16], codes: [u8; 64], activations: i32) -> [i32; 16] {
        let a = activations.to_le_bytes();
        for i in 0..16 {
            for c in 0..4 {
                acc[i] += i32::from(codes[4 * i + c]) * i32::from(a[c] as i8);
            }
        }
        acc
    }
    #[inline(always)]
    fn total(self, acc: [i32; 16]) -> [f32; 16] {
        self.float(acc)
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> [i32; 16] {
        let mut w = [0; 16];
        for (i, w) in w.iter_mut().enumerate() {
            // SAFETY: the caller's promise: 16 bytes.
            *w = i32::from(unsafe { at.add(i).read() });
        }
        w
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> [i32; 16] {
        let mut w = [0; 16];
        for (i, w) in w.iter_mut().enumerate() {
            // SAFETY: the caller's promise: 16 bytes.
            *w = i32::from(unsafe { at.add(i).read() } as i8);
        }
        w
    }
    #[inline(always)]
    fn bits(self, mut w: [i32; 16], shift: u32, mask: i32) -> [i32; 16] {
        for w in &mut w {
            *w = *w >> shift & mask;
        }
        w
    }
    #[inline(always)]
    fn join(self, mut a: [i32; 16], b: [i32; 16], shift: u32) -> [i32; 16] {
        for i in 0..16 {
            a[i] += b[i] << shift;
        }
        a
    }
    #[inline(always)]
    fn float(self, w: [i32; 16]) -> [f32; 16] {
        let mut f = [0.0; 16];
        for i in 0..16 {
            f[i] = w[i] as f32;
        }
        f
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> [f32; 16] {
        let mut f = [0.0; 16];
        for (i, f) in f.iter_mut().enumerate() {
            // SAFETY: the caller's promise: 16 times two bytes.
            *f = crate::quant::half_to_f32(unsafe { at.cast::<u16>().add(i).read_unaligned() });
        }
        f
    }
    #[inline(always)]
    unsafe fn load_f32(self, at: *const f32) -> [f32; 16] {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: [f32; 16], at: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn mul(self, mut a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        for i in 0..16 {
            a[i] *= b[i];
        }
        a
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], mut c: [f32; 16]) -> [f32; 16] {
        for i in 0..16 {
            c[i] += a[i] * b[i];
        }
        c
    }
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}
