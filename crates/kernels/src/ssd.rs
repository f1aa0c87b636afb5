//! Mamba-2's state-space duality recurrence (arXiv 2405.21060) for one KV group: scalar decay per query head.
//!
//! `S_t = a_t S_{t−1} + b_t k_t v_tᵀ`, `y_t = S_tᵀ q_t + d_skip · v_t`, `a_t = exp(log_a_t)`.

use crate::Exec;

/// Sizes of one call. Query heads share `k` and `v`, each has its own decay, input scale and state.
#[derive(Clone, Copy, Debug)]
pub struct SsdShape {
    /// Tokens.
    pub seq: usize,
    /// Query heads `G`.
    pub heads: usize,
    /// Width of keys and queries `N`.
    pub d_state: usize,
    /// Width of values `P`.
    pub head_dim: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct SsdInputs<'a> {
    /// `[seq, heads · d_state]`.
    pub q: &'a [f32],
    /// `[seq, d_state]`.
    pub k: &'a [f32],
    /// `[seq, head_dim]`.
    pub v: &'a [f32],
    /// `[seq, heads]`, ≤ 0.
    pub log_a: &'a [f32],
    /// `[seq, heads]`.
    pub b: &'a [f32],
    /// `[heads]`.
    pub d_skip: &'a [f32],
}

/// Gradients of [`SsdInputs`], same shapes; added to.
#[derive(Debug)]
pub struct SsdGrads<'a> {
    /// Of `q`.
    pub dq: &'a mut [f32],
    /// Of `k`.
    pub dk: &'a mut [f32],
    /// Of `v`.
    pub dv: &'a mut [f32],
    /// Of `log_a`.
    pub dlog_a: &'a mut [f32],
    /// Of `b`.
    pub db: &'a mut [f32],
    /// Of `d_skip`.
    pub dd_skip: &'a mut [f32],
}

/// Chunked parallel form. `state` `[heads, d_state, head_dim]` is read and replaced; `y` is `[seq, heads · head_dim]`.
pub fn ssd(exec: &Exec, shape: SsdShape, inputs: SsdInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// One-token form of [`ssd`] (`shape.seq == 1`), for decoding.
pub fn ssd_step(exec: &Exec, shape: SsdShape, inputs: SsdInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let _ = (exec, shape, inputs, state, y);
    todo!()
}
/// Gradient of [`ssd`] from `initial_state` (zeros when `None`), given the gradients of `y` and, when given, of the
/// final state. Adds to `grads` and, when given, to `d_initial_state`. Chunked; recomputes the states.
pub fn ssd_backward(
    exec: &Exec,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    initial_state: Option<&[f32]>,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: SsdGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let _ = (exec, shape, inputs, initial_state, dy, d_final_state, grads, d_initial_state);
    todo!()
}
