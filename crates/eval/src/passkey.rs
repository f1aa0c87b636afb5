//! Passkey retrieval: a number hidden in noise, asked for at the end; exact match of the greedy answer.

use crate::error::{EvalError, Result};
use kernels::Exec;
use model::{Engine, LogitRows, Progress, Sampler, SamplerOptions};
use serde::{Deserialize, Serialize};
use tasks::passkey::{ANSWER_TOKENS, PasskeyPrompt, prompt};
use weights::Tokenizer;

/// What is asked.
#[derive(Clone, Debug)]
pub struct PasskeyOptions {
    /// Context lengths in tokens, prompt and answer together.
    pub contexts: Vec<usize>,
    /// Prompts per context; needles are spread evenly over the depth.
    pub samples: usize,
    /// Seed of the numbers.
    pub seed: u64,
}

impl Default for PasskeyOptions {
    fn default() -> Self {
        Self { contexts: vec![512, 1024, 2048], samples: 12, seed: 0 }
    }
}

/// Score at one context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PasskeyResult {
    /// Tokens, prompt and answer.
    pub context: usize,
    /// Right answers.
    pub correct: usize,
    /// Prompts.
    pub samples: usize,
}

/// Scores one model: the first run of digits in the greedy answer must equal the number.
pub fn passkey(
    exec: &Exec,
    model: &Engine,
    tokenizer: &Tokenizer,
    options: &PasskeyOptions,
    progress: &mut dyn Progress,
) -> Result<Vec<PasskeyResult>> {
    if options.samples == 0 || options.contexts.is_empty() {
        return Err(EvalError::Argument("passkey needs at least one context and one sample".into()));
    }
    progress.start("passkey", (options.contexts.len() * options.samples) as u64, "prompt");
    let mut results = Vec::new();
    for &context in &options.contexts {
        let mut correct = 0;
        for index in 0..options.samples {
            if progress.cancelled() {
                return Err(EvalError::Interrupted);
            }
            let prompt = prompt(
                tokenizer,
                model.config.bos_token_id,
                context,
                (index, options.samples),
                options.seed,
            )?;
            correct += usize::from(answers(exec, model, tokenizer, &prompt)?);
            progress.advance(1, &format!("{context} tokens: {correct}/{}", index + 1));
        }
        results.push(PasskeyResult { context, correct, samples: options.samples });
    }
    progress.finish();
    Ok(results)
}

fn answers(exec: &Exec, model: &Engine, tokenizer: &Tokenizer, prompt: &PasskeyPrompt) -> Result<bool> {
    let mut cache = model.new_cache();
    let mut sampler = Sampler::new(SamplerOptions::default())?;
    let mut logits = model.forward(exec, &prompt.tokens, &mut cache, LogitRows::Last)?;
    let mut ids = Vec::new();
    for _ in 0..ANSWER_TOKENS {
        let id = sampler.sample(&logits, &[])?;
        if model.config.eos_token_ids.contains(&id) {
            break;
        }
        ids.push(id);
        logits = model.forward(exec, &[id], &mut cache, LogitRows::Last)?;
    }
    Ok(first_number(&tokenizer.decode(&ids, true)?) == prompt.answer)
}

/// The first run of ASCII digits.
fn first_number(text: &str) -> &str {
    let Some(start) = text.find(|c: char| c.is_ascii_digit()) else { return "" };
    let rest = &text[start..];
    &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())]
}

#[cfg(test)]
mod tests {
    use super::first_number;

    #[test]
    fn the_first_number_must_match_whole() {
        assert_eq!(first_number(" 12345. Remember"), "12345");
        assert_eq!(first_number(" hidden: 123456"), "123456");
        assert_eq!(first_number("none"), "");
    }
}
