//! Losses over rows of logits, with gradients.

use crate::Exec;

/// Negative log-likelihood (nats) of `targets[r]` under row `r` of `logits` `[rows, vocab]`, one value per row in `nll`.
/// With `dlogits`, overwrites it with `weight · (softmax − onehot)`. A target of `u32::MAX` is ignored: zero loss, zero
/// gradient.
pub fn cross_entropy(exec: &Exec, logits: &[f32], vocab: usize, targets: &[u32], weight: f32, nll: &mut [f32], dlogits: Option<&mut [f32]>) {
    let _ = (exec, logits, vocab, targets, weight, nll, dlogits);
    todo!()
}
/// `KL(teacher ‖ student)` in nats per row, of the softmaxes of two `[rows, vocab]` logit matrices. With `dlogits`, **adds**
/// `weight · (softmax(student) − softmax(teacher))`.
pub fn kl_divergence(exec: &Exec, teacher: &[f32], student: &[f32], vocab: usize, weight: f32, kl: &mut [f32], dlogits: Option<&mut [f32]>) {
    let _ = (exec, teacher, student, vocab, weight, kl, dlogits);
    todo!()
}
