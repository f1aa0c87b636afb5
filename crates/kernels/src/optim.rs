//! The AdamW update as one fused pass.

use crate::Exec;

/// Hyperparameters of one [`adamw`] update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
    /// Multiplier of the gradient (clipping).
    pub grad_scale: f32,
}

/// Decoupled-weight-decay Adam (arXiv 1711.05101), PyTorch's arithmetic; updates `param`, `m`, `v` in place.
pub fn adamw(exec: &Exec, hyper: &AdamW, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let _ = (exec, hyper, grad, param, m, v);
    todo!()
}
