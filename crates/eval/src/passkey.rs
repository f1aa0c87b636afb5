//! Passkey retrieval: a number hidden in noise, asked for at the end; exact match of the greedy answer.

use crate::error::{EvalError, Result};
use kernels::Exec;
use model::{Engine, LogitRows, Progress, Sampler, SamplerOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use weights::Tokenizer;

const INTRO: &str = "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it.\n";
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
const QUESTION: &str = "What is the pass key? The pass key is";
/// Digits of the hidden number.
const DIGITS: usize = 5;

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

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasskeyPrompt {
    /// Token ids, BOS included when the model has one.
    pub tokens: Vec<u32>,
    /// The hidden number.
    pub answer: String,
}

/// Builds sample `index` of `samples` for a context of `context` tokens: noise lines with the needle at the share
/// `(index + ½) / samples` of them. The prompt and an answer of [`ANSWER_TOKENS`] fit the context.
pub fn prompt(
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    context: usize,
    index: usize,
    options: &PasskeyOptions,
) -> Result<PasskeyPrompt> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed ^ (context as u64) << 20 ^ index as u64);
    let answer: String =
        (0..DIGITS).map(|i| char::from(b'0' + rng.random_range(u8::from(i == 0)..10))).collect();
    let needle = format!("The pass key is {answer}. Remember it. {answer} is the pass key.\n");
    let render = |lines: usize| -> Result<Vec<u32>> {
        let depth = ((index as f64 + 0.5) / options.samples as f64 * (lines + 1) as f64) as usize;
        let mut text = String::from(INTRO);
        (0..depth).for_each(|_| text.push_str(NOISE));
        text.push_str(&needle);
        (depth..lines).for_each(|_| text.push_str(NOISE));
        text.push_str(QUESTION);
        let mut tokens: Vec<u32> = bos.into_iter().collect();
        tokens.extend(tokenizer.encode(&text, false)?);
        Ok(tokens)
    };
    let room = context.saturating_sub(ANSWER_TOKENS);
    if render(0)?.len() > room {
        return Err(EvalError::Argument(format!(
            "a passkey prompt does not fit a context of {context} tokens; use at least 128"
        )));
    }
    // The largest number of noise lines that fits.
    let (mut low, mut high) = (0, context);
    while low + 1 < high {
        let mid = (low + high) / 2;
        if render(mid)?.len() <= room { low = mid } else { high = mid }
    }
    Ok(PasskeyPrompt { tokens: render(low)?, answer })
}

/// Tokens generated for an answer.
pub const ANSWER_TOKENS: usize = 12;

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
            let prompt = prompt(tokenizer, model.config.bos_token_id, context, index, options)?;
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
