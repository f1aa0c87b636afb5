//! Perplexity, and divergence and agreement with a base model, over windows of text.

use crate::error::{EvalError, Result};
use crate::text::{EvalText, Window};
use kernels::{Exec, loss};
use model::{Engine, Progress};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Rows of logits formed at a time, so that `[seq, vocab]` never exists whole.
pub(crate) const ROWS: usize = 256;

/// Scores of one model on one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileQuality {
    /// File or domain.
    pub name: String,
    /// `exp(nll)`.
    pub ppl: f64,
    /// Mean negative log-likelihood per scored token, nats.
    pub nll: f64,
    /// Mean `KL(base ‖ model)` per scored token, nats; absent without a base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of positions where both models' best tokens agree; absent without a base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Tokens scored.
    pub tokens: usize,
}

/// Scores over all files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OverallQuality {
    /// Geometric mean of the files' perplexities.
    pub ppl: f64,
    /// Mean KL per token over all files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Agreement over all files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Tokens scored.
    pub tokens: usize,
}

/// The result of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Per file.
    pub files: Vec<FileQuality>,
    /// Over all.
    pub overall: OverallQuality,
}

/// What scored rows add up to.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sums {
    pub nll: f64,
    pub kl: f64,
    pub agree: usize,
    pub tokens: usize,
}

/// Scores every model of `models` on the same windows. With a `base`, each is also compared with it; the base runs once per window, also when it is
/// itself (the same reference) among the models.
/// `progress` advances by tokens times models.
///
/// # Errors
/// [`EvalError::Mismatch`] when a model's vocabulary is not the base's, [`EvalError::Model`] for tokens a model refuses,
/// [`EvalError::Interrupted`].
pub fn evaluate(
    exec: &Exec,
    base: Option<&Engine>,
    models: &[&Engine],
    texts: &[EvalText],
    progress: &mut dyn Progress,
) -> Result<Vec<Quality>> {
    if let Some(base) = base {
        let expected = base.config.vocab;
        if let Some(found) = models.iter().map(|m| m.config.vocab).find(|&vocab| vocab != expected) {
            return Err(EvalError::Mismatch { expected, found });
        }
    }
    let total: usize = texts.iter().flat_map(|t| &t.windows).map(|w| w.tokens.len()).sum();
    progress.start("evaluate", (total * models.len()) as u64, "tok");
    let mut sums = vec![vec![Sums::default(); texts.len()]; models.len()];
    for (file, text) in texts.iter().enumerate() {
        for window in &text.windows {
            if progress.cancelled() {
                return Err(EvalError::Interrupted);
            }
            let base_hidden = base.map(|b| hidden(exec, b, window)).transpose()?;
            let mut hiddens = Vec::with_capacity(models.len());
            for &model in models {
                hiddens.push(match (&base_hidden, base) {
                    (Some(of_base), Some(base)) if std::ptr::eq(base, model) => of_base.clone(),
                    _ => hidden(exec, model, window)?,
                });
            }
            let mut row = window.score_from - 1;
            let end = window.tokens.len() - 1;
            while row < end {
                let rows = row..(row + ROWS).min(end);
                let teacher = base.zip(base_hidden.as_deref()).map(|(b, h)| logits(exec, b, h, &rows));
                for ((model, own), sums) in models.iter().zip(&hiddens).zip(&mut sums) {
                    let student = logits(exec, model, own, &rows);
                    let targets = &window.tokens[rows.start + 1..rows.end + 1];
                    sums[file].add(exec, model.config.vocab, &student, teacher.as_deref(), targets);
                }
                row = rows.end;
            }
            progress.advance((window.tokens.len() * models.len()) as u64, &text.name);
        }
    }
    progress.finish();
    Ok(sums.iter().map(|per_file| summarise(texts, per_file, base.is_some())).collect())
}

pub(crate) fn hidden(exec: &Exec, model: &Engine, window: &Window) -> Result<Vec<f32>> {
    // The last token is only predicted, never read.
    let tokens = &window.tokens[..window.tokens.len() - 1];
    Ok(model.hidden(exec, tokens, &mut model.new_cache())?)
}

pub(crate) fn logits(exec: &Exec, model: &Engine, hidden: &[f32], rows: &Range<usize>) -> Vec<f32> {
    let d_model = model.config.d_model;
    model.logits(exec, &hidden[rows.start * d_model..rows.end * d_model])
}

impl Sums {
    /// Adds rows of logits that predict `targets`.
    pub fn add(
        &mut self,
        exec: &Exec,
        vocab: usize,
        student: &[f32],
        teacher: Option<&[f32]>,
        targets: &[u32],
    ) {
        let sum = |values: &[f32]| values.iter().map(|&x| f64::from(x)).sum::<f64>();
        let mut per_row = vec![0.0; targets.len()];
        loss::cross_entropy(exec, student, vocab, targets, 1.0, &mut per_row, None);
        self.nll += sum(&per_row);
        if let Some(teacher) = teacher {
            loss::kl_divergence(exec, teacher, student, vocab, 1.0, &mut per_row, None);
            self.kl += sum(&per_row);
            let agree = exec.parallel_map(targets.len(), |r| {
                let [teacher, student] = [teacher, student].map(|logits| &logits[r * vocab..][..vocab]);
                argmax(teacher) == argmax(student)
            });
            self.agree += agree.into_iter().filter(|&agree| agree).count();
        }
        self.tokens += targets.len();
    }
}

/// The first of the largest values; NaN counts as smaller than any.
pub(crate) fn argmax(row: &[f32]) -> usize {
    const LANES: usize = 16;
    let larger = |best: f32, x: f32| if x > best { x } else { best };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    // Lane by lane, which is compiled to vectors.
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (best, &x) in lanes.iter_mut().zip(chunk) {
            *best = larger(*best, x);
        }
    }
    let best = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    row.iter().position(|&x| x == best && best > f32::NEG_INFINITY).unwrap_or(0)
}

fn summarise(texts: &[EvalText], sums: &[Sums], compared: bool) -> Quality {
    let mean = |total: f64, tokens: usize| total / tokens as f64;
    let files: Vec<FileQuality> = texts
        .iter()
        .zip(sums)
        .map(|(text, s)| {
            let nll = mean(s.nll, s.tokens);
            FileQuality {
                name: text.name.clone(),
                ppl: nll.exp(),
                nll,
                kl: compared.then(|| mean(s.kl, s.tokens)),
                top1_agreement: compared.then(|| mean(s.agree as f64, s.tokens)),
                tokens: s.tokens,
            }
        })
        .collect();
    let tokens: usize = sums.iter().map(|s| s.tokens).sum();
    let overall = OverallQuality {
        ppl: (files.iter().map(|f| f.nll).sum::<f64>() / files.len() as f64).exp(),
        kl: compared.then(|| mean(sums.iter().map(|s| s.kl).sum(), tokens)),
        top1_agreement: compared.then(|| mean(sums.iter().map(|s| s.agree as f64).sum(), tokens)),
        tokens,
    };
    Quality { files, overall }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_values_wins() {
        let naive = |row: &[f32]| {
            let better = |best: (usize, f32), (i, &x): (usize, &f32)| if x > best.1 { (i, x) } else { best };
            row.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0
        };
        for len in [0, 1, 15, 16, 17, 31, 33, 100] {
            for at in 0..len {
                let mut row: Vec<f32> = (0..len).map(|i| ((i * 7) % 11) as f32).collect();
                assert_eq!(argmax(&row), naive(&row), "ties of {len}");
                row[at] = 20.0;
                assert_eq!(argmax(&row), at, "{len}");
                row[(at + 3) % len] = 20.0;
                assert_eq!(argmax(&row), at.min((at + 3) % len), "{len}");
                row[0] = f32::NAN;
                assert_eq!(argmax(&row), naive(&row), "NaN of {len}");
                row.fill(f32::NEG_INFINITY);
                assert_eq!(argmax(&row), 0);
                row[at] = -1e30;
                assert_eq!(argmax(&row), at);
            }
        }
        assert_eq!(argmax(&[]), 0);
    }
}
