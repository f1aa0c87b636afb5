//! One conversion against the base on windows of text: the base runs once, intervals come from the windows.

use crate::error::{EvalError, Result};
use crate::quality::{ROWS, Sums, hidden, logits};
use crate::text::{EvalText, Window};
use kernels::Exec;
use model::{Engine, Progress};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The base's final hidden states are kept up to this size, else they are computed again for every model.
const HIDDEN_BYTES: usize = 1 << 30;
/// Resamples behind an interval.
const RESAMPLES: usize = 2000;

/// A figure with its 95 % interval: percentiles of a bootstrap over windows, which keeps tokens that depend on each other together.
/// Absent where there are fewer than two windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Lower and upper end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
}

/// How far a model is from its base on some text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distance {
    /// Perplexity over the base's, `exp` of the mean difference of their negative log-likelihoods per token.
    pub ppl_ratio: Estimate,
    /// Mean `KL(base ‖ model)` per token, nats.
    pub kl: Estimate,
    /// Share of positions where both models' best tokens agree.
    pub top1_agreement: Estimate,
    /// Tokens scored.
    pub tokens: usize,
}

/// What one window adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct WindowScore {
    pub tokens: usize,
    /// Negative log-likelihood of the model.
    pub nll: f64,
    /// Of the base.
    pub base_nll: f64,
    pub kl: f64,
    pub agree: usize,
}

/// The base on the windows that every model is judged on.
pub struct Reference<'a> {
    exec: &'a Exec,
    base: &'a Engine,
    windows: Vec<&'a Window>,
    /// Final hidden states of every window, when they fit.
    hidden: Option<Vec<Vec<f32>>>,
    nll: Vec<f64>,
    /// Of the bootstrap.
    seed: u64,
}

impl<'a> Reference<'a> {
    /// Runs the base. `progress` advances by tokens, in a phase that the caller has begun.
    ///
    /// # Errors
    /// [`EvalError::Argument`] without a window, [`EvalError::Model`] for tokens that the base refuses, [`EvalError::Interrupted`].
    pub fn new(
        exec: &'a Exec,
        base: &'a Engine,
        texts: &'a [EvalText],
        seed: u64,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let windows: Vec<&Window> = texts.iter().flat_map(|text| &text.windows).collect();
        if windows.is_empty() {
            return Err(EvalError::Argument("there is no window of text to judge on".into()));
        }
        let values: usize = windows.iter().map(|w| w.tokens.len() * base.config.d_model).sum();
        let keep = values * size_of::<f32>() <= HIDDEN_BYTES;
        let mut reference = Self { exec, base, windows, hidden: None, nll: Vec::new(), seed };
        let (mut kept, mut nll) = (Vec::new(), Vec::new());
        for window in &reference.windows {
            if progress.cancelled() {
                return Err(EvalError::Interrupted);
            }
            let states = hidden(exec, base, window)?;
            let mut sums = Sums::default();
            for rows in rows_of(window) {
                let own = logits(exec, base, &states, &rows);
                sums.add(exec, base.config.vocab, &own, None, &window.tokens[rows.start + 1..rows.end + 1]);
            }
            nll.push(sums.nll);
            if keep {
                kept.push(states);
            }
            progress.advance(window.tokens.len() as u64, "base");
        }
        (reference.hidden, reference.nll) = (keep.then_some(kept), nll);
        Ok(reference)
    }

    /// Tokens of all windows: what [`judge`](Self::judge) advances by.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(|w| w.tokens.len()).sum()
    }

    /// The base's perplexity over all windows.
    pub fn perplexity(&self) -> f64 {
        let scored: usize = self.windows.iter().map(|w| w.scored()).sum();
        (self.nll.iter().sum::<f64>() / scored as f64).exp()
    }

    /// How far `model` is from the base. `progress` advances by tokens, in a phase that the caller has begun.
    ///
    /// # Errors
    /// [`EvalError::Mismatch`] when the vocabularies differ, [`EvalError::Model`], [`EvalError::Interrupted`].
    pub fn judge(&self, model: &Engine, name: &str, progress: &mut dyn Progress) -> Result<Distance> {
        let (expected, found) = (self.base.config.vocab, model.config.vocab);
        if expected != found {
            return Err(EvalError::Mismatch { expected, found });
        }
        let mut scores = Vec::with_capacity(self.windows.len());
        for (i, window) in self.windows.iter().enumerate() {
            if progress.cancelled() {
                return Err(EvalError::Interrupted);
            }
            let own = hidden(self.exec, model, window)?;
            let again;
            let teacher = match &self.hidden {
                Some(kept) => &kept[i],
                None => {
                    again = hidden(self.exec, self.base, window)?;
                    &again
                }
            };
            let mut sums = Sums::default();
            for rows in rows_of(window) {
                let teacher = logits(self.exec, self.base, teacher, &rows);
                let student = logits(self.exec, model, &own, &rows);
                let targets = &window.tokens[rows.start + 1..rows.end + 1];
                sums.add(self.exec, found, &student, Some(&teacher), targets);
            }
            let Sums { nll, kl, agree, tokens } = sums;
            scores.push(WindowScore { tokens, nll, base_nll: self.nll[i], kl, agree });
            progress.advance(window.tokens.len() as u64, name);
        }
        Ok(distance(&scores, self.seed))
    }
}

/// The rows of a window that predict its scored tokens, some at a time.
fn rows_of(window: &Window) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
    let (start, end) = (window.score_from - 1, window.tokens.len() - 1);
    (start..end).step_by(ROWS).map(move |row| row..(row + ROWS).min(end))
}

/// Figures over all windows and their intervals.
pub(super) fn distance(scores: &[WindowScore], seed: u64) -> Distance {
    let figures = |chosen: &mut dyn Iterator<Item = usize>| -> [f64; 3] {
        let mut sum = WindowScore::default();
        for i in chosen {
            let WindowScore { tokens, nll, base_nll, kl, agree } = scores[i];
            sum.tokens += tokens;
            sum.nll += nll;
            sum.base_nll += base_nll;
            sum.kl += kl;
            sum.agree += agree;
        }
        let per_token = |total: f64| total / sum.tokens as f64;
        [per_token(sum.nll - sum.base_nll).exp(), per_token(sum.kl), per_token(sum.agree as f64)]
    };
    let count = scores.len();
    let values = figures(&mut (0..count));
    let mut drawn: [Vec<f64>; 3] = Default::default();
    if count > 1 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..RESAMPLES {
            let resample = figures(&mut (0..count).map(|_| rng.random_range(0..count)));
            drawn.iter_mut().zip(resample).for_each(|(drawn, x)| drawn.push(x));
        }
    }
    let estimate = |i: usize| {
        let mut drawn = drawn[i].clone();
        drawn.sort_by(f64::total_cmp);
        let at = |share: f64| drawn[(share * (drawn.len() - 1) as f64).round() as usize];
        Estimate { value: values[i], interval: (!drawn.is_empty()).then(|| (at(0.025), at(0.975))) }
    };
    Distance {
        ppl_ratio: estimate(0),
        kl: estimate(1),
        top1_agreement: estimate(2),
        tokens: scores.iter().map(|s| s.tokens).sum(),
    }
}
