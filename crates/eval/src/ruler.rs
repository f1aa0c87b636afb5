//! RULER's retrieval tasks: the share of the wanted answers that occur in the greedy one, whatever their case.

use crate::answers::{Score, greedy_answers};
use crate::error::{EvalError, Result};
use kernels::Exec;
use model::{Engine, Progress};
use serde::{Deserialize, Serialize};
use tasks::ruler::{RulerTask, prompt};
use weights::Tokenizer;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulerTest {
    /// Tasks, each tested at every context.
    pub tasks: Vec<RulerTask>,
    /// Context lengths in tokens, prompt and answer together.
    pub contexts: Vec<usize>,
    /// Prompts per task and context.
    pub samples: usize,
    /// Seed of the prompts.
    pub seed: u64,
}

/// Score at one task and one context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RulerResult {
    /// Name of the task.
    pub task: String,
    /// Tokens, prompt and answer.
    pub context: usize,
    /// Prompts.
    pub prompts: usize,
    /// Answers found of all that were wanted; tasks with several answers want them all of every prompt.
    #[serde(flatten)]
    pub score: Score,
}

/// Scores one model, task by task, context by context. An answer ends as soon as all that was wanted is in it, which cannot change its score.
///
/// # Errors
/// [`EvalError::Argument`] for an empty test or a task that does not fit, [`EvalError::Model`], [`EvalError::Interrupted`].
pub fn ruler(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    test: &RulerTest,
    progress: &mut dyn Progress,
) -> Result<Vec<RulerResult>> {
    if test.samples == 0 || test.tasks.is_empty() || test.contexts.is_empty() {
        return Err(EvalError::Argument("ruler needs at least one task, context and sample".into()));
    }
    let cells = test.tasks.len() * test.contexts.len();
    progress.start("ruler", (cells * test.samples) as u64, "prompts");
    let bos = model.config.bos_token_id;
    let mut results = Vec::with_capacity(cells);
    for &task in &test.tasks {
        for &context in &test.contexts {
            let (mut correct, mut asked) = (0, 0);
            for index in 0..test.samples {
                if progress.cancelled() {
                    return Err(EvalError::Interrupted);
                }
                let reserved = usize::from(bos.is_some());
                let made = prompt(tokenizer, task, context, reserved, (test.seed, index as u64))?;
                let ids: Vec<u32> = bos.into_iter().chain(tokenizer.encode(&made.text, false)?).collect();
                let all = |_, text: &str| found(text, &made.answers) == made.answers.len();
                let text = greedy_answers(exec, model, tokenizer, &[ids], task.answer_tokens(), all)?;
                correct += found(&text[0], &made.answers);
                asked += made.answers.len();
                progress.advance(1, &format!("{}, {context} tokens: {correct}/{asked}", task.name()));
            }
            results.push(RulerResult {
                task: task.name().into(),
                context,
                prompts: test.samples,
                score: Score::new(correct, asked),
            });
        }
    }
    progress.finish();
    Ok(results)
}

/// Answers that occur in the text, upper and lower case alike.
fn found(text: &str, answers: &[String]) -> usize {
    let text = text.to_lowercase();
    answers.iter().filter(|answer| text.contains(&answer.to_lowercase())).count()
}

#[cfg(test)]
mod tests {
    use super::found;

    #[test]
    fn recall_ignores_case_and_surroundings() {
        let answers = ["1234567", "ABCDE", "xyz"].map(String::from);
        assert_eq!(found(" 1234567, abcde and more", &answers), 2);
        assert_eq!(found("xXYZx 12345678", &answers), 2);
        assert_eq!(found("", &answers), 0);
    }
}
