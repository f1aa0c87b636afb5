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
        if let Some(dlogits) = dlogits {
            dlogits.copy_from_slice(row);
            dispatch!(exec.isa(), |s| *nll = row_in_place(s, dlogits, target, weight));
            return;
        }
        *nll = 0.0;
        if let Some(target) = counted(target, vocab) {
            dispatch!(exec.isa(), |s| *nll = Softmax::of(s, row).nll(row[target]));
        }
    });
}

/// [`cross_entropy`] with the gradient in the memory of the logits.
pub fn cross_entropy_in_place(
    exec: &Exec,
    logits: &mut [f32],
    vocab: usize,
    targets: &[u32],
    weight: f32,
    nll: &mut [f32],
) {
    assert_eq!(nll.len(), targets.len(), "cross_entropy: rows");
    exec.parallel_items(row_tasks(nll, Some(logits), vocab), |r, (nll, row)| {
        let row = row.expect("every row is to be overwritten");
        dispatch!(exec.isa(), |s| *nll = row_in_place(s, row, targets[r], weight));
    });
}

/// Turns a row of logits into its gradient and returns its loss.
#[inline(always)]
fn row_in_place<S: Simd>(s: S, row: &mut [f32], target: u32, weight: f32) -> f32 {
    let Some(target) = counted(target, row.len()) else {
        row.fill(0.0);
        return 0.0;
    };
    let (logit, norm) = (row[target], Softmax::leaving_terms(s, row));
    let scale = weight * norm.inv_sum;
    row.iter_mut().for_each(|d| *d *= scale);
    row[target] -= weight;
    norm.nll(logit)
}

/// The place of a target that is not [`IGNORED`].
fn counted(target: u32, vocab: usize) -> Option<usize> {
    if target == IGNORED {
        return None;
    }
    assert!((target as usize) < vocab, "target {target} is not below the vocabulary's {vocab}");
    Some(target as usize)
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
            let terms = &mut terms[..row.len()];
            terms.copy_from_slice(row);
            sum += exps(s, terms, max);
        }
        Self::new(max, sum)
    }

    /// The same, leaving `exp(x − max)` in place of `x`.
    #[inline(always)]
    fn leaving_terms<S: Simd>(s: S, row: &mut [f32]) -> Self {
        let max = simd::max(row);
        let mut sum = 0.0;
        for terms in row.chunks_mut(BLOCK) {
            sum += exps(s, terms, max);
        }
        Self::new(max, sum)
    }

    /// The loss of a token with this logit.
    fn nll(&self, logit: f32) -> f32 {
        (self.log_sum - f64::from(logit - self.max)) as f32
    }

    fn new(max: f32, sum: f64) -> Self {
        Self { max, inv_sum: (1.0 / sum) as f32, log_sum: sum.ln() }
    }
}

/// Turns every `x` into `exp(x − max)` and returns the sum.
#[inline(always)]
fn exps<S: Simd>(s: S, row: &mut [f32], max: f32) -> f64 {
    for x in row.iter_mut() {
        *x = simd::exp(s, *x - max);
    }
    f64::from(simd::sum(s, row))
}

#[cfg(test)]
mod tests;
