//! Induction and copying on random tokens: how well a model predicts what it has seen before, by the distance to it.

use crate::answers::Score;
use crate::error::{EvalError, Result};
use crate::likelihood::Mean;
use crate::quality::{ROWS, argmax};
use kernels::{Exec, loss};
use model::{Engine, ModelError, Progress};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tasks::induction::{Returning, ordinary_ids, sequence};
use weights::Tokenizer;

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InductionTest {
    /// Tokens from the first occurrence to the second, each measured with both tasks.
    pub distances: Vec<usize>,
    /// Sequences per task and distance.
    pub samples: usize,
    /// Tokens that are copied.
    pub span: usize,
    /// Of them, those that are given.
    pub cue: usize,
    /// Seed of the tokens.
    pub seed: u64,
}

/// Scores at one distance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InductionResult {
    /// `repeat`: the whole sequence twice; `copy`: a span again after other tokens.
    pub task: String,
    /// Tokens between the two occurrences.
    pub distance: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens predicted right the second time (as the most likely one). The interval takes them as independent, which those of one sequence are not
    /// quite.
    #[serde(flatten)]
    pub score: Score,
    /// Copies predicted right from the cue to the end, which is what greedy generation gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<Score>,
    /// Loss of the tokens the second time, nats; mean over sequences with its standard error.
    pub loss: Mean,
    /// The same tokens the first time.
    pub first_loss: Mean,
}

/// Measures one model. Two models with the same tokenizer see the same sequences.
///
/// # Errors
/// [`EvalError::Argument`] for an empty test or sequences that cannot be made, [`EvalError::NonFinite`], [`EvalError::Model`] for sequences longer
/// than its context, [`EvalError::Weights`] of the tokenizer, [`EvalError::Interrupted`].
pub fn induction(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    test: &InductionTest,
    progress: &mut dyn Progress,
) -> Result<Vec<InductionResult>> {
    if test.samples == 0 || test.distances.is_empty() {
        return Err(EvalError::Argument("induction needs at least one distance and one sample".into()));
    }
    let ids = ordinary_ids(tokenizer, model.config.vocab)?;
    let tasks = [("repeat", Returning::Whole), ("copy", Returning::Span { span: test.span, cue: test.cue })];
    let bos = model.config.bos_token_id;
    let limit = model.config.max_context;
    for (&distance, (_, returning)) in test.distances.iter().flat_map(|d| tasks.iter().map(move |t| (d, t))) {
        sequence(&ids, *returning, distance, (test.seed, 0))?;
        let requested = returning.len(distance) + usize::from(bos.is_some());
        if requested > limit {
            return Err(ModelError::Context { requested, limit }.into());
        }
    }
    progress.start("induction", (tasks.len() * test.distances.len() * test.samples) as u64, "sequences");
    let mut results = Vec::new();
    for (name, returning) in tasks {
        for &distance in &test.distances {
            let mut sums = Sums::default();
            for index in 0..test.samples as u64 {
                if progress.cancelled() {
                    return Err(EvalError::Interrupted);
                }
                let made = sequence(&ids, returning, distance, (test.seed, index))?;
                let tokens: Vec<u32> = bos.into_iter().chain(made.tokens).collect();
                let shift = usize::from(bos.is_some());
                let [scored, first] =
                    [made.scored, made.first].map(|range| range.start + shift..range.end + shift);
                sums.add(exec, model, &tokens, scored, first)?;
                progress.advance(1, &format!("{name} {distance}: {}/{}", sums.right, sums.asked));
            }
            results.push(InductionResult {
                task: name.into(),
                distance,
                sequences: test.samples,
                score: Score::new(sums.right, sums.asked),
                whole: (returning != Returning::Whole).then(|| Score::new(sums.whole, test.samples)),
                loss: Mean::of(&sums.losses),
                first_loss: Mean::of(&sums.first_losses),
            });
        }
    }
    progress.finish();
    Ok(results)
}

#[derive(Default)]
struct Sums {
    right: usize,
    asked: usize,
    whole: usize,
    losses: Vec<f64>,
    first_losses: Vec<f64>,
}

impl Sums {
    fn add(
        &mut self,
        exec: &Exec,
        model: &Engine,
        tokens: &[u32],
        scored: Range<usize>,
        first: Range<usize>,
    ) -> Result<()> {
        let hidden = model.hidden(exec, &tokens[..tokens.len() - 1], &mut model.new_cache())?;
        let (right, loss) = predicted(exec, model, &hidden, tokens, scored.clone())?;
        self.right += right;
        self.asked += scored.len();
        self.whole += usize::from(right == scored.len());
        self.losses.push(loss);
        self.first_losses.push(predicted(exec, model, &hidden, tokens, first)?.1);
        Ok(())
    }
}

/// How many of the tokens at `range` are the most likely ones, and their mean loss. `hidden` `[tokens − 1, d_model]`; the range begins after 0.
fn predicted(
    exec: &Exec,
    model: &Engine,
    hidden: &[f32],
    tokens: &[u32],
    range: Range<usize>,
) -> Result<(usize, f64)> {
    let (vocab, d_model) = (model.config.vocab, model.config.d_model);
    let (mut right, mut total) = (0, 0.0);
    let rows = &hidden[(range.start - 1) * d_model..(range.end - 1) * d_model];
    for (rows, targets) in rows.chunks(ROWS * d_model).zip(tokens[range.clone()].chunks(ROWS)) {
        let logits = model.logits(exec, rows);
        let mut nll = vec![0.0; targets.len()];
        loss::cross_entropy(exec, &logits, vocab, targets, 1.0, &mut nll, None);
        total += nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        right += logits.chunks(vocab).zip(targets).filter(|(row, t)| argmax(row) == **t as usize).count();
    }
    match total.is_finite() {
        true => Ok((right, total / range.len() as f64)),
        false => Err(EvalError::NonFinite),
    }
}
