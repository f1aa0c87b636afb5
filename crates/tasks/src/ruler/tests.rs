//! Every answer can be read off the text, and only so; prompts fill their context.

use super::*;
use crate::testing::tokenizer;
use proptest::prelude::*;
use std::collections::HashMap;

fn rng(seed: u64) -> ChaCha8Rng {
    stream(Purpose::Ruler, seed, 0)
}

/// Values by key, as the needles in a text say them.
fn needles(text: &str) -> HashMap<&str, Vec<&str>> {
    let mut found: HashMap<&str, Vec<&str>> = HashMap::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("One of the special magic numbers for ")) {
        let (key, value) = line.split_once(" is: ").unwrap();
        found.entry(key).or_default().push(value.strip_suffix('.').unwrap());
    }
    found
}

#[test]
fn the_texts_are_those_of_the_definition() {
    let made = niah(2, [1, 1, 1], false, rng(0));
    let key = *needles(&made.text).keys().next().unwrap();
    let needle = format!("One of the special magic numbers for {key} is: {}.", made.answers[0]);
    let lines: Vec<&str> = made.text.lines().collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(
        lines[0],
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards."
    );
    assert_eq!(lines[1..4].iter().filter(|l| **l == NOISE).count(), 2);
    assert!(lines[1..4].contains(&needle.as_str()));
    assert_eq!(
        lines[4],
        format!(
            "What is the special magic number for {key} mentioned in the provided text? The special magic number for {key} mentioned in the provided text is"
        )
    );
    let made = variable_tracking(0, &mut rng(0));
    let [a, b, c, d, e] = [0, 1, 2, 3, 4].map(|i| made.answers[i].as_str());
    let value = made.text.split(' ').skip_while(|w| *w != "=").nth(1).unwrap().lines().next().unwrap();
    assert_eq!(
        made.text,
        format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nVAR {a} = {value}\nVAR {b} = VAR {a}\n\
             VAR {c} = VAR {b}\nVAR {d} = VAR {c}\nVAR {e} = VAR {d}\nQuestion: Find all variables that are assigned the value {value} in the text \
             above. Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are:"
        )
    );
}

proptest! {
    #[test]
    fn needles_hold_the_answers(size in 0..60_usize, seed: u64) {
        for (task, keys, values, queries) in [
            (RulerTask::NiahSingle, 1, 1, 1),
            (RulerTask::NiahMultikey, 4, 1, 1),
            (RulerTask::NiahNeedles, 1 + size, 1, 1),
            (RulerTask::NiahMultivalue, 1, 4, 1),
            (RulerTask::NiahMultiquery, 4, 1, 4),
        ] {
            let made = make(task, size, 1024, rng(seed));
            let found = needles(&made.text);
            prop_assert_eq!(found.len(), keys);
            prop_assert!(found.values().all(|v| v.len() == values));
            let question = made.text.lines().last().unwrap();
            let asked: Vec<&&str> = found.keys().filter(|key| names(question, key)).collect();
            prop_assert_eq!(asked.len(), queries, "{}", question);
            let mut expected: Vec<&str> = asked.iter().flat_map(|key| found[**key].clone()).collect();
            let mut answers: Vec<&str> = made.answers.iter().map(String::as_str).collect();
            expected.sort_unstable();
            answers.sort_unstable();
            prop_assert_eq!(expected, answers);
            let noise = if task == RulerTask::NiahNeedles { 0 } else { size };
            prop_assert_eq!(made.text.lines().filter(|l| *l == NOISE).count(), noise);
        }
    }

    #[test]
    fn variables_can_be_followed(size in 0..60_usize, seed: u64) {
        let made = variable_tracking(size, &mut rng(seed));
        let mut known: HashMap<&str, &str> = HashMap::new();
        for line in made.text.lines().filter_map(|l| l.strip_prefix("VAR ")) {
            let (name, value) = line.split_once(" = ").unwrap();
            // Each is assigned after what it copies.
            let value = value.strip_prefix("VAR ").map_or(value, |from| known[from]);
            prop_assert!(known.insert(name, value).is_none());
        }
        prop_assert_eq!(known.len(), 5);
        for name in &made.answers {
            let question = format!("assigned the value {} in the text above", known[name.as_str()]);
            prop_assert!(made.text.contains(&question));
        }
        prop_assert_eq!(made.text.lines().filter(|l| *l == NOISE).count(), size);
    }

    #[test]
    fn frequent_words_are_the_most_frequent(size in 0..3000_usize, different in 0..200_usize, seed: u64) {
        let made = frequent_words(MIN_CODED + size, different, &mut rng(seed));
        let (text, _) = made.text.split_once("\nQuestion").unwrap();
        let coded = text.split_once("coded words. ").unwrap().1;
        let mut counts: HashMap<&str, usize> = HashMap::new();
        coded.split(' ').for_each(|word| *counts.entry(word).or_default() += 1);
        let mut order: Vec<(&str, usize)> = counts.into_iter().collect();
        order.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        prop_assert_eq!(order[0].0, "...");
        prop_assert_eq!(order[1..4].iter().map(|(word, _)| *word).collect::<Vec<_>>(), made.answers);
        prop_assert!(order[3].1 > order[4].1, "the fourth is no tie: {:?}", &order[..5]);
    }
}

/// Whether a question names a key, and not one that only begins with it.
fn names(question: &str, key: &str) -> bool {
    question.split([' ', ',']).any(|word| word == key)
}

#[test]
fn prompts_fill_their_context_and_no_more() {
    let tokenizer = tokenizer();
    for task in RulerTask::ALL {
        let line = if task == RulerTask::FrequentWords { 2 * 7 } else { 100 };
        for context in [1100, 3000] {
            for index in 0..4 {
                let made = prompt(&tokenizer, task, context, 1, (5, index)).unwrap();
                assert_eq!(made, prompt(&tokenizer, task, context, 1, (5, index)).unwrap());
                assert_ne!(made, prompt(&tokenizer, task, context, 1, (6, index)).unwrap());
                let tokens = 1 + tokenizer.encode(&made.text, false).unwrap().len() + task.answer_tokens();
                assert!(tokens <= context && tokens + line > context, "{}: {tokens}", task.name());
            }
        }
        let error = prompt(&tokenizer, task, 64, 0, (0, 0)).unwrap_err().to_string();
        assert!(error.contains(task.name()) && error.contains("hint:"), "{error}");
    }
}
