//! Short causal depthwise convolution with a carried tail.

use crate::Exec;

/// `out[t, c] = Σ_{i<d_conv} weight[c, i] · x[t − (d_conv−1) + i, c] (+ bias[c])`. `x`, `out`: `[seq, channels]`, `weight`:
/// `[channels, d_conv]` (the last tap is the current token). Rows before the first come from `tail`
/// `[(d_conv−1), channels]` (oldest first), which is replaced by the last rows seen.
pub fn short_conv(exec: &Exec, x: &[f32], weight: &[f32], bias: Option<&[f32]>, channels: usize, tail: &mut [f32], out: &mut [f32]) {
    let _ = (exec, x, weight, bias, channels, tail, out);
    todo!()
}
/// Gradient of [`short_conv`] started from a zero tail; adds to `dx`, `dweight`, `dbias`.
pub fn short_conv_backward(
    exec: &Exec,
    x: &[f32],
    weight: &[f32],
    channels: usize,
    dout: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let _ = (exec, x, weight, channels, dout, dx, dweight, dbias);
    todo!()
}
