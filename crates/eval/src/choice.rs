//! Multiple choice: which of several texts is the most likely after a context. Scores are those of a `multiple_choice` task of EleutherAI's
//! lm-evaluation-harness (MIT), version 0.4.13 (`process_results` of `lm_eval/api/task.py`), with its `target_delimiter` of one space.

use crate::error::{EvalError, Result};
use crate::likelihood::{Likelihood, Mean, Request, at_line, log_likelihoods, read_items};
use kernels::Exec;
use model::{Engine, Progress};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use weights::Tokenizer;

/// What stands between context and choice.
const DELIMITER: &str = " ";

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ChoiceItem {
    /// What comes before every choice; may be empty.
    pub context: String,
    /// At least two texts.
    pub choices: Vec<String>,
    /// Index of the right one, from 0.
    pub answer: usize,
}

/// The questions of a file.
#[derive(Clone, Debug)]
pub struct ChoiceTest {
    path: PathBuf,
    items: Vec<(u64, ChoiceItem)>,
}

/// Scores of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChoiceResult {
    /// Share of questions whose right choice has the largest log-likelihood; of equal ones the first counts.
    pub acc: Mean,
    /// The same after division by the choice's length in characters.
    pub acc_norm: Mean,
    /// The same after division by its length in bytes.
    pub acc_bytes: Mean,
    /// Questions.
    pub items: usize,
    /// Choices whose context lost its beginning because it was longer than the model's.
    pub truncated: usize,
    /// Of every choice of every question.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub likelihoods: Vec<Vec<Likelihood>>,
}

impl ChoiceTest {
    /// Reads a file of JSON lines (`.gz` and `.zst` are unpacked), of at most `limit` questions the first.
    ///
    /// # Errors
    /// [`EvalError::File`] with the line that is no question, or for a file without any.
    pub fn read(path: &Path, limit: Option<usize>) -> Result<Self> {
        let expected = "a JSON object with a string `context`, an array of strings `choices`, and the index `answer` of the right one";
        let items: Vec<(u64, ChoiceItem)> = read_items(path, expected, limit)?;
        for (line, ChoiceItem { choices, answer, .. }) in &items {
            let wrong = if choices.len() < 2 {
                format!("{} choices leave nothing to choose\nhint: give at least two", choices.len())
            } else if *answer >= choices.len() {
                format!(
                    "answer {answer} is none of the {} choices\nhint: it is an index and counts from 0",
                    choices.len()
                )
            } else if let Some(i) = choices.iter().position(String::is_empty) {
                format!("choice {i} is empty\nhint: every choice needs some text")
            } else {
                continue;
            };
            return Err(at_line(path, *line, EvalError::Argument(wrong)));
        }
        Ok(Self { path: path.into(), items })
    }

    /// The questions in order.
    pub fn items(&self) -> impl Iterator<Item = &ChoiceItem> {
        self.items.iter().map(|(_, item)| item)
    }
}

/// Asks one model; the context is read once for all its choices.
///
/// # Errors
/// [`EvalError::File`] with the line that cannot be asked, [`EvalError::NonFinite`], [`EvalError::Model`], [`EvalError::Weights`] of the
/// tokenizer, [`EvalError::Interrupted`].
pub fn choice(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    test: &ChoiceTest,
    progress: &mut dyn Progress,
) -> Result<ChoiceResult> {
    progress.start("choice", test.items.len() as u64, "questions");
    let (mut likelihoods, mut truncated, mut right) = (Vec::new(), 0, 0);
    for (line, item) in &test.items {
        if progress.cancelled() {
            return Err(EvalError::Interrupted);
        }
        let encode =
            |choice: &String| Request::encode(tokenizer, &item.context, &[DELIMITER, choice].concat());
        let (scores, cut) = item
            .choices
            .iter()
            .map(encode)
            .collect::<Result<Vec<_>>>()
            .and_then(|requests| log_likelihoods(exec, model, &requests))
            .map_err(|error| at_line(&test.path, *line, error))?;
        truncated += cut;
        right += usize::from(best(&scores, item, |_| 1) == item.answer);
        likelihoods.push(scores);
        progress.advance(1, &format!("{right}/{}", likelihoods.len()));
    }
    progress.finish();
    Ok(summarise(test, likelihoods, truncated))
}

fn summarise(test: &ChoiceTest, likelihoods: Vec<Vec<Likelihood>>, truncated: usize) -> ChoiceResult {
    let acc = |length: fn(&str) -> usize| {
        let right =
            test.items().zip(&likelihoods).map(|(item, scores)| best(scores, item, length) == item.answer);
        Mean::share(right)
    };
    let (plain, norm, bytes) = (acc(|_| 1), acc(|choice| choice.chars().count()), acc(str::len));
    let items = test.items.len();
    ChoiceResult { acc: plain, acc_norm: norm, acc_bytes: bytes, items, truncated, likelihoods }
}

/// The first of the choices of largest log-likelihood per length.
fn best(scores: &[Likelihood], item: &ChoiceItem, length: impl Fn(&str) -> usize) -> usize {
    let per_length =
        scores.iter().zip(&item.choices).map(|(score, choice)| score.log_likelihood / length(choice) as f64);
    let first = (0, f64::NEG_INFINITY);
    per_length.enumerate().fold(first, |best, (i, x)| if x > best.1 { (i, x) } else { best }).0
}
