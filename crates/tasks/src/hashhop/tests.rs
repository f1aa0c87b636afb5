//! The definition, followed line by line, and an example written out by hand.

use super::*;
use crate::testing::{decode, tokenizer};
use proptest::prelude::*;
use std::collections::HashMap;

fn options(hops: usize, hash_length: usize, answering: Answering) -> HashHopOptions {
    HashHopOptions { hops, hash_length, answering }
}

/// Two chains of two hops, their lines in an order chosen here.
fn example(answering: Answering) -> HashHop {
    let chain = |names: [&str; 3]| names.map(String::from).to_vec();
    HashHop {
        options: options(2, 3, answering),
        chains: vec![chain(["abc", "def", "ghi"]), chain(["JKL", "mno", "PQR"])],
        lines: vec![(1, 1), (0, 0), (1, 0), (0, 1)],
    }
}

#[test]
fn the_text_is_that_of_the_definition() {
    let direct = "mno = 'PQR'\nabc = def\nJKL = mno\ndef = 'ghi'\nCOMPLETION:\nHops=2\n\nCoT=False\n\nabc = 'ghi'\nJKL = 'PQR'\n";
    assert_eq!(example(Answering::Direct).document(2), direct);
    let thought = "mno = 'PQR'\nabc = def\nJKL = mno\ndef = 'ghi'\nCOMPLETION:\nHops=2\n\nCoT=True\n\nabc = 'def = ghi'\n";
    assert_eq!(example(Answering::ChainOfThought).document(1), thought);
    let task = example(Answering::ChainOfThought);
    assert_eq!((task.query(1), task.completion(1)), ("JKL = '".into(), "mno = PQR'".into()));
}

/// What a reader of the text knows: pairs, and which of their values are ends.
fn pairs(lines: &str) -> (HashMap<&str, &str>, usize) {
    let mut quoted = 0;
    let mut map = HashMap::new();
    for line in lines.lines() {
        let (key, value) = line.split_once(" = ").unwrap();
        let bare = value.trim_matches('\'');
        quoted += usize::from(bare != value);
        assert!(map.insert(key, bare).is_none(), "{key} twice");
    }
    (map, quoted)
}

proptest! {
    #[test]
    fn every_query_is_answered_by_following_the_pairs(
        hops in 1..=4_usize,
        length in 3..8_usize,
        chains in 1..60_usize,
        thought: bool,
        seed: u64,
    ) {
        let answering = if thought { Answering::ChainOfThought } else { Answering::Direct };
        let rng = stream(Purpose::HashHop, seed, 0);
        let task = HashHop::draw(options(hops, length, answering), chains, rng.clone()).unwrap();
        prop_assert_eq!(&task, &HashHop::draw(options(hops, length, answering), chains, rng).unwrap());
        let document = task.document(chains);
        let (lines, completion) = document.split_once("COMPLETION:\n").unwrap();
        prop_assert_eq!(lines.lines().count(), chains * hops);
        let (map, quoted) = pairs(lines);
        prop_assert_eq!(quoted, chains, "one end per chain");
        // Levels: a chain's first key is no value, every other key is.
        let values: HashSet<&str> = map.values().copied().collect();
        prop_assert_eq!(values.len(), chains * hops, "no value twice");
        prop_assert_eq!(map.keys().filter(|key| !values.contains(*key)).count(), chains);
        prop_assert!(map.iter().flat_map(|(k, v)| [k, v]).all(|s| s.len() == length && s.bytes().all(|b| b.is_ascii_alphabetic())));

        let header = format!("Hops={hops}\n\nCoT={}\n\n", if thought { "True" } else { "False" });
        let queries: Vec<&str> = completion.strip_prefix(&header).unwrap().lines().collect();
        prop_assert_eq!(queries.len(), chains);
        for query in queries {
            let (key, answer) = query.strip_suffix('\'').unwrap().split_once(" = '").unwrap();
            prop_assert!(!values.contains(key), "a query starts a chain");
            let path: Vec<&str> =
                std::iter::successors(Some(key), |key| map.get(*key).copied()).skip(1).collect();
            prop_assert_eq!(path.len(), hops);
            let expected = if thought { path.join(" = ") } else { path[hops - 1].to_string() };
            prop_assert_eq!(answer, expected);
        }
    }

    #[test]
    fn prompts_fill_their_context_and_no_more(
        hops in 1..=3_usize,
        context in 200..1500_usize,
        reserved in 0..2_usize,
        queries in 1..20_usize,
        thought: bool,
        seed: u64,
    ) {
        let tokenizer = tokenizer();
        let answering = if thought { Answering::ChainOfThought } else { Answering::Direct };
        let options = options(hops, 6, answering);
        let made = prompt(&tokenizer, options, context, reserved, queries, (seed, 3)).unwrap();
        prop_assert_eq!(&made, &prompt(&tokenizer, options, context, reserved, queries, (seed, 3)).unwrap());
        prop_assert_ne!(&made.text, &prompt(&tokenizer, options, context, reserved, queries, (seed, 4)).unwrap().text);
        let (lines, _) = made.text.split_once("COMPLETION:\n").unwrap();
        let chains = lines.lines().count() / hops;
        prop_assert_eq!(made.queries.len(), queries.min(chains));
        let (map, _) = pairs(lines);
        for query in &made.queries {
            let tokens = tokenizer.encode(&[made.text.as_str(), &query.text].concat(), false).unwrap().len();
            prop_assert!(reserved + tokens + made.answer_tokens <= context);
            // One more chain and its query would not have fitted: what is left is less than they take.
            let chain = hops * (2 * 6 + 6);
            prop_assert!(reserved + tokens + made.answer_tokens + chain + 12 * SLACK > context);
            let key = query.text.strip_suffix(" = '").unwrap();
            let end = std::iter::successors(Some(key), |key| map.get(*key).copied()).last().unwrap();
            prop_assert_eq!(end, &query.value);
            // The whole answer fits what is generated.
            let answer = if thought { hops * 6 + (hops - 1) * 3 } else { 6 };
            prop_assert!(made.answer_tokens > tokenizer.encode(&query.value, false).unwrap().len());
            prop_assert!(made.answer_tokens <= answer + 1 + SLACK);
        }
    }
}

#[test]
fn more_chains_begin_with_those_that_fewer_are() {
    let draw =
        |n| HashHop::draw(options(2, 5, Answering::Direct), n, stream(Purpose::Train, 1, 0)).unwrap().chains;
    assert_eq!(draw(7), draw(12)[..7]);
}

#[test]
fn training_documents_are_full_and_end_with_answers() {
    let tokenizer = tokenizer();
    for context in [150, 400, 1024] {
        for hops in [1, 2] {
            let rng = stream(Purpose::Train, 9, context as u64);
            let tokens =
                training_document(&tokenizer, options(hops, 6, Answering::Direct), context, &rng).unwrap();
            assert_eq!(tokens.len(), context);
            let text = decode(&tokenizer, &tokens);
            let (lines, completion) = text.split_once("COMPLETION:\n").unwrap();
            // The first line may be cut, and then has a shorter key.
            let pairs = lines.lines().filter_map(|line| line.split_once(" = "));
            let map: HashMap<&str, &str> = pairs.filter(|(key, _)| key.len() == 6).collect();
            let queries: Vec<&str> = completion.lines().filter(|line| line.contains(" = ")).collect();
            assert!(!queries.is_empty() && text.ends_with("'\n"), "{text}");
            for query in queries {
                let (key, end) = query.split_once(" = ").unwrap();
                let followed = (0..hops).fold(key, |key, _| map[key]);
                assert_eq!(followed, end);
            }
        }
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let rng = || stream(Purpose::HashHop, 0, 0);
    for (options, chains) in [
        (options(0, 6, Answering::Direct), 1),
        (options(17, 6, Answering::Direct), 1),
        (options(1, 0, Answering::Direct), 1),
        (options(1, 65, Answering::Direct), 1),
    ] {
        assert!(HashHop::draw(options, chains, rng()).unwrap_err().to_string().contains("between 1 and"));
    }
    let one_letter = options(1, 1, Answering::Direct);
    assert!(HashHop::draw(one_letter, 13, rng()).is_ok());
    assert!(HashHop::draw(one_letter, 14, rng()).unwrap_err().to_string().contains("hint:"));
    let short = prompt(&tokenizer(), options(4, 6, Answering::Direct), 40, 0, 1, (0, 0));
    assert!(short.unwrap_err().to_string().contains("40 tokens"));
}
