//! Documents of one file. One thread reads, unpacks and decodes, the others tokenise what it has read, in pieces: a file need not fit into
//! memory twice.

use super::Document;
use super::npy::read_npy;
use super::parquet_file::read_parquet;
use super::text::{read_jsonl, read_text, read_values};
use crate::error::{Result, TrainError};
use kernels::Exec;
use model::Progress;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;
use weights::Tokenizer;

/// Text handed to the tokenizer at once.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Chunks per thread that are tokenised together, and as many that wait meanwhile.
const CHUNKS_PER_THREAD: usize = 2;
/// How often a wait for the reader looks whether the user asked to stop.
const LOOK: Duration = Duration::from_millis(100);

/// What the name says about the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Jsonl,
    Npy,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

/// Part of a document.
pub(super) struct Piece {
    pub text: String,
    /// Whether the next piece begins another document.
    pub ends: bool,
}

/// What a reader hands on at once: about [`PIECE_BYTES`] of text.
#[derive(Default)]
pub(super) struct Chunk {
    pub pieces: Vec<Piece>,
    /// Bytes of the (unpacked) file.
    pub bytes: u64,
}

/// Takes a chunk; `false` when nobody wants more.
pub(super) type Emit<'a> = dyn FnMut(Chunk) -> bool + 'a;

/// All documents of a file, in order: `.npy` of int32 token ids (a vector is one document, a matrix one per row), `.jsonl` with a `text` field
/// (one per line), `.parquet` with a string column `text` (one per row, rows without a value left out), anything else as one document of
/// plain UTF-8 text. `.gz` and `.zst` after the name are unpacked, but for parquet, which packs its own columns. `tokenizer` may be `None` for
/// `.npy`, whose ids the caller checks with [`check_vocab`](super::check_vocab).
///
/// Text longer than 1 MiB is tokenised in pieces that end at single line breaks, where byte-level tokenizers would end a token anyway. The result
/// does not depend on the threads.
///
/// # Errors
/// [`TrainError::File`]: unreadable or corrupt packing, invalid UTF-8 (with its byte offset), a line without `text`, a parquet file without
/// such a column, a wrong array type, or nothing in it; [`TrainError::Interrupted`].
pub fn read_file(
    exec: &Exec,
    path: &Path,
    tokenizer: Option<&Tokenizer>,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let encode = tokenizer.map(|t| move |text: &str| t.encode(text, false).map_err(TrainError::from));
    read_with(exec, path, encode.as_ref().map(|encode| encode as &Encode<'_>), progress)
}

/// Text to token ids.
pub(super) type Encode<'a> = dyn Fn(&str) -> Result<Vec<u32>> + Sync + 'a;

/// [`read_file`] with any encoder.
pub(super) fn read_with(
    exec: &Exec,
    path: &Path,
    encode: Option<&Encode<'_>>,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let (format, packing) = classify(path);
    if format == Format::Parquet && packing != Packing::None {
        let reason = "a packed parquet file cannot be read\nhint: unpack it; its columns are packed already";
        return Err(fail(path, reason.into()));
    }
    let file = File::open(path).map_err(|e| fail(path, e.to_string()))?;
    let bytes = file.metadata().map(|m| m.len()).unwrap_or(0);
    let known = packing == Packing::None && format != Format::Parquet;
    progress.start(&format!("reading {}", path.display()), if known { bytes } else { 0 }, "bytes");
    let documents = match (format, encode) {
        (Format::Npy, _) => read_npy(path, unpacked(path, file, packing)?)?,
        (_, None) => return Err(fail(path, "text needs a tokenizer, and the model has none".into())),
        (_, Some(encode)) => {
            let read = |emit: &mut Emit<'_>| match format {
                // What the library that reads the format did not foresee is no reason to end the program.
                Format::Parquet => catch_unwind(AssertUnwindSafe(|| read_parquet(path, file, emit)))
                    .unwrap_or_else(|_| Err(fail(path, "malformed parquet: reading it failed".into()))),
                Format::Jsonl => read_jsonl(path, unpacked(path, file, packing)?, emit),
                _ => read_text(path, unpacked(path, file, packing)?, emit),
            };
            tokenised(exec, read, encode, progress)?
        }
    };
    progress.finish();
    let source = path.display().to_string();
    let documents: Vec<Document> = documents
        .into_iter()
        .filter(|tokens| !tokens.is_empty())
        .map(|tokens| Document { source: source.clone(), tokens })
        .collect();
    match documents.is_empty() {
        true => Err(fail(path, "holds no text".into())),
        false => Ok(documents),
    }
}

/// All values of a file of JSON lines (`.gz` and `.zst` are unpacked), each with the number of its line, from 1. Blank lines are left out.
/// `expected` says in errors what a line should hold.
///
/// # Errors
/// [`TrainError::File`]: unreadable or corrupt packing, invalid UTF-8 (with its byte offset), or a line that is no `T` (with its number).
pub fn read_json_lines<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<(u64, T)>> {
    let file = File::open(path).map_err(|e| fail(path, e.to_string()))?;
    read_values(path, unpacked(path, file, classify(path).1)?, expected)
}

fn unpacked(path: &Path, file: File, packing: Packing) -> Result<Box<dyn Read>> {
    let file = BufReader::new(file);
    Ok(match packing {
        Packing::None => Box::new(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Packing::Zstd => Box::new(zstd::Decoder::with_buffer(file).map_err(|e| fail(path, e.to_string()))?),
    })
}

/// Runs `read` on a thread of its own and tokenises what it emits on the threads of `exec`, in order. Of several errors the one that comes first
/// in the file is returned.
fn tokenised(
    exec: &Exec,
    read: impl FnOnce(&mut Emit<'_>) -> Result<()> + Send,
    encode: &Encode<'_>,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    let at_once = CHUNKS_PER_THREAD * exec.threads().max(1);
    std::thread::scope(|scope| {
        let (sender, chunks) = sync_channel(at_once);
        let reader = scope.spawn(move || read(&mut |chunk| sender.send(chunk).is_ok()));
        let (mut documents, mut current) = (Vec::new(), Vec::new());
        loop {
            let chunks = receive(&chunks, at_once, progress)?;
            if chunks.is_empty() {
                break;
            }
            let pieces: Vec<&Piece> = chunks.iter().flat_map(|chunk| &chunk.pieces).collect();
            let encoded = exec.parallel_map(pieces.len(), |i| encode(&pieces[i].text));
            for (piece, tokens) in pieces.iter().zip(encoded) {
                current.extend(tokens?);
                if piece.ends {
                    documents.push(std::mem::take(&mut current));
                }
            }
            progress.advance(chunks.iter().map(|chunk| chunk.bytes).sum(), "");
        }
        match reader.join() {
            Ok(result) => result.map(|()| documents),
            Err(panic) => resume_unwind(panic),
        }
    })
}

/// The next chunks, up to `count`; none at the end.
fn receive(chunks: &Receiver<Chunk>, count: usize, progress: &dyn Progress) -> Result<Vec<Chunk>> {
    let mut received = Vec::with_capacity(count);
    while received.len() < count {
        if progress.cancelled() {
            return Err(TrainError::Interrupted);
        }
        match chunks.recv_timeout(LOOK) {
            Ok(chunk) => received.push(chunk),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(received)
}

fn classify(path: &Path) -> (Format, Packing) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let (name, packing) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
        (Some(inner), _) => (inner, Packing::Gzip),
        (_, Some(inner)) => (inner, Packing::Zstd),
        _ => (name.as_str(), Packing::None),
    };
    let format = match name.rsplit_once('.') {
        Some((_, "npy")) => Format::Npy,
        Some((_, "jsonl" | "ndjson")) => Format::Jsonl,
        Some((_, "parquet")) => Format::Parquet,
        _ => Format::Text,
    };
    (format, packing)
}

pub(super) fn fail(path: &Path, reason: String) -> TrainError {
    TrainError::File { path: path.to_path_buf(), reason }
}
