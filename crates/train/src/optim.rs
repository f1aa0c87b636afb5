//! The optimiser as training stages use it: learning-rate schedule, moments, clipping. The update itself is a kernel.

use half::bf16;
use kernels::Exec;
use kernels::elementwise::tensor_dot;
use kernels::optim::{AdamW, adamw, adamw_bf16};
use serde::Serialize;

/// Added to the gradient norm before dividing, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPS: f64 = 1e-6;
/// AdamW's epsilon (PyTorch's default).
pub const ADAM_EPS: f32 = 1e-8;

/// Linear warm-up to 1, then a cosine to `final_share`. Depends on nothing but the step, so a resumed run follows the same curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Steps of the warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub total: u64,
    /// Multiplier at the last step.
    pub final_share: f32,
}

impl Schedule {
    /// The multiplier of the peak learning rate at `step`, counted from 1.
    pub fn factor(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let (done, all) = (step - self.warmup, self.total.saturating_sub(self.warmup).max(1));
        let progress = (done as f64 / all as f64).min(1.0);
        let last = f64::from(self.final_share);
        last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

/// What moments are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MomentType {
    /// 8 bytes for each trained value.
    #[default]
    F32,
    /// 4 bytes, rounded stochastically ([`adamw_bf16`]).
    Bf16,
}

/// Exponential averages of a tensor's gradient and its square.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments<T = f32> {
    /// Of the gradient.
    pub m: Vec<T>,
    /// Of its square.
    pub v: Vec<T>,
}

impl<T: Default + Clone> Moments<T> {
    /// Moments before the first step of a tensor of `len` values.
    pub fn zeros(len: usize) -> Self {
        Self { m: vec![T::default(); len], v: vec![T::default(); len] }
    }
}

/// Moments of either type.
#[derive(Clone, Debug, PartialEq)]
pub enum AnyMoments {
    /// In f32.
    F32(Moments),
    /// In bfloat16.
    Bf16(Moments<bf16>),
}

impl AnyMoments {
    /// Moments before the first step of a tensor of `len` values.
    pub fn zeros(len: usize, kind: MomentType) -> Self {
        match kind {
            MomentType::F32 => Self::F32(Moments::zeros(len)),
            MomentType::Bf16 => Self::Bf16(Moments::zeros(len)),
        }
    }
}

/// What all tensors of one optimiser step share.
#[derive(Clone, Copy, Debug)]
pub struct StepRule {
    /// (β₁, β₂).
    pub betas: (f32, f32),
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of this update, from 1.
    pub step: u64,
    /// Multiplier of the gradient.
    pub grad_scale: f32,
}

impl StepRule {
    /// Updates one tensor in place with learning rate `lr`.
    pub fn apply(&self, exec: &Exec, lr: f32, grad: &[f32], param: &mut [f32], moments: &mut Moments) {
        adamw(exec, &self.hyper(lr), grad, param, &mut moments.m, &mut moments.v);
    }

    /// [`apply`](Self::apply) with moments of either type.
    pub fn apply_any(&self, exec: &Exec, lr: f32, grad: &[f32], param: &mut [f32], moments: &mut AnyMoments) {
        match moments {
            AnyMoments::F32(moments) => self.apply(exec, lr, grad, param, moments),
            AnyMoments::Bf16(Moments { m, v }) => adamw_bf16(exec, &self.hyper(lr), grad, param, m, v),
        }
    }

    fn hyper(&self, lr: f32) -> AdamW {
        AdamW {
            lr,
            beta1: self.betas.0,
            beta2: self.betas.1,
            eps: ADAM_EPS,
            weight_decay: self.weight_decay,
            step: self.step,
            grad_scale: self.grad_scale,
        }
    }
}

/// Sum of squares in f64, each tensor on its own and then in order: the same on any number of threads.
pub fn sum_of_squares(exec: &Exec, tensors: &[&[f32]]) -> f64 {
    exec.parallel_map(tensors.len(), |i| tensor_dot(exec.isa(), tensors[i], tensors[i])).into_iter().sum()
}

/// The multiplier that brings a gradient of norm `norm` down to `limit` (1 when it is below; 0 as limit: no clipping).
pub fn clip_scale(norm: f64, limit: f32) -> f32 {
    if limit <= 0.0 {
        return 1.0;
    }
    (f64::from(limit) / (norm + CLIP_EPS)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_warms_up_and_ends_at_its_final_share() {
        let s = Schedule { warmup: 10, total: 110, final_share: 0.05 };
        assert_eq!(s.factor(1), 0.1);
        assert_eq!(s.factor(10), 1.0);
        assert!((s.factor(60) - 0.525).abs() < 1e-7);
        assert!((s.factor(110) - f64::from(0.05_f32)).abs() < 1e-12);
        assert_eq!(s.factor(110), s.factor(1000));
        for step in 11..110 {
            assert!(s.factor(step + 1) < s.factor(step));
        }
    }

    #[test]
    fn schedules_without_warmup_or_decay_are_flat() {
        let flat = Schedule { warmup: 0, total: 10, final_share: 1.0 };
        assert!((1..=10).all(|step| flat.factor(step) == 1.0));
        let short = Schedule { warmup: 10, total: 4, final_share: 0.1 };
        assert_eq!(short.factor(4), 0.4);
        assert!(Schedule { warmup: 0, total: 0, final_share: 0.1 }.factor(1).is_finite());
    }

    #[test]
    fn clipping_never_enlarges() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_scale(4.0, 0.0), 1.0);
        assert_eq!(clip_scale(0.0, 1.0), 1.0);
    }
}
