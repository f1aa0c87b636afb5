//! Matrix products, all shapes, through one entry point: the `gemm` crate for large ones, our own kernels for few rows
//! (decoding) and for the scalar instruction set.

use crate::isa::{IsaLevel, dispatch};
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, MatRef, Precision, packed};

/// Whether an operand is used as stored or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trans {
    /// As stored.
    No,
    /// Transposed.
    Yes,
}

impl Trans {
    /// Rows and columns of `op(x)`.
    pub(crate) fn shape(self, x: MatRef<'_>) -> (usize, usize) {
        match self {
            Self::No => (x.rows(), x.cols()),
            Self::Yes => (x.cols(), x.rows()),
        }
    }
}

/// What happens to the output's old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Overwritten (the old content is never read).
    Overwrite,
    /// Added to.
    Accumulate,
}

/// Up to this many output rows our own kernel, which reads each weight once and packs nothing, is used.
const MAX_SKINNY_ROWS: usize = 8;
/// Below this many multiply-adds waking another thread costs more than it gains.
const MIN_PARALLEL_WORK: usize = 64 * 1024;
/// Rows of the output that one task computes at most.
const MAX_TILE_HEIGHT: usize = 512;
/// Columns of the output that one task computes, multiples of every vector width; half of it when ...
const WIDE_TILE: usize = 192;
/// ... that gives fewer tasks than this.
const MANY_TILES: usize = 16;

/// `out = alpha · op(a) · op(b)` (or `+=`). `out` is `[m, n]`, `op(a)` `[m, k]`, `op(b)` `[k, n]`; any of them may be a
/// strided view. With weights stored `[out_features, in_features]`, a linear layer is `gemm(x, No, w, Yes)`.
/// Panics when the shapes do not fit. `k == 0` gives zeros (or leaves `out` when accumulating).
///
/// The result depends on the instruction set but not on the number of threads. With AVX2 forced, the `gemm` crate still
/// picks its own best instruction set for more than 8 rows; the scalar one avoids it altogether.
pub fn gemm(
    exec: &Exec,
    mut out: MatMut<'_>,
    a: MatRef<'_>,
    ta: Trans,
    b: MatRef<'_>,
    tb: Trans,
    alpha: f32,
    store: Store,
) {
    let (m, n, k) = check(&out, (a, ta), (b, tb));
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if store == Store::Overwrite {
            (0..m).for_each(|i| out.row_mut(i).fill(0.0));
        }
        return;
    }
    let product = Product { a, ta, b, tb, alpha, store, k };
    if m <= MAX_SKINNY_ROWS && ta == Trans::No {
        product.skinny(exec, out);
    } else if exec.isa().level() == IsaLevel::Scalar {
        product.plain(exec, out);
    } else {
        product.blocked(exec, out);
    }
}

/// `m`, `n`, `k` of a product whose shapes fit.
fn check(
    out: &MatMut<'_>,
    (a, ta): (MatRef<'_>, Trans),
    (b, tb): (MatRef<'_>, Trans),
) -> (usize, usize, usize) {
    let (m, n) = (out.rows(), out.cols());
    let ((rows_a, k), (rows_b, cols_b)) = (ta.shape(a), tb.shape(b));
    assert!(
        rows_a == m && rows_b == k && cols_b == n,
        "out [{m}, {n}] = op(a) [{rows_a}, {k}] · op(b) [{rows_b}, {cols_b}]"
    );
    (m, n, k)
}

/// [`gemm()`] in the context's [`Precision`]: with bfloat16 both factors are rounded, where the product is large enough to pay for it;
/// sums are f32. For linear layers and their gradients.
pub fn mixed_gemm(
    exec: &Exec,
    out: MatMut<'_>,
    a: MatRef<'_>,
    ta: Trans,
    b: MatRef<'_>,
    tb: Trans,
    alpha: f32,
    store: Store,
) {
    let (m, n, k) = check(&out, (a, ta), (b, tb));
    if exec.precision() == Precision::F32 || !packed::pays(exec, m, n, k) {
        return gemm(exec, out, a, ta, b, tb, alpha, store);
    }
    packed::product(exec, out, (a, ta), (b, tb), alpha, store);
}

/// [`gemm()`] with `alpha` 1 for what bfloat16 is too coarse for: where the context multiplies in bfloat16 and tiles make it pay, factors keep 16
/// bits of their mantissa, two bfloat16 values each; otherwise all of it.
pub(crate) fn split_gemm(
    exec: &Exec,
    out: MatMut<'_>,
    a: (MatRef<'_>, Trans),
    b: (MatRef<'_>, Trans),
    store: Store,
) {
    #[cfg(target_arch = "x86_64")]
    {
        let (m, n, k) = check(&out, a, b);
        if exec.precision() == Precision::Bf16 && packed::split_pays(exec, m, n, k) {
            return packed::split_product(exec, out, a, b, store);
        }
    }
    gemm(exec, out, a.0, a.1, b.0, b.1, 1.0, store);
}

/// The right-hand side of one call, shapes checked, `k > 0`.
#[derive(Clone, Copy)]
struct Product<'a> {
    a: MatRef<'a>,
    ta: Trans,
    b: MatRef<'a>,
    tb: Trans,
    alpha: f32,
    store: Store,
    k: usize,
}

impl Product<'_> {
    /// The `gemm` crate's packed, cache-blocked product.
    fn blocked(&self, exec: &Exec, mut out: MatMut<'_>) {
        let (m, n, k) = (out.rows(), out.cols(), self.k);
        let strides = |mat: &MatRef<'_>, trans| match trans {
            Trans::No => (1, mat.row_stride() as isize),
            Trans::Yes => (mat.row_stride() as isize, 1),
        };
        let (a_cols, a_rows) = strides(&self.a, self.ta);
        let (b_cols, b_rows) = strides(&self.b, self.tb);
        let accumulate = self.store == Store::Accumulate;
        let out_stride = out.row_stride();
        let dst = SharedPtr(out.data_mut().as_mut_ptr());
        let (height, width) = tile(m, n, k);
        let across = n.div_ceil(width);
        let run = |task: usize| {
            let (i, j) = (task / across * height, task % across * width);
            let (height, width) = (height.min(m - i), width.min(n - j));
            // SAFETY: `MatRef` and `MatMut` checked that their slices hold every element these shapes and strides
            // address, and `gemm` above that the shapes agree; rows `i..i + height` and columns `j..j + width` lie
            // inside (`i < m`, `j < n`, sizes cut). `out` is exclusively borrowed until all tasks have ended, and the
            // tiles of different tasks do not overlap.
            unsafe {
                gemm::gemm(
                    height,
                    width,
                    k,
                    dst.get().add(i * out_stride + j),
                    1,
                    out_stride as isize,
                    accumulate,
                    self.a.data().as_ptr().offset(i as isize * a_rows),
                    a_cols,
                    a_rows,
                    self.b.data().as_ptr().offset(j as isize * b_cols),
                    b_cols,
                    b_rows,
                    1.0,
                    self.alpha,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        };
        exec.parallel_for(m.div_ceil(height) * across, run);
    }

    /// A plain product, row by row: no packing, no explicit SIMD beyond the dispatched instruction set.
    fn plain(&self, exec: &Exec, out: MatMut<'_>) {
        let (m, n, k) = (out.rows(), out.cols(), self.k);
        let exec = if m * n * k < MIN_PARALLEL_WORK { &exec.single() } else { exec };
        exec.parallel_items(out.into_rows(), |i, out| {
            let a: Vec<f32> = match self.ta {
                Trans::No => self.a.row(i).iter().map(|&a| self.alpha * a).collect(),
                Trans::Yes => (0..k).map(|p| self.alpha * self.a.row(p)[i]).collect(),
            };
            dispatch!(exec.isa(), |s| self.plain_row(s, &a, out));
        });
    }

    #[inline(always)]
    fn plain_row<S: Simd>(&self, s: S, a: &[f32], out: &mut [f32]) {
        if self.store == Store::Overwrite {
            out.fill(0.0);
        }
        match self.tb {
            Trans::No => a.iter().enumerate().for_each(|(p, &a)| simd::axpy(s, a, self.b.row(p), out)),
            Trans::Yes => out.iter_mut().enumerate().for_each(|(j, o)| *o += simd::dot(s, a, self.b.row(j))),
        }
    }

    /// Few rows: every value of `b` is loaded once for all of them; parallel over columns of the output.
    fn skinny(&self, exec: &Exec, out: MatMut<'_>) {
        let (m, n) = (out.rows(), out.cols());
        // Whole cache lines of the output per task; the arithmetic of one element does not depend on the split.
        let (serial, width) = match m * n * self.k < MIN_PARALLEL_WORK {
            true => (true, n),
            false => (false, n.div_ceil(2 * exec.threads()).next_multiple_of(16)),
        };
        let mut tasks: Vec<Vec<&mut [f32]>> = (0..n.div_ceil(width)).map(|_| Vec::with_capacity(m)).collect();
        for row in out.into_rows() {
            for (task, part) in tasks.iter_mut().zip(row.chunks_mut(width)) {
                task.push(part);
            }
        }
        let run = |i: usize, mut part: Vec<&mut [f32]>| {
            dispatch!(exec.isa(), |s| match self.tb {
                Trans::Yes => self.skinny_dots(s, i * width, &mut part),
                Trans::No => self.skinny_axpys(s, i * width, &mut part),
            });
        };
        if serial {
            tasks.into_iter().enumerate().for_each(|(i, part)| run(i, part));
        } else {
            exec.parallel_items(tasks, run);
        }
    }

    /// Output columns from `j0` on as dot products with rows of `b`, four rows of `b` at a time.
    #[inline(always)]
    fn skinny_dots<S: Simd>(&self, s: S, j0: usize, out: &mut [&mut [f32]]) {
        let cols = out[0].len();
        let mut j = 0;
        while j < cols {
            let wide = cols - j >= 4;
            for i0 in (0..out.len()).step_by(4) {
                let group = (out.len() - i0).min(4);
                match (wide, group) {
                    (true, 4) => self.dot_tile::<S, 4, 4, 1>(s, i0, j0, j, out),
                    (true, 3) => self.dot_tile::<S, 3, 4, 1>(s, i0, j0, j, out),
                    (true, 2) => self.dot_tile::<S, 2, 4, 2>(s, i0, j0, j, out),
                    (true, _) => self.dot_tile::<S, 1, 4, 2>(s, i0, j0, j, out),
                    (false, 4) => self.dot_tile::<S, 4, 1, 1>(s, i0, j0, j, out),
                    (false, 3) => self.dot_tile::<S, 3, 1, 1>(s, i0, j0, j, out),
                    (false, 2) => self.dot_tile::<S, 2, 1, 2>(s, i0, j0, j, out),
                    (false, _) => self.dot_tile::<S, 1, 1, 2>(s, i0, j0, j, out),
                }
            }
            j += if wide { 4 } else { 1 };
        }
    }

    /// `M × N` outputs at rows `i0..`, local columns `j..`, each summed in `U` vectors.
    #[inline(always)]
    fn dot_tile<S: Simd, const M: usize, const N: usize, const U: usize>(
        &self,
        s: S,
        i0: usize,
        j0: usize,
        j: usize,
        out: &mut [&mut [f32]],
    ) {
        let a: [&[f32]; M] = std::array::from_fn(|i| self.a.row(i0 + i));
        let b: [&[f32]; N] = std::array::from_fn(|n| self.b.row(j0 + j + n));
        let step = U * S::LANES;
        let whole = self.k / step * step;
        let mut acc = [[[s.splat(0.0); U]; N]; M];
        for p in (0..whole).step_by(step) {
            for u in 0..U {
                let at = p + u * S::LANES..p + (u + 1) * S::LANES;
                // Loops instead of `array::from_fn`, which need not be inlined and would then lose the features.
                let mut w = [s.splat(0.0); N];
                for (w, b) in w.iter_mut().zip(&b) {
                    *w = s.load(&b[at.clone()]);
                }
                for (acc, a) in acc.iter_mut().zip(&a) {
                    let x = s.load(&a[at.clone()]);
                    for (acc, &w) in acc.iter_mut().zip(&w) {
                        acc[u] = s.mul_add(x, w, acc[u]);
                    }
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let mut total = acc[0];
                for &part in &acc[1..] {
                    total = s.add(total, part);
                }
                let mut sum = s.sum(total);
                for (&a, &b) in a[i][whole..].iter().zip(&b[n][whole..]) {
                    sum = s.fma(a, b, sum);
                }
                let out = &mut out[i0 + i][j + n];
                *out =
                    if self.store == Store::Overwrite { self.alpha * sum } else { *out + self.alpha * sum };
            }
        }
    }

    /// Output columns from `j0` on as sums of scaled rows of `b`.
    #[inline(always)]
    fn skinny_axpys<S: Simd>(&self, s: S, j0: usize, out: &mut [&mut [f32]]) {
        let cols = out[0].len();
        if self.store == Store::Overwrite {
            out.iter_mut().for_each(|row| row.fill(0.0));
        }
        // Four rows of `b` per pass, so that the output is loaded and stored a quarter as often.
        let whole = self.k / 4 * 4;
        for p in (0..whole).step_by(4) {
            let b: [&[f32]; 4] = std::array::from_fn(|u| &self.b.row(p + u)[j0..j0 + cols]);
            for (i, out) in out.iter_mut().enumerate() {
                let a = &self.a.row(i)[p..p + 4];
                let a: [f32; 4] = std::array::from_fn(|u| self.alpha * a[u]);
                for (j, out) in out[..cols].iter_mut().enumerate() {
                    let low = s.fma(a[1], b[1][j], a[0] * b[0][j]);
                    let high = s.fma(a[3], b[3][j], a[2] * b[2][j]);
                    *out += low + high;
                }
            }
        }
        for p in whole..self.k {
            let b = &self.b.row(p)[j0..j0 + cols];
            for (i, out) in out.iter_mut().enumerate() {
                simd::axpy(s, self.alpha * self.a.row(i)[p], b, out);
            }
        }
    }
}

/// Height and width of the parts of an `[m, n]` output that one task computes. They depend on the shape alone, so that
/// the result does not depend on the number of threads.
fn tile(m: usize, n: usize, k: usize) -> (usize, usize) {
    if m * n * k < MIN_PARALLEL_WORK {
        return (m, n);
    }
    // A task packs its part of `b` again for each height and its part of `a` again for each width: high tiles, because
    // `b` (weights) is what must be transposed, and equally high, because a last low one would pack as much.
    let height = m.div_ceil(m.div_ceil(MAX_TILE_HEIGHT)).next_multiple_of(16);
    let width = if n >= MANY_TILES * WIDE_TILE { WIDE_TILE } else { WIDE_TILE / 2 };
    (height, width)
}

/// The start of the output, whose disjoint tiles go to different tasks.
struct SharedPtr(*mut f32);

// SAFETY: made in `blocked` from an exclusive borrow that outlives the tasks; says there why its uses are disjoint.
unsafe impl Sync for SharedPtr {}

impl SharedPtr {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

#[cfg(test)]
mod tests;
