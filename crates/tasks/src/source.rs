//! Generated text as a data argument: `hashhop` and `retrieval` with their parameters.

use crate::draw::{Purpose, stream};
use crate::error::{Result, TaskError};
use crate::hashhop::{self, Answering, HashHopOptions};
use crate::retrieval;
use rand::Rng;
use weights::Tokenizer;

#[cfg(test)]
mod tests;

/// Shortest documents.
const MIN_CONTEXT: usize = 64;
/// Most tokens of a source, and of a document.
const MAX_TOKENS: usize = 1 << 30;

/// What a source generates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HashHop with answers, hops drawn from a list.
    HashHop {
        /// Hops, each with an equal share of the documents.
        hops: Vec<usize>,
        /// Letters per string.
        hash_length: usize,
        /// What answers say.
        answering: Answering,
    },
    /// A mixture of facts hidden in noise and in prose with questions, lists with lookups, and spans that return.
    Retrieval,
}

/// A source of generated documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// What it generates.
    pub kind: Kind,
    /// Tokens per document.
    pub context: usize,
    /// Tokens of the part to train on, in whole documents; the held-out part has an eighth.
    pub tokens: usize,
    /// Seed.
    pub seed: u64,
}

/// Which documents: no random stream serves both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// To train on.
    Train,
    /// Held out.
    Heldout,
}

impl Generated {
    /// Held-out documents per document to train on: one eighth.
    const HELDOUT_SHARE: usize = 8;

    /// Reads `hashhop` or `retrieval`, alone or with parameters: `hashhop:hops=1+2,length=6,context=1024`. `None` when `arg` names neither.
    ///
    /// # Errors
    /// [`TaskError::Argument`] for a parameter that is unknown, given twice or out of range.
    pub fn parse(arg: &str) -> Result<Option<Self>> {
        let (name, parameters) = arg.split_once(':').map_or((arg, None), |(name, rest)| (name, Some(rest)));
        let kind = match name {
            "hashhop" => Kind::HashHop { hops: vec![1, 2], hash_length: 6, answering: Answering::Direct },
            "retrieval" => Kind::Retrieval,
            _ => return Ok(None),
        };
        let mut source = Self { kind, context: 1024, tokens: 1 << 18, seed: 0 };
        let known = source.parameters();
        let mut seen: Vec<&str> = Vec::new();
        for parameter in parameters.into_iter().flat_map(|list| list.split(',')) {
            let fail = |reason: &str| {
                TaskError::Argument(format!(
                    "data `{arg}`: `{parameter}` {reason}\nhint: parameters of {name} are {}",
                    known.join(", ")
                ))
            };
            let (key, value) = parameter.split_once('=').ok_or_else(|| fail("is not NAME=VALUE"))?;
            if seen.contains(&key) {
                return Err(fail("is given twice"));
            }
            seen.push(key);
            if !source.set(key, value) {
                let reason = match known.iter().any(|known| known.split('=').next() == Some(key)) {
                    true => "is out of range",
                    false => "is unknown",
                };
                return Err(fail(reason));
            }
        }
        Ok(Some(source))
    }

    /// Parameters with their forms, for messages.
    fn parameters(&self) -> Vec<&'static str> {
        let own: &[&str] = match self.kind {
            Kind::HashHop { .. } => &["hops=1+2 (1 to 16)", "length=6 (1 to 64)", "cot=true|false"],
            Kind::Retrieval => &[],
        };
        [own, &["context=1024 (from 64)", "tokens=262144", "seed=0"]].concat()
    }

    /// Sets a parameter; `false` when there is none of that name, or the value is not one of its.
    fn set(&mut self, key: &str, value: &str) -> bool {
        let number =
            |range: std::ops::RangeInclusive<usize>| value.parse().ok().filter(|n| range.contains(n));
        match (key, &mut self.kind) {
            ("hops", Kind::HashHop { hops, .. }) => {
                let list: Option<Vec<usize>> = value
                    .split('+')
                    .map(|n| n.parse().ok().filter(|n| (1..=HashHopOptions::MAX_HOPS).contains(n)))
                    .collect();
                list.map(|list| *hops = list).is_some()
            }
            ("length", Kind::HashHop { hash_length, .. }) => {
                number(1..=HashHopOptions::MAX_LENGTH).map(|n| *hash_length = n).is_some()
            }
            ("cot", Kind::HashHop { answering, .. }) => {
                let chosen = match value {
                    "true" => Answering::ChainOfThought,
                    "false" => Answering::Direct,
                    _ => return false,
                };
                *answering = chosen;
                true
            }
            ("context", _) => number(MIN_CONTEXT..=MAX_TOKENS).map(|n| self.context = n).is_some(),
            ("tokens", _) => number(1..=MAX_TOKENS).map(|n| self.tokens = n).is_some(),
            ("seed", _) => value.parse().map(|seed| self.seed = seed).is_ok(),
            _ => false,
        }
    }

    /// Documents of a part.
    pub fn documents(&self, part: Part) -> usize {
        let tokens = match part {
            Part::Train => self.tokens,
            Part::Heldout => self.tokens.div_ceil(Self::HELDOUT_SHARE),
        };
        tokens.div_ceil(self.context)
    }

    /// Document `index` of a part: exactly `context` tokens, no special ones, answers included.
    ///
    /// # Errors
    /// [`TaskError::Argument`] when the context is too short for what is generated (tokenizers differ), or the hashes are; those of the tokenizer.
    pub fn document(&self, part: Part, index: usize, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let purpose = match part {
            Part::Train => Purpose::Train,
            Part::Heldout => Purpose::Heldout,
        };
        let mut rng = stream(purpose, self.seed, index as u64);
        match &self.kind {
            Kind::HashHop { hops, hash_length, answering } => {
                let options = HashHopOptions {
                    hops: hops[rng.random_range(0..hops.len())],
                    hash_length: *hash_length,
                    answering: *answering,
                };
                hashhop::training_document(tokenizer, options, self.context, &rng)
            }
            Kind::Retrieval => retrieval::training_document(tokenizer, self.context, rng),
        }
    }
}
