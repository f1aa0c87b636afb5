//! The endless, seeded stream of equal-length training sequences.

use super::Document;
use crate::error::{Result, TrainError};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// An endless, seeded, resumable stream of equal-length sequences cut from documents.
///
/// Every source has its own epochs. In each, its documents are cut into windows of `seq_len` from a random start (so that the short rest that is
/// dropped differs from epoch to epoch); documents shorter than a window are joined, in random order, and cut likewise; the windows are
/// then shuffled. Sources take turns in proportion to the square root of their size: a small one is neither drowned nor repeated as often
/// as equal shares would.
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
    documents: Arc<Vec<Vec<u32>>>,
    /// Its place among all sources, those too small to give a sequence included: selects its random stream.
    index: u64,
    /// Share of the draws, in arbitrary units, and the credit it has (smooth weighted round robin).
    weight: i64,
    credit: i64,
    epoch: u64,
    windows: Vec<Cut>,
    next: usize,
}

/// A sequence: pieces of documents.
type Cut = Vec<Piece>;

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
                "a training sequence has at least 2 tokens, found {seq_len}"
            )));
        }
        let mut names: Vec<&str> = Vec::new();
        let mut grouped: Vec<Vec<Vec<u32>>> = Vec::new();
        let mut digest = Sha256::new();
        for document in documents {
            let at = names.iter().position(|n| *n == document.source).unwrap_or_else(|| {
                names.push(&document.source);
                grouped.push(Vec::new());
                names.len() - 1
            });
            digest.update((at as u64).to_le_bytes());
            digest.update((document.tokens.len() as u64).to_le_bytes());
            document.tokens.iter().for_each(|t| digest.update(t.to_le_bytes()));
            grouped[at].push(document.tokens.clone());
        }
        let mut sources: Vec<Source> = grouped.into_iter().enumerate().map(Source::new).collect();
        for source in &mut sources {
            source.begin_epoch(seq_len, seed);
            source.weight = (1000.0 * (source.windows.len() as f64).sqrt()) as i64;
        }
        sources.retain(|s| s.weight > 0);
        if sources.is_empty() {
            let longest = documents.iter().map(|d| d.tokens.len()).max().unwrap_or(0);
            return Err(TrainError::Data(format!(
                "no source holds {seq_len} tokens (longest document: {longest})\nhint: give more text or a shorter sequence length"
            )));
        }
        let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { seq_len, seed, sources, position: 0, fingerprint: format!("{hex}-{seq_len}-{seed}") })
    }

    /// The next sequence.
    pub fn next_sequence(&mut self) -> Vec<u32> {
        let (source, window) = self.draw();
        let source = &self.sources[source];
        let mut out = Vec::with_capacity(self.seq_len);
        for piece in &source.windows[window] {
            out.extend_from_slice(&source.documents[piece.document][piece.start..piece.start + piece.len]);
        }
        out
    }

    /// Tokens per sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Digest of the documents, the sequence length and the seed: equal fingerprints and positions give equal sequences.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Sequences drawn so far; with the same documents and seed, [`skip_to`](Self::skip_to) restores the position.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Jumps to a position.
    pub fn skip_to(&mut self, position: u64) {
        if position < self.position {
            for source in &mut self.sources {
                source.credit = 0;
                source.epoch = 0;
                source.begin_epoch(self.seq_len, self.seed);
            }
            self.position = 0;
        }
        while self.position < position {
            self.draw();
        }
    }

    /// Chooses source and window of the next sequence.
    fn draw(&mut self) -> (usize, usize) {
        let total: i64 = self.sources.iter().map(|s| s.weight).sum();
        self.sources.iter_mut().for_each(|s| s.credit += s.weight);
        // The first of the largest credits.
        let chosen = (0..self.sources.len()).rev().max_by_key(|&i| self.sources[i].credit).unwrap_or(0);
        let source = &mut self.sources[chosen];
        source.credit -= total;
        if source.next == source.windows.len() {
            source.epoch += 1;
            source.begin_epoch(self.seq_len, self.seed);
        }
        source.next += 1;
        self.position += 1;
        (chosen, source.next - 1)
    }
}

impl Source {
    fn new((index, documents): (usize, Vec<Vec<u32>>)) -> Self {
        Self {
            documents: Arc::new(documents),
            index: index as u64,
            weight: 0,
            credit: 0,
            epoch: 0,
            windows: Vec::new(),
            next: 0,
        }
    }

    /// Cuts and shuffles the windows of the current epoch. Their number is the same in every epoch.
    fn begin_epoch(&mut self, seq_len: usize, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream((self.index << 40) | self.epoch);
        self.windows.clear();
        self.next = 0;
        let mut short: Vec<usize> = Vec::new();
        for (document, tokens) in self.documents.iter().enumerate() {
            if tokens.len() < seq_len {
                short.push(document);
                continue;
            }
            let first = rng.random_range(0..=tokens.len() % seq_len);
            self.windows.extend(
                (0..tokens.len() / seq_len)
                    .map(|i| vec![Piece { document, start: first + i * seq_len, len: seq_len }]),
            );
        }
        short.shuffle(&mut rng);
        let (mut cut, mut room) = (Vec::new(), seq_len);
        for document in short {
            let mut start = 0;
            let end = self.documents[document].len();
            while start < end {
                let len = room.min(end - start);
                cut.push(Piece { document, start, len });
                start += len;
                room -= len;
                if room == 0 {
                    self.windows.push(std::mem::take(&mut cut));
                    room = seq_len;
                }
            }
        }
        self.windows.shuffle(&mut rng);
    }
}
