//! HashHop: pairs of random strings form chains; a query names the start of a chain and wants its end.
//!
//! Source: magicproduct/hash-hop (MIT), `hashhop/generate.py`, written anew from its definition. N chains of `hops` pairs: level 0 maps N
//! random strings to N others, level i + 1 maps each value of level i to a fresh one. Each pair is a line `k = v`, those of the last level
//! `k = 'v'`; all lines are shuffled. After them comes
//!
//! ```text
//! COMPLETION:
//! Hops={hops}
//!
//! CoT={True|False}
//!
//! H1 = 'H3'
//! ```
//!
//! with a last line for each query, which with chain of thought says `H1 = 'H2 = H3'`. Two things differ: no string occurs twice (there, a key
//! drawn twice loses its first value), and the size is given in tokens instead of characters.

use crate::draw::{Purpose, stream};
use crate::error::{Result, TaskError};
use crate::sizing::{fill_front, largest_fitting};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;
use weights::Tokenizer;

#[cfg(test)]
mod tests;

/// Letters of the strings.
const ALPHABET: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// Tokens that an answer may take beyond its own, and that text may take where two pieces meet.
const SLACK: usize = 2;

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answering {
    /// The end of the chain.
    Direct,
    /// The chain.
    ChainOfThought,
}

/// The form of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashHopOptions {
    /// Pairs from a key to the value asked for, 1 to [`MAX_HOPS`](Self::MAX_HOPS).
    pub hops: usize,
    /// Letters per string, 1 to [`MAX_LENGTH`](Self::MAX_LENGTH).
    pub hash_length: usize,
    /// What answers say.
    pub answering: Answering,
}

impl HashHopOptions {
    /// Most hops.
    pub const MAX_HOPS: usize = 16;
    /// Most letters.
    pub const MAX_LENGTH: usize = 64;

    /// Whether the values are in range.
    ///
    /// # Errors
    /// [`TaskError::Argument`].
    pub fn check(&self) -> Result<()> {
        let range = |name: &str, value: usize, max: usize| match (1..=max).contains(&value) {
            true => Ok(()),
            false => Err(TaskError::Argument(format!(
                "hashhop: {name} must be between 1 and {max}, found {value}"
            ))),
        };
        range("hops", self.hops, Self::MAX_HOPS)?;
        range("the hash length", self.hash_length, Self::MAX_LENGTH)
    }
}

/// Chains and the order in which they are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashHop {
    options: HashHopOptions,
    /// `hops + 1` strings each.
    chains: Vec<Vec<String>>,
    /// Chain and level of each line.
    lines: Vec<(usize, usize)>,
}

/// A prompt to test with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashHopPrompt {
    /// What comes before every query.
    pub text: String,
    /// Each continues it.
    pub queries: Vec<HashHopQuery>,
    /// Tokens to generate at most.
    pub answer_tokens: usize,
}

/// A query of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashHopQuery {
    /// `H1 = '`.
    pub text: String,
    /// The end of the chain.
    pub value: String,
}

impl HashHop {
    /// `chains` chains. The same stream gives the same ones, and more of them begin with those that fewer are.
    ///
    /// # Errors
    /// [`TaskError::Argument`] for options out of range, and when there are too few strings of that length.
    pub fn draw(options: HashHopOptions, chains: usize, mut rng: ChaCha8Rng) -> Result<Self> {
        options.check()?;
        let HashHopOptions { hops, hash_length, .. } = options;
        let wanted = chains.saturating_mul(hops + 1);
        let strings = 52_u128.saturating_pow(hash_length as u32);
        // Half of them: a string that is still free is then found at the second try on average.
        if wanted as u128 > strings / 2 {
            return Err(TaskError::Argument(format!(
                "hashhop: {wanted} different strings of {hash_length} letters are too many\nhint: choose longer hashes or a shorter context"
            )));
        }
        let mut seen = HashSet::with_capacity(wanted);
        let mut string = |rng: &mut ChaCha8Rng| loop {
            let letters = (0..hash_length).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
            let drawn: String = letters.collect();
            if seen.insert(drawn.clone()) {
                return drawn;
            }
        };
        let chains: Vec<Vec<String>> =
            (0..chains).map(|_| (0..=hops).map(|_| string(&mut rng)).collect()).collect();
        let mut lines: Vec<(usize, usize)> =
            (0..chains.len()).flat_map(|chain| (0..hops).map(move |level| (chain, level))).collect();
        lines.shuffle(&mut rng);
        Ok(Self { options, chains, lines })
    }

    /// The line of one pair.
    fn line(&self, chain: usize, level: usize) -> String {
        let (key, value) = (&self.chains[chain][level], &self.chains[chain][level + 1]);
        match level + 1 == self.options.hops {
            true => format!("{key} = '{value}'\n"),
            false => format!("{key} = {value}\n"),
        }
    }

    /// Lines and header: what comes before the first query.
    pub fn text(&self) -> String {
        let HashHopOptions { hops, answering, .. } = self.options;
        let mut text = String::new();
        self.lines.iter().for_each(|&(chain, level)| text.push_str(&self.line(chain, level)));
        let cot = match answering {
            Answering::Direct => "False",
            Answering::ChainOfThought => "True",
        };
        text + &format!("COMPLETION:\nHops={hops}\n\nCoT={cot}\n\n")
    }

    /// The query of a chain up to the opening quote.
    pub fn query(&self, chain: usize) -> String {
        format!("{} = '", self.chains[chain][0])
    }

    /// What follows it, with the closing quote.
    pub fn completion(&self, chain: usize) -> String {
        let answer = match self.options.answering {
            Answering::Direct => self.chains[chain][self.options.hops].clone(),
            Answering::ChainOfThought => self.chains[chain][1..].join(" = "),
        };
        format!("{answer}'")
    }

    /// A document: the text and the first `queries` chains' queries (their order tells nothing: lines are shuffled) with their completions.
    pub fn document(&self, queries: usize) -> String {
        let queries = queries.min(self.chains.len());
        (0..queries)
            .fold(self.text(), |text, chain| text + &self.query(chain) + &self.completion(chain) + "\n")
    }
}

/// Prompt number `index` to test with: as many chains as let the prompt, any one of up to `queries` queries and its answer fit `context` tokens, of which
/// `reserved` are taken already (by a beginning-of-sequence token).
///
/// # Errors
/// [`TaskError::Argument`] when not even one chain fits, or for options out of range; those of the tokenizer.
pub fn prompt(
    tokenizer: &Tokenizer,
    options: HashHopOptions,
    context: usize,
    reserved: usize,
    queries: usize,
    (seed, index): (u64, u64),
) -> Result<HashHopPrompt> {
    options.check()?;
    let count = |text: &str| -> Result<usize> { Ok(tokenizer.encode(text, false)?.len()) };
    let rng = stream(Purpose::HashHop, seed, index);
    let make = |chains: usize| -> Result<(usize, HashHopPrompt)> {
        let task = HashHop::draw(options, chains, rng.clone())?;
        let (mut query_tokens, mut answer_tokens) = (0, 0);
        for chain in 0..chains.min(queries) {
            query_tokens = query_tokens.max(count(&task.query(chain))?);
            answer_tokens = answer_tokens.max(count(&task.completion(chain))? + SLACK);
        }
        let text = task.text();
        let tokens = reserved + count(&text)? + query_tokens + SLACK + answer_tokens;
        let queries = (0..chains.min(queries)).map(|chain| HashHopQuery {
            text: task.query(chain),
            value: task.chains[chain][options.hops].clone(),
        });
        Ok((tokens, HashHopPrompt { text, queries: queries.collect(), answer_tokens }))
    };
    let size = largest_fitting(context, context, |size| Ok(make(size + 1)?.0))?.ok_or_else(|| {
        TaskError::Argument(format!(
            "hashhop: a chain of {} hops with its query does not fit a context of {context} tokens\nhint: choose a longer one",
            options.hops
        ))
    })?;
    Ok(make(size + 1)?.1)
}

/// Tokens of a document of exactly `context` tokens to train on: as many chains as fit, every second one queried, and before them what is cut off
/// from the lines of further chains.
///
/// # Errors
/// As [`prompt`].
pub fn training_document(
    tokenizer: &Tokenizer,
    options: HashHopOptions,
    context: usize,
    rng: &ChaCha8Rng,
) -> Result<Vec<u32>> {
    let text = |chains: usize| -> Result<String> {
        Ok(HashHop::draw(options, chains, rng.clone())?.document(chains.div_ceil(2)))
    };
    let tokens = |chains: usize| -> Result<Vec<u32>> { Ok(tokenizer.encode(&text(chains)?, false)?) };
    let size = largest_fitting(context, context, |size| Ok(tokens(size + 1)?.len()))?.ok_or_else(|| {
        TaskError::Argument(format!(
            "hashhop: a chain of {} hops with its query does not fit a document of {context} tokens\nhint: choose a larger `context`",
            options.hops
        ))
    })?;
    let document = tokens(size + 1)?;
    // Strings of the chains that would have come next: none of them occurs in the document.
    let more = HashHop::draw(options, size + 3, rng.clone())?;
    let further = more.lines.iter().filter(|(chain, _)| *chain > size);
    let rest: String = further.map(|&(chain, level)| more.line(chain, level)).collect();
    Ok(fill_front(document, &tokenizer.encode(&rest, false)?, context))
}
