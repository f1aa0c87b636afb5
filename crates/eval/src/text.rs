//! Evaluation text as scored windows of token ids.

use crate::error::{EvalError, Result};
use train::TrainError;
use train::data::Document;

/// How text is cut and what is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowOptions {
    /// Tokens per window (BOS included when prepended).
    pub context: usize,
    /// Score only the last `stride` tokens of overlapping windows; `None`: consecutive windows, everything but the first token scored.
    pub stride: Option<usize>,
    /// Prepended to every window.
    pub bos: Option<u32>,
    /// At most this many tokens of each file.
    pub max_tokens: Option<usize>,
}

/// One window: tokens, and the first position whose prediction is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Tokens `score_from..` are scored, each predicted from those before it; at least 1.
    pub score_from: usize,
}

impl Window {
    /// Scored tokens.
    pub fn scored(&self) -> usize {
        self.tokens.len() - self.score_from
    }
}

/// All windows of one file or domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalText {
    /// File or domain name.
    pub name: String,
    /// Its windows.
    pub windows: Vec<Window>,
}

/// Cuts every document into windows and collects them by source, in order of first appearance. A last window shorter than 2 tokens is
/// dropped. An error when nothing is left to score.
pub fn windows(documents: &[Document], options: &WindowOptions) -> Result<Vec<EvalText>> {
    let bos_len = usize::from(options.bos.is_some());
    if options.context < 2 + bos_len {
        return Err(EvalError::Argument(format!(
            "context {} leaves nothing to score; it must be at least {}",
            options.context,
            2 + bos_len
        )));
    }
    let body = options.context - bos_len;
    if let Some(stride) = options.stride
        && (stride == 0 || stride > body)
    {
        return Err(EvalError::Argument(format!("stride {stride} must be in 1..={body}")));
    }
    let mut texts: Vec<EvalText> = Vec::new();
    let mut used: Vec<usize> = Vec::new();
    for document in documents {
        let index = texts.iter().position(|t| t.name == document.source).unwrap_or_else(|| {
            texts.push(EvalText { name: document.source.clone(), windows: Vec::new() });
            used.push(0);
            texts.len() - 1
        });
        let room = options.max_tokens.map_or(usize::MAX, |m| m.saturating_sub(used[index]));
        let tokens = &document.tokens[..document.tokens.len().min(room)];
        used[index] += tokens.len();
        cut(tokens, body, options, &mut texts[index].windows);
    }
    texts.retain(|t| !t.windows.is_empty());
    if texts.is_empty() {
        return Err(EvalError::Train(TrainError::Data(
            "there is nothing to score: every document is shorter than 2 tokens\nhint: give more text".into(),
        )));
    }
    Ok(texts)
}

fn cut(tokens: &[u32], body: usize, options: &WindowOptions, out: &mut Vec<Window>) {
    let step = options.stride.unwrap_or(body);
    let mut start = 0;
    while start < tokens.len() {
        let end = (start + body).min(tokens.len());
        let overlap = if start == 0 { 0 } else { body - step };
        if end - start >= 2 && end - start > overlap {
            let mut window = Vec::with_capacity(end - start + 1);
            window.extend(options.bos);
            window.extend_from_slice(&tokens[start..end]);
            let score_from = (overlap + usize::from(options.bos.is_some())).max(1);
            out.push(Window { tokens: window, score_from });
        }
        if end == tokens.len() {
            break;
        }
        start += step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn document(n: usize) -> Document {
        Document { source: "a".into(), tokens: (0..n as u32).collect() }
    }

    fn options(context: usize, stride: Option<usize>, bos: Option<u32>) -> WindowOptions {
        WindowOptions { context, stride, bos, max_tokens: None }
    }

    #[test]
    fn consecutive_windows_score_all_but_their_first_token() {
        let texts = windows(&[document(21)], &options(10, None, None)).unwrap();
        let lens: Vec<_> = texts[0].windows.iter().map(|w| (w.tokens.len(), w.scored())).collect();
        assert_eq!(lens, [(10, 9), (10, 9)], "the last window of one token is dropped");
    }

    #[test]
    fn bos_makes_every_token_scored() {
        let texts = windows(&[document(18)], &options(10, None, Some(99))).unwrap();
        assert_eq!(texts[0].windows.iter().map(Window::scored).sum::<usize>(), 18);
        assert!(texts[0].windows.iter().all(|w| w.tokens[0] == 99 && w.tokens.len() == 10));
    }

    #[test]
    fn empty_and_tiny_documents_are_an_error() {
        assert!(windows(&[document(1)], &options(10, None, None)).is_err());
        assert!(windows(&[], &options(10, None, None)).is_err());
        assert!(windows(&[document(30)], &options(1, None, None)).is_err());
        assert!(windows(&[document(30)], &options(8, Some(9), None)).is_err());
    }

    #[test]
    fn max_tokens_counts_per_source() {
        let mut opts = options(10, None, None);
        opts.max_tokens = Some(15);
        let texts = windows(&[document(12), document(12)], &opts).unwrap();
        let total: usize = texts[0].windows.iter().map(|w| w.tokens.len()).sum();
        assert_eq!(total, 15);
    }

    proptest! {
        #[test]
        fn strided_windows_score_each_token_once(n in 2usize..200, context in 3usize..40, stride in 1usize..40) {
            let stride = stride.min(context);
            let texts = windows(&[document(n)], &options(context, Some(stride), None)).unwrap();
            let mut scored = vec![0; n];
            for w in &texts[0].windows {
                for &t in &w.tokens[w.score_from..] { scored[t as usize] += 1; }
            }
            prop_assert_eq!(scored[0], 0);
            // With stride == context, windows do not overlap: the first token of each has no prediction.
            if stride < context { prop_assert!(scored[1..].iter().all(|&s| s == 1)); }
        }
    }
}
