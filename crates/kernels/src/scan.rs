//! Mamba-1's selective scan (arXiv 2312.00752, Algorithm 2).
//!
//! `h_t = exp(δ_t A) h_{t−1} + δ_t B_t u_t`, `y_t = C_t · h_t + D u_t`, per channel.

use crate::Exec;

/// Sizes of one call.
#[derive(Clone, Copy, Debug)]
pub struct ScanShape {
    /// Tokens.
    pub seq: usize,
    /// Channels.
    pub d_inner: usize,
    /// State values per channel.
    pub d_state: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs<'a> {
    /// `[seq, d_inner]`.
    pub u: &'a [f32],
    /// `[seq, d_inner]`, > 0 (after softplus).
    pub delta: &'a [f32],
    /// `[d_inner, d_state]`, < 0.
    pub a: &'a [f32],
    /// `[seq, d_state]`.
    pub b: &'a [f32],
    /// `[seq, d_state]`.
    pub c: &'a [f32],
    /// `[d_inner]`.
    pub d: &'a [f32],
}

/// Gradients of [`ScanInputs`], same shapes; added to.
#[derive(Debug)]
pub struct ScanGrads<'a> {
    /// Of `u`.
    pub du: &'a mut [f32],
    /// Of `delta`.
    pub ddelta: &'a mut [f32],
    /// Of `a`.
    pub da: &'a mut [f32],
    /// Of `b`.
    pub db: &'a mut [f32],
    /// Of `c`.
    pub dc: &'a mut [f32],
    /// Of `d`.
    pub dd: &'a mut [f32],
}

/// Sequence form, chunked over time and parallel over channels. `state` `[d_inner, d_state]` is read and replaced; `y` is
/// `[seq, d_inner]`.
pub fn selective_scan(exec: &Exec, shape: ScanShape, inputs: ScanInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// One-token form of [`selective_scan`] (`shape.seq == 1`).
pub fn selective_scan_step(exec: &Exec, shape: ScanShape, inputs: ScanInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// Gradient of [`selective_scan`], as [`crate::ssd::ssd_backward`]; keeps states only at chunk starts.
pub fn selective_scan_backward(
    exec: &Exec,
    shape: ScanShape,
    inputs: ScanInputs<'_>,
    initial_state: Option<&[f32]>,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: ScanGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let _ = (exec, shape, inputs, initial_state, dy, d_final_state, grads, d_initial_state);
    todo!()
}
