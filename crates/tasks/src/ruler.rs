//! A subset of RULER: needles in a haystack, variable tracking, frequent words.
//!
//! Source: NVIDIA/RULER (Apache-2.0), `scripts/data/synthetic`, written anew from its definition, with its wording. Nothing is downloaded: haystacks are
//! noise or other needles, keys are adjective-noun pairs of this crate's words, values have 7 digits. The example that RULER puts before variable
//! tracking is left out. Scored by the share of answers that occur in the generated text, whatever their case.

use crate::draw::{Purpose, stream};
use crate::error::{Result, TaskError};
use crate::sizing::largest_fitting;
use crate::text::{Distinct, Style};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;
use weights::Tokenizer;

#[cfg(test)]
mod tests;

const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Needles, keys or values where there are several.
const SEVERAL: usize = 4;
/// Variables that copy from the one before.
const HOPS: usize = 4;
/// Letters of coded words.
const CODED_LETTERS: usize = 6;
/// Tokens of context per different coded word.
const TOKENS_PER_CODED: usize = 50;
/// Riemann's ζ(2): the sum of rank⁻² over all ranks.
const ZETA_2: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;
/// Coded words to begin with: from here on ranks 2 to 4 stand out.
const MIN_CODED: usize = 60;

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RulerTask {
    /// One needle in noise.
    NiahSingle,
    /// Four needles with different keys in noise, one asked for.
    NiahMultikey,
    /// One needle among others of the same form.
    NiahNeedles,
    /// Four needles with the same key in noise, all values asked for.
    NiahMultivalue,
    /// Four needles with different keys in noise, all asked for.
    NiahMultiquery,
    /// A chain of five variables in noise; all names that have the first one's value are asked for.
    VariableTracking,
    /// Random words with frequencies falling as rank⁻²; the three most frequent after the first, which is shown as dots, are asked for.
    FrequentWords,
}

impl RulerTask {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::NiahSingle,
        Self::NiahMultikey,
        Self::NiahNeedles,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::VariableTracking,
        Self::FrequentWords,
    ];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle => "niah_single",
            Self::NiahMultikey => "niah_multikey",
            Self::NiahNeedles => "niah_needles",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::VariableTracking => "variable_tracking",
            Self::FrequentWords => "frequent_words",
        }
    }

    /// Tokens to generate at most: RULER's numbers.
    pub fn answer_tokens(self) -> usize {
        match self {
            Self::VariableTracking => 30,
            Self::FrequentWords => 50,
            _ => 128,
        }
    }
}

/// A prompt to test with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulerPrompt {
    /// The prompt with the beginning of the answer.
    pub text: String,
    /// What the answer must hold.
    pub answers: Vec<String>,
}

/// Prompt number `index` of a task: as much haystack as lets prompt and answer fit `context` tokens, of which `reserved` are taken already (by a
/// beginning-of-sequence token).
///
/// # Errors
/// [`TaskError::Argument`] when it does not fit; those of the tokenizer.
pub fn prompt(
    tokenizer: &Tokenizer,
    task: RulerTask,
    context: usize,
    reserved: usize,
    (seed, index): (u64, u64),
) -> Result<RulerPrompt> {
    let rng = stream(Purpose::Ruler, seed, index);
    let make = |size: usize| make(task, size, context, rng.clone());
    let room = context.saturating_sub(reserved + task.answer_tokens());
    let size =
        largest_fitting(room, context, |size| Ok(tokenizer.encode(&make(size).text, false)?.len()))?
            .ok_or_else(|| {
                TaskError::Argument(format!(
                    "{} with an answer of {} tokens does not fit a context of {context} tokens\nhint: choose a longer one",
                    task.name(),
                    task.answer_tokens()
                ))
            })?;
    Ok(make(size))
}

/// The prompt with `size` lines of haystack (or more coded words than the fewest).
fn make(task: RulerTask, size: usize, context: usize, mut rng: ChaCha8Rng) -> RulerPrompt {
    match task {
        RulerTask::VariableTracking => variable_tracking(size, &mut rng),
        RulerTask::FrequentWords => frequent_words(MIN_CODED + size, context / TOKENS_PER_CODED, &mut rng),
        RulerTask::NiahSingle => niah(size, [1, 1, 1], false, rng),
        RulerTask::NiahNeedles => niah(size, [1, 1, 1], true, rng),
        RulerTask::NiahMultikey => niah(size, [SEVERAL, 1, 1], false, rng),
        RulerTask::NiahMultivalue => niah(size, [1, SEVERAL, 1], false, rng),
        RulerTask::NiahMultiquery => niah(size, [SEVERAL, 1, SEVERAL], false, rng),
    }
}

/// Needles of `keys` keys with `values` values each, the first `queries` keys asked for, in `size` lines of noise or of other needles.
fn niah(
    size: usize,
    [keys, values, queries]: [usize; 3],
    in_needles: bool,
    mut rng: ChaCha8Rng,
) -> RulerPrompt {
    let (mut names, mut numbers) = (Distinct::default(), HashSet::new());
    let mut number = |rng: &mut ChaCha8Rng| loop {
        let number = rng.random_range(1_000_000..10_000_000_u32).to_string();
        if numbers.insert(number.clone()) {
            return number;
        }
    };
    let needle = |key: &str, value: &str| format!("One of the special magic numbers for {key} is: {value}.");
    let (mut asked, mut answers, mut needles) = (Vec::new(), Vec::new(), Vec::new());
    for at in 0..keys {
        let key = names.draw(Style::Pair, &mut rng);
        for _ in 0..values {
            let value = number(&mut rng);
            needles.push(needle(&key, &value));
            if at < queries {
                answers.push(value);
            }
        }
        if at < queries {
            asked.push(key);
        }
    }
    let places: Vec<f64> = needles.iter().map(|_| rng.random_range(0.0..1.0)).collect();
    let mut lines: Vec<String> = (0..size)
        .map(|_| match in_needles {
            true => needle(&names.draw(Style::Pair, &mut rng), &number(&mut rng)),
            false => NOISE.into(),
        })
        .collect();
    for (needle, place) in needles.into_iter().zip(places) {
        let at = (place * (lines.len() + 1) as f64) as usize;
        lines.insert(at, needle);
    }
    let context = lines.join("\n");
    let asked = match asked.as_slice() {
        [one] => one.clone(),
        [others @ .., last] => format!("{}, and {last}", others.join(", ")),
        [] => String::new(),
    };
    let text = if answers.len() == 1 {
        format!(
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n\
             {context}\n\
             What is the special magic number for {asked} mentioned in the provided text? The special magic number for {asked} mentioned in the \
             provided text is"
        )
    } else {
        format!(
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the numbers afterwards.\n\
             {context}\n\
             What are all the special magic numbers for {asked} mentioned in the provided text? The special magic numbers for {asked} mentioned in \
             the provided text are"
        )
    };
    RulerPrompt { text, answers }
}

fn variable_tracking(size: usize, rng: &mut ChaCha8Rng) -> RulerPrompt {
    let mut names: Vec<String> = Vec::new();
    while names.len() <= HOPS {
        let name: String = (0..5).map(|_| char::from(b'A' + rng.random_range(0..26))).collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let value = rng.random_range(10_000..100_000);
    let mut places: Vec<f64> = names.iter().map(|_| rng.random_range(0.0..1.0)).collect();
    places.sort_by(f64::total_cmp);
    let mut lines = vec![NOISE.to_string(); size];
    for (hop, place) in places.into_iter().enumerate() {
        let statement = match hop {
            0 => format!("VAR {} = {value}", names[0]),
            _ => format!("VAR {} = VAR {}", names[hop], names[hop - 1]),
        };
        // Statements already there stand before it.
        lines.insert(hop + (place * (size + 1) as f64) as usize, statement);
    }
    let text = format!(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n\
         {}\n\
         Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable \
         assignment in the text above, {} variables are assigned the value {value}, they are: ",
        lines.join("\n"),
        names.len()
    );
    // The space belongs to the answer's first token.
    RulerPrompt { text: text.trim_end().into(), answers: names }
}

/// About `words` coded words, `different` of them different (at least 8).
fn frequent_words(words: usize, different: usize, rng: &mut ChaCha8Rng) -> RulerPrompt {
    let mut vocabulary = vec!["...".to_string()];
    while vocabulary.len() < different.max(8) {
        let word: String = (0..CODED_LETTERS).map(|_| char::from(b'a' + rng.random_range(0..26))).collect();
        if !vocabulary.contains(&word) {
            vocabulary.push(word);
        }
    }
    let mut shown: Vec<&str> = Vec::new();
    for (rank, word) in (1..).zip(&vocabulary) {
        let count = (words as f64 / (f64::from(rank) * f64::from(rank) * ZETA_2)) as usize;
        shown.extend(std::iter::repeat_n(word.as_str(), count));
    }
    shown.shuffle(rng);
    let text = format!(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. {}\n\
         Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above \
         coded text? Answer: According to the coded text above, the three most frequently appeared words are:",
        shown.join(" ")
    );
    RulerPrompt { text, answers: vocabulary[1..4].to_vec() }
}
