//! Text in, token sequences out: files (plain, JSONL and parquet with `text`, .gz, .zst, .npy of int32), the built-in text, the model's own text,
//! generated tasks.
//! Knows formats, documents and splits; knows nothing of losses or training state.

mod brown;
mod english;
mod file;
mod generated;
mod heldout;
mod npy;
mod parquet_file;
mod sampled;
mod stream;
mod text;

#[cfg(test)]
mod tests;

pub use english::{BuiltIn, built_in};
pub use file::{read_file, read_json_lines};
pub use generated::generated;
pub use heldout::split_pair;
pub use sampled::self_sampled;
pub use stream::{SequenceStream, fingerprint, sequences};

use crate::error::{Result, TrainError};
use std::path::{Path, PathBuf};
use tasks::Generated;

/// A data argument of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataSource {
    /// A file.
    File(PathBuf),
    /// A built-in text (`split` chosen by the caller).
    BuiltIn(BuiltIn),
    /// `self`: text sampled from the base model.
    SelfSampled,
    /// `hashhop` or `retrieval`, with or without parameters (`split` chosen by the caller).
    Generated(Generated),
}

/// Which part of a source that is split by document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For analysis, alignment and healing.
    Train,
    /// For evaluation only.
    Heldout,
}

impl Split {
    /// Every eighth document of a source is held out: the eighth, the sixteenth, ….
    pub const HELDOUT_EVERY: usize = 8;

    /// Which part the document at `index` of its source belongs to.
    pub fn of(index: usize) -> Self {
        match index % Self::HELDOUT_EVERY == Self::HELDOUT_EVERY - 1 {
            true => Self::Heldout,
            false => Self::Train,
        }
    }
}

/// One tokenised document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// File or domain it came from.
    pub source: String,
    /// Token ids, no special tokens.
    pub tokens: Vec<u32>,
}

/// Options for [`SelfSampled`](DataSource::SelfSampled) text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfOptions {
    /// Documents to sample.
    pub documents: usize,
    /// Tokens per document.
    pub tokens: usize,
    /// Seed.
    pub seed: u64,
}

impl Default for SelfOptions {
    fn default() -> Self {
        Self { documents: 64, tokens: 512, seed: 0 }
    }
}

impl DataSource {
    /// Decides what `arg` names: an existing path, then a built-in text, `self` or generated tasks; anything else is an error.
    pub fn parse(arg: &str) -> Result<Self> {
        let built_in = BuiltIn::ALL.into_iter().find(|text| text.name() == arg);
        match (arg, built_in) {
            _ if Path::new(arg).is_file() => Ok(Self::File(PathBuf::from(arg))),
            (_, Some(text)) => Ok(Self::BuiltIn(text)),
            ("self", _) => Ok(Self::SelfSampled),
            _ if let Some(source) = Generated::parse(arg)? => Ok(Self::Generated(source)),
            _ if Path::new(arg).is_dir() => Err(TrainError::Argument(format!(
                "data `{arg}` is a folder\nhint: name its files one by one"
            ))),
            _ => Err(TrainError::Argument(format!(
                "data `{arg}` is no file and no built-in source\nhint: built-in are `english-small`, `english-mixed`, `self`, `hashhop` and `retrieval`"
            ))),
        }
    }
}

/// Checks every token id against the vocabulary; `.npy` files and foreign tokenizers can hold anything.
///
/// # Errors
/// [`TrainError::Data`] naming the first id that does not fit, its source and its position in the document.
pub fn check_vocab(documents: &[Document], vocab: usize) -> Result<()> {
    for document in documents {
        if let Some(at) = document.tokens.iter().position(|&t| t as usize >= vocab) {
            return Err(TrainError::Data(format!(
                "{}: token id {} at position {at} is outside the vocabulary of {vocab}",
                document.source, document.tokens[at]
            )));
        }
    }
    Ok(())
}

/// Documents of one part, numbered within each source in order of appearance.
pub fn split(documents: Vec<Document>, part: Split) -> Vec<Document> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    documents
        .into_iter()
        .filter(|document| {
            let at = counts.iter().position(|(name, _)| *name == document.source).unwrap_or_else(|| {
                counts.push((document.source.clone(), 0));
                counts.len() - 1
            });
            counts[at].1 += 1;
            Split::of(counts[at].1 - 1) == part
        })
        .collect()
}

/// Held-out windows by source, in order of first appearance: every document is cut into consecutive windows of `context` tokens (a last
/// window may be shorter; one shorter than 2 is dropped), until a source has given `max_tokens_per_source` tokens.
pub fn windows(
    documents: &[Document],
    context: usize,
    max_tokens_per_source: usize,
) -> Vec<(String, Vec<Vec<u32>>)> {
    let context = context.max(2);
    let mut out: Vec<(String, Vec<Vec<u32>>, usize)> = Vec::new();
    for document in documents {
        let at = out.iter().position(|(name, ..)| *name == document.source).unwrap_or_else(|| {
            out.push((document.source.clone(), Vec::new(), max_tokens_per_source));
            out.len() - 1
        });
        let (_, list, room) = &mut out[at];
        let taken = &document.tokens[..document.tokens.len().min(*room)];
        *room -= taken.len();
        list.extend(taken.chunks(context).filter(|w| w.len() >= 2).map(<[u32]>::to_vec));
    }
    out.into_iter().filter(|(_, list, _)| !list.is_empty()).map(|(name, list, _)| (name, list)).collect()
}
