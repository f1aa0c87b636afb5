//! Choosing the next token from a row of logits. Knows nothing of the model that made them.
//!
//! The order of the steps and their meaning are those of Hugging Face's `generate`: repetition penalty, temperature, top-k,
//! top-p, min-p, draw. Unlike there, top-k keeps exactly `k` tokens: of equal logits the lower id comes first.

mod passes;

use crate::error::{ModelError, Result};
use passes::{BLOCK, exp_blocks, first_largest, largest, position_of_broken};
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

/// A seeded sampler: the same options, logits and seen tokens give the same tokens. Its buffers are reused.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha12Rng,
    buffers: Buffers,
}

/// A token and its logit or weight.
type Candidate = (u32, f64);

fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    // Only finite values get here.
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Which tokens may be drawn, with which unnormalised probabilities.
enum Kept {
    /// All, as `Buffers::weights`: impossible ones have weight 0.
    All,
    /// `Buffers::candidates`, never none.
    Some,
}

impl Sampler {
    /// Validates the options.
    ///
    /// # Errors
    /// As [`SamplerOptions::validate`].
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        let rng = ChaCha12Rng::seed_from_u64(options.seed);
        Ok(Self { options, rng, buffers: Buffers::default() })
    }

    /// Draws a token from `logits` `[vocab]`; `seen` are the tokens so far (prompt and generation). A logit of −∞ is a token
    /// that is never chosen. Greedy decoding takes the lowest id of equal logits and draws nothing.
    ///
    /// # Errors
    /// [`ModelError::Sampler`] when a logit is NaN or +∞ (a broken model must not go on talking), or when none is finite.
    pub fn sample(&mut self, logits: &[f32], seen: &[u32]) -> Result<u32> {
        if self.options.temperature == 0.0 {
            return self.buffers.greedy(&self.options, logits, seen);
        }
        let kept = self.buffers.weigh(&self.options, logits, seen)?;
        let point = self.rng.random::<f64>();
        Ok(match kept {
            Kept::All => self.buffers.draw_of_all(point),
            Kept::Some => self.buffers.draw_of_some(point),
        })
    }

    /// The probabilities that [`sample`](Self::sample) draws from: kept tokens only, summing to 1; best first with top-k or
    /// top-p, else by id. Greedy decoding gives one token.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&self, logits: &[f32], seen: &[u32]) -> Result<Vec<(u32, f64)>> {
        let mut buffers = Buffers::default();
        if self.options.temperature == 0.0 {
            return Ok(vec![(buffers.greedy(&self.options, logits, seen)?, 1.0)]);
        }
        let mut kept = match buffers.weigh(&self.options, logits, seen)? {
            Kept::All => {
                let tokens = (0..).zip(&buffers.weights).zip(&buffers.logits);
                tokens.filter(|(_, logit)| logit.is_finite()).map(|((token, w), _)| (token, *w)).collect()
            }
            Kept::Some => buffers.candidates,
        };
        let total: f64 = kept.iter().map(|c| c.1).sum();
        kept.iter_mut().for_each(|c| c.1 /= total);
        Ok(kept)
    }
}

/// What one draw needs besides its options.
#[derive(Clone, Debug, Default)]
struct Buffers {
    /// Logits after the repetition penalty `[vocab]`, ...
    logits: Vec<f64>,
    /// ... the largest of each block, ...
    maxima: Vec<f64>,
    /// ... the same in another order.
    order: Vec<f64>,
    /// Weights `[vocab]` relative to the best token's, and their sum per block.
    weights: Vec<f64>,
    sums: Vec<f64>,
    candidates: Vec<Candidate>,
    /// The round in which a token's penalty was last applied.
    penalized: Vec<u64>,
    round: u64,
}

impl Buffers {
    fn greedy(&mut self, options: &SamplerOptions, logits: &[f32], seen: &[u32]) -> Result<u32> {
        let best = if options.repetition_penalty == 1.0 {
            check(logits)?;
            first_largest(logits, f32::NEG_INFINITY)
        } else {
            self.penalize(options, logits, seen)?;
            first_largest(&self.logits, f64::NEG_INFINITY)
        };
        best.map(|token| token as u32).ok_or_else(none_finite)
    }

    /// Decides which tokens are kept and weighs them.
    fn weigh(&mut self, options: &SamplerOptions, logits: &[f32], seen: &[u32]) -> Result<Kept> {
        self.penalize(options, logits, seen)?;
        self.maxima.clear();
        self.maxima.extend(self.logits.chunks(BLOCK).map(|block| largest(block, f64::NEG_INFINITY)));
        let best = largest(&self.maxima, f64::NEG_INFINITY);
        if best == f64::NEG_INFINITY {
            return Err(none_finite());
        }
        let SamplerOptions { temperature, top_k, top_p, min_p, .. } = *options;
        let (temperature, top_p, min_p) = (f64::from(temperature), f64::from(top_p), f64::from(min_p));
        let weight = |logit: f64| ((logit - best) / temperature).exp();
        if top_k > 0 && top_k < self.logits.len() {
            self.keep_best(top_k);
            self.candidates.iter_mut().for_each(|c| c.1 = weight(c.1));
            if top_p < 1.0 {
                let target = self.candidates.iter().map(|c| c.1).sum::<f64>() * top_p;
                keep_mass(&mut self.candidates, target, |c| c.1);
            }
        } else if top_p < 1.0 {
            self.weigh_all(best, temperature);
            self.keep_mass_of_all(best, temperature, top_p);
        } else if min_p > 0.0 {
            // A little more than those that pass the exact test below.
            self.gather(best + temperature * (min_p.ln() - 1e-9) - 1e-9 * best.abs());
            self.candidates.iter_mut().for_each(|c| c.1 = weight(c.1));
        } else {
            self.weigh_all(best, temperature);
            return Ok(Kept::All);
        }
        if min_p > 0.0 {
            // The best token has weight 1.
            self.candidates.retain(|c| c.1 >= min_p);
        }
        Ok(Kept::Some)
    }

    /// Fills `logits`.
    fn penalize(&mut self, options: &SamplerOptions, logits: &[f32], seen: &[u32]) -> Result<()> {
        check(logits)?;
        self.logits.clear();
        self.logits.extend(logits.iter().map(|&l| f64::from(l)));
        let penalty = f64::from(options.repetition_penalty);
        if penalty != 1.0 {
            self.penalized.resize(logits.len(), 0);
            self.round += 1;
            for &token in seen {
                let token = token as usize;
                let Some(logit) = self.logits.get_mut(token) else { continue };
                if self.penalized[token] != self.round {
                    self.penalized[token] = self.round;
                    *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                }
            }
        }
        Ok(())
    }

    /// `candidates`: the finite logits of at least `least`, by id.
    fn gather(&mut self, least: f64) {
        self.candidates.clear();
        let blocks = self.logits.chunks(BLOCK).zip(&self.maxima).enumerate();
        for (i, (block, _)) in blocks.filter(|(_, (_, max))| **max >= least) {
            let tokens = ((i * BLOCK) as u32..).zip(block);
            let kept = tokens.filter(|(_, logit)| **logit >= least && logit.is_finite());
            self.candidates.extend(kept.map(|(token, logit)| (token, *logit)));
        }
    }

    /// `candidates`: the `k` best logits, best first.
    fn keep_best(&mut self, k: usize) {
        // The k-th largest of the blocks' maxima: at least k logits are no less.
        let mut least = f64::NEG_INFINITY;
        if k <= self.maxima.len() {
            self.order.clone_from(&self.maxima);
            least = *self.order.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1;
        }
        self.gather(least);
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, best_first);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(best_first);
    }

    /// Fills `weights` and `sums`.
    fn weigh_all(&mut self, best: f64, temperature: f64) {
        exp_blocks(&self.logits, best, 1.0 / temperature, &mut self.weights, &mut self.sums);
    }

    /// `candidates`: the smallest set of best tokens that has `share` of all weight, best first.
    fn keep_mass_of_all(&mut self, best: f64, temperature: f64, share: f64) {
        let target = self.sums.iter().sum::<f64>() * share;
        let weights = &self.weights;
        let weight = |c: &Candidate| weights[c.0 as usize];
        // Tokens within e⁻², e⁻⁴, e⁻⁸, … of the best one's probability until there are enough.
        let mut depth = 2.0;
        loop {
            let least = if depth < 1e3 { best - depth * temperature } else { f64::NEG_INFINITY };
            self.candidates.clear();
            let blocks = self.logits.chunks(BLOCK).zip(&self.maxima).enumerate();
            let mut mass = 0.0;
            for (i, (block, _)) in blocks.filter(|(_, (_, max))| **max >= least) {
                for (token, &logit) in ((i * BLOCK) as u32..).zip(block) {
                    if logit >= least && logit.is_finite() {
                        mass += weights[token as usize];
                        self.candidates.push((token, logit));
                    }
                }
            }
            // Twice the rounding of a sum in another order.
            if mass >= target * (1.0 + 1e-9) || least == f64::NEG_INFINITY {
                break;
            }
            depth *= 2.0;
        }
        keep_mass(&mut self.candidates, target, weight);
        self.candidates.iter_mut().for_each(|c| c.1 = weights[c.0 as usize]);
    }

    /// The token at `point` (0 to 1) of all weight.
    fn draw_of_all(&self, point: f64) -> u32 {
        let mut point = point * self.sums.iter().sum::<f64>();
        for (i, (block, &sum)) in self.weights.chunks(BLOCK).zip(&self.sums).enumerate() {
            if point >= sum {
                point -= sum;
                continue;
            }
            for (token, &weight) in block.iter().enumerate() {
                point -= weight;
                if point < 0.0 {
                    return (i * BLOCK + token) as u32;
                }
            }
        }
        // Rounding can leave a sliver behind the last token.
        self.weights.iter().rposition(|&w| w > 0.0).expect("the best token has weight 1") as u32
    }

    /// The token at `point` (0 to 1) of the candidates' weight.
    fn draw_of_some(&self, point: f64) -> u32 {
        let mut point = point * self.candidates.iter().map(|c| c.1).sum::<f64>();
        for &(token, weight) in &self.candidates {
            point -= weight;
            if point < 0.0 {
                return token;
            }
        }
        let possible = self.candidates.iter().rfind(|c| c.1 > 0.0);
        possible.expect("the best token has weight 1").0
    }
}

fn none_finite() -> ModelError {
    ModelError::Sampler("no logit is finite".into())
}

fn check(logits: &[f32]) -> Result<()> {
    match position_of_broken(logits) {
        Some(i) => Err(ModelError::Sampler(format!("the logit of token {i} is {}", logits[i]))),
        None => Ok(()),
    }
}

/// Keeps the smallest set of best candidates whose weights reach `target`; sorts no more than it must.
fn keep_mass(candidates: &mut Vec<Candidate>, target: f64, weight: impl Fn(&Candidate) -> f64) {
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
            mass += weight(candidate);
            if mass >= target {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += block;
    }
}
