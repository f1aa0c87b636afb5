//! Spearman's rank correlation between criteria.

use serde::{Deserialize, Serialize};

/// How alike two criteria order the KV groups.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankCorrelation {
    /// Names of the criteria, a row and a column each.
    pub criteria: Vec<String>,
    /// Spearman's ρ, `[row][column]`; absent where a criterion gives every group the same score.
    pub rho: Vec<Vec<Option<f64>>>,
}

impl RankCorrelation {
    /// Of the scores of criteria, all over the same groups in the same order.
    pub fn of(scores: &[(String, Vec<f64>)]) -> Self {
        let row = |a: &[f64]| scores.iter().map(|(_, b)| spearman(a, b)).collect();
        Self {
            criteria: scores.iter().map(|(name, _)| name.clone()).collect(),
            rho: scores.iter().map(|(_, a)| row(a)).collect(),
        }
    }
}

/// Spearman's ρ: Pearson's correlation of ranks, equal values sharing the mean of theirs. `None` when one side has a single value, or none.
///
/// # Panics
/// When the lengths differ.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    assert_eq!(a.len(), b.len(), "rank correlation");
    let (a, b) = (ranks(a), ranks(b));
    // Ranks with shared means keep this mean.
    let mean = (a.len() as f64 + 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    (scale > 0.0).then(|| product(&a, &b) / scale)
}

/// Ranks from 1.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    while first < order.len() {
        let tied = order[first..].iter().take_while(|&&i| values[i] == values[order[first]]).count().max(1);
        for &i in &order[first..first + tied] {
            ranks[i] = first as f64 + (tied as f64 + 1.0) / 2.0;
        }
        first += tied;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_share_their_rank() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0, 3.0]), [4.0, 1.0, 4.0, 2.0, 4.0]);
        assert_eq!(ranks(&[]), [0.0; 0]);
    }

    #[test]
    fn rho_is_that_of_the_tables() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 90.0]), Some(1.0));
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[5.0, 0.0, -5.0]), Some(-1.0));
        // IQ against hours of television, the textbook example: ρ = -29/165.
        let iq = [86.0, 97.0, 99.0, 100.0, 101.0, 103.0, 106.0, 110.0, 112.0, 113.0];
        let hours = [2.0, 20.0, 28.0, 27.0, 50.0, 29.0, 7.0, 17.0, 6.0, 12.0];
        assert!((spearman(&iq, &hours).unwrap() + 29.0 / 165.0).abs() < 1e-12);
        // With ties: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4 give 4.5 / sqrt(4.5 · 5).
        let tied = spearman(&[1.0, 2.0, 2.0, 3.0], &[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert!((tied - 4.5 / (4.5f64 * 5.0).sqrt()).abs() < 1e-12);
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[], &[]), None);
    }
}
