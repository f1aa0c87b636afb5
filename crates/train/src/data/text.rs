//! Plain text and JSON lines, decoded piece by piece. Knows bytes and documents; knows nothing of tokens.

use super::file::{Chunk, Emit, PIECE_BYTES, Piece, fail};
use crate::error::Result;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::path::Path;

/// A JSONL line longer than this is refused: it is no line of documents.
const MAX_LINE_BYTES: usize = 1 << 30;

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

/// One document of plain text.
pub(super) fn read_text(path: &Path, input: Box<dyn Read>, emit: &mut Emit<'_>) -> Result<()> {
    let mut window = Window::new(path, input);
    loop {
        window.fill(PIECE_BYTES)?;
        let text = window.text()?;
        let len = if window.ended { text.len() } else { cut_point(text) };
        let piece = text[..len].to_string();
        window.consume(len);
        let ends = window.ended && window.bytes.is_empty();
        if !emit(Chunk { pieces: vec![Piece { text: piece, ends }], bytes: len as u64 }) || ends {
            return Ok(());
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

/// Hands on blocks of whole lines, each with the number of lines before it, until `take` wants no more.
fn line_blocks(
    path: &Path,
    input: Box<dyn Read>,
    take: &mut dyn FnMut(&str, u64) -> Result<bool>,
) -> Result<()> {
    let mut window = Window::new(path, input);
    let (mut number, mut want) = (0_u64, PIECE_BYTES);
    loop {
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
        let more = take(&text[..len], number)?;
        number += text[..len].lines().count() as u64;
        window.consume(len);
        if !more || (window.ended && window.bytes.is_empty()) {
            return Ok(());
        }
    }
}

/// A document per line.
pub(super) fn read_jsonl(path: &Path, input: Box<dyn Read>, emit: &mut Emit<'_>) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Line {
        text: String,
    }
    line_blocks(path, input, &mut |block, before| {
        let mut chunk = Chunk { pieces: Vec::new(), bytes: block.len() as u64 };
        for (line, number) in block.lines().zip(before + 1..).filter(|(line, _)| !line.trim().is_empty()) {
            match serde_json::from_str(line) {
                Ok(Line { text }) => chunk.pieces.push(Piece { text, ends: true }),
                Err(e) => {
                    // Lines before it may hold what is wrong first.
                    emit(chunk);
                    let reason = format!("line {number}: expected a JSON object with a string `text`: {e}");
                    return Err(fail(path, reason));
                }
            }
        }
        Ok(emit(chunk))
    })
}

/// A value per line, with the number of its line.
pub(super) fn read_values<T: DeserializeOwned>(
    path: &Path,
    input: Box<dyn Read>,
    expected: &str,
) -> Result<Vec<(u64, T)>> {
    let mut values = Vec::new();
    line_blocks(path, input, &mut |block, before| {
        for (line, number) in block.lines().zip(before + 1..).filter(|(line, _)| !line.trim().is_empty()) {
            let value = serde_json::from_str(line)
                .map_err(|e| fail(path, format!("line {number}: expected {expected}: {e}")))?;
            values.push((number, value));
        }
        Ok(true)
    })?;
    Ok(values)
}
