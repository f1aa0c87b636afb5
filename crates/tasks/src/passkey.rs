//! Passkey: a number hidden in lines of noise and asked for at the end.

use crate::error::{Result, TaskError};
use crate::sizing::largest_fitting;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use weights::Tokenizer;

const INTRO: &str = "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it.\n";
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
const QUESTION: &str = "What is the pass key? The pass key is";
/// Digits of the hidden number.
const DIGITS: usize = 5;

/// Tokens generated for an answer.
pub const ANSWER_TOKENS: usize = 12;

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
///
/// # Errors
/// [`TaskError::Argument`] when the needle does not fit; those of the tokenizer.
pub fn prompt(
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    context: usize,
    (index, samples): (usize, usize),
    seed: u64,
) -> Result<PasskeyPrompt> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (context as u64) << 20 ^ index as u64);
    let answer: String =
        (0..DIGITS).map(|i| char::from(b'0' + rng.random_range(u8::from(i == 0)..10))).collect();
    let needle = format!("The pass key is {answer}. Remember it. {answer} is the pass key.\n");
    let render = |lines: usize| -> Result<Vec<u32>> {
        let depth = ((index as f64 + 0.5) / samples as f64 * (lines + 1) as f64) as usize;
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
    let lines = largest_fitting(room, context, |lines| Ok(render(lines)?.len()))?.ok_or_else(|| {
        TaskError::Argument(format!(
            "a passkey prompt does not fit a context of {context} tokens; use at least 128"
        ))
    })?;
    Ok(PasskeyPrompt { tokens: render(lines)?, answer })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{decode, tokenizer};

    #[test]
    fn the_text_is_pinned() {
        let tokenizer = tokenizer();
        let made = prompt(&tokenizer, None, 512, (1, 3), 7).unwrap();
        let noise =
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
        let expected = format!(
            "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it.\n\
             {noise}{noise}\
             The pass key is 45282. Remember it. 45282 is the pass key.\n\
             {noise}{noise}\
             What is the pass key? The pass key is"
        );
        assert_eq!(decode(&tokenizer, &made.tokens), expected);
        assert_eq!((made.answer.as_str(), made.tokens.len()), ("45282", 482));
        // A polynomial hash of more of them.
        let mut hash = 0_u64;
        for context in [300, 512, 700, 2000] {
            for index in 0..3 {
                for id in prompt(&tokenizer, Some(0), context, (index, 3), 7).unwrap().tokens {
                    hash = hash.wrapping_mul(1_099_511_628_211).wrapping_add(u64::from(id) + 1);
                }
            }
        }
        assert_eq!(hash, 6_141_047_654_788_515_590);
    }

    #[test]
    fn prompts_fill_their_context_and_needles_spread() {
        let tokenizer = tokenizer();
        let noise = tokenizer.encode(NOISE, false).unwrap().len();
        for context in [300, 700, 2000] {
            let mut depths = Vec::new();
            for index in 0..5 {
                let made = prompt(&tokenizer, Some(0), context, (index, 5), 3).unwrap();
                assert!(made.tokens[0] == 0 && made.tokens.len() + ANSWER_TOKENS <= context);
                assert!(made.tokens.len() + ANSWER_TOKENS + noise > context, "one more line would fit");
                let text = decode(&tokenizer, &made.tokens[1..]);
                assert!(text.contains(&format!("The pass key is {0}. Remember it. {0} is", made.answer)));
                depths.push(text.find("The pass key").unwrap());
            }
            assert!(depths.is_sorted() && depths[0] < depths[4]);
        }
        assert!(prompt(&tokenizer, None, 100, (0, 1), 0).unwrap_err().to_string().contains("at least 128"));
    }
}
