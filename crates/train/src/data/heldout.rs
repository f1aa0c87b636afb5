//! Splitting any documents into a part to train on and a part held out.

use super::{Document, Split};
use std::collections::HashMap;

/// Documents to train on and documents held out, both in order. Sources of eight documents or more are split by document
/// ([`Split::of`]); of a smaller source the last eighth of every document is held out.
pub fn split_pair(documents: Vec<Document>) -> (Vec<Document>, Vec<Document>) {
    let mut counts: HashMap<String, usize> = HashMap::new();
    for document in &documents {
        *counts.entry(document.source.clone()).or_default() += 1;
    }
    let mut seen: HashMap<String, usize> = HashMap::new();
    let (mut train, mut heldout) = (Vec::new(), Vec::new());
    for mut document in documents {
        if counts[&document.source] >= Split::HELDOUT_EVERY {
            let index = seen.entry(document.source.clone()).or_default();
            *index += 1;
            match Split::of(*index - 1) {
                Split::Train => train.push(document),
                Split::Heldout => heldout.push(document),
            }
            continue;
        }
        let len = document.tokens.len();
        let tokens = document.tokens.split_off(len - len / Split::HELDOUT_EVERY);
        if !tokens.is_empty() {
            heldout.push(Document { source: document.source.clone(), tokens });
        }
        train.push(document);
    }
    (train, heldout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(source: &str, tokens: std::ops::Range<u32>) -> Document {
        Document { source: source.into(), tokens: tokens.collect() }
    }

    #[test]
    fn one_document_gives_its_last_eighth() {
        let (train, heldout) = split_pair(vec![document("a", 0..80)]);
        assert_eq!(train, [document("a", 0..70)]);
        assert_eq!(heldout, [document("a", 70..80)]);
    }

    #[test]
    fn many_documents_are_split_whole_and_none_is_lost() {
        let documents: Vec<_> = (0..20).map(|i| document("a", i..i + 5)).collect();
        let (train, heldout) = split_pair(documents.clone());
        assert!(!heldout.is_empty() && train.len() > heldout.len());
        assert_eq!(train.len() + heldout.len(), 20);
        assert!(documents.iter().all(|d| train.contains(d) != heldout.contains(d)));
    }
}
