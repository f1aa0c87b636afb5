//! Naive f64 reference of `adamw`: one parameter.

use crate::optim::AdamW;

/// One step of AdamW (arXiv 1711.05101, algorithm 2) on `(param, m, v)`; returns the new three.
pub fn adamw(hyper: &AdamW, grad: f64, param: f64, m: f64, v: f64) -> (f64, f64, f64) {
    let (beta1, beta2) = (f64::from(hyper.beta1), f64::from(hyper.beta2));
    let grad = grad * f64::from(hyper.grad_scale);
    let m = beta1 * m + (1.0 - beta1) * grad;
    let v = beta2 * v + (1.0 - beta2) * grad * grad;
    let m_hat = m / (1.0 - beta1.powf(hyper.step as f64));
    let v_hat = v / (1.0 - beta2.powf(hyper.step as f64));
    let decayed = param * (1.0 - f64::from(hyper.lr) * f64::from(hyper.weight_decay));
    (decayed - f64::from(hyper.lr) * m_hat / (v_hat.sqrt() + f64::from(hyper.eps)), m, v)
}
