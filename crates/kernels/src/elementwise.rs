//! Row-wise and element-wise operations with their backward passes. In backward passes `dx`, `dw`… are added to.

use crate::Exec;

/// RMSNorm over rows of `weight.len()` values: `out = x / sqrt(mean(x²) + eps) · weight`.
pub fn rms_norm(exec: &Exec, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let _ = (exec, x, weight, eps, out);
    todo!()
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
    let _ = (exec, x, weight, eps, dout, dx, dweight);
    todo!()
}
/// L2 normalisation over rows of `dim` values: `out = x / sqrt(Σx² + eps)`.
pub fn l2_norm(exec: &Exec, x: &[f32], dim: usize, eps: f32, out: &mut [f32]) {
    let _ = (exec, x, dim, eps, out);
    todo!()
}
/// Gradient of [`l2_norm`]; adds to `dx`.
pub fn l2_norm_backward(exec: &Exec, x: &[f32], dim: usize, eps: f32, dout: &[f32], dx: &mut [f32]) {
    let _ = (exec, x, dim, eps, dout, dx);
    todo!()
}
/// SwiGLU: `out = silu(gate) · up`, `silu(z) = z · sigmoid(z)`.
pub fn swiglu(exec: &Exec, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let _ = (exec, gate, up, out);
    todo!()
}
/// Gradient of [`swiglu`]; overwrites `dgate` and `dup`.
pub fn swiglu_backward(exec: &Exec, gate: &[f32], up: &[f32], dout: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let _ = (exec, gate, up, dout, dgate, dup);
    todo!()
}
/// `y += alpha · x`.
pub fn axpy(exec: &Exec, alpha: f32, x: &[f32], y: &mut [f32]) {
    let _ = (exec, alpha, x, y);
    todo!()
}
/// Adds `bias` to every row.
pub fn add_bias(exec: &Exec, bias: &[f32], x: &mut [f32]) {
    let _ = (exec, bias, x);
    todo!()
}
/// Column sums of `[rows, out.len()]`, added to `out` (the gradient of [`add_bias`]).
pub fn add_column_sums(exec: &Exec, x: &[f32], out: &mut [f32]) {
    let _ = (exec, x, out);
    todo!()
}
/// Sum of products in f64.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    let _ = (a, b);
    todo!()
}
/// Numerically stable logistic function.
pub fn sigmoid(x: f32) -> f32 {
    let _ = x;
    todo!()
}
/// Numerically stable `ln(1 + e^x)`.
pub fn softplus(x: f32) -> f32 {
    let _ = x;
    todo!()
}
