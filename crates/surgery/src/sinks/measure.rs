//! How much attention keys get in one head: shares and strengths, row by row. Knows queries and keys of one sequence; knows nothing of
//! what is done with them.

use crate::exp::exp_nonpositive;
use crate::scores::each_query;
use kernels::{Exec, MatRef};

/// First query that counts.
pub fn first_query(seq: usize) -> usize {
    seq / 2
}

/// Mean attention that each key gets from the queries in `[T/2, T)`; queries before a key give it none.
pub fn masses(exec: &Exec, q: MatRef<'_>, k: MatRef<'_>, scale: f32) -> Vec<f64> {
    let seq = q.rows();
    let (mut masses, mut exps) = (vec![0.0f64; seq], vec![0.0f32; seq]);
    each_query(exec, (q, k), scale, first_query(q.rows()), |_, scores| {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps = &mut exps[..scores.len()];
        for (e, &score) in exps.iter_mut().zip(scores) {
            *e = exp_nonpositive(score - max);
        }
        let total: f64 = exps.iter().map(|&e| f64::from(e)).sum();
        for (mass, &e) in masses.iter_mut().zip(exps.iter()) {
            *mass += f64::from(e) / total;
        }
    });
    let queries = (seq - first_query(seq)) as f64;
    masses.iter_mut().for_each(|mass| *mass /= queries);
    masses
}

/// What [`masses`] would be if every query looked at all keys alike.
pub fn uniform_masses(seq: usize) -> Vec<f64> {
    let first = first_query(seq);
    let mut masses = vec![0.0; seq];
    let mut sum = 0.0;
    for j in (0..seq).rev() {
        if j >= first {
            sum += 1.0 / (j + 1) as f64;
        }
        masses[j] = sum / (seq - first) as f64;
    }
    masses
}

/// Strengths Δ_j = mean_i [log a_ij − median_k log a_ik] of the keys `keys`, over the queries i in `[T/2, T)` after each; k runs over all
/// keys that i sees. The normaliser cancels, so that scores take the place of logarithms. 0 for a key without later queries.
pub fn strengths(exec: &Exec, q: MatRef<'_>, k: MatRef<'_>, scale: f32, keys: &[usize]) -> Vec<f64> {
    let (mut sums, mut queries) = (vec![0.0f64; keys.len()], vec![0usize; keys.len()]);
    let mut sorted = Vec::with_capacity(q.rows());
    each_query(exec, (q, k), scale, first_query(q.rows()), |i, scores| {
        sorted.clear();
        sorted.extend_from_slice(scores);
        let median = median(&mut sorted);
        for (slot, &key) in keys.iter().enumerate().filter(|(_, key)| **key < i) {
            sums[slot] += f64::from(scores[key]) - median;
            queries[slot] += 1;
        }
    });
    sums.into_iter().zip(queries).map(|(sum, n)| sum / n.max(1) as f64).collect()
}

/// The median, of an even number the mean of the middle two; reorders the values.
///
/// # Panics
/// Without values.
pub fn median(values: &mut [f32]) -> f64 {
    let n = values.len();
    assert!(n > 0, "the median of nothing");
    let (below, &mut upper, _) = values.select_nth_unstable_by(n / 2, f32::total_cmp);
    match n % 2 {
        1 => f64::from(upper),
        _ => {
            let lower = below.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (f64::from(lower) + f64::from(upper)) / 2.0
        }
    }
}

/// Norm of each row as a share of the median norm, `[T]`; 0 where all are zero.
pub fn norm_ratios(v: MatRef<'_>) -> Vec<f64> {
    let norms: Vec<f32> = (0..v.rows()).map(|t| v.row(t).iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    let middle = median(&mut norms.clone());
    norms.iter().map(|&norm| if norm == 0.0 { 0.0 } else { f64::from(norm) / middle.max(1e-30) }).collect()
}
