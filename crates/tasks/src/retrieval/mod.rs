//! Documents that ask back for what they said: facts hidden in filler, lists with lookups, spans that return.
//!
//! The wording is this module's own: no sentence of the passkey test or of RULER occurs, so that those stay fair tests of a model that was trained
//! on these documents. What is shared is the kind of task, which is the point.

mod facts;
mod lists;
mod spans;
#[cfg(test)]
mod tests;

use crate::error::{Result, TaskError};
use crate::sizing::{fill_front, largest_fitting};
use crate::text::sentence;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use weights::Tokenizer;

/// Tokens below which a document is not divided.
const SMALLEST_PART: usize = 256;
/// Items drawn for a place before it counts as too small. Sizes of the smallest items differ by a factor of ten.
const DRAWS: usize = 64;

/// A part of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    /// Says things.
    body: String,
    /// Ask for them.
    lookups: Vec<Lookup>,
}

/// A question and its answer, as text; the answer stands in the body, too.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lookup {
    before: String,
    answer: String,
    after: String,
}

/// Makes an item of a given size: filler lines, pairs or spans. The same size gives the same item.
type Make = Box<dyn Fn(usize) -> Item>;

impl Item {
    fn text(&self) -> String {
        self.lookups.iter().fold(self.body.clone(), |mut text, lookup| {
            [&lookup.before, &lookup.answer, &lookup.after].into_iter().for_each(|s| text.push_str(s));
            text
        })
    }
}

/// Kinds of items, drawn with equal shares.
const KINDS: [fn(ChaCha8Rng) -> Make; 4] = [facts::in_noise, facts::in_prose, lists::list, spans::spans];

/// Tokens of a document of exactly `context` tokens: one, two or four items (of at least 256 tokens each when there are several), and before each
/// of them filler where it falls short.
///
/// # Errors
/// [`TaskError::Argument`] when no item fits; those of the tokenizer.
pub fn training_document(tokenizer: &Tokenizer, context: usize, mut rng: ChaCha8Rng) -> Result<Vec<u32>> {
    let most = match context / SMALLEST_PART {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => 3,
    };
    let parts = 1 << rng.random_range(0..most);
    let mut document = Vec::with_capacity(context);
    for part in 1..=parts {
        let room = part * context / parts - document.len();
        document.extend(filled(tokenizer, room, &mut rng)?);
    }
    Ok(document)
}

/// An item that fits, as large as it can be, with filler before it: `room` tokens. One that does not fit at its smallest is drawn anew.
fn filled(tokenizer: &Tokenizer, room: usize, rng: &mut ChaCha8Rng) -> Result<Vec<u32>> {
    for _ in 0..DRAWS {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let item = kind(ChaCha8Rng::from_seed(rng.random()));
        let tokens = |size: usize| -> Result<Vec<u32>> { Ok(tokenizer.encode(&item(size).text(), false)?) };
        let Some(size) = largest_fitting(room, room, |size| Ok(tokens(size)?.len()))? else { continue };
        let document = tokens(size)?;
        let mut filler = Vec::new();
        while filler.len() < room - document.len() {
            let mut more = tokenizer.encode(&format!("{}\n", sentence(rng)), false)?;
            more.append(&mut filler);
            filler = more;
        }
        return Ok(fill_front(document, &filler, room));
    }
    Err(TaskError::Argument(format!(
        "retrieval: {room} tokens are too few for a question and what it asks for\nhint: choose a larger `context`"
    )))
}
