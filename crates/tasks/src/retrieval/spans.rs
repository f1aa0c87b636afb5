//! Random spans, some of which return: what copying and induction heads live on.

use super::{Item, Make};
use crate::text::{Style, sentence};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// At least two spans, half of those after the first repeated from somewhere before.
pub fn spans(rng: ChaCha8Rng) -> Make {
    Box::new(move |size| {
        let body: String =
            sequence(size + 2, rng.clone()).iter().map(|(span, _)| format!("{span}\n")).collect();
        Item { body, lookups: Vec::new() }
    })
}

/// Spans in order, each with the place of the one that it repeats. The second is always a repetition.
pub(super) fn sequence(spans: usize, mut rng: ChaCha8Rng) -> Vec<(String, Option<usize>)> {
    let style = rng.random_range(0..4);
    let words = rng.random_range(2..=12);
    let mut out: Vec<(String, Option<usize>)> = Vec::with_capacity(spans);
    let mut fresh: Vec<usize> = Vec::new();
    for at in 0..spans {
        if at == 1 || (at > 1 && rng.random_bool(0.5)) {
            let of = fresh[rng.random_range(0..fresh.len())];
            out.push((out[of].0.clone(), Some(of)));
        } else {
            fresh.push(at);
            out.push((span(style, words, &mut rng), None));
        }
    }
    out
}

/// A span of about `words` words: prose, names and numbers, letters, or hexadecimal digits.
fn span(style: usize, words: usize, rng: &mut ChaCha8Rng) -> String {
    let join = |drawn: Vec<String>| drawn.join(" ");
    match style {
        0 => join((0..words.div_ceil(6)).map(|_| sentence(rng)).collect()),
        1 => {
            let styles = [Style::Digits, Style::Words, Style::Code, Style::Pair, Style::Person];
            join((0..words).map(|_| styles[rng.random_range(0..styles.len())].draw(rng)).collect())
        }
        2 => join((0..words).map(|_| letters(rng)).collect()),
        _ => join((0..words).map(|_| format!("{:04x}", rng.random_range(0..0x1_0000))).collect()),
    }
}

fn letters(rng: &mut ChaCha8Rng) -> String {
    (0..rng.random_range(1..=6)).map(|_| char::from(b'a' + rng.random_range(0..26))).collect()
}
