//! One to four facts, and others nobody asks for, hidden in filler and asked for at the end.

use super::{Item, Lookup, Make};
use crate::draw::one_of;
use crate::text::{Distinct, NOISE, Style, sentence};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Ways to state a fact about `{key}`, to ask for it, and to answer up to the value.
const TEMPLATES: [[&str; 3]; 10] = [
    [
        "The access code of {key} is {value}.",
        "What is the access code of {key}?",
        "The access code of {key} is",
    ],
    [
        "It was decided that {key} would be listed under {value}.",
        "Under what is {key} listed?",
        "{key} is listed under",
    ],
    ["Locker of {key}: {value}.", "Which locker belongs to {key}?", "Locker of {key}:"],
    [
        "A parcel for {key} came with the label {value}.",
        "Which label came with the parcel for {key}?",
        "The label says",
    ],
    [
        "In the ledger, {key} stands next to {value}.",
        "What stands next to {key} in the ledger?",
        "Next to {key} stands",
    ],
    ["Keep in mind that {key} means {value}.", "What does {key} mean?", "{key} means"],
    ["[{key}] reference={value}", "reference of [{key}]", "reference="],
    [
        "Whoever looks for {key} should ask for {value}.",
        "What should one ask for when looking for {key}?",
        "One should ask for",
    ],
    ["{key} was last seen with {value} on the badge.", "What was on the badge of {key}?", "On the badge was"],
    ["Entry {value} belongs to {key}.", "Which entry belongs to {key}?", "Entry"],
];

/// Ways to write question and answer.
const FORMS: [[&str; 2]; 4] = [["Question: ", "\nAnswer: "], ["Q: ", "\nA: "], ["", " "], ["### ", "\n"]];

const INTRODUCTIONS: [&str; 4] = [
    "",
    "",
    "Some details in this text matter; they are asked for at the end.\n",
    "Read everything. A few facts below will be needed later.\n",
];

/// What surrounds the facts.
#[derive(Clone, Copy)]
enum Filler {
    /// The same line over and over; facts are lines of their own.
    Noise,
    /// Invented sentences in paragraphs; facts stand among them.
    Prose,
}

/// Facts in lines that repeat.
pub fn in_noise(rng: ChaCha8Rng) -> Make {
    Box::new(move |size| item(Filler::Noise, size, rng.clone()))
}

/// Facts in invented prose.
pub fn in_prose(rng: ChaCha8Rng) -> Make {
    Box::new(move |size| item(Filler::Prose, size, rng.clone()))
}

/// An item with `size` filler lines or sentences.
fn item(filler: Filler, size: usize, mut rng: ChaCha8Rng) -> Item {
    let (key_style, value_style) =
        (Style::OF_KEYS[rng.random_range(0..4)], Style::OF_VALUES[rng.random_range(0..4)]);
    let [statement, question, lead] = TEMPLATES[rng.random_range(0..TEMPLATES.len())];
    let [ask, reply] = FORMS[rng.random_range(0..FORMS.len())];
    let introduction = one_of(&mut rng, &INTRODUCTIONS);
    let line = NOISE[rng.random_range(0..NOISE.len())];
    let asked = rng.random_range(1..=4);
    let others = rng.random_range(0..=2);

    let (mut keys, mut values) = (Distinct::default(), Distinct::default());
    let facts: Vec<(String, String, f64)> = (0..asked + others)
        .map(|_| {
            (keys.draw(key_style, &mut rng), values.draw(value_style, &mut rng), rng.random_range(0.0..1.0))
        })
        .collect();
    // Few facts where there is little room for filler: a short text asks for one.
    let stated = facts.len().min(1 + size / 2);
    let mut asking: Vec<usize> = (0..stated.min(asked)).collect();
    asking.shuffle(&mut rng);

    // A stream of its own: what is filler does not depend on where the facts are.
    let mut prose = ChaCha8Rng::from_seed(rng.random());
    let mut body = String::from(introduction);
    for at in 0..=size {
        let here = facts[..stated].iter().filter(|(.., depth)| (depth * (size + 1) as f64) as usize == at);
        for (key, value, _) in here {
            body.push_str(&statement.replace("{key}", key).replace("{value}", value));
            body.push(match filler {
                Filler::Noise => '\n',
                Filler::Prose => ' ',
            });
        }
        if at == size {
            break;
        }
        match filler {
            Filler::Noise => body.extend([line, "\n"]),
            Filler::Prose => {
                let end = if prose.random_range(0..8) == 0 { "\n" } else { " " };
                body.extend([&sentence(&mut prose), end]);
            }
        }
    }
    let body = format!("{}\n", body.trim_end());
    let lookups = asking.into_iter().map(|fact| {
        let (key, value, _) = &facts[fact];
        let [question, lead] = [question, lead].map(|text| text.replace("{key}", key));
        let gap = if lead.ends_with('=') { "" } else { " " };
        Lookup {
            before: format!("{ask}{question}{reply}{lead}{gap}"),
            answer: value.clone(),
            after: "\n".into(),
        }
    });
    Item { body, lookups: lookups.collect() }
}
