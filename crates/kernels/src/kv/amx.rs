//! Prefill tiles on AMX: sixteen query rows, the cache's blocks of keys and panels of values as they lie.
//! Knows tile registers; the order of the work is `prefill`'s.

use std::marker::PhantomData;

use super::buffers::Buffers;
use super::dot::{Bf16Pairs, Dot, MAX_ROWS};
use super::format::Format;
use super::lanes::Lanes;
use super::prefill;
use crate::packed::amx::{Configured, Hardware, Tiles};
use crate::simd::Avx512;

/// Lines that a tile of keys or values holds: 32 reduced values in pairs.
const TILE_LINES: usize = 16;
/// Bytes of such a tile.
const TILE_BYTES: usize = TILE_LINES * 64;

/// Whether heads of this size fill whole tiles.
pub(super) fn fits(head_dim: usize) -> bool {
    head_dim.is_multiple_of(2 * TILE_LINES)
}

/// [`prefill::block`] on AMX tiles.
///
/// # Safety
/// As [`prefill::block`]; the CPU has AVX-512 with BF16, and the task's heads [`fit`](fits).
///
/// # Panics
/// Without AMX (unit tests use the model of its instructions instead).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn block<F: Format>(task: &prefill::Block<'_>, buffers: &mut Buffers) {
    #[cfg(test)]
    if !crate::packed::amx::supported() {
        // SAFETY: the caller's contract; the model needs no instructions.
        return unsafe { prefill::block::<_, F>(AmxTiles::<crate::packed::Model>::new(), task, buffers) };
    }
    assert!(crate::packed::amx::supported(), "no AMX on this CPU");
    let _configured = Configured::new();
    // SAFETY: the caller's contract; the tiles are configured.
    unsafe { prefill::block::<_, F>(AmxTiles::<Hardware>::new(), task, buffers) }
}

/// Products of bfloat16 pairs in tiles; everything else as [`Bf16Pairs`].
struct AmxTiles<T>(Bf16Pairs, PhantomData<T>);

impl<T> Clone for AmxTiles<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for AmxTiles<T> {}

impl<T> AmxTiles<T> {
    /// # Safety
    /// As [`Bf16Pairs::new`]; the tiles of `T` are configured wherever [`Tiles::ready`] says so.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's contract.
        Self(unsafe { Bf16Pairs::new() }, PhantomData)
    }
}

impl<T: Tiles> Dot for AmxTiles<T> {
    type L = Avx512;
    type Line = <Bf16Pairs as Dot>::Line;
    type Coefficient = <Bf16Pairs as Dot>::Coefficient;
    const PAIR: usize = 2;
    const ROWS: usize = MAX_ROWS;
    const STEPS: usize = TILE_LINES;

    #[inline(always)]
    fn lanes(self) -> Avx512 {
        self.0.lanes()
    }
    #[inline(always)]
    unsafe fn line(self, line: *const u32) -> Self::Line {
        // SAFETY: the caller's contract.
        unsafe { self.0.line(line) }
    }
    #[inline(always)]
    unsafe fn coefficient(self, x: *const u32) -> Self::Coefficient {
        // SAFETY: the caller's contract.
        unsafe { self.0.coefficient(x) }
    }
    #[inline(always)]
    fn dot(self, acc: <Avx512 as Lanes>::W, line: Self::Line, x: Self::Coefficient) -> <Avx512 as Lanes>::W {
        self.0.dot(acc, line, x)
    }
    #[inline(always)]
    unsafe fn store_coefficients(self, v: <Avx512 as Lanes>::W, out: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { self.0.store_coefficients(v, out) }
    }
    #[inline(always)]
    unsafe fn store_pair(self, v: <Avx512 as Lanes>::W, w: <Avx512 as Lanes>::W, out: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { self.0.store_pair(v, w, out) }
    }
    #[inline(always)]
    unsafe fn store_step<F: Format>(self, loaded: [<Avx512 as Lanes>::W; 2], out: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { self.0.store_step::<F>(loaded, out) }
    }
    #[inline(always)]
    fn exp2(self, x: <Avx512 as Lanes>::W) -> <Avx512 as Lanes>::W {
        self.0.exp2(x)
    }
    #[inline(always)]
    unsafe fn tiles(
        self,
        steps: usize,
        panels: usize,
        (a, a_stride): (*const u32, usize),
        (b, b_stride): (*const u32, usize),
        (out, out_stride): (*mut f32, usize),
        keep: Option<&[f32; MAX_ROWS]>,
    ) {
        let (s, steps) = (self.lanes(), steps.div_ceil(TILE_LINES));
        // SAFETY: the caller's contract; the tiles are configured, see `new`.
        unsafe {
            // Maxima settle after a few tiles of keys; then nothing is to be scaled.
            if let Some(keep) = keep.filter(|keep| keep.iter().any(|&keep| keep != 1.0)) {
                for (row, &keep) in keep.iter().enumerate() {
                    let keep = s.splat16(keep);
                    for panel in 0..panels {
                        let at = out.add(row * out_stride + 16 * panel);
                        s.store16(s.mul16(s.load16(at), keep), at);
                    }
                }
            }
            let mut tiles = T::ready();
            for at in (0..panels).step_by(4) {
                let (b, out) = (b.add(at * b_stride), out.add(16 * at));
                let product = Product {
                    steps,
                    a: a.cast(),
                    a_stride: 4 * a_stride,
                    b: b.cast(),
                    b_stride: 4 * b_stride,
                    out: out.cast(),
                    out_stride: 4 * out_stride,
                    add: keep.is_some(),
                };
                match panels - at {
                    1 => product.run::<T, 1>(&mut tiles),
                    2 => product.run::<T, 2>(&mut tiles),
                    3 => product.run::<T, 3>(&mut tiles),
                    _ => product.run::<T, 4>(&mut tiles),
                }
            }
        }
    }
}

/// Up to four tiles of outputs side by side; strides in bytes.
struct Product {
    /// Tiles along the reduction.
    steps: usize,
    a: *const u8,
    a_stride: usize,
    b: *const u8,
    b_stride: usize,
    out: *mut u8,
    out_stride: usize,
    /// Whether the outputs are added to.
    add: bool,
}

impl Product {
    /// Tiles 0 to 3 sum, 4 holds rows, 5 to 7 keys or values.
    ///
    /// # Safety
    /// The tiles are configured; the pointers fit `steps` and `P` as in [`Dot::tiles`].
    #[inline(always)]
    unsafe fn run<T: Tiles, const P: usize>(&self, t: &mut T) {
        let Self { steps, a, a_stride, b, b_stride, out, out_stride, add } = *self;
        // SAFETY: the caller's contract.
        unsafe {
            if add {
                t.load::<0>(out, out_stride);
                if P > 1 {
                    t.load::<1>(out.add(64), out_stride);
                }
                if P > 2 {
                    t.load::<2>(out.add(128), out_stride);
                }
                if P > 3 {
                    t.load::<3>(out.add(192), out_stride);
                }
            } else {
                t.zero::<0>();
                t.zero::<1>();
                t.zero::<2>();
                t.zero::<3>();
            }
            for step in 0..steps {
                let b = b.add(step * TILE_BYTES);
                t.load::<4>(a.add(step * 64), a_stride);
                t.load::<5>(b, 64);
                t.multiply::<0, 4, 5>();
                if P > 1 {
                    t.load::<6>(b.add(b_stride), 64);
                    t.multiply::<1, 4, 6>();
                }
                if P > 2 {
                    t.load::<7>(b.add(2 * b_stride), 64);
                    t.multiply::<2, 4, 7>();
                }
                if P > 3 {
                    t.load::<5>(b.add(3 * b_stride), 64);
                    t.multiply::<3, 4, 5>();
                }
            }
            t.store::<0>(out, out_stride);
            if P > 1 {
                t.store::<1>(out.add(64), out_stride);
            }
            if P > 2 {
                t.store::<2>(out.add(128), out_stride);
            }
            if P > 3 {
                t.store::<3>(out.add(192), out_stride);
            }
        }
    }
}
