//! MQAR, multi-query associative recall (arXiv 2312.04927; HazyResearch/zoology, Apache-2.0, `zoology/data/multiquery_ar.py`): keys with their values,
//! then the keys again among other tokens; at each the model is to name its value.

use crate::draw::{Purpose, stream};
use crate::error::{Result, TaskError};
use rand::Rng;
use rand::seq::index::sample;

#[cfg(test)]
mod tests;

/// The label of positions that ask nothing.
pub const IGNORED: u32 = u32::MAX;

/// What stands where no key is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filler {
    /// Any tokens.
    Random,
    /// Token 0.
    Zeros,
}

/// What sequences are for; those of one part are drawn apart from those of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MqarPart {
    /// To train on.
    Train,
    /// To see when training is done.
    Check,
    /// To test with.
    Test,
}

/// The task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MqarOptions {
    /// Token ids: keys lie in `1..vocab/2`, values in `vocab/2..vocab`.
    pub vocab: usize,
    /// Tokens of a sequence (T), even.
    pub length: usize,
    /// Keys of a sequence (K), each asked for once.
    pub pairs: usize,
    /// Exponent `a` of the distances: the i-th place after the pairs is taken with a probability in proportion to `a·i^(a−1)`.
    pub power: f64,
    /// Between the keys that are asked for.
    pub filler: Filler,
}

impl Default for MqarOptions {
    fn default() -> Self {
        Self { vocab: 8192, length: 64, pairs: 4, power: 0.01, filler: Filler::Random }
    }
}

/// A sequence with its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqarSequence {
    /// `[length]`: `k1 v1 k2 v2 …`, then every key once more at an even distance from the pairs' end.
    pub tokens: Vec<u32>,
    /// `[length]`: at the second occurrence of each key its value, elsewhere [`IGNORED`].
    pub labels: Vec<u32>,
}

impl MqarOptions {
    /// Whether such sequences can be made.
    ///
    /// # Errors
    /// [`TaskError::Argument`] saying what does not fit.
    pub fn check(&self) -> Result<()> {
        let Self { vocab, length, pairs, power, .. } = *self;
        let refuse = |reason: String| Err(TaskError::Argument(reason));
        if pairs == 0 || !length.is_multiple_of(2) || 4 * pairs > length {
            return refuse(format!(
                "{pairs} pairs in {length} tokens: there must be at least one, an even number of tokens, and four of them for each pair\n\
                 hint: the usual sizes are 64:4, 128:8, 256:16 and 512:64"
            ));
        }
        if vocab <= length || vocab > 1 << 24 || pairs >= vocab / 2 {
            return refuse(format!(
                "a vocabulary of {vocab} does not fit {length} tokens with {pairs} pairs: it must be larger than a sequence and have a key for each pair\n\
                 hint: the usual one is 8192"
            ));
        }
        match power > 0.0 && power <= 1.0 {
            true => Ok(()),
            false => refuse(format!(
                "the power {power} must be above 0 and at most 1\nhint: the usual one is 0.01"
            )),
        }
    }

    /// Sequence number `index` of a part.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn sequence(&self, part: MqarPart, (seed, index): (u64, u64)) -> Result<MqarSequence> {
        self.check()?;
        let Self { vocab, length, pairs, .. } = *self;
        let purpose = match part {
            MqarPart::Train => Purpose::MqarTrain,
            MqarPart::Check => Purpose::MqarCheck,
            MqarPart::Test => Purpose::MqarTest,
        };
        let mut rng = stream(purpose, seed, index);
        let half = vocab / 2;
        let keys = sample(&mut rng, half - 1, pairs).iter().map(|i| 1 + i as u32).collect::<Vec<_>>();
        let values =
            sample(&mut rng, vocab - half, pairs).iter().map(|i| (half + i) as u32).collect::<Vec<_>>();
        let places = self.places(&mut rng);
        let mut tokens: Vec<u32> = keys.iter().zip(&values).flat_map(|(&k, &v)| [k, v]).collect();
        tokens.extend((2 * pairs..length).map(|_| match self.filler {
            Filler::Random => rng.random_range(0..vocab as u32),
            Filler::Zeros => 0,
        }));
        let mut labels = vec![IGNORED; length];
        for ((key, value), place) in keys.into_iter().zip(values).zip(places) {
            (tokens[2 * pairs + 2 * place], labels[2 * pairs + 2 * place]) = (key, value);
        }
        Ok(MqarSequence { tokens, labels })
    }

    /// For every pair its place of `0..(length − 2·pairs) / 2`, all different: drawn one after the other with the weights of those that are left
    /// (Efraimidis and Spirakis, 2006: in order of `ln(u) / weight`).
    fn places(&self, rng: &mut impl Rng) -> Vec<usize> {
        let space = (self.length - 2 * self.pairs) / 2;
        let mut drawn: Vec<(f64, usize)> = (0..space)
            .map(|place| {
                let weight = self.power * ((place + 1) as f64).powf(self.power - 1.0);
                // Uniform in (0, 1].
                ((1.0 - rng.random::<f64>()).ln() / weight, place)
            })
            .collect();
        drawn.sort_by(|a, b| b.0.total_cmp(&a.0));
        drawn.into_iter().take(self.pairs).map(|(_, place)| place).collect()
    }
}
