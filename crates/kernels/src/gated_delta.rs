//! The gated delta rule (arXiv 2412.06464) for one KV group whose query heads share one state.
//!
//! `S_t = a_t S_{t−1} + β_t k_t (v_t − a_t S_{t−1}ᵀ k_t)ᵀ`, `y_{t,h} = S_tᵀ q_{t,h}`, `a_t = exp(log_a_t)`.

use crate::Exec;

/// Sizes of one call.
#[derive(Clone, Copy, Debug)]
pub struct DeltaShape {
    /// Tokens.
    pub seq: usize,
    /// Query heads that read the one state.
    pub heads: usize,
    /// Width of keys and queries.
    pub d_state: usize,
    /// Width of values.
    pub head_dim: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct DeltaInputs<'a> {
    /// `[seq, heads · d_state]`.
    pub q: &'a [f32],
    /// `[seq, d_state]`, unit rows expected (stable for any row of norm ≤ 1).
    pub k: &'a [f32],
    /// `[seq, head_dim]`.
    pub v: &'a [f32],
    /// `[seq]`, ≤ 0.
    pub log_a: &'a [f32],
    /// `[seq]`, in (0, 1).
    pub beta: &'a [f32],
}

/// Gradients of [`DeltaInputs`], same shapes; added to.
#[derive(Debug)]
pub struct DeltaGrads<'a> {
    /// Of `q`.
    pub dq: &'a mut [f32],
    /// Of `k`.
    pub dk: &'a mut [f32],
    /// Of `v`.
    pub dv: &'a mut [f32],
    /// Of `log_a`.
    pub dlog_a: &'a mut [f32],
    /// Of `beta`.
    pub dbeta: &'a mut [f32],
}

/// Chunked parallel form (unit-triangular solve per chunk). `state` `[d_state, head_dim]` is read and replaced; `y` is
/// `[seq, heads · head_dim]`.
pub fn gated_delta(exec: &Exec, shape: DeltaShape, inputs: DeltaInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// One-token form of [`gated_delta`] (`shape.seq == 1`).
pub fn gated_delta_step(exec: &Exec, shape: DeltaShape, inputs: DeltaInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// Gradient of [`gated_delta`], as [`crate::ssd::ssd_backward`].
pub fn gated_delta_backward(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    initial_state: Option<&[f32]>,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: DeltaGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let _ = (exec, shape, inputs, initial_state, dy, d_final_state, grads, d_initial_state);
    todo!()
}
