//! Token sequences of any lengths that go through the layers together. Knows rows; knows nothing of what is computed in them.

use kernels::packed::{Shared, Uses};
use kernels::{Exec, MatRef};
use std::ops::Range;

/// Token sequences processed together, each from position 0 with its own attention, windows, convolutions and states: nothing leaks from one
/// to another. Rows of activations lie sequence after sequence, so that products run over all of them at once. A sequence may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    tokens: Vec<u32>,
    /// First row of every sequence, and then the number of rows.
    starts: Vec<usize>,
}

impl Default for TokenBatch {
    /// No sequences.
    fn default() -> Self {
        Self { tokens: Vec::new(), starts: vec![0] }
    }
}

impl TokenBatch {
    /// One sequence.
    pub fn one(tokens: &[u32]) -> Self {
        Self { tokens: tokens.to_vec(), starts: vec![0, tokens.len()] }
    }

    /// Sequences of `seq_len` tokens each.
    ///
    /// # Panics
    /// When `tokens` are not a whole number of sequences, or `seq_len` is 0.
    pub fn equal(seq_len: usize, tokens: Vec<u32>) -> Self {
        assert!(tokens.len().is_multiple_of(seq_len), "{} tokens in sequences of {seq_len}", tokens.len());
        let starts = (0..=tokens.len() / seq_len).map(|s| s * seq_len).collect();
        Self { tokens, starts }
    }

    /// Adds a sequence.
    pub fn push(&mut self, sequence: &[u32]) {
        self.tokens.extend_from_slice(sequence);
        self.starts.push(self.tokens.len());
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.starts.len() - 1
    }

    /// Rows of all sequences together.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// All token ids, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Rows of sequence `s`.
    ///
    /// # Panics
    /// When there is no such sequence.
    pub fn range(&self, s: usize) -> Range<usize> {
        self.starts[s]..self.starts[s + 1]
    }

    /// Rows of every sequence.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.starts.windows(2).map(|w| w[0]..w[1])
    }

    /// Token ids of every sequence.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> + '_ {
        self.ranges().map(|range| &self.tokens[range])
    }

    /// Tokens of the longest sequence; 0 without any.
    pub fn longest(&self) -> usize {
        self.ranges().map(|range| range.len()).max().unwrap_or(0)
    }

    /// Parts of `values` `[rows, width]` that belong to each sequence.
    pub(super) fn split_mut<'a, T>(&self, values: &'a mut [T], width: usize) -> Vec<&'a mut [T]> {
        assert_eq!(values.len(), self.rows() * width, "values of {} rows", self.rows());
        let mut rest = values;
        self.ranges()
            .map(|range| rest.split_off_mut(..range.len() * width).expect("as long as all"))
            .collect()
    }
}

impl<'a> FromIterator<&'a [u32]> for TokenBatch {
    fn from_iter<I: IntoIterator<Item = &'a [u32]>>(sequences: I) -> Self {
        let mut batch = Self::default();
        sequences.into_iter().for_each(|sequence| batch.push(sequence));
        batch
    }
}

/// Some rows of a row-major matrix.
pub(super) fn rows_of(values: &[f32], rows: Range<usize>, width: usize) -> MatRef<'_> {
    MatRef::dense(&values[rows.start * width..rows.end * width], rows.len(), width)
}

/// Layer inputs of every sequence, rounded once for all heads that read them. Reuse one over layers: memory only grows.
#[derive(Default)]
pub struct RoundedSequences {
    /// With whether the last [`set`](Self::set) could round it.
    sequences: Vec<(Shared, bool)>,
}

impl RoundedSequences {
    /// Becomes `x`, the rows of `batch`.
    pub fn set(&mut self, exec: &Exec, x: MatRef<'_>, batch: &TokenBatch, uses: Uses) {
        self.sequences.resize_with(batch.sequences(), Default::default);
        for ((shared, is_set), rows) in self.sequences.iter_mut().zip(batch.ranges()) {
            *is_set = shared.set(exec, x.rows_at(rows.start, rows.len()), uses).is_some();
        }
    }

    /// Of sequence `s`; `None` where the context multiplies in f32 or the sequence is short.
    pub fn get(&self, s: usize) -> Option<&Shared> {
        self.sequences.get(s).filter(|(_, is_set)| *is_set).map(|(shared, _)| shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_belong_to_their_sequences() {
        let batch: TokenBatch = [&[1, 2][..], &[], &[3]].into_iter().collect();
        assert_eq!((batch.sequences(), batch.rows(), batch.longest()), (3, 3, 2));
        assert_eq!(batch.ranges().collect::<Vec<_>>(), [0..2, 2..2, 2..3]);
        assert_eq!(batch.iter().collect::<Vec<_>>(), [&[1, 2][..], &[], &[3]]);
        assert_eq!(batch.split_mut(&mut [1, 2, 3, 4, 5, 6], 2), [&[1, 2, 3, 4][..], &[], &[5, 6]]);
        assert_eq!(TokenBatch::equal(2, vec![1, 2, 3, 4]), [&[1, 2][..], &[3, 4]].into_iter().collect());
        assert_eq!(TokenBatch::one(&[]), [&[][..]].into_iter().collect());
        assert_eq!((TokenBatch::default().sequences(), TokenBatch::default().longest()), (0, 0));
    }
}
