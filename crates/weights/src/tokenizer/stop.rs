//! Streaming text that ends at a stop string.

use super::{TokenStream, Tokenizer};
use crate::error::Result;

/// Decodes a stream of tokens and holds text back while it may be the beginning of a stop string.
pub struct StopStream<'a> {
    stream: TokenStream<'a>,
    matcher: Matcher<'a>,
}

impl<'a> StopStream<'a> {
    /// A decoder that stops before any of `stops`; empty ones are ignored.
    pub fn new(tokenizer: &'a Tokenizer, stops: &'a [String]) -> Self {
        let matcher = Matcher { stops, text: String::new(), held: String::new(), stopped: false };
        Self { stream: tokenizer.stream(), matcher }
    }

    /// Text that `id` releases (possibly empty). Nothing more comes after a stop string.
    ///
    /// # Errors
    /// [`crate::WeightsError::Tokenizer`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.matcher.stopped {
            return Ok(String::new());
        }
        let new = self.stream.push(id)?;
        Ok(self.matcher.push(&new))
    }

    /// Whether a stop string appeared.
    pub fn stopped(&self) -> bool {
        self.matcher.stopped
    }

    /// Ends the stream: the rest of the text, and all of it.
    ///
    /// # Errors
    /// [`crate::WeightsError::Tokenizer`].
    pub fn finish(self) -> Result<(String, String)> {
        let Self { stream, mut matcher } = self;
        let last = if matcher.stopped { String::new() } else { stream.finish()? };
        let mut rest = matcher.push(&last);
        rest.push_str(&matcher.flush());
        Ok((rest, matcher.text))
    }
}

/// The part that knows only text.
struct Matcher<'a> {
    stops: &'a [String],
    text: String,
    held: String,
    stopped: bool,
}

impl Matcher<'_> {
    /// Takes new text, returns what can no longer be part of a stop string.
    fn push(&mut self, new: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(new);
        let found =
            self.stops.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            self.stopped = true;
            return self.flush();
        }
        let keep = self.stops.iter().map(|s| partial_suffix(&self.held, s)).max().unwrap_or(0);
        let released: String = self.held.drain(..self.held.len() - keep).collect();
        self.text.push_str(&released);
        released
    }

    /// Releases what was held back.
    fn flush(&mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        self.text.push_str(&rest);
        rest
    }
}

/// Bytes of the longest proper beginning of `stop` that `text` ends with.
fn partial_suffix(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(i, _)| i).rev().find(|&n| n > 0 && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[String]) -> Matcher<'_> {
        Matcher { stops, text: String::new(), held: String::new(), stopped: false }
    }

    #[test]
    fn a_possible_beginning_of_a_stop_string_is_held_back() {
        assert_eq!(partial_suffix("hello <|", "<|end|>"), 2);
        assert_eq!(partial_suffix("hello", "<|end|>"), 0);
        assert_eq!(partial_suffix("naïve é", "éa"), 2);
        assert_eq!(partial_suffix("aa", "aab"), 2);
    }

    proptest! {
        #[test]
        fn pieces_give_the_text_before_the_first_stop_string(text in "[ab<>]{0,30}", cuts in prop::collection::vec(1usize..4, 1..30)) {
            let stops = vec!["<a>".to_string(), "bb".to_string()];
            let mut matcher = matcher(&stops);
            let mut out = String::new();
            let mut rest = text.as_str();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, tail) = rest.split_at((*cut).min(rest.len()));
                out.push_str(&matcher.push(piece));
                rest = tail;
            }
            out.push_str(&matcher.flush());
            let end = stops.iter().filter_map(|s| text.find(s.as_str())).min();
            prop_assert_eq!(&out, &text[..end.unwrap_or(text.len())]);
            prop_assert_eq!(&out, &matcher.text);
            prop_assert_eq!(matcher.stopped, end.is_some());
        }
    }
}
