//! Definition of the products with packed weights.

use super::elementwise;

/// `out = x · weightᵀ + bias`, with `x` `[m, k]`, `weight` `[n, k]`, `bias` `[n]`; returns `[m, n]`.
pub fn matmul(m: usize, n: usize, k: usize, x: &[f64], weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let dot: f64 = (0..k).map(|l| x[i * k + l] * weight[j * k + l]).sum();
            out.push(dot + bias.map_or(0.0, |bias| bias[j]));
        }
    }
    out
}

/// `silu(x · gateᵀ) ⊙ (x · upᵀ)`, shapes as in [`matmul`].
pub fn matmul_swiglu(m: usize, n: usize, k: usize, x: &[f64], gate: &[f64], up: &[f64]) -> Vec<f64> {
    elementwise::swiglu(&matmul(m, n, k, x, gate, None), &matmul(m, n, k, x, up, None))
}
