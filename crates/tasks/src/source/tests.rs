//! Parameters, and what the parts of a source are.

use super::*;
use crate::testing::{decode, tokenizer};
use std::collections::HashSet;

fn parse(arg: &str) -> Generated {
    Generated::parse(arg).unwrap().unwrap()
}

#[test]
fn parameters_are_read() {
    assert_eq!(Generated::parse("retrievals").unwrap(), None);
    assert_eq!(Generated::parse("book.txt:context=3").unwrap(), None);
    let retrieval = parse("retrieval");
    assert_eq!(retrieval, Generated { kind: Kind::Retrieval, context: 1024, tokens: 262_144, seed: 0 });
    assert_eq!(parse("retrieval:seed=7,context=512"), Generated { context: 512, seed: 7, ..retrieval });
    let hashhop = parse("hashhop:hops=1+2+4,length=8,cot=true,tokens=1000,context=256,seed=3");
    let kind = Kind::HashHop { hops: vec![1, 2, 4], hash_length: 8, answering: Answering::ChainOfThought };
    assert_eq!(hashhop, Generated { kind, context: 256, tokens: 1000, seed: 3 });
    assert_eq!((hashhop.documents(Part::Train), hashhop.documents(Part::Heldout)), (4, 1));
    assert_eq!(
        (parse("hashhop").documents(Part::Train), parse("hashhop").documents(Part::Heldout)),
        (256, 32)
    );
}

#[test]
fn other_parameters_are_errors_that_name_the_known_ones() {
    for (arg, needles) in [
        ("retrieval:", ["`` is not NAME=VALUE", "context="]),
        ("retrieval:context", ["`context` is not NAME=VALUE", "tokens="]),
        ("retrieval:hops=1", ["`hops=1` is unknown", "seed="]),
        ("retrieval:context=63", ["out of range", "context="]),
        ("retrieval:context=512,context=512", ["twice", "context="]),
        ("retrieval:context=512,", ["`` is not NAME=VALUE", "context="]),
        ("hashhop:hops=", ["out of range", "hops="]),
        ("hashhop:hops=1+17", ["out of range", "hops="]),
        ("hashhop:length=0", ["out of range", "length="]),
        ("hashhop:cot=maybe", ["out of range", "cot="]),
        ("hashhop:tokens=0", ["out of range", "tokens="]),
        ("hashhop:seed=-1", ["out of range", "seed="]),
        ("hashhop:hop=2", ["`hop=2` is unknown", "hops="]),
    ] {
        let error = Generated::parse(arg).unwrap_err().to_string();
        assert!(needles.iter().all(|n| error.contains(n)) && error.contains("hint:"), "{arg}: {error}");
    }
}

#[test]
fn the_parts_share_no_document_and_the_seed_decides() {
    let tokenizer = tokenizer();
    for name in ["hashhop", "retrieval"] {
        let mut seen = HashSet::new();
        for seed in 0..2 {
            let source = parse(&format!("{name}:context=700,seed={seed}"));
            for part in [Part::Train, Part::Heldout] {
                for index in 0..6 {
                    let document = source.document(part, index, &tokenizer).unwrap();
                    assert_eq!(document.len(), 700);
                    assert_eq!(document, source.document(part, index, &tokenizer).unwrap());
                    assert!(seen.insert(document), "{name}, seed {seed}, {part:?}, {index}");
                }
            }
        }
    }
}

#[test]
fn all_hops_occur() {
    let tokenizer = tokenizer();
    let source = parse("hashhop:hops=1+3,context=400,length=4");
    let texts: Vec<String> =
        (0..12).map(|i| decode(&tokenizer, &source.document(Part::Train, i, &tokenizer).unwrap())).collect();
    let with = |hops| texts.iter().filter(|text| text.contains(&format!("\nHops={hops}\n"))).count();
    assert!(with(1) > 0 && with(3) > 0 && with(1) + with(3) == 12);
}
