//! Probes: numbers said once between lines of noise and asked back, with the answers and the positions of everything known.
//!
//! The wording is this module's own: no sentence of the passkey test or of RULER occurs, so that heads chosen by probes are tested fairly.

use crate::draw::{Purpose, one_of, stream};
use crate::error::{Result, TaskError};
use crate::sizing::largest_fitting;
use crate::text::{Distinct, NOISE, Style};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use weights::Tokenizer;

/// Digits of a number.
const DIGITS: usize = 7;
/// Draws of another number with as many tokens.
const DRAWS: usize = 256;

/// A text with questions and answers, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Token ids, BOS included when there is one; the last are an answer and a full stop.
    pub tokens: Vec<u32>,
    /// Every number, in the order of the questions.
    pub needles: Vec<ProbeNeedle>,
}

/// A number that is said once in the text and once as an answer, with the same tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeNeedle {
    /// Position of its first token in the text.
    pub said: usize,
    /// Position of its first token in the answer.
    pub asked: usize,
    /// Another number of as many tokens.
    pub distractor: Vec<u32>,
}

/// A number to hide, and one that could stand in its place.
struct Fact {
    key: String,
    value: Vec<u32>,
    distractor: Vec<u32>,
}

/// Probe number `index`: `needles` numbers at random places in as much noise as fits `context` tokens. The pieces are tokenised one by one, so that a
/// number has the same tokens wherever it stands.
///
/// # Errors
/// [`TaskError::Argument`] when it does not fit, without needles, or when the tokenizer gives no two numbers the same length; those of the tokenizer.
pub fn probe(
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    context: usize,
    needles: usize,
    (seed, index): (u64, u64),
) -> Result<Probe> {
    if needles == 0 {
        return Err(TaskError::Argument("a probe needs at least one needle".into()));
    }
    let mut rng = stream(Purpose::Probe, seed, index);
    let encode = |text: &str| -> Result<Vec<u32>> { Ok(tokenizer.encode(text, false)?) };
    let mut names = Distinct::default();
    let facts: Vec<Fact> = (0..needles)
        .map(|_| fact(tokenizer, names.draw(Style::Pair, &mut rng), &mut rng))
        .collect::<Result<_>>()?;
    let noise = encode(&format!("{}\n", one_of(&mut rng, &NOISE)))?;
    let places: Vec<f64> = facts.iter().map(|_| rng.random_range(0.0..1.0)).collect();
    let mut questions: Vec<usize> = (0..needles).collect();
    questions.shuffle(&mut rng);
    let intro = encode("Some numbers are written down here and there. They are needed at the end.\n")?;
    let stop = encode(".\n")?;
    let said: Vec<Vec<u32>> = facts
        .iter()
        .map(|f| encode(&format!("Note: the number of the {} is ", f.key)))
        .collect::<Result<_>>()?;
    let asked: Vec<Vec<u32>> = facts
        .iter()
        .map(|f| encode(&format!("As noted above, the number of the {} is ", f.key)))
        .collect::<Result<_>>()?;
    let render = |lines: usize| {
        let mut tokens: Vec<u32> = bos.into_iter().chain(intro.iter().copied()).collect();
        let mut starts = vec![0; needles];
        for line in 0..=lines {
            for (fact, place) in places.iter().enumerate() {
                if (place * (lines + 1) as f64) as usize == line {
                    tokens.extend(&said[fact]);
                    starts[fact] = tokens.len();
                    tokens.extend(facts[fact].value.iter().chain(&stop));
                }
            }
            if line < lines {
                tokens.extend(&noise);
            }
        }
        let needles = questions
            .iter()
            .map(|&fact| {
                tokens.extend(&asked[fact]);
                let asked = tokens.len();
                tokens.extend(facts[fact].value.iter().chain(&stop));
                ProbeNeedle { said: starts[fact], asked, distractor: facts[fact].distractor.clone() }
            })
            .collect();
        Probe { tokens, needles }
    };
    let lines = largest_fitting(context, context, |lines| Ok(render(lines).tokens.len()))?.ok_or_else(|| {
        TaskError::Argument(format!(
            "a probe with {needles} needles does not fit a context of {context} tokens\nhint: choose a longer one, or fewer needles"
        ))
    })?;
    Ok(render(lines))
}

fn fact(tokenizer: &Tokenizer, key: String, rng: &mut ChaCha8Rng) -> Result<Fact> {
    let mut number = || -> Result<Vec<u32>> {
        let text: String =
            (0..DIGITS).map(|i| char::from(b'0' + rng.random_range(u8::from(i == 0)..10))).collect();
        Ok(tokenizer.encode(&text, false)?)
    };
    let value = number()?;
    for _ in 0..DRAWS {
        let distractor = number()?;
        if distractor.len() == value.len() && distractor != value {
            return Ok(Fact { key, value, distractor });
        }
    }
    Err(TaskError::Argument(format!(
        "this tokenizer gives no two numbers of {DIGITS} digits the same number of tokens"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{decode, tokenizer};

    #[test]
    fn numbers_stand_where_the_positions_say() {
        let tokenizer = tokenizer();
        let noise = NOISE.map(|line| tokenizer.encode(&format!("{line}\n"), false).unwrap().len());
        let longest = noise.into_iter().max().unwrap();
        for (context, needles) in [(300, 1), (1000, 4), (3000, 7)] {
            for index in 0..5 {
                let made = probe(&tokenizer, Some(0), context, needles, (3, index)).unwrap();
                assert!(made.tokens[0] == 0 && made.needles.len() == needles);
                assert!(made.tokens.len() <= context && made.tokens.len() + longest > context);
                for ProbeNeedle { said, asked, distractor } in &made.needles {
                    let at = |from: usize| &made.tokens[from..from + distractor.len()];
                    let value = decode(&tokenizer, at(*said));
                    assert!(at(*said) == at(*asked) && at(*said) != distractor && said < asked);
                    assert!(value.len() == DIGITS && value.bytes().all(|b| b.is_ascii_digit()), "{value}");
                    // Said once, asked once, of the same thing.
                    let text = decode(&tokenizer, &made.tokens[1..]);
                    assert_eq!(text.matches(&value).count(), 2, "{text}");
                    let key = |from: usize| {
                        let text = decode(&tokenizer, &made.tokens[1..from]);
                        text.rsplit("number of the ").next().unwrap().to_string()
                    };
                    assert_eq!(key(*said), key(*asked));
                    assert!(key(*said).ends_with(" is "));
                }
            }
        }
    }

    #[test]
    fn the_text_is_noise_a_note_and_a_question() {
        let tokenizer = tokenizer();
        let made = probe(&tokenizer, None, 700, 1, (0, 0)).unwrap();
        let text = decode(&tokenizer, &made.tokens);
        let lines: Vec<&str> = text.trim_end().split('\n').collect();
        let [intro, middle @ .., question] = lines.as_slice() else { panic!("{text}") };
        assert!(intro.starts_with("Some numbers are written down"));
        let (notes, noise): (Vec<&str>, Vec<&str>) =
            middle.iter().partition(|line| line.starts_with("Note: "));
        assert!(noise.len() > 3 && NOISE.contains(&noise[0]) && noise.iter().all(|line| *line == noise[0]));
        let fact = notes[0].strip_prefix("Note: the number of the ").unwrap();
        assert_eq!(*question, format!("As noted above, the number of the {fact}"));
        assert_eq!(notes.len(), 1);
        assert_eq!(made, probe(&tokenizer, None, 700, 1, (0, 0)).unwrap());
        assert_ne!(made, probe(&tokenizer, None, 700, 1, (0, 1)).unwrap());
        assert_ne!(made, probe(&tokenizer, None, 700, 1, (1, 0)).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let tokenizer = tokenizer();
        let message =
            |context, needles| probe(&tokenizer, None, context, needles, (0, 0)).unwrap_err().to_string();
        assert!(message(150, 3).contains("3 needles does not fit a context of 150 tokens"));
        assert!(message(500, 0).contains("at least one needle"));
    }
}
