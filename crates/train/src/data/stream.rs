//! The endless, seeded stream of training text, in items of equal length that consist of pieces of documents.

use super::Document;
use crate::error::{Result, TrainError};
use model::TokenBatch;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// The rule by which items are cut, part of the fingerprint: a run that was interrupted under another one cannot go on.
const RULE: &str = "pieces";
/// A rest of a document that is shorter teaches little: it is dropped.
const MIN_REST: usize = 16;

/// An endless, seeded, resumable stream of items of `seq_len` tokens. An item consists of pieces of documents, each a sequence of its own: nothing
/// reaches from one document to another.
///
/// Every source has its own epochs. In each, documents of at least `seq_len` tokens are cut into windows of that length from a random start (so
/// that the short rest that is dropped differs from epoch to epoch), each an item; shorter documents follow one another, in random order, until
/// an item is full. What then is left of a document begins the next item, unless it has fewer than 16 tokens. The items are then shuffled.
/// Sources take turns in proportion to the square root of their size: a small one is neither drowned nor repeated as often as equal shares
/// would.
#[derive(Clone, Debug)]
pub struct SequenceStream {
    seq_len: usize,
    seed: u64,
    sources: Vec<Source>,
    position: u64,
    fingerprint: String,
}

#[derive(Clone, Debug)]
struct Source {
    name: String,
    documents: Arc<Vec<Vec<u32>>>,
    /// Its place among all sources: selects its random stream.
    index: u64,
    /// Share of the draws, in arbitrary units (0 when it is too small to give an item), and the credit it has (smooth weighted round robin).
    weight: i64,
    credit: i64,
    epoch: u64,
    items: Vec<Item>,
    next: usize,
    /// Items drawn.
    drawn: u64,
}

/// Pieces of documents, `seq_len` tokens in all.
type Item = Vec<Piece>;

#[derive(Clone, Copy, Debug)]
struct Piece {
    document: usize,
    start: usize,
    len: usize,
}

impl SequenceStream {
    /// A stream over `documents`, at position 0.
    ///
    /// # Errors
    /// [`TrainError::Argument`] when `seq_len` is below 2, [`TrainError::Data`] when no source holds `seq_len` tokens.
    pub fn new(documents: &[Document], seq_len: usize, seed: u64) -> Result<Self> {
        if seq_len < 2 {
            return Err(TrainError::Argument(format!(
                "an item of training text has at least 2 tokens, found {seq_len}"
            )));
        }
        let mut names: Vec<&str> = Vec::new();
        let mut grouped: Vec<Vec<Vec<u32>>> = Vec::new();
        for document in documents {
            let at = place(&mut names, &document.source);
            grouped.resize(names.len(), Vec::new());
            grouped[at].push(document.tokens.clone());
        }
        let mut sources: Vec<Source> = names.iter().zip(grouped).enumerate().map(Source::new).collect();
        for source in &mut sources {
            source.begin_epoch(seq_len, seed);
            source.weight = (1000.0 * (source.items.len() as f64).sqrt()) as i64;
        }
        if sources.iter().all(|s| s.weight == 0) {
            let longest = documents.iter().map(|d| d.tokens.len()).max().unwrap_or(0);
            return Err(TrainError::Data(format!(
                "no source holds {seq_len} tokens (longest document: {longest})\nhint: give more text or a shorter sequence length"
            )));
        }
        let digest = fingerprint(documents);
        Ok(Self {
            seq_len,
            seed,
            sources,
            position: 0,
            fingerprint: format!("{digest}-{seq_len}-{seed}-{RULE}"),
        })
    }

    /// The next items: a sequence for every piece, `items · seq_len` tokens in all.
    pub fn next_batch(&mut self, items: usize) -> TokenBatch {
        let mut batch = TokenBatch::default();
        for _ in 0..items {
            let (source, item) = self.draw();
            let source = &self.sources[source];
            for piece in &source.items[item] {
                batch.push(&source.documents[piece.document][piece.start..piece.start + piece.len]);
            }
        }
        batch
    }

    /// Tokens drawn from every source since position 0, in order of the sources' first documents.
    pub fn drawn(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sources.iter().map(|s| (s.name.as_str(), s.drawn * self.seq_len as u64))
    }

    /// [`drawn`](Self::drawn) in one line.
    pub fn drawn_note(&self) -> String {
        let sources: Vec<String> = self.drawn().map(|(name, tokens)| format!("{name} {tokens}")).collect();
        format!("tokens by source: {}", sources.join(", "))
    }

    /// Tokens per item.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Digest of the documents, the length of items, the seed and the rule of cutting: equal fingerprints and positions give equal items.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Items drawn so far; with the same documents and seed, [`skip_to`](Self::skip_to) restores the position.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Jumps to a position.
    pub fn skip_to(&mut self, position: u64) {
        if position < self.position {
            for source in &mut self.sources {
                source.credit = 0;
                source.epoch = 0;
                source.drawn = 0;
                source.begin_epoch(self.seq_len, self.seed);
            }
            self.position = 0;
        }
        while self.position < position {
            self.draw();
        }
    }

    /// Chooses source and item.
    fn draw(&mut self) -> (usize, usize) {
        let total: i64 = self.sources.iter().map(|s| s.weight).sum();
        self.sources.iter_mut().for_each(|s| s.credit += s.weight);
        // The first of the largest credits.
        let usable = (0..self.sources.len()).filter(|&i| self.sources[i].weight > 0);
        let chosen = usable.rev().max_by_key(|&i| self.sources[i].credit).unwrap_or(0);
        let source = &mut self.sources[chosen];
        source.credit -= total;
        if source.next == source.items.len() {
            source.epoch += 1;
            source.begin_epoch(self.seq_len, self.seed);
        }
        source.next += 1;
        source.drawn += 1;
        self.position += 1;
        (chosen, source.next - 1)
    }
}

/// SHA-256 of the documents' tokens and of which of them come from the same source, in hexadecimal; the sources' names do not count.
pub fn fingerprint(documents: &[Document]) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut digest = Sha256::new();
    for document in documents {
        digest.update((place(&mut names, &document.source) as u64).to_le_bytes());
        digest.update((document.tokens.len() as u64).to_le_bytes());
        document.tokens.iter().for_each(|t| digest.update(t.to_le_bytes()));
    }
    digest.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The pieces of `tokens / context` items (at least one) drawn from the documents, each a sequence of one document; single tokens, which predict
/// nothing, are left out.
///
/// # Errors
/// As [`SequenceStream::new`].
pub fn sequences(documents: &[Document], context: usize, tokens: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    let mut stream = SequenceStream::new(documents, context, seed)?;
    let pieces = stream.next_batch((tokens / context).max(1));
    Ok(pieces.iter().filter(|piece| piece.len() >= 2).map(<[u32]>::to_vec).collect())
}

/// Index of `name`, which is added when it is new.
fn place<'a>(names: &mut Vec<&'a str>, name: &'a str) -> usize {
    names.iter().position(|n| *n == name).unwrap_or_else(|| {
        names.push(name);
        names.len() - 1
    })
}

impl Source {
    fn new((index, (name, documents)): (usize, (&&str, Vec<Vec<u32>>))) -> Self {
        Self {
            name: name.to_string(),
            documents: Arc::new(documents),
            index: index as u64,
            weight: 0,
            credit: 0,
            epoch: 0,
            items: Vec::new(),
            next: 0,
            drawn: 0,
        }
    }

    /// Cuts and shuffles the items of the current epoch. Their number differs a little from epoch to epoch; there is at least one when there was
    /// one before.
    fn begin_epoch(&mut self, seq_len: usize, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream((self.index << 40) | self.epoch);
        self.items.clear();
        self.next = 0;
        let mut short: Vec<usize> = Vec::new();
        for (document, tokens) in self.documents.iter().enumerate() {
            if tokens.len() < seq_len {
                short.push(document);
                continue;
            }
            let first = rng.random_range(0..=tokens.len() % seq_len);
            self.items.extend(
                (0..tokens.len() / seq_len)
                    .map(|i| vec![Piece { document, start: first + i * seq_len, len: seq_len }]),
            );
        }
        short.shuffle(&mut rng);
        let (mut item, mut room) = (Item::new(), seq_len);
        for document in short {
            let mut start = 0;
            let end = self.documents[document].len();
            while start < end {
                let len = room.min(end - start);
                item.push(Piece { document, start, len });
                start += len;
                room -= len;
                if room == 0 {
                    self.items.push(std::mem::take(&mut item));
                    room = seq_len;
                    if end - start < MIN_REST {
                        break;
                    }
                }
            }
        }
        self.items.shuffle(&mut rng);
    }
}
