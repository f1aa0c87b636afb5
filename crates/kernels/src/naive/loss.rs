//! Naive f64 references of the losses, one row each.

/// Logarithm of the softmax of one row.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + logits.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - lse).collect()
}

/// Negative log-likelihood of `target` and its gradient.
pub fn cross_entropy(logits: &[f64], target: usize) -> (f64, Vec<f64>) {
    let log_p = log_softmax(logits);
    let onehot = |i| if i == target { 1.0 } else { 0.0 };
    (-log_p[target], log_p.iter().enumerate().map(|(i, l)| l.exp() - onehot(i)).collect())
}

/// `KL(teacher ‖ student)` and its gradient for the student's logits.
pub fn kl_divergence(teacher: &[f64], student: &[f64]) -> (f64, Vec<f64>) {
    let (log_t, log_s) = (log_softmax(teacher), log_softmax(student));
    let kl =
        log_t.iter().zip(&log_s).map(|(t, s)| if t.exp() == 0.0 { 0.0 } else { t.exp() * (t - s) }).sum();
    (kl, log_t.iter().zip(&log_s).map(|(t, s)| s.exp() - t.exp()).collect())
}
