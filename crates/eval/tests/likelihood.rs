//! Choices and last words against the scores of lm-evaluation-harness itself, shared contexts against a naive twin, hostile files.
#![allow(clippy::unwrap_used)]

use kernels::Exec;
use model::{Engine, EngineOptions, Model, Silent};
use recurformer_eval::EvalError;
use recurformer_eval::choice::{ChoiceTest, choice};
use recurformer_eval::lastword::{LastWordTest, lastword};
use recurformer_eval::likelihood::{Likelihood, Request, log_likelihoods};
use serde_json::Value;
use std::path::PathBuf;
use weights::{Checkpoint, Tokenizer};

/// Sums of up to 60 f32 log-probabilities, each within 1e-4 of the frozen logits' deviation.
const TOLERANCE: f64 = 2e-3;
/// Means of the same numbers of right answers.
const EXACT: f64 = 1e-12;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/likelihood").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

fn model() -> Model {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
    Model::load(&Checkpoint::open(&dir).unwrap()).unwrap()
}

fn engine(model: &Model) -> Engine {
    Engine::from_model(&Exec::new(1).unwrap(), model, EngineOptions::EXACT).unwrap()
}

/// Without and with a token that begins every text.
fn tokenizer(begun: bool) -> Tokenizer {
    let mut file = json("tokenizer.json");
    if begun {
        file["post_processor"] = json("goldens.json")["post_processor"].take();
    }
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>"});
    Tokenizer::from_parts(file.to_string().into_bytes(), config).unwrap()
}

fn assert_scores(found: &[Likelihood], expected: &Value) {
    let expected = expected.as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    for (score, want) in found.iter().zip(expected) {
        let off = (score.log_likelihood - want[0].as_f64().unwrap()).abs();
        assert!(off < TOLERANCE && score.greedy == want[1].as_bool().unwrap(), "{score:?} {want}");
    }
}

#[test]
fn scores_are_those_of_the_harness() {
    let goldens = json("goldens.json");
    let (exec, model) = (Exec::new(2).unwrap(), engine(&model()));
    let choices = ChoiceTest::read(&data("choice.jsonl"), None).unwrap();
    let words = LastWordTest::read(&data("lastword.jsonl"), None).unwrap();
    for (case, begun) in [("plain", false), ("bos", true)] {
        let (golden, tokenizer) = (&goldens[case], tokenizer(begun));
        let found = choice(&exec, &model, &tokenizer, &choices, &mut Silent).unwrap();
        for (scores, want) in found.likelihoods.iter().zip(golden["choices"].as_array().unwrap()) {
            assert_scores(scores, want);
        }
        assert_eq!((found.items, found.truncated), (16, 2));
        for (name, mean) in [("acc", found.acc), ("acc_norm", found.acc_norm), ("acc_bytes", found.acc_bytes)]
        {
            let want = &golden["choice"];
            assert!((mean.value - want[name].as_f64().unwrap()).abs() < EXACT, "{name} {mean:?}");
            let stderr = want[format!("{name}_stderr")].as_f64().unwrap();
            assert!((mean.stderr.unwrap() - stderr).abs() < EXACT, "{name} {mean:?}");
        }
        let found = lastword(&exec, &model, &tokenizer, &words, &mut Silent).unwrap();
        assert_scores(&found.likelihoods, &golden["words"]);
        let want = &golden["lastword"];
        assert!((found.acc.value - want["acc"].as_f64().unwrap()).abs() < EXACT);
        assert!((found.acc.stderr.unwrap() - want["acc_stderr"].as_f64().unwrap()).abs() < EXACT);
        let off = found.perplexity.value.ln() - want["perplexity"].as_f64().unwrap().ln();
        assert!(off.abs() < TOLERANCE, "{:?}", found.perplexity);
    }
    // The three accuracies are three different rules.
    assert_ne!(goldens["plain"]["choice"]["acc_norm"], goldens["plain"]["choice"]["acc_bytes"]);
    assert_ne!(goldens["plain"]["choice"]["acc_norm"], goldens["plain"]["choice"]["acc"]);
}

#[test]
fn shared_beginnings_change_no_score() {
    let (exec, model, tokenizer) = (Exec::new(2).unwrap(), engine(&model()), tokenizer(false));
    let long = "the storm and the sea and the ship ".repeat(12);
    let encode =
        |context: &str, rest: &str| Request::encode(&tokenizer, context, &format!(" {rest}")).unwrap();
    let mut groups: Vec<Vec<Request>> = ["a sailor saw", "x", "the end. ", &long]
        .iter()
        .map(|context| {
            ["the whale", "a", "it again, and again", "s"].map(|rest| encode(context, rest)).into()
        })
        .collect();
    groups.push(vec![encode("one", "two"), encode("another", "three"), encode(&long, "four")]);
    for group in groups {
        let (together, _) = log_likelihoods(&exec, &model, &group).unwrap();
        for (request, score) in group.iter().zip(together) {
            let (alone, _) = log_likelihoods(&exec, &model, std::slice::from_ref(request)).unwrap();
            assert!((score.log_likelihood - alone[0].log_likelihood).abs() < 1e-4, "{score:?} {alone:?}");
            assert_eq!(score.greedy, alone[0].greedy);
        }
    }
    assert_eq!(log_likelihoods(&exec, &model, &[]).unwrap(), (vec![], 0));
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let exec = Exec::new(1).unwrap();
    let tokenizer = tokenizer(false);
    let tell =
        |context: &str, rest: &str| Request::encode(&tokenizer, context, rest).unwrap_err().to_string();
    assert!(tell(" \t", " a").contains("no token of the context"));
    assert!(tell("", "").contains("no token of the continuation"));
    let mut broken = model();
    let output = broken.params.id("lm_head.weight").unwrap();
    broken.params.data_mut(output).fill(f32::MAX);
    let request = Request::encode(&tokenizer, "a", " b").unwrap();
    assert!(matches!(log_likelihoods(&exec, &engine(&broken), &[request]), Err(EvalError::NonFinite)));
    let request = Request::encode(&tokenizer, "a", &"xyz".repeat(100)).unwrap();
    let error = log_likelihoods(&exec, &engine(&model()), &[request]).unwrap_err().to_string();
    assert!(error.contains("300 tokens, the model's context only 256"), "{error}");
}

#[test]
fn hostile_files_are_refused_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let good = r#"{"context": "a", "choices": ["b", "c"], "answer": 1, "id": 7}"#;
    let first = [good.as_bytes(), b"\n\n"].concat();
    for (line, needle) in [
        (&br#"{"context": "a", "choices": ["b"], "answer": 0}"#[..], "1 choices"),
        (br#"{"context": "a", "choices": [], "answer": 0}"#, "0 choices"),
        (br#"{"context": "a", "choices": ["b", "c"], "answer": 2}"#, "answer 2"),
        (br#"{"context": "a", "choices": ["b", "c"], "answer": -1}"#, "-1"),
        (br#"{"context": "a", "choices": ["b", "c"], "answer": "b"}"#, "string"),
        (br#"{"context": "a", "choices": ["b", ""], "answer": 0}"#, "choice 1 is empty"),
        (br#"{"context": "a", "choices": ["b", 3], "answer": 0}"#, "expected a string"),
        (br#"{"context": "a", "choices": "bc", "answer": 0}"#, "choices"),
        (br#"{"context": null, "choices": ["b", "c"], "answer": 0}"#, "null"),
        (br#"{"choices": ["b", "c"], "answer": 0}"#, "context"),
        (br#"{"context": "a", "choices": ["b", "c"], "answer": 0"#, "EOF"),
        (br#"{"context": "\ud800", "choices": ["b", "c"], "answer": 0}"#, "hex escape"),
        (b"[1, 2]", "expected"),
        (b"not json", "expected"),
    ] {
        let path = write("choice.jsonl", &[&first, line].concat());
        let error = ChoiceTest::read(&path, None).unwrap_err().to_string();
        for needle in ["choice.jsonl: line 3: ", needle] {
            assert!(error.contains(needle), "`{needle}` is not in {error}");
        }
        assert_eq!(error.matches("hint: ").count(), 1, "{error}");
    }
    let deep = [&first[..], &b"[".repeat(100_000)].concat();
    assert!(ChoiceTest::read(&write("deep.jsonl", &deep), None).unwrap_err().to_string().contains("line 3"));
    let error = ChoiceTest::read(&write("bytes.jsonl", b"{\"context\": \"\xff\"}"), None).unwrap_err();
    assert!(error.to_string().contains("invalid byte at offset 13"), "{error}");
    for (bytes, needle) in [(&b"\n \n"[..], "nothing to ask"), (b"", "nothing to ask")] {
        let error = LastWordTest::read(&write("empty.jsonl", bytes), None).unwrap_err().to_string();
        assert!(error.contains(needle) && error.contains("hint: "), "{error}");
    }
    for text in ["a b ", "", " "] {
        let line = serde_json::json!({"text": text}).to_string();
        let error = LastWordTest::read(&write("text.jsonl", line.as_bytes()), None).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("ends with a space"), "{error}");
    }
    assert!(LastWordTest::read(&dir.path().join("none.jsonl"), None).is_err());
    // A byte-order mark, line ends of another system, and what a limit leaves out.
    let path = write("marked.jsonl", format!("\u{feff}{good}\r\n{good}\r\n").as_bytes());
    assert_eq!(ChoiceTest::read(&path, None).unwrap().items().count(), 2);
    assert_eq!(ChoiceTest::read(&path, Some(1)).unwrap().items().count(), 1);
}

#[test]
fn an_unaskable_line_is_named_when_it_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}\n{\"context\": \"\\t\", \"choices\": [\"b\", \"c\"], \"answer\": 0}\n").unwrap();
    let test = ChoiceTest::read(&path, None).unwrap();
    let exec = Exec::new(1).unwrap();
    let error =
        choice(&exec, &engine(&model()), &tokenizer(false), &test, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("a.jsonl: line 2: ") && error.contains("context"), "{error}");
}
