//! What is asked was said; documents are full; the tests' own wording does not occur.

use super::*;
use crate::draw::{Purpose, stream};
use crate::testing::{decode, tokenizer};
use proptest::prelude::*;
use std::collections::HashSet;

proptest! {
    #[test]
    fn every_answer_stands_in_the_body_beside_its_key(seed: u64, kind in 0..3_usize, size in 0..80_usize) {
        let make = KINDS[kind](stream(Purpose::Train, seed, 0));
        let item = make(size);
        prop_assert_eq!(&item, &make(size), "the same size gives the same item");
        prop_assert!(!item.lookups.is_empty());
        let mut asked = HashSet::new();
        for lookup in &item.lookups {
            prop_assert!(asked.insert(&lookup.before), "{} twice", lookup.before);
            let holes = ["{key}", "{value}"].map(|hole| item.text().contains(hole));
            prop_assert_eq!(holes, [false, false]);
            let (answer, before) = (&lookup.answer, &lookup.before);
            // Some piece of the body between line breaks or sentences holds both the answer and a word of the question that names the key.
            let said = item.body.split(['\n']).filter(|line| line.contains(answer.as_str()));
            prop_assert!(said.clone().count() >= 1, "{answer} is not in\n{}", item.body);
            let names: Vec<&str> = before.split([' ', '"', ':', '?', '\n', ',', '[', ']', '|', '=']).collect();
            let shares = |line: &str| names.iter().any(|n| n.len() > 3 && line.contains(n) && n.chars().any(|c| c == '-' || c.is_uppercase()));
            prop_assert!(said.into_iter().any(shares), "{before}{answer}\n{}", item.body);
        }
    }

    #[test]
    fn spans_return(seed: u64, spans in 2..60_usize) {
        let rng = stream(Purpose::Train, seed, 0);
        let sequence = spans::sequence(spans, rng.clone());
        let repeated: Vec<(usize, usize)> =
            sequence.iter().enumerate().filter_map(|(at, (_, of))| of.map(|of| (at, of))).collect();
        prop_assert!(!repeated.is_empty());
        for (at, of) in repeated {
            prop_assert!(of < at && sequence[at].0 == sequence[of].0 && sequence[of].1.is_none());
        }
        let lines: Vec<String> = spans::spans(rng)(spans - 2).body.lines().map(String::from).collect();
        prop_assert_eq!(lines, sequence.into_iter().map(|(span, _)| span).collect::<Vec<_>>());
    }

    #[test]
    fn larger_items_are_longer(seed: u64, kind in 0..KINDS.len(), size in 8..40_usize) {
        let make = KINDS[kind](stream(Purpose::Train, seed, 0));
        prop_assert!(make(2 * size).text().len() > make(size).text().len());
    }
}

#[test]
fn documents_have_exactly_their_length() {
    let tokenizer = tokenizer();
    for context in [150, 600, 1024, 2048] {
        let documents: Vec<Vec<u32>> = (0..20)
            .map(|i| training_document(&tokenizer, context, stream(Purpose::Train, 5, i)).unwrap())
            .collect();
        assert!(documents.iter().all(|d| d.len() == context));
        assert_eq!(documents.iter().collect::<HashSet<_>>().len(), documents.len());
        assert_eq!(
            documents[3],
            training_document(&tokenizer, context, stream(Purpose::Train, 5, 3)).unwrap()
        );
    }
    let error = training_document(&tokenizer, 8, stream(Purpose::Train, 5, 0)).unwrap_err();
    assert!(error.to_string().contains("hint:"), "{error}");
}

/// The passkey test and RULER must stay tests.
#[test]
fn the_wording_of_the_tests_does_not_occur() {
    let tokenizer = tokenizer();
    let text: String = (0..200)
        .map(|i| {
            decode(&tokenizer, &training_document(&tokenizer, 1024, stream(Purpose::Train, 0, i)).unwrap())
        })
        .collect::<Vec<_>>()
        .join("\n")
        .to_lowercase();
    for phrase in [
        "pass key",
        "passkey",
        "memorize",
        "irrelevant",
        "hidden",
        "grass is green",
        "sky is blue",
        "sun is yellow",
        "here we go",
        "there and back",
        "special magic",
        "mentioned in the provided text",
        "var ",
        "coded",
    ] {
        assert!(!text.contains(phrase), "{phrase}");
    }
    // Everything that a document can be occurs.
    for phrase in ["access code of", "### ", "lookup ", ">>> table", "birds sing", "q: ", "key,value"] {
        assert!(text.contains(phrase), "{phrase} does not occur");
    }
}
