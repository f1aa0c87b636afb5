//! Row-wise and element-wise operations with their backward passes. In backward passes `dx`, `dw`… are added to.

use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, Isa, MatRef};

/// Values one task handles: a few cache pages, so that waking a thread pays off. Fixed, so that results do not depend
/// on the number of threads.
const TASK: usize = 16 * 1024;

/// Values per task such that it holds whole rows of `dim`.
fn whole_rows(dim: usize) -> usize {
    (TASK / dim).max(1) * dim
}

/// Panics unless `len` is a whole number of rows of `dim` values; false when there is nothing to do.
fn has_rows(len: usize, dim: usize) -> bool {
    assert!(if dim == 0 { len == 0 } else { len.is_multiple_of(dim) }, "{len} values are not rows of {dim}");
    len > 0
}

/// Rows of `dim` values with the inputs of the same place: `(x, second, out)`.
#[inline(always)]
fn zip_rows<'a>(
    dim: usize,
    x: &'a [f32],
    dout: &'a [f32],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [f32], &'a [f32], &'a mut [f32])> {
    x.chunks_exact(dim)
        .zip(dout.chunks_exact(dim))
        .zip(out.chunks_exact_mut(dim))
        .map(|((x, d), o)| (x, d, o))
}

/// RMSNorm over rows of `weight.len()` values: `out = x / sqrt(mean(x²) + eps) · weight`. `x` and `out` have the same
/// length, a multiple of the weight's. Source: arXiv 1910.07467, eq. 4.
pub fn rms_norm(exec: &Exec, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    assert_eq!(x.len(), out.len(), "rms_norm: x and out");
    if !has_rows(x.len(), dim) {
        return;
    }
    let task = whole_rows(dim);
    exec.parallel_chunks(out, task, |i, out| {
        let x = &x[i * task..][..out.len()];
        dispatch!(exec.isa(), |s| rms_norm_rows(s, x, weight, eps, out));
    });
}

#[inline(always)]
fn rms_norm_rows<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let inv = inverse_rms(s, x, eps);
        for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inv * w;
        }
    }
}

#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (simd::dot(s, x, x) / x.len() as f32 + eps).sqrt()
}

/// Gradient of [`rms_norm`]; adds to `dx` and, when given, to `dweight`.
pub fn rms_norm_backward(
    exec: &Exec,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dout: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    let dim = weight.len();
    assert!(x.len() == dout.len() && x.len() == dx.len(), "rms_norm_backward: x, dout and dx");
    if !has_rows(x.len(), dim) {
        return;
    }
    let task = whole_rows(dim);
    exec.parallel_chunks(dx, task, |i, dx| {
        let (x, dout) = (&x[i * task..][..dx.len()], &dout[i * task..][..dx.len()]);
        dispatch!(exec.isa(), |s| rms_norm_dx(s, x, weight, eps, dout, dx));
    });
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), dim, "rms_norm_backward: dweight");
        add_row_sums(exec, x.len(), dim, dweight, |rows, sums| {
            let (x, dout) = (&x[rows.clone()], &dout[rows]);
            dispatch!(exec.isa(), |s| rms_norm_dweight(s, x, eps, dout, sums));
        });
    }
}

#[inline(always)]
fn rms_norm_dx<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, dout: &[f32], dx: &mut [f32]) {
    let dim = weight.len();
    for (x, dout, dx) in zip_rows(dim, x, dout, dx) {
        let inv = inverse_rms(s, x, eps);
        let mean = simd::dot3(s, dout, weight, x) / dim as f32;
        // Multiplied in this order, neither factor overflows for large x (then inv is small).
        let along = mean * inv * inv;
        for (((dx, &x), &d), &w) in dx.iter_mut().zip(x).zip(dout).zip(weight) {
            *dx += inv * (d * w - x * along);
        }
    }
}

#[inline(always)]
fn rms_norm_dweight<S: Simd>(s: S, x: &[f32], eps: f32, dout: &[f32], sums: &mut [f32]) {
    let dim = sums.len();
    for (x, dout) in x.chunks_exact(dim).zip(dout.chunks_exact(dim)) {
        let inv = inverse_rms(s, x, eps);
        for ((sum, &x), &d) in sums.iter_mut().zip(x).zip(dout) {
            *sum += d * x * inv;
        }
    }
}

/// Adds to `out` sums over rows: `partial(range, sums)` adds the rows of a fixed range of values, and the ranges'
/// sums are added in order, so that the result does not depend on the number of threads.
fn add_row_sums(
    exec: &Exec,
    len: usize,
    dim: usize,
    out: &mut [f32],
    partial: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) {
    let task = whole_rows(dim);
    let partials = exec.parallel_map(len.div_ceil(task), |i| {
        let mut sums = vec![0.0; dim];
        partial(i * task..((i + 1) * task).min(len), &mut sums);
        sums
    });
    for sums in partials {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}

/// L2 normalisation over rows of `dim` values: `out = x / sqrt(Σx² + eps)`.
pub fn l2_norm(exec: &Exec, x: &[f32], dim: usize, eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "l2_norm: x and out");
    if !has_rows(x.len(), dim) {
        return;
    }
    let task = whole_rows(dim);
    exec.parallel_chunks(out, task, |i, out| {
        let x = &x[i * task..][..out.len()];
        dispatch!(exec.isa(), |s| l2_norm_rows(s, x, dim, eps, out));
    });
}

#[inline(always)]
fn l2_norm_rows<S: Simd>(s: S, x: &[f32], dim: usize, eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let inv = 1.0 / (simd::dot(s, x, x) + eps).sqrt();
        out.iter_mut().zip(x).for_each(|(out, &x)| *out = x * inv);
    }
}

/// Gradient of [`l2_norm`]; adds to `dx`.
pub fn l2_norm_backward(exec: &Exec, x: &[f32], dim: usize, eps: f32, dout: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dout.len() && x.len() == dx.len(), "l2_norm_backward: x, dout and dx");
    if !has_rows(x.len(), dim) {
        return;
    }
    let task = whole_rows(dim);
    exec.parallel_chunks(dx, task, |i, dx| {
        let (x, dout) = (&x[i * task..][..dx.len()], &dout[i * task..][..dx.len()]);
        dispatch!(exec.isa(), |s| l2_norm_dx(s, x, dim, eps, dout, dx));
    });
}

#[inline(always)]
fn l2_norm_dx<S: Simd>(s: S, x: &[f32], dim: usize, eps: f32, dout: &[f32], dx: &mut [f32]) {
    for (x, dout, dx) in zip_rows(dim, x, dout, dx) {
        let inv = 1.0 / (simd::dot(s, x, x) + eps).sqrt();
        let along = simd::dot(s, x, dout) * inv * inv;
        for ((dx, &x), &d) in dx.iter_mut().zip(x).zip(dout) {
            *dx += inv * (d - x * along);
        }
    }
}

/// [`sigmoid`] of every value, in parallel.
pub fn sigmoid_in_place(exec: &Exec, x: &mut [f32]) {
    exec.parallel_chunks(x, TASK, |_, x| {
        dispatch!(exec.isa(), |s| {
            for x in x.iter_mut() {
                *x = simd::sigmoid(s, *x);
            }
        });
    });
}

/// SwiGLU: `out = silu(gate) · up`, `silu(z) = z · sigmoid(z)`. All of the same length. Source: arXiv 2002.05202.
pub fn swiglu(exec: &Exec, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len(), "swiglu: gate, up and out");
    exec.parallel_chunks(out, TASK, |i, out| {
        let (gate, up) = (&gate[i * TASK..][..out.len()], &up[i * TASK..][..out.len()]);
        dispatch!(exec.isa(), |s| swiglu_values(s, gate, up, out));
    });
}

#[inline(always)]
fn swiglu_values<S: Simd>(s: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *out = g * simd::sigmoid(s, g) * u;
    }
}

/// Gradient of [`swiglu`]; overwrites `dgate` and `dup`.
pub fn swiglu_backward(
    exec: &Exec,
    gate: &[f32],
    up: &[f32],
    dout: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let len = gate.len();
    let fits = up.len() == len && dout.len() == len && dgate.len() == len && dup.len() == len;
    assert!(fits, "swiglu_backward: five slices of {len} values");
    exec.parallel_items(dgate.chunks_mut(TASK).zip(dup.chunks_mut(TASK)).collect(), |i, (dgate, dup)| {
        let range = i * TASK..i * TASK + dgate.len();
        let (gate, up, dout) = (&gate[range.clone()], &up[range.clone()], &dout[range]);
        dispatch!(exec.isa(), |s| swiglu_gradients(s, gate, up, dout, dgate, dup));
    });
}

#[inline(always)]
fn swiglu_gradients<S: Simd>(
    s: S,
    gate: &[f32],
    up: &[f32],
    dout: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    for ((((dgate, dup), &g), &u), &d) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dout) {
        let sigmoid = simd::sigmoid(s, g);
        let silu = g * sigmoid;
        *dup = d * silu;
        *dgate = d * u * (sigmoid + silu * (1.0 - sigmoid));
    }
}

/// `to` becomes the values of `from`, dense; memory only grows.
pub fn copy(exec: &Exec, from: MatRef<'_>, to: &mut Vec<f32>) {
    let cols = from.cols();
    to.resize(from.rows() * cols, 0.0);
    let rows = TASK.div_ceil(cols.max(1));
    exec.parallel_chunks(to, rows * cols, |i, to| {
        for (r, to) in to.chunks_exact_mut(cols).enumerate() {
            to.copy_from_slice(from.row(i * rows + r));
        }
    });
}

/// `y += alpha · x`, of the same length.
pub fn axpy(exec: &Exec, alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: x and y");
    exec.parallel_chunks(y, TASK, |i, y| {
        let x = &x[i * TASK..][..y.len()];
        dispatch!(exec.isa(), |s| simd::axpy(s, alpha, x, y));
    });
}

/// Adds `bias` to every row of `x` `[rows, bias.len()]`.
pub fn add_bias(exec: &Exec, bias: &[f32], x: &mut [f32]) {
    if !has_rows(x.len(), bias.len()) {
        return;
    }
    exec.parallel_chunks(x, whole_rows(bias.len()), |_, x| {
        dispatch!(exec.isa(), |s| x.chunks_exact_mut(bias.len()).for_each(|x| simd::axpy(s, 1.0, bias, x)));
    });
}

/// Column sums of `[rows, out.len()]`, added to `out` (the gradient of [`add_bias`]).
pub fn add_column_sums(exec: &Exec, x: &[f32], out: &mut [f32]) {
    let dim = out.len();
    if !has_rows(x.len(), dim) {
        return;
    }
    add_row_sums(exec, x.len(), dim, out, |rows, sums| {
        let x = &x[rows];
        dispatch!(exec.isa(), |s| x.chunks_exact(dim).for_each(|x| simd::axpy(s, 1.0, x, sums)));
    });
}

/// Sum of products in f64, of a row. `a` and `b` have the same length.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    f64_products::<8>(a, b)
}

/// [`dot`] of whole tensors, the same bits on every instruction set.
pub fn tensor_dot(isa: Isa, a: &[f32], b: &[f32]) -> f64 {
    // Enough sums side by side to hide the additions' latency.
    dispatch!(isa, f64_products::<32>(a, b))
}

#[inline(always)]
fn f64_products<const SUMS: usize>(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot: a and b");
    let mut acc = [0.0f64; SUMS];
    for (a, b) in a.chunks(SUMS).zip(b.chunks(SUMS)) {
        for ((acc, &a), &b) in acc.iter_mut().zip(a).zip(b) {
            *acc += f64::from(a) * f64::from(b);
        }
    }
    let mut sum = 0.0;
    for acc in acc {
        sum += acc;
    }
    sum
}

/// Numerically stable logistic function.
pub fn sigmoid(x: f32) -> f32 {
    // e^-x overflows to infinity for very negative x, and 1 / inf = 0 is the right limit.
    1.0 / (1.0 + (-x).exp())
}

/// Numerically stable `ln(1 + e^x)`.
pub fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests;
