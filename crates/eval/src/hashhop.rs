//! HashHop: the end of a chain of random strings, asked for by its start; exact match of the greedy answer.

use crate::answers::{Score, greedy_answers};
use crate::error::{EvalError, Result};
use kernels::Exec;
use model::{Engine, Progress};
use serde::{Deserialize, Serialize};
use tasks::hashhop::{Answering, HashHopOptions, prompt};
use weights::Tokenizer;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashHopTest {
    /// Hops, each tested at every context.
    pub hops: Vec<usize>,
    /// Context lengths in tokens, prompt and answer together.
    pub contexts: Vec<usize>,
    /// Letters per string.
    pub hash_length: usize,
    /// What answers say; only the end of the chain is compared.
    pub answering: Answering,
    /// Queries per hops and context.
    pub samples: usize,
    /// Queries asked of one prompt (fewer where it has fewer chains).
    pub queries_per_prompt: usize,
    /// Seed of the strings.
    pub seed: u64,
}

/// Score at one number of hops and one context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HashHopResult {
    /// Hops.
    pub hops: usize,
    /// Tokens, prompt and answer.
    pub context: usize,
    /// Prompts that the queries were asked of.
    pub prompts: usize,
    /// Queries answered with the right string.
    #[serde(flatten)]
    pub score: Score,
}

/// Scores one model, hops by hops, context by context. Every prompt is read once for all its queries.
///
/// # Errors
/// [`EvalError::Argument`] for an empty test or a task that does not fit, [`EvalError::Model`], [`EvalError::Interrupted`].
pub fn hashhop(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    test: &HashHopTest,
    progress: &mut dyn Progress,
) -> Result<Vec<HashHopResult>> {
    if test.samples == 0 || test.queries_per_prompt == 0 || test.hops.is_empty() || test.contexts.is_empty() {
        return Err(EvalError::Argument(
            "hashhop needs at least one number of hops, context, sample and query per prompt".into(),
        ));
    }
    let cells = test.hops.len() * test.contexts.len();
    progress.start("hashhop", (cells * test.samples) as u64, "queries");
    let bos = model.config.bos_token_id;
    let mut results = Vec::with_capacity(cells);
    for &hops in &test.hops {
        let options = HashHopOptions { hops, hash_length: test.hash_length, answering: test.answering };
        for &context in &test.contexts {
            let (mut correct, mut asked, mut prompts) = (0, 0, 0);
            while asked < test.samples {
                if progress.cancelled() {
                    return Err(EvalError::Interrupted);
                }
                let queries = test.queries_per_prompt.min(test.samples - asked);
                let reserved = usize::from(bos.is_some());
                let task =
                    prompt(tokenizer, options, context, reserved, queries, (test.seed, prompts as u64))?;
                let encode = |query: &str| -> Result<Vec<u32>> {
                    let ids = tokenizer.encode(&[task.text.as_str(), query].concat(), false)?;
                    Ok(bos.into_iter().chain(ids).collect())
                };
                let questions =
                    task.queries.iter().map(|query| encode(&query.text)).collect::<Result<Vec<_>>>()?;
                let ends = |_, text: &str| text.contains(['\'', '\n']);
                let answers = greedy_answers(exec, model, tokenizer, &questions, task.answer_tokens, ends)?;
                let right =
                    answers.iter().zip(&task.queries).filter(|(text, query)| named(text) == query.value);
                correct += right.count();
                asked += questions.len();
                prompts += 1;
                progress.advance(
                    questions.len() as u64,
                    &format!("{hops} hops, {context} tokens: {correct}/{asked}"),
                );
            }
            results.push(HashHopResult { hops, context, prompts, score: Score::new(correct, asked) });
        }
    }
    progress.finish();
    Ok(results)
}

/// The string that an answer ends with: what stands between the last ` = `, if any, and the closing quote.
fn named(answer: &str) -> &str {
    let quoted = answer.split(['\'', '\n']).next().unwrap_or_default();
    quoted.rsplit(" = ").next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn the_last_string_before_the_quote_is_the_answer() {
        for (answer, expected) in [
            ("abcdef'\nxyz = 'q'", "abcdef"),
            ("abc = def = ghi'", "ghi"),
            ("abc = def", "def"),
            ("abc\ndef'", "abc"),
            ("'abc", ""),
            ("", ""),
        ] {
            assert_eq!(named(answer), expected, "{answer}");
        }
    }
}
