//! Log-likelihoods of texts that continue others. Tokens, truncation and sums are those of EleutherAI's lm-evaluation-harness (MIT), version 0.4.13:
//! `_encode_pair` and `loglikelihood` of `lm_eval/api/model.py`, `_loglikelihood_tokens` of `lm_eval/models/huggingface.py`.

use crate::error::{EvalError, Result};
use crate::quality::{ROWS, argmax};
use kernels::{Exec, loss};
use model::Engine;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;
use train::TrainError;
use train::data::read_json_lines;
use weights::Tokenizer;

/// A context and what is to follow it, in tokens, at least one of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    context: Vec<u32>,
    continuation: Vec<u32>,
}

/// How well a continuation fits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Likelihood {
    /// Sum over its tokens, nats.
    pub log_likelihood: f64,
    /// Whether each of its tokens is the most likely one.
    pub greedy: bool,
}

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub value: f64,
    /// Standard error; absent for a single value.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stderr: Option<f64>,
}

impl Request {
    /// Tokens of a pair. White space at the end of the context goes to the continuation; then context and both together are encoded, and what of
    /// the latter lies beyond the former's length is the continuation. The tokenizer's own special tokens (BOS) are added, unless the text begins
    /// with that token. An empty context is the BOS token, or EOS for a tokenizer without.
    ///
    /// # Errors
    /// [`EvalError::Argument`] when one of the two has no token, [`EvalError::Weights`] of the tokenizer.
    pub fn encode(tokenizer: &Tokenizer, context: &str, continuation: &str) -> Result<Self> {
        let prefix = tokenizer.bos_id().or_else(|| tokenizer.eos_id());
        let (context, continuation) = if context.is_empty() {
            let mut ids = tokenizer.encode(continuation, false)?;
            match prefix {
                Some(prefix) if ids.first() == Some(&prefix) => (vec![prefix], ids.split_off(1)),
                prefix => (prefix.into_iter().collect(), ids),
            }
        } else {
            let start = context.trim_end_matches(is_space);
            let both = [context, continuation].concat();
            let begun = prefix.and_then(|id| tokenizer.token_text(id));
            let encode = |text: &str| {
                let own = begun.as_ref().is_none_or(|begun| !text.starts_with(begun.as_str()));
                tokenizer.encode(text, own)
            };
            let context = encode(start)?;
            let continuation = encode(&both)?.into_iter().skip(context.len()).collect();
            (context, continuation)
        };
        let nothing = |what: &str| {
            Err(EvalError::Argument(format!(
                "the tokenizer makes no token of the {what}\nhint: leave it out"
            )))
        };
        match (context.is_empty(), continuation.is_empty()) {
            (true, _) => nothing("context, and has no token to begin with"),
            (_, true) => nothing("continuation"),
            _ => Ok(Self { context, continuation }),
        }
    }

    /// Tokens that are read, at most `limit`, and whether some had to be left out at the beginning. The last of the continuation is only
    /// predicted.
    fn inputs(&self, limit: usize) -> Result<(Vec<u32>, bool)> {
        if self.continuation.len() > limit {
            return Err(EvalError::Argument(format!(
                "a continuation has {} tokens, the model's context only {limit}\nhint: shorten it",
                self.continuation.len()
            )));
        }
        let mut tokens = [self.context.as_slice(), &self.continuation].concat();
        tokens.pop();
        let left_out = tokens.len().saturating_sub(limit);
        Ok((tokens.split_off(left_out), left_out > 0))
    }
}

/// Python's `str.isspace`: Unicode's white space and four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Scores every request; what they have in common at their beginning is read once. Tokens beyond the model's context are left out at the beginning;
/// also returns of how many requests.
///
/// # Errors
/// [`EvalError::Argument`] for a continuation longer than the model's context, [`EvalError::NonFinite`], [`EvalError::Model`].
pub fn log_likelihoods(
    exec: &Exec,
    model: &Engine,
    requests: &[Request],
) -> Result<(Vec<Likelihood>, usize)> {
    let limit = model.config.max_context;
    let inputs = requests.iter().map(|r| r.inputs(limit)).collect::<Result<Vec<_>>>()?;
    let truncated = inputs.iter().filter(|(_, truncated)| *truncated).count();
    let Some((first, _)) = inputs.first() else { return Ok((Vec::new(), 0)) };
    // Each reads the tokens itself that its continuation is predicted from.
    let shared = |((tokens, _), request): (&(Vec<u32>, bool), &Request)| {
        let alike = first.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        alike.min(tokens.len() - request.continuation.len())
    };
    let common = match requests.len() {
        1 => 0,
        _ => inputs.iter().zip(requests).map(shared).min().unwrap_or(0),
    };
    let mut beginning = model.new_cache();
    model.hidden(exec, &first[..common], &mut beginning)?;
    let mut scores = Vec::with_capacity(requests.len());
    for ((tokens, _), Request { continuation, .. }) in inputs.iter().zip(requests) {
        let hidden = model.hidden(exec, &tokens[common..], &mut beginning.clone())?;
        let d_model = model.config.d_model;
        let rows = &hidden[hidden.len() - continuation.len() * d_model..];
        scores.push(score(exec, model, rows, continuation)?);
    }
    Ok((scores, truncated))
}

/// Of final hidden states `[targets, d_model]`.
fn score(exec: &Exec, model: &Engine, hidden: &[f32], targets: &[u32]) -> Result<Likelihood> {
    let (vocab, d_model) = (model.config.vocab, model.config.d_model);
    let mut total = Likelihood { log_likelihood: 0.0, greedy: true };
    for (hidden, targets) in hidden.chunks(ROWS * d_model).zip(targets.chunks(ROWS)) {
        let logits = model.logits(exec, hidden);
        let mut nll = vec![0.0; targets.len()];
        loss::cross_entropy(exec, &logits, vocab, targets, 1.0, &mut nll, None);
        total.log_likelihood -= nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        total.greedy &= logits.chunks(vocab).zip(targets).all(|(row, &t)| argmax(row) == t as usize);
    }
    match total.log_likelihood.is_finite() {
        true => Ok(total),
        false => Err(EvalError::NonFinite),
    }
}

impl Mean {
    /// Mean and its standard error, from the sample's variance (`mean` and `mean_stderr` of `lm_eval/api/metrics.py`).
    ///
    /// # Panics
    /// Without values.
    pub fn of(values: &[f64]) -> Self {
        assert!(!values.is_empty(), "a mean of nothing");
        let n = values.len() as f64;
        let value = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
        Self { value, stderr: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt()) }
    }

    /// Of how often something is true.
    pub fn share(values: impl Iterator<Item = bool>) -> Self {
        Self::of(&values.map(|right| f64::from(u8::from(right))).collect::<Vec<_>>())
    }
}

impl std::fmt::Display for Mean {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stderr = self.stderr.map_or(String::new(), |e| format!(" ± {}", crate::report::number(e)));
        f.pad(&format!("{}{stderr}", crate::report::number(self.value)))
    }
}

/// Reads the items of a test, at most `limit` of them, with the numbers of their lines.
pub(crate) fn read_items<T: DeserializeOwned>(
    path: &Path,
    expected: &str,
    limit: Option<usize>,
) -> Result<Vec<(u64, T)>> {
    let mut items = read_json_lines(path, expected).map_err(|error| match error {
        TrainError::File { path, reason } => EvalError::File {
            path,
            reason: format!("{reason}\nhint: one object per line; other fields may stand beside"),
        },
        other => other.into(),
    })?;
    items.truncate(limit.unwrap_or(usize::MAX));
    match items.is_empty() {
        true => Err(EvalError::File {
            path: path.into(),
            reason: format!("there is nothing to ask\nhint: every line is {expected}"),
        }),
        false => Ok(items),
    }
}

/// Says in which line of which file something cannot be asked.
pub(crate) fn at_line(path: &Path, line: u64, error: EvalError) -> EvalError {
    match error {
        EvalError::Argument(reason) => {
            EvalError::File { path: path.into(), reason: format!("line {line}: {reason}") }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_have_the_standard_error_of_the_sample() {
        let mean = Mean::of(&[1.0, 2.0, 4.0]);
        // Variance (16 + 1 + 25) / 9 / 2 = 7/3, over 3 values.
        assert!(
            (mean.value - 7.0 / 3.0).abs() < 1e-12
                && (mean.stderr.unwrap() - 7.0_f64.sqrt() / 3.0).abs() < 1e-12
        );
        assert_eq!(Mean::of(&[5.0]), Mean { value: 5.0, stderr: None });
        assert_eq!(Mean::share([true, false].into_iter()), Mean { value: 0.5, stderr: Some(0.5) });
    }

    #[test]
    fn inputs_lack_what_is_only_predicted_and_what_does_not_fit() {
        let request = Request { context: vec![1, 2, 3], continuation: vec![4, 5] };
        assert_eq!(request.inputs(4).unwrap(), (vec![1, 2, 3, 4], false));
        assert_eq!(request.inputs(3).unwrap(), (vec![2, 3, 4], true));
        assert_eq!(request.inputs(2).unwrap(), (vec![3, 4], true));
        assert!(request.inputs(1).unwrap_err().to_string().contains("2 tokens"));
    }
}
