//! Documents of one file. Text is decoded and tokenised in pieces, so a file need not fit into memory twice.

use super::Document;
use crate::error::{Result, TrainError};
use model::Progress;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use weights::Tokenizer;

/// Text handed to the tokenizer at once.
const PIECE_BYTES: usize = 1 << 20;
/// A JSONL line longer than this is refused: it is no line of documents.
const MAX_LINE_BYTES: usize = 1 << 30;

/// What the name says about the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Jsonl,
    Npy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

/// All documents of a file, in order: `.npy` of int32 token ids (a vector is one document, a matrix one per row), `.jsonl` with a `text` field
/// (one per line), anything else as one document of plain UTF-8 text. `.gz` and `.zst` after the name are unpacked. `tokenizer` may be `None` for
/// `.npy`, whose ids the caller checks with [`check_vocab`](super::check_vocab).
///
/// Text longer than 1 MiB is tokenised in pieces that end at single line breaks, where byte-level tokenizers would end a token anyway.
///
/// # Errors
/// [`TrainError::File`]: unreadable or corrupt packing, invalid UTF-8 (with its byte offset), a line without `text`, a wrong array type, or nothing
/// in it; [`TrainError::Interrupted`].
pub fn read_file(
    path: &Path,
    tokenizer: Option<&Tokenizer>,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    match tokenizer {
        None => read_with(path, None, progress),
        Some(tokenizer) => {
            read_with(path, Some(&|text| tokenizer.encode(text, false).map_err(TrainError::from)), progress)
        }
    }
}

/// Text to token ids.
pub(super) type Encode<'a> = dyn Fn(&str) -> Result<Vec<u32>> + 'a;

/// [`read_file`] with any encoder.
pub(super) fn read_with(
    path: &Path,
    encode: Option<&Encode<'_>>,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let (format, packing) = classify(path);
    let file = File::open(path).map_err(|e| fail(path, e.to_string()))?;
    let bytes = file.metadata().map(|m| m.len()).unwrap_or(0);
    progress.start(
        &format!("reading {}", path.display()),
        if packing == Packing::None { bytes } else { 0 },
        "bytes",
    );
    let file = BufReader::new(file);
    let input: Box<dyn Read> = match packing {
        Packing::None => Box::new(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Packing::Zstd => Box::new(zstd::Decoder::with_buffer(file).map_err(|e| fail(path, e.to_string()))?),
    };
    let source = path.display().to_string();
    let documents = match format {
        Format::Npy => read_npy(path, input)?,
        Format::Text | Format::Jsonl => {
            let encode =
                encode.ok_or_else(|| fail(path, "text needs a tokenizer, and the model has none".into()))?;
            match format {
                Format::Text => vec![read_text(path, input, encode, progress)?],
                _ => read_jsonl(path, input, encode, progress)?,
            }
        }
    };
    progress.finish();
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
        _ => Format::Text,
    };
    (format, packing)
}

fn fail(path: &Path, reason: String) -> TrainError {
    TrainError::File { path: path.to_path_buf(), reason }
}

/// Bytes read so far that are not yet consumed, and where they lie in the (unpacked) file.
struct Window<'a> {
    path: &'a Path,
    input: Box<dyn Read>,
    bytes: Vec<u8>,
    offset: u64,
    ended: bool,
}

impl<'a> Window<'a> {
    fn new(path: &'a Path, input: Box<dyn Read>) -> Self {
        Self { path, input, bytes: Vec::new(), offset: 0, ended: false }
    }

    /// Reads until `len` bytes are there or the input ends.
    fn fill(&mut self, len: usize) -> Result<()> {
        if self.ended || self.bytes.len() >= len {
            return Ok(());
        }
        let want = (len - self.bytes.len()) as u64;
        let read = (&mut self.input).take(want).read_to_end(&mut self.bytes);
        self.ended = (read.map_err(|e| fail(self.path, format!("cannot be read: {e}")))? as u64) < want;
        Ok(())
    }

    /// The valid UTF-8 text at the front; a character cut off by the end of the window is left for later.
    fn text(&self) -> Result<&str> {
        let bytes = match self.offset == 0 {
            true => self.bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.bytes),
            false => &self.bytes,
        };
        let skipped = self.bytes.len() - bytes.len();
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(error) if error.error_len().is_none() && !self.ended => {
                Ok(std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default())
            }
            Err(error) => {
                let at = self.offset + (skipped + error.valid_up_to()) as u64;
                Err(fail(self.path, format!("is not UTF-8 text: invalid byte at offset {at}")))
            }
        }
    }

    /// Drops the byte-order mark and the first `len` bytes of [`text`](Self::text).
    fn consume(&mut self, len: usize) {
        let mark = if self.offset == 0 && self.bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        self.bytes.drain(..mark + len);
        self.offset += (mark + len) as u64;
    }
}

fn read_text(
    path: &Path,
    input: Box<dyn Read>,
    encode: &Encode<'_>,
    progress: &mut dyn Progress,
) -> Result<Vec<u32>> {
    let mut window = Window::new(path, input);
    let mut tokens = Vec::new();
    loop {
        check_cancelled(progress)?;
        window.fill(PIECE_BYTES)?;
        let text = window.text()?;
        let len = if window.ended { text.len() } else { cut_point(text) };
        tokens.extend(encode(&text[..len])?);
        progress.advance(len as u64, "");
        window.consume(len);
        if window.ended && window.bytes.is_empty() {
            return Ok(tokens);
        }
    }
}

/// Where a long text is cut: after the last line break that has visible characters on both sides, else after the last line break, else after
/// the last white space, else at the end.
pub(super) fn cut_point(text: &str) -> usize {
    let bytes = text.as_bytes();
    let single = |i: &usize| {
        bytes[*i] == b'\n'
            && *i > 0
            && !bytes[*i - 1].is_ascii_whitespace()
            && bytes.get(*i + 1).is_some_and(|b| !b.is_ascii_whitespace())
    };
    (0..bytes.len())
        .rev()
        .find(single)
        .or_else(|| bytes.iter().rposition(|&b| b == b'\n'))
        .or_else(|| bytes.iter().rposition(u8::is_ascii_whitespace))
        .map_or(bytes.len(), |i| i + 1)
}

fn read_jsonl(
    path: &Path,
    input: Box<dyn Read>,
    encode: &Encode<'_>,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    #[derive(serde::Deserialize)]
    struct Line {
        text: String,
    }
    let mut window = Window::new(path, input);
    let (mut documents, mut number, mut want) = (Vec::new(), 0_u64, PIECE_BYTES);
    loop {
        check_cancelled(progress)?;
        window.fill(want)?;
        let text = window.text()?;
        let len = match text.rfind('\n') {
            _ if window.ended => text.len(),
            Some(at) => at + 1,
            None if want >= MAX_LINE_BYTES => {
                return Err(fail(path, format!("line {} is longer than {MAX_LINE_BYTES} bytes", number + 1)));
            }
            None => {
                want *= 2;
                continue;
            }
        };
        want = PIECE_BYTES;
        for line in text[..len].lines() {
            number += 1;
            if line.trim().is_empty() {
                continue;
            }
            let line: Line = serde_json::from_str(line).map_err(|e| {
                fail(path, format!("line {number}: expected a JSON object with a string `text`: {e}"))
            })?;
            documents.push(encode(&line.text)?);
        }
        progress.advance(len as u64, "");
        window.consume(len);
        if window.ended && window.bytes.is_empty() {
            return Ok(documents);
        }
    }
}

fn check_cancelled(progress: &dyn Progress) -> Result<()> {
    match progress.cancelled() {
        true => Err(TrainError::Interrupted),
        false => Ok(()),
    }
}

fn read_npy(path: &Path, input: Box<dyn Read>) -> Result<Vec<Vec<u32>>> {
    let bad = |reason: String| fail(path, format!("malformed npy: {reason}"));
    let file = npyz::NpyFile::new(input).map_err(|e| bad(e.to_string()))?;
    let shape: Vec<usize> = file.shape().iter().map(|&n| n as usize).collect();
    let row = match shape[..] {
        [n] | [_, n] => n,
        _ => {
            return Err(bad(format!(
                "expected a vector or a matrix of int32 token ids, found shape {shape:?}"
            )));
        }
    };
    if file.order() == npyz::Order::Fortran && shape.len() > 1 {
        return Err(bad("expected C order, found Fortran order".into()));
    }
    let values: usize = shape
        .iter()
        .try_fold(1_usize, |a, &n| a.checked_mul(n))
        .ok_or_else(|| bad(format!("shape {shape:?}")))?;
    let dtype = file.dtype().descr();
    let data =
        file.data::<i32>().map_err(|_| bad(format!("expected int32 token ids, found dtype {dtype}")))?;
    let mut ids = Vec::new();
    for value in data {
        let value = value.map_err(|e| bad(e.to_string()))?;
        ids.push(
            u32::try_from(value)
                .map_err(|_| bad(format!("token id {value} at index {} is negative", ids.len())))?,
        );
    }
    if ids.len() != values {
        return Err(bad(format!("expected {values} values, found {}", ids.len())));
    }
    Ok(ids.chunks(row.max(1)).map(<[u32]>::to_vec).collect())
}
