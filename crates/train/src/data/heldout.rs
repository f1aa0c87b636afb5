//! Splitting any documents into a part to train on and a part held out.

use super::{Document, Split, split};

/// Documents to train on and documents held out. Sources of eight documents or more are split by document ([`split`]); of a smaller source the
/// last eighth of every document is held out.
pub fn split_pair(documents: Vec<Document>) -> (Vec<Document>, Vec<Document>) {
    let count = |source: &str| documents.iter().filter(|d| d.source == source).count();
    let (many, few): (Vec<_>, Vec<_>) = documents.iter().cloned().partition(|d| count(&d.source) >= 8);
    let mut train = split(many.clone(), Split::Train);
    let mut heldout = split(many, Split::Heldout);
    for mut document in few {
        let tail = document.tokens.split_off(document.tokens.len() - document.tokens.len() / 8);
        heldout.push(Document { source: document.source.clone(), tokens: tail });
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
