//! Random tokens that come back: a whole sequence twice (induction, arXiv 2209.11895), or a span at its beginning again after other tokens (copying).
//! No token stands in a sequence twice but for that, so what follows is known from what came before, and only from it.

use crate::draw::{Purpose, stream};
use crate::error::{Result, TaskError};
use rand::seq::index::sample;
use std::ops::Range;
use weights::Tokenizer;

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returning {
    /// Everything: `distance` tokens, and the same again.
    Whole,
    /// The first `span` of `distance` tokens; of the second time the first `cue` are given.
    Span {
        /// Tokens that come back.
        span: usize,
        /// Of them, those that say which span it is.
        cue: usize,
    },
}

/// A sequence with tokens that return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Positions of the tokens to be predicted the second time.
    pub scored: Range<usize>,
    /// The same tokens the first time, when nothing said what they are.
    pub first: Range<usize>,
}

impl Returning {
    /// Tokens of a sequence at a distance.
    pub fn len(self, distance: usize) -> usize {
        match self {
            Self::Whole => 2 * distance,
            Self::Span { span, .. } => distance + span,
        }
    }

    /// Tokens scored of each sequence.
    pub fn scored(self, distance: usize) -> usize {
        match self {
            Self::Whole => distance - 1,
            Self::Span { span, cue } => span - cue,
        }
    }
}

/// Sequence number `index` of `seed`: every returning token stands `distance` tokens after its first occurrence. Tokens are drawn from `ids`.
///
/// # Errors
/// [`TaskError::Argument`] for a distance below 2 or above the number of ids, a span longer than the distance, and a cue that is empty or leaves
/// nothing of the span.
pub fn sequence(
    ids: &[u32],
    returning: Returning,
    distance: usize,
    (seed, index): (u64, u64),
) -> Result<Returned> {
    let refuse = |reason: String| Err(TaskError::Argument(reason));
    if distance < 2 || distance > ids.len() {
        return refuse(format!(
            "a distance of {distance} must be between 2 and the {} different tokens there are\nhint: choose other distances",
            ids.len()
        ));
    }
    let cue = match returning {
        Returning::Whole => 1,
        Returning::Span { span, cue } if cue == 0 || cue >= span => {
            return refuse(format!(
                "a cue of {cue} tokens must be between 1 and less than the span's {span}\nhint: choose others"
            ));
        }
        Returning::Span { span, .. } if span > distance => {
            return refuse(format!(
                "a span of {span} tokens cannot return after {distance}\nhint: choose a shorter span or longer distances"
            ));
        }
        Returning::Span { cue, .. } => cue,
    };
    let mut rng = stream(Purpose::Induction, seed, index);
    let mut tokens: Vec<u32> = sample(&mut rng, ids.len(), distance).iter().map(|i| ids[i]).collect();
    let end = cue + returning.scored(distance);
    tokens.extend_from_within(..end);
    Ok(Returned { tokens, scored: distance + cue..distance + end, first: cue..end })
}

/// The ids below `vocab` that stand for text: no special tokens, no rows without a token.
///
/// # Errors
/// Those of the tokenizer.
pub fn ordinary_ids(tokenizer: &Tokenizer, vocab: usize) -> Result<Vec<u32>> {
    let mut ids = Vec::with_capacity(vocab);
    for id in (0..vocab as u32).filter(|&id| tokenizer.token_text(id).is_some()) {
        if !tokenizer.decode(&[id], true)?.is_empty() {
            ids.push(id);
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn what_is_scored_stood_at_the_distance_and_nothing_else_repeats(
            distance in 2_usize..80, cut in 1_usize..40, cue in 1_usize..40, whole: bool, seed: u64
        ) {
            let ids: Vec<u32> = (100..200).collect();
            let span = (cut + 1).min(distance);
            let returning = match whole {
                true => Returning::Whole,
                false => Returning::Span { span, cue: cue.min(span - 1) },
            };
            let Returned { tokens, scored, first } = sequence(&ids, returning, distance, (seed, 3)).unwrap();
            prop_assert_eq!((tokens.len(), scored.len()), (returning.len(distance), returning.scored(distance)));
            prop_assert_eq!(tokens[..distance].iter().collect::<HashSet<_>>().len(), distance);
            prop_assert!(tokens.iter().all(|t| ids.contains(t)));
            for t in distance..tokens.len() {
                prop_assert_eq!(tokens[t], tokens[t - distance]);
            }
            prop_assert_eq!(scored.end, tokens.len());
            prop_assert_eq!(first.start + distance..first.end + distance, scored);
        }
    }

    #[test]
    fn sequences_follow_from_seed_and_number() {
        let ids: Vec<u32> = (0..50).collect();
        let make = |seed, index| sequence(&ids, Returning::Whole, 20, (seed, index)).unwrap();
        assert_eq!(make(1, 2), make(1, 2));
        assert_ne!(make(1, 2), make(1, 3));
        assert_ne!(make(1, 2), make(2, 2));
        let span = Returning::Span { span: 4, cue: 1 };
        assert_eq!(sequence(&ids, span, 20, (1, 2)).unwrap().tokens[..20], make(1, 2).tokens[..20]);
    }

    #[test]
    fn what_cannot_be_made_is_an_error() {
        let ids: Vec<u32> = (0..50).collect();
        let tell = |returning, distance| sequence(&ids, returning, distance, (0, 0)).unwrap_err().to_string();
        assert!(tell(Returning::Whole, 51).contains("the 50 different tokens"));
        assert!(tell(Returning::Whole, 1).contains("between 2"));
        assert!(tell(Returning::Span { span: 9, cue: 2 }, 8).contains("span of 9"));
        assert!(tell(Returning::Span { span: 2, cue: 2 }, 8).contains("cue of 2"));
        assert!(tell(Returning::Span { span: 2, cue: 0 }, 8).contains("cue of 0"));
    }

    #[test]
    fn special_tokens_and_empty_rows_are_left_out() {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Fuse"},
            "added_tokens": [{
                "id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true
            }],
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": {"a": 0, "<s>": 1, "b": 2, " ": 3}, "merges": []
            }
        });
        let tokenizer = Tokenizer::from_parts(json.to_string().into_bytes(), serde_json::json!({})).unwrap();
        assert_eq!(ordinary_ids(&tokenizer, 10).unwrap(), [0, 2, 3]);
        assert_eq!(ordinary_ids(&tokenizer, 3).unwrap(), [0, 2]);
    }
}
