//! A list of keys with values, and lookups of some of them.

use super::{Item, Lookup, Make};
use crate::text::{Distinct, Style};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// What comes before the list, before a key, between key and value, after the value, and after the list.
const FORMS: [[&str; 5]; 6] = [
    ["", "", ": ", "\n", ""],
    ["{\n", "  \"", "\": \"", "\",\n", "}\n"],
    ["", "- ", " -> ", "\n", ""],
    ["key,value\n", "", ",", "\n", ""],
    ["", "", " = ", "\n", ""],
    ["| key | value |\n|---|---|\n", "| ", " | ", " |\n", ""],
];

/// What comes before a key that is looked up, between key and value, and after; the form's own where empty.
const LOOKUPS: [[&str; 3]; 4] = [
    ["", "", ""],
    ["What is listed for ", "? ", "\n"],
    ["Lookup ", ": ", "\n"],
    [">>> table[\"", "\"]\n", "\n"],
];

/// A list of at least two pairs, every third of them looked up.
pub fn list(rng: ChaCha8Rng) -> Make {
    Box::new(move |size| item(size + 2, rng.clone()))
}

fn item(pairs: usize, mut rng: ChaCha8Rng) -> Item {
    let (key_style, value_style) =
        (Style::OF_KEYS[rng.random_range(0..4)], Style::OF_VALUES[rng.random_range(0..4)]);
    let [start, before, between, after, end] = FORMS[rng.random_range(0..FORMS.len())];
    let lookup = match LOOKUPS[rng.random_range(0..LOOKUPS.len())] {
        ["", "", ""] => [before, between, after],
        own => own,
    };
    let (mut keys, mut values) = (Distinct::default(), Distinct::default());
    let list: Vec<(String, String)> =
        (0..pairs).map(|_| (keys.draw(key_style, &mut rng), values.draw(value_style, &mut rng))).collect();
    let mut body = String::from(start);
    for (key, value) in &list {
        body.push_str(&[before, key, between, value, after].concat());
    }
    body.push_str(end);
    body.push('\n');
    let mut order: Vec<usize> = (0..pairs).collect();
    order.shuffle(&mut rng);
    order.truncate(pairs.div_ceil(3));
    let lookups = order.into_iter().map(|at| Lookup {
        before: [lookup[0], &list[at].0, lookup[1]].concat(),
        answer: list[at].1.clone(),
        after: lookup[2].into(),
    });
    Item { body, lookups: lookups.collect() }
}
