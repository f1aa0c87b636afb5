//! Every query has one answer, which stands before it; places follow the power law.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn options(length: usize, pairs: usize, filler: Filler) -> MqarOptions {
    MqarOptions { length, pairs, filler, ..MqarOptions::default() }
}

proptest! {
    #[test]
    fn every_query_is_answerable_and_every_position_right(
        pairs in 1_usize..40, extra in 0_usize..60, zeros: bool, vocab in 400_usize..9000, seed: u64, index in 0_u64..1000
    ) {
        let filler = if zeros { Filler::Zeros } else { Filler::Random };
        let length = 4 * pairs + 2 * extra;
        let options = MqarOptions { vocab, ..options(length, pairs, filler) };
        let MqarSequence { tokens, labels } = options.sequence(MqarPart::Train, (seed, index)).unwrap();
        prop_assert_eq!((tokens.len(), labels.len()), (length, length));
        let half = vocab as u32 / 2;
        let keys: Vec<u32> = tokens[..2 * pairs].iter().copied().step_by(2).collect();
        let values: Vec<u32> = tokens[1..2 * pairs].iter().copied().step_by(2).collect();
        prop_assert!(keys.iter().all(|k| (1..half).contains(k)));
        prop_assert!(values.iter().all(|v| (half..vocab as u32).contains(v)));
        prop_assert_eq!(keys.iter().collect::<HashSet<_>>().len(), pairs, "no key twice");
        prop_assert_eq!(values.iter().collect::<HashSet<_>>().len(), pairs, "no value twice");
        let mut asked = HashSet::new();
        for (t, &label) in labels.iter().enumerate() {
            if label == IGNORED {
                prop_assert!(!zeros || t < 2 * pairs || tokens[t] == 0);
                continue;
            }
            prop_assert!(t >= 2 * pairs && t % 2 == 0);
            let pair = keys.iter().position(|k| *k == tokens[t]);
            prop_assert!(pair.is_some_and(|pair| values[pair] == label && asked.insert(pair)));
        }
        prop_assert_eq!(asked.len(), pairs, "every key is asked for once");
        prop_assert!(tokens.iter().all(|&t| (t as usize) < vocab));
    }
}

#[test]
fn places_follow_the_power_law() {
    // One pair: the probability of a place is its weight. 10 places, a = 0.01.
    let options = options(22, 1, Filler::Zeros);
    let weights: Vec<f64> = (1..=10).map(|i| f64::from(i).powf(0.01 - 1.0)).collect();
    let total: f64 = weights.iter().sum();
    let draws = 20_000;
    let mut counts = [0_u32; 10];
    for index in 0..draws {
        let made = options.sequence(MqarPart::Test, (1, index)).unwrap();
        counts[(made.labels.iter().position(|&l| l != IGNORED).unwrap() - 2) / 2] += 1;
    }
    for (count, weight) in counts.iter().zip(weights) {
        let p = weight / total;
        // Five standard deviations.
        let off = (f64::from(*count) / draws as f64 - p).abs();
        assert!(off < 5.0 * (p * (1.0 - p) / draws as f64).sqrt(), "{counts:?}");
    }
}

#[test]
fn all_places_may_be_taken_and_each_once() {
    let options = options(16, 4, Filler::Zeros);
    for index in 0..50 {
        let made = options.sequence(MqarPart::Test, (0, index)).unwrap();
        assert!((8..16).all(|t| (made.labels[t] != IGNORED) == (t % 2 == 0)), "{made:?}");
    }
}

#[test]
fn parts_and_numbers_are_drawn_apart() {
    let options = MqarOptions::default();
    let make = |part, seed, index| options.sequence(part, (seed, index)).unwrap();
    assert_eq!(make(MqarPart::Train, 1, 2), make(MqarPart::Train, 1, 2));
    let others = [
        make(MqarPart::Check, 1, 2),
        make(MqarPart::Test, 1, 2),
        make(MqarPart::Train, 2, 2),
        make(MqarPart::Train, 1, 3),
    ];
    assert!(others.iter().all(|other| *other != make(MqarPart::Train, 1, 2)));
    assert_ne!(others[0], others[1]);
    // The random filler leaves no trace of a place that is not asked.
    let filled: HashSet<u32> = make(MqarPart::Test, 0, 0).tokens[8..].iter().copied().collect();
    assert!(filled.len() > 40);
}

#[test]
fn what_cannot_be_made_is_an_error() {
    let good = MqarOptions::default();
    for (options, needle) in [
        (MqarOptions { pairs: 0, ..good }, "0 pairs"),
        (MqarOptions { pairs: 17, ..good }, "17 pairs in 64"),
        (MqarOptions { length: 65, ..good }, "65 tokens"),
        (MqarOptions { vocab: 64, ..good }, "vocabulary of 64"),
        (MqarOptions { vocab: usize::MAX, ..good }, "vocabulary of"),
        (MqarOptions { power: 0.0, ..good }, "power 0"),
        (MqarOptions { power: f64::NAN, ..good }, "power NaN"),
    ] {
        let error = options.sequence(MqarPart::Test, (0, 0)).unwrap_err().to_string();
        assert!(error.contains(needle) && error.contains("hint: "), "{error}");
    }
}
