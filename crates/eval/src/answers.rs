//! Greedy answers to prompts that begin alike, and shares with their intervals.

use crate::error::Result;
use kernels::Exec;
use model::{Cache, Engine, LogitRows, Sampler, SamplerOptions};
use serde::{Deserialize, Serialize};
use weights::Tokenizer;

/// The 97.5th percentile of the normal distribution.
const Z: f64 = 1.959_963_985;

/// A share of right answers, with the 95 % interval of Wilson (1927) for independent answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Right answers.
    pub correct: usize,
    /// Answers wanted, at least 1.
    pub asked: usize,
    /// Lower end of the interval, 0 to 1.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Score {
    /// `correct` of `asked`.
    ///
    /// # Panics
    /// When more are correct than asked, or none is asked.
    pub fn new(correct: usize, asked: usize) -> Self {
        assert!(correct <= asked && asked > 0, "{correct} of {asked}");
        let (n, p) = (asked as f64, correct as f64 / asked as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (p + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        Self { correct, asked, low: (middle - half).max(0.0), high: (middle + half).min(1.0) }
    }

    /// The share.
    pub fn share(&self) -> f64 {
        self.correct as f64 / self.asked as f64
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [share, low, high] = [self.share(), self.low, self.high].map(|p| 100.0 * p);
        f.pad(&format!("{}/{} {share:.1} % ({low:.1}–{high:.1})", self.correct, self.asked))
    }
}

/// Greedy answers to prompts of token ids. What the prompts have in common at their beginning is read once; every prompt goes on from a fork of its
/// cache, and all of them decode together. An answer ends at an end token, after `max_tokens`, or as soon as `done(prompt, text)`; end tokens are
/// no part of it.
///
/// # Errors
/// [`EvalError::Model`](crate::EvalError::Model) for an empty prompt or one that is too long, [`EvalError::Weights`](crate::EvalError::Weights) of
/// the tokenizer.
pub fn greedy_answers(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    done: impl Fn(usize, &str) -> bool,
) -> Result<Vec<String>> {
    let Some(first) = prompts.first() else { return Ok(Vec::new()) };
    // Each keeps a token of its own to read, which gives it logits.
    let common = prompts
        .iter()
        .map(|p| first.iter().zip(p).take_while(|(a, b)| a == b).count().min(p.len().saturating_sub(1)))
        .min()
        .unwrap_or(0);
    let mut shared = model.new_cache();
    if common > 0 {
        model.forward(exec, &first[..common], &mut shared, LogitRows::Last)?;
    }
    let mut sampler = Sampler::new(SamplerOptions::default())?;
    let mut answers: Vec<Answer> = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let mut cache = shared.clone();
        let logits = model.forward(exec, &prompt[common..], &mut cache, LogitRows::Last)?;
        let mut answer = Answer { cache, ids: Vec::new(), text: String::new(), ended: max_tokens == 0 };
        if !answer.ended {
            answer.take(model, tokenizer, sampler.sample(&logits, &[])?)?;
            answer.ended |= max_tokens == 1 || done(answers.len(), &answer.text);
        }
        answers.push(answer);
    }
    loop {
        let mut open: Vec<(usize, &mut Answer)> =
            answers.iter_mut().enumerate().filter(|(_, answer)| !answer.ended).collect();
        if open.is_empty() {
            break;
        }
        let last: Vec<u32> = open.iter().filter_map(|(_, answer)| answer.ids.last().copied()).collect();
        let mut caches: Vec<&mut Cache> = open.iter_mut().map(|(_, answer)| &mut answer.cache).collect();
        let logits = model.decode_batch(exec, &last, &mut caches)?;
        for ((at, answer), logits) in open.iter_mut().zip(logits.chunks(model.config.vocab)) {
            answer.take(model, tokenizer, sampler.sample(logits, &[])?)?;
            answer.ended |= answer.ids.len() >= max_tokens || done(*at, &answer.text);
        }
    }
    Ok(answers.into_iter().map(|answer| answer.text).collect())
}

struct Answer {
    cache: Cache,
    ids: Vec<u32>,
    text: String,
    ended: bool,
}

impl Answer {
    fn take(&mut self, model: &Engine, tokenizer: &Tokenizer, id: u32) -> Result<()> {
        self.ended = model.config.eos_token_ids.contains(&id);
        if !self.ended {
            self.ids.push(id);
            self.text = tokenizer.decode(&self.ids, true)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Score;

    #[test]
    fn intervals_are_those_of_the_table() {
        // Newcombe (1998), table I, method 3: the score method without continuity correction.
        for (correct, asked, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let score = Score::new(correct, asked);
            assert!((score.low - low).abs() < 1e-4 && (score.high - high).abs() < 1e-4, "{score:?}");
        }
        let all = Score::new(20, 20);
        assert!((all.low - (1.0 - 0.1611)).abs() < 1e-4 && all.high == 1.0, "{all:?}");
        assert_eq!(Score::new(5, 10).to_string(), "5/10 50.0 % (23.7–76.3)");
    }
}
