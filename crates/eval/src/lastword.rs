//! The last word of a text (arXiv 1606.06031): does a model write it, and how surprised is it. As task `lambada_openai` of EleutherAI's
//! lm-evaluation-harness (MIT), version 0.4.13: the context is everything before the last space, the target a space and what follows.

use crate::error::{EvalError, Result};
use crate::likelihood::{Likelihood, Mean, Request, at_line, log_likelihoods, read_items};
use kernels::Exec;
use model::{Engine, Progress};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use weights::Tokenizer;

/// The texts of a file.
#[derive(Clone, Debug)]
pub struct LastWordTest {
    path: PathBuf,
    texts: Vec<(u64, String)>,
}

/// Scores of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastWordResult {
    /// Share of texts whose last word is the greedy continuation, token by token.
    pub acc: Mean,
    /// `exp` of minus the mean log-likelihood of a last word (of all its tokens). The standard error is that of the mean times the perplexity, what
    /// the bootstrap of the harness estimates.
    pub perplexity: Mean,
    /// Texts.
    pub items: usize,
    /// Texts that lost their beginning because they were longer than the model's context.
    pub truncated: usize,
    /// Of every last word.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub likelihoods: Vec<Likelihood>,
}

impl LastWordTest {
    /// Reads a file of JSON lines (`.gz` and `.zst` are unpacked), of at most `limit` texts the first.
    ///
    /// # Errors
    /// [`EvalError::File`] with the line that holds no text or ends with a space, or for a file without any.
    pub fn read(path: &Path, limit: Option<usize>) -> Result<Self> {
        #[derive(Deserialize)]
        struct Line {
            text: String,
        }
        let items: Vec<(u64, Line)> = read_items(path, "a JSON object with a string `text`", limit)?;
        let texts = items.into_iter().map(|(line, Line { text })| (line, text));
        let test = Self { path: path.into(), texts: texts.collect() };
        for (line, text) in &test.texts {
            if split(text).1.len() < 2 {
                let wrong =
                    "the text ends with a space or is empty\nhint: its last word is what is asked for";
                return Err(at_line(path, *line, EvalError::Argument(wrong.into())));
            }
        }
        Ok(test)
    }
}

/// Context and target: a space and the last word.
fn split(text: &str) -> (&str, String) {
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", text));
    (context, format!(" {word}"))
}

/// Asks one model.
///
/// # Errors
/// [`EvalError::File`] with the line that cannot be asked, [`EvalError::NonFinite`], [`EvalError::Model`], [`EvalError::Weights`] of the
/// tokenizer, [`EvalError::Interrupted`].
pub fn lastword(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    test: &LastWordTest,
    progress: &mut dyn Progress,
) -> Result<LastWordResult> {
    progress.start("last words", test.texts.len() as u64, "texts");
    let (mut likelihoods, mut truncated, mut right) = (Vec::new(), 0, 0);
    for (line, text) in &test.texts {
        if progress.cancelled() {
            return Err(EvalError::Interrupted);
        }
        let (context, word) = split(text);
        let (scores, cut) = Request::encode(tokenizer, context, &word)
            .and_then(|request| log_likelihoods(exec, model, &[request]))
            .map_err(|error| at_line(&test.path, *line, error))?;
        truncated += cut;
        right += scores.iter().filter(|score| score.greedy).count();
        likelihoods.extend(scores);
        progress.advance(1, &format!("{right}/{}", likelihoods.len()));
    }
    progress.finish();
    Ok(summarise(likelihoods, truncated))
}

fn summarise(likelihoods: Vec<Likelihood>, truncated: usize) -> LastWordResult {
    let mean = Mean::of(&likelihoods.iter().map(|l| l.log_likelihood).collect::<Vec<_>>());
    let value = (-mean.value).exp();
    let perplexity = Mean { value, stderr: mean.stderr.map(|e| e * value) };
    let acc = Mean::share(likelihoods.iter().map(|l| l.greedy));
    LastWordResult { acc, perplexity, items: likelihoods.len(), truncated, likelihoods }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_space_ends_the_context() {
        assert_eq!(split("a b  c"), ("a b ", " c".into()));
        assert_eq!(split("one"), ("", " one".into()));
        assert_eq!(split("a\nb c\nd"), ("a\nb", " c\nd".into()));
        assert_eq!(split("a ").1, " ");
    }

    #[test]
    fn perplexity_is_of_whole_words_with_the_error_of_their_mean() {
        let word = |log_likelihood, greedy| Likelihood { log_likelihood, greedy };
        let result = summarise(vec![word(-1.0, true), word(-3.0, false)], 1);
        let e2 = 2.0_f64.exp();
        // The sample's deviation is √2, that of the mean 1.
        assert!((result.perplexity.value - e2).abs() < 1e-12);
        assert!((result.perplexity.stderr.unwrap() - e2).abs() < 1e-12);
        assert_eq!((result.acc.value, result.items, result.truncated), (0.5, 2, 1));
    }
}
