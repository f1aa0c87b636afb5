//! The AdamW update as one fused pass.

use crate::Exec;
use crate::isa::dispatch;
use half::bf16;

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

/// [`adamw`] with both moments kept in bfloat16: half of their memory and of its traffic. The update itself is in f32, from moments that are
/// not rounded yet. Rounding is stochastic, up with the probability of the part cut off, so that averages which move by less than a rounding
/// step in each update still move by as much in the mean; the same step number and place give the same rounding on any number of threads.
/// Panics as [`adamw`].
pub fn adamw_bf16(
    exec: &Exec,
    hyper: &AdamW,
    grad: &[f32],
    param: &mut [f32],
    m: &mut [bf16],
    v: &mut [bf16],
) {
    let len = grad.len();
    assert!(param.len() == len && m.len() == len && v.len() == len, "adamw: four slices of {len} values");
    assert!(hyper.step > 0, "adamw: steps count from 1");
    let scalars = Scalars::of(hyper);
    let seed = scramble((hyper.step as u32) ^ (hyper.step >> 32) as u32);
    let tasks = param.chunks_mut(TASK).zip(m.chunks_mut(TASK)).zip(v.chunks_mut(TASK)).collect();
    exec.parallel_items(tasks, |i, ((param, m), v)| {
        let grad = &grad[i * TASK..][..param.len()];
        let seed = seed.wrapping_add((i * TASK) as u32);
        dispatch!(exec.isa(), update_bf16(&scalars, seed, grad, param, m, v));
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

/// New parameter, first and second moment of one value.
#[inline(always)]
fn stepped(c: &Scalars, grad: f32, param: f32, m: f32, v: f32) -> (f32, f32, f32) {
    let grad = grad * c.grad_scale;
    // PyTorch: param.mul_, exp_avg.lerp_, exp_avg_sq.mul_().addcmul_, denom = sqrt / correction + eps, addcdiv_.
    let decayed = param * c.keep;
    let m = m + c.one_minus_beta1 * (grad - m);
    let v = v * c.beta2 + c.one_minus_beta2 * grad * grad;
    let denom = v.sqrt() / c.root_correction2 + c.eps;
    (decayed - c.step_size * (m / denom), m, v)
}

#[inline(always)]
fn update(c: &Scalars, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    for (((param, m), v), &grad) in param.iter_mut().zip(m).zip(v).zip(grad) {
        (*param, *m, *v) = stepped(c, grad, *param, *m, *v);
    }
}

#[inline(always)]
fn update_bf16(c: &Scalars, seed: u32, grad: &[f32], param: &mut [f32], m: &mut [bf16], v: &mut [bf16]) {
    for (i, (((param, m), v), &grad)) in param.iter_mut().zip(m).zip(v).zip(grad).enumerate() {
        let noise = scramble(seed.wrapping_add(i as u32));
        let (new, new_m, new_v) = stepped(c, grad, *param, widened(*m), widened(*v));
        *param = new;
        *m = round_stochastic(new_m, noise & 0xffff);
        *v = round_stochastic(new_v, noise >> 16);
    }
}

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// `x` as one of its two neighbours in bfloat16: away from zero when `noise`, of 16 bits, and the bits that are cut off carry.
#[inline(always)]
fn round_stochastic(x: f32, noise: u32) -> bf16 {
    bf16::from_bits((x.to_bits().wrapping_add(noise) >> 16) as u16)
}

/// A bijection whose bits all depend on all bits of `x` (the finaliser of MurmurHash3).
#[inline(always)]
fn scramble(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::testing::{assert_close, execs, noise, to_f64};

    /// f32 rounding of ten steps of a handful of operations each.
    const TOLERANCE: f64 = 3e-6;

    const LENGTHS: [usize; 7] = [0, 1, 63, 64, 65, 500, TASK + 1];

    /// Everything in use, at a step.
    fn hyper(step: u64) -> AdamW {
        AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
    }

    #[test]
    fn ten_steps_agree_with_naive() {
        for exec in execs() {
            for n in LENGTHS {
                let mut param = noise(1, n);
                let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
                let (mut param6, mut m6, mut v6) = (to_f64(&param), to_f64(&m), to_f64(&v));
                for step in 1..=10 {
                    let hyper = hyper(step);
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

    /// Every step from the same moments: the parameter is the one of [`adamw`], moments are one of the two neighbours of what it computes.
    #[test]
    fn moments_in_bf16_are_neighbours_of_those_in_f32() {
        for exec in execs() {
            for n in LENGTHS {
                let (mut m, mut v) = (vec![bf16::ZERO; n], vec![bf16::ZERO; n]);
                let mut param = noise(1, n);
                for step in 1..=10 {
                    let hyper = hyper(step);
                    let grad = noise(step + 1, n);
                    let (mut wanted, mut m32, mut v32) = (param.clone(), widen(&m), widen(&v));
                    adamw(&exec, &hyper, &grad, &mut wanted, &mut m32, &mut v32);
                    adamw_bf16(&exec, &hyper, &grad, &mut param, &mut m, &mut v);
                    assert_eq!(param, wanted);
                    for (rounded, exact) in m.iter().zip(&m32).chain(v.iter().zip(&v32)) {
                        let below = exact.to_bits() >> 16;
                        let rounded = u32::from(rounded.to_bits());
                        assert!(
                            rounded == below || rounded == below + 1,
                            "{rounded:x} of {:x}",
                            exact.to_bits()
                        );
                    }
                }
            }
        }
    }

    /// A gradient of 1 whose average stands a hundredth below it: the average comes closer by a thousandth in each step, a quarter of a rounding
    /// step. Rounding to nearest would leave it there.
    #[test]
    fn stochastic_rounding_moves_averages_by_less_than_a_rounding_step() {
        let hyper =
            AdamW { lr: 0.0, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
        let n = 40_000;
        for exec in execs() {
            let start = bf16::from_f32(0.99);
            let (mut m, mut v) = (vec![start; n], vec![start; n]);
            let mut wanted = f64::from(start.to_f32());
            for step in 1..=5 {
                let hyper = AdamW { step, ..hyper };
                adamw_bf16(&exec, &hyper, &vec![1.0; n], &mut vec![0.0; n], &mut m, &mut v);
                wanted += 0.1 * (1.0 - wanted);
            }
            for moments in [&m, &v] {
                let mean = widen(moments).iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
                // Five roundings, each off by at most a rounding step of 1/256 and by half of it in the mean of squares: 5e-5 for the mean of n.
                assert!((mean - wanted).abs() < 2e-4, "{mean} instead of {wanted}");
            }
            assert!(
                m.iter().zip(&v).filter(|(m, v)| m != v).count() > n / 10,
                "m and v are rounded by the same noise"
            );
        }
    }

    fn widen(x: &[bf16]) -> Vec<f32> {
        x.iter().map(|x| x.to_f32()).collect()
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
