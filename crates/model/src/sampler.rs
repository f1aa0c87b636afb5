//! Choosing the next token from a row of logits. Knows nothing of the model that made them.
//!
//! The order of the steps and their meaning are those of Hugging Face's `generate`: repetition penalty, temperature, top-k,
//! top-p, min-p, draw. Unlike there, top-k keeps exactly `k` tokens: of equal logits the lower id comes first.

use crate::error::{ModelError, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::cmp::Ordering;

#[cfg(test)]
mod tests;

/// Sampling parameters; the defaults are greedy decoding.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0: greedy.
    pub temperature: f32,
    /// Keep the `k` best; 0: all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches this; 1: all.
    pub top_p: f32,
    /// Drop tokens below this share of the best one's probability; 0: none.
    pub min_p: f32,
    /// Divides (multiplies when negative) the logits of tokens already seen; 1: off.
    pub repetition_penalty: f32,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplerOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ModelError::Sampler`] naming the parameter, its range and what was found.
    pub fn validate(&self) -> Result<()> {
        let Self { temperature, top_p, min_p, repetition_penalty, top_k: _, seed: _ } = *self;
        let check = |name: &str, value: f32, ok: bool, range: &str| {
            if ok {
                return Ok(());
            }
            Err(ModelError::Sampler(format!("{name} is {value}, expected {range}")))
        };
        check("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 (greedy) to 100")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0, at most 1")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
        let range = (0.01..=100.0).contains(&repetition_penalty);
        check("repetition_penalty", repetition_penalty, range, "0.01 to 100, 1 for none")
    }
}

/// A seeded sampler: the same options, logits and seen tokens give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha12Rng,
}

/// A token and its logit or weight.
type Candidate = (u32, f64);

fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    // Only finite values get here.
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

impl Sampler {
    /// Validates the options.
    ///
    /// # Errors
    /// As [`SamplerOptions::validate`].
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        let rng = ChaCha12Rng::seed_from_u64(options.seed);
        Ok(Self { options, rng })
    }

    /// Draws a token from `logits` `[vocab]`; `seen` are the tokens so far (prompt and generation). A logit of −∞ is a token
    /// that is never chosen. Greedy decoding takes the lowest id of equal logits and draws nothing.
    ///
    /// # Errors
    /// [`ModelError::Sampler`] when a logit is NaN or +∞ (a broken model must not go on talking), or when none is finite.
    pub fn sample(&mut self, logits: &[f32], seen: &[u32]) -> Result<u32> {
        let logits = self.penalized(logits, seen)?;
        if self.options.temperature == 0.0 {
            let best = logits.into_iter().min_by(best_first);
            return Ok(best.expect("at least one finite logit").0);
        }
        let weights = self.weights(logits);
        let total: f64 = weights.iter().map(|c| c.1).sum();
        let mut point = self.rng.random::<f64>() * total;
        for &(token, weight) in &weights {
            point -= weight;
            if point < 0.0 {
                return Ok(token);
            }
        }
        // Rounding can leave a sliver behind the last token.
        Ok(weights.last().expect("filters keep at least one token").0)
    }

    /// The probabilities that [`sample`](Self::sample) draws from: kept tokens only, summing to 1. Greedy decoding gives one
    /// token.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&self, logits: &[f32], seen: &[u32]) -> Result<Vec<(u32, f64)>> {
        let logits = self.penalized(logits, seen)?;
        if self.options.temperature == 0.0 {
            return Ok(logits
                .into_iter()
                .min_by(best_first)
                .map(|(token, _)| (token, 1.0))
                .into_iter()
                .collect());
        }
        let mut weights = self.weights(logits);
        let total: f64 = weights.iter().map(|c| c.1).sum();
        weights.iter_mut().for_each(|c| c.1 /= total);
        Ok(weights)
    }

    /// Possible tokens with their logits after the repetition penalty.
    fn penalized(&self, logits: &[f32], seen: &[u32]) -> Result<Vec<Candidate>> {
        if let Some(i) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(ModelError::Sampler(format!("the logit of token {i} is {}", logits[i])));
        }
        let mut logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let penalty = f64::from(self.options.repetition_penalty);
        if penalty != 1.0 {
            let mut seen: Vec<usize> =
                seen.iter().map(|&t| t as usize).filter(|&t| t < logits.len()).collect();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                let logit = &mut logits[token];
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
        let candidates: Vec<Candidate> = logits
            .into_iter()
            .enumerate()
            .filter(|(_, l)| l.is_finite())
            .map(|(i, l)| (i as u32, l))
            .collect();
        if candidates.is_empty() {
            return Err(ModelError::Sampler("no logit is finite".into()));
        }
        Ok(candidates)
    }

    /// Unnormalised probabilities of the tokens that pass the filters, never none; best first when a filter is on, else by id.
    fn weights(&self, mut candidates: Vec<Candidate>) -> Vec<Candidate> {
        let SamplerOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let best = candidates.iter().map(|c| c.1).fold(f64::NEG_INFINITY, f64::max);
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, best_first);
            candidates.truncate(top_k);
            candidates.sort_unstable_by(best_first);
        }
        for candidate in &mut candidates {
            candidate.1 = ((candidate.1 - best) / f64::from(temperature)).exp();
        }
        if top_p < 1.0 {
            keep_mass(&mut candidates, f64::from(top_p));
        }
        if min_p > 0.0 {
            // The best token has weight 1.
            candidates.retain(|c| c.1 >= f64::from(min_p));
        }
        candidates
    }
}

/// Keeps the smallest set of best candidates that has `share` of the total weight; sorts no more than it must.
fn keep_mass(candidates: &mut Vec<Candidate>, share: f64) {
    let target = candidates.iter().map(|c| c.1).sum::<f64>() * share;
    let mut sorted = 0;
    let mut mass = 0.0;
    while sorted < candidates.len() {
        let block = (4 * sorted.max(64)).min(candidates.len() - sorted);
        let rest = &mut candidates[sorted..];
        if block < rest.len() {
            rest.select_nth_unstable_by(block - 1, best_first);
        }
        rest[..block].sort_unstable_by(best_first);
        for (i, candidate) in rest[..block].iter().enumerate() {
            mass += candidate.1;
            if mass >= target {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += block;
    }
}
