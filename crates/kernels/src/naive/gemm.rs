//! Naive f64 reference of `gemm`.

use crate::Trans;

/// `alpha · op(a) · op(b)` of dense row-major matrices; `op(a)` is `[m, k]`, `op(b)` `[k, n]`, the result `[m, n]`.
#[allow(clippy::too_many_arguments, reason = "mirrors the fast kernel")]
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: &[f64],
    ta: Trans,
    b: &[f64],
    tb: Trans,
    alpha: f64,
) -> Vec<f64> {
    let at = |i: usize, p: usize| if ta == Trans::No { a[i * k + p] } else { a[p * m + i] };
    let bt = |p: usize, j: usize| if tb == Trans::No { b[p * n + j] } else { b[j * k + p] };
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            out[i * n + j] = alpha * (0..k).map(|p| at(i, p) * bt(p, j)).sum::<f64>();
        }
    }
    out
}
