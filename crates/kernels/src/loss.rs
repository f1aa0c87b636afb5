//! Losses over rows of logits, with gradients.

use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, Store};

/// The target that [`cross_entropy`] ignores.
pub const IGNORED: u32 = u32::MAX;

/// Values summed in f32 before the sum joins an f64 total, so that long vocabularies lose no accuracy.
const BLOCK: usize = 1024;

/// Negative log-likelihood (nats) of `targets[r]` under row `r` of `logits` `[rows, vocab]`, one value per row in `nll`.
/// With `dlogits`, overwrites it with `weight · (softmax − onehot)`. A target of [`IGNORED`] (`u32::MAX`) is ignored:
/// zero loss, zero gradient. Panics when a target is not below `vocab` or the sizes do not fit.
pub fn cross_entropy(
    exec: &Exec,
    logits: &[f32],
    vocab: usize,
    targets: &[u32],
    weight: f32,
    nll: &mut [f32],
    dlogits: Option<&mut [f32]>,
) {
    let rows = targets.len();
    assert!(
        logits.len() == rows * vocab && nll.len() == rows,
        "cross_entropy: {rows} rows of {vocab} logits"
    );
    exec.parallel_items(row_tasks(nll, dlogits, vocab), |r, (nll, dlogits)| {
        let (row, target) = (&logits[r * vocab..][..vocab], targets[r]);
        if target == IGNORED {
            *nll = 0.0;
            if let Some(dlogits) = dlogits {
                dlogits.fill(0.0);
            }
            return;
        }
        assert!((target as usize) < vocab, "target {target} is not below the vocabulary's {vocab}");
        dispatch!(exec.isa(), |s| {
            let norm = match dlogits {
                None => Softmax::of(s, row),
                Some(dlogits) => {
                    let norm = Softmax::with_terms(s, row, dlogits);
                    let scale = weight * norm.inv_sum;
                    dlogits.iter_mut().for_each(|d| *d *= scale);
                    dlogits[target as usize] -= weight;
                    norm
                }
            };
            *nll = (norm.log_sum - f64::from(row[target as usize] - norm.max)) as f32;
        });
    });
}

/// `KL(teacher ‖ student)` in nats per row, of the softmaxes of two `[rows, vocab]` logit matrices. With `dlogits`, writes or adds
/// `weight · (softmax(student) − softmax(teacher))`. Panics when the sizes do not fit.
pub fn kl_divergence(
    exec: &Exec,
    teacher: &[f32],
    student: &[f32],
    vocab: usize,
    weight: f32,
    kl: &mut [f32],
    dlogits: Option<(&mut [f32], Store)>,
) {
    let rows = kl.len();
    let (dlogits, store) = match dlogits {
        Some((dlogits, store)) => (Some(dlogits), store),
        None => (None, Store::Overwrite),
    };
    let fits = teacher.len() == rows * vocab && student.len() == rows * vocab;
    assert!(fits, "kl_divergence: {rows} rows of {vocab} logits");
    exec.parallel_items(row_tasks(kl, dlogits, vocab), |r, (kl, dlogits)| {
        let (teacher, student) = (&teacher[r * vocab..][..vocab], &student[r * vocab..][..vocab]);
        dispatch!(exec.isa(), |s| {
            let (norm_t, norm_s) = (Softmax::of(s, teacher), Softmax::of(s, student));
            // log p − log q of one token is (t − max_t) − (s − max_s) − offset; the small differences are formed first.
            let offset = (norm_t.log_sum - norm_s.log_sum) as f32;
            let mut sum = 0.0;
            let mut terms = [0.0; BLOCK];
            for (teacher, student) in teacher.chunks(BLOCK).zip(student.chunks(BLOCK)) {
                let terms = &mut terms[..teacher.len()];
                for ((term, &t), &q) in terms.iter_mut().zip(teacher).zip(student) {
                    let (t, q) = (t - norm_t.max, q - norm_s.max);
                    let p = simd::exp(s, t);
                    // A token of no teacher probability counts 0, also when both logits are -inf.
                    *term = if p > 0.0 { p * ((t - q) - offset) } else { 0.0 };
                }
                sum += f64::from(simd::sum(s, terms));
            }
            *kl = (sum * f64::from(norm_t.inv_sum)) as f32;
            if let Some(dlogits) = dlogits {
                for ((d, &t), &q) in dlogits.iter_mut().zip(teacher).zip(student) {
                    let p = norm_t.inv_sum * simd::exp(s, t - norm_t.max);
                    let gradient = weight * (norm_s.inv_sum * simd::exp(s, q - norm_s.max) - p);
                    *d = if store == Store::Accumulate { *d + gradient } else { gradient };
                }
            }
        });
    });
}

/// One row's output and, when wanted, its gradient.
type RowTask<'a> = (&'a mut f32, Option<&'a mut [f32]>);

fn row_tasks<'a>(out: &'a mut [f32], dlogits: Option<&'a mut [f32]>, vocab: usize) -> Vec<RowTask<'a>> {
    match dlogits {
        None => out.iter_mut().map(|out| (out, None)).collect(),
        Some(dlogits) => {
            assert_eq!(dlogits.len(), out.len() * vocab, "loss: dlogits");
            out.iter_mut().zip(dlogits.chunks_mut(vocab.max(1)).map(Some)).collect()
        }
    }
}

/// What turns one row of logits into probabilities: `p = exp(x − max) · inv_sum`.
struct Softmax {
    max: f32,
    inv_sum: f32,
    log_sum: f64,
}

impl Softmax {
    #[inline(always)]
    fn of<S: Simd>(s: S, row: &[f32]) -> Self {
        let max = simd::max(row);
        let mut terms = [0.0; BLOCK];
        // Plain loops: an iterator's `sum` is compiled apart, without the instruction set.
        let mut sum = 0.0;
        for row in row.chunks(BLOCK) {
            sum += exps(s, row, max, &mut terms[..row.len()]);
        }
        Self::new(max, sum)
    }

    /// The same, leaving `exp(x − max)` in `terms`.
    #[inline(always)]
    fn with_terms<S: Simd>(s: S, row: &[f32], terms: &mut [f32]) -> Self {
        let max = simd::max(row);
        let mut sum = 0.0;
        for (row, terms) in row.chunks(BLOCK).zip(terms.chunks_mut(BLOCK)) {
            sum += exps(s, row, max, terms);
        }
        Self::new(max, sum)
    }

    fn new(max: f32, sum: f64) -> Self {
        Self { max, inv_sum: (1.0 / sum) as f32, log_sum: sum.ln() }
    }
}

/// Writes `exp(x − max)` and returns the sum.
#[inline(always)]
fn exps<S: Simd>(s: S, row: &[f32], max: f32, terms: &mut [f32]) -> f64 {
    for (term, &x) in terms.iter_mut().zip(row) {
        *term = simd::exp(s, x - max);
    }
    f64::from(simd::sum(s, terms))
}

#[cfg(test)]
mod tests;
