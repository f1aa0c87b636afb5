//! The AdamW update as one fused pass.

use crate::Exec;
use crate::isa::dispatch;

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

/// Parameters one task updates.
const TASK: usize = 16 * 1024;

/// Decoupled-weight-decay Adam (arXiv 1711.05101), PyTorch's arithmetic; updates `param`, `m`, `v` in place. All four
/// slices have the same length. Panics when they do not, or at step 0.
pub fn adamw(exec: &Exec, hyper: &AdamW, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let len = grad.len();
    assert!(param.len() == len && m.len() == len && v.len() == len, "adamw: four slices of {len} values");
    assert!(hyper.step > 0, "adamw: steps count from 1");
    let scalars = Scalars::of(hyper);
    let tasks = param.chunks_mut(TASK).zip(m.chunks_mut(TASK)).zip(v.chunks_mut(TASK)).collect();
    exec.parallel_items(tasks, |i, ((param, m), v)| {
        let grad = &grad[i * TASK..][..param.len()];
        dispatch!(exec.isa(), update(&scalars, grad, param, m, v));
    });
}

/// What PyTorch computes once per step in f64 and rounds to f32 where it meets tensors.
struct Scalars {
    grad_scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction2: f32,
    eps: f32,
}

impl Scalars {
    fn of(hyper: &AdamW) -> Self {
        let (lr, beta1, beta2) = (f64::from(hyper.lr), f64::from(hyper.beta1), f64::from(hyper.beta2));
        let step = hyper.step as f64;
        Self {
            grad_scale: hyper.grad_scale,
            keep: (1.0 - lr * f64::from(hyper.weight_decay)) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: hyper.beta2,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
            root_correction2: (1.0 - beta2.powf(step)).sqrt() as f32,
            eps: hyper.eps,
        }
    }
}

#[inline(always)]
fn update(c: &Scalars, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    for (((param, m), v), &grad) in param.iter_mut().zip(m).zip(v).zip(grad) {
        let grad = grad * c.grad_scale;
        // PyTorch: param.mul_, exp_avg.lerp_, exp_avg_sq.mul_().addcmul_, denom = sqrt / correction + eps, addcdiv_.
        let decayed = *param * c.keep;
        *m += c.one_minus_beta1 * (grad - *m);
        *v = *v * c.beta2 + c.one_minus_beta2 * grad * grad;
        let denom = v.sqrt() / c.root_correction2 + c.eps;
        *param = decayed - c.step_size * (*m / denom);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::testing::{assert_close, execs, noise, to_f64};

    /// f32 rounding of ten steps of a handful of operations each.
    const TOLERANCE: f64 = 3e-6;

    #[test]
    fn ten_steps_agree_with_naive() {
        let mut hyper = AdamW {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 0,
            grad_scale: 0.5,
        };
        for exec in execs() {
            for n in [0, 1, 63, 64, 65, 500, TASK + 1] {
                let mut param = noise(1, n);
                let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
                let (mut param6, mut m6, mut v6) = (to_f64(&param), to_f64(&m), to_f64(&v));
                for step in 1..=10 {
                    hyper.step = step;
                    let grad = noise(step + 1, n);
                    adamw(&exec, &hyper, &grad, &mut param, &mut m, &mut v);
                    for i in 0..n {
                        (param6[i], m6[i], v6[i]) =
                            naive::optim::adamw(&hyper, f64::from(grad[i]), param6[i], m6[i], v6[i]);
                    }
                }
                assert_close("param", &param, &param6, TOLERANCE);
                assert_close("m", &m, &m6, TOLERANCE);
                assert_close("v", &v, &v6, TOLERANCE);
            }
        }
    }

    #[test]
    fn zero_gradients_only_decay() {
        let hyper = AdamW {
            lr: 0.5,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.5,
            step: 1,
            grad_scale: 1.0,
        };
        for exec in execs() {
            let (mut param, mut m, mut v) = (vec![2.0; 3], vec![0.0; 3], vec![0.0; 3]);
            adamw(&exec, &hyper, &[0.0; 3], &mut param, &mut m, &mut v);
            assert_eq!(param, [1.5; 3]);
        }
    }
}
