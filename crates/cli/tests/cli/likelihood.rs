//! Choices, last words and returning tokens: base and hybrid in one run, tables, JSON and wrong files.

use crate::common::{Work, some_text};
use serde_json::{Value, json};

fn work() -> Work {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    work
}

/// Lines of choices and of texts.
fn questions(work: &Work) {
    let choices: String = (0..6)
        .map(|i| {
            let choices = ["the harbour", "a distant light", "its own shadow"];
            format!(
                "{}\n",
                json!({"id": i, "context": some_text(i + 1), "choices": choices, "answer": i % 3})
            )
        })
        .collect();
    work.write("choice.jsonl", choices.as_bytes());
    let texts: String = (1..6).map(|i| format!("{}\n", json!({"text": some_text(i).trim_end()}))).collect();
    work.write("lastword.jsonl", texts.as_bytes());
}

#[test]
fn choices_and_last_words_are_scored_beside_the_base() {
    let work = work();
    questions(&work);
    let line = "eval choice --model hybrid --base llama3 --data choice.jsonl";
    let result = work.ok_json(&format!("{line} --json --details"));
    let alone = work.ok_json("eval choice --model llama3 --data choice.jsonl --json");
    for name in ["acc", "acc_norm", "acc_bytes"] {
        assert_eq!(result["base"]["results"][name], alone["results"][name]);
        let share = result["results"][name]["value"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&share) && result["results"][name]["stderr"].is_number());
    }
    assert_eq!((&alone["results"]["likelihoods"], &alone["results"]["items"]), (&Value::Null, &json!(6)));
    let likelihoods = result["results"]["likelihoods"].as_array().unwrap();
    assert_eq!(likelihoods.len(), 6);
    for scores in likelihoods {
        let scores = scores.as_array().unwrap();
        assert_eq!(scores.len(), 3);
        assert!(scores.iter().all(|s| s["log_likelihood"].as_f64().unwrap() < 0.0), "{scores:?}");
    }
    assert_ne!(result["results"]["likelihoods"], result["base"]["results"]["likelihoods"]);
    let table = work.ok(line);
    assert!(table.contains("6 lines") && table.contains("base") && table.contains('±'), "{table}");
    assert_eq!(table.lines().count(), 4);

    let line = "eval lastword --model hybrid --base llama3 --data lastword.jsonl";
    let result = work.ok_json(&format!("{line} --json --limit 3"));
    assert_eq!(result["results"]["items"], 3);
    assert!(result["base"]["results"]["perplexity"]["value"].as_f64().unwrap() > 1.0);
    assert!(work.ok(line).contains("5 lines"));
}

#[test]
fn files_that_hold_no_questions() {
    let work = work();
    questions(&work);
    work.write("bad.jsonl", b"{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 2}\n");
    for (line, needles) in [
        ("eval choice --model llama3 --data bad.jsonl", ["bad.jsonl: line 1", "answer 2"]),
        ("eval choice --model llama3 --data lastword.jsonl", ["lastword.jsonl: line 1", "context"]),
        ("eval lastword --model llama3 --data choice.jsonl", ["choice.jsonl: line 1", "text"]),
        ("eval lastword --model llama3 --data nowhere.jsonl", ["nowhere.jsonl", "hint:"]),
    ] {
        work.fails(1, line, &needles);
    }
}

#[test]
fn returning_tokens_are_scored_beside_the_base() {
    let work = work();
    let line = "eval induction --model hybrid --base llama3 --distances 8,40 --span 6 --cue 2 --samples 3";
    let result = work.ok_json(&format!("{line} --json"));
    for results in [&result["results"], &result["base"]["results"]] {
        let cells: Vec<(&str, u64, u64)> = results
            .as_array()
            .unwrap()
            .iter()
            .map(|r| {
                (r["task"].as_str().unwrap(), r["distance"].as_u64().unwrap(), r["asked"].as_u64().unwrap())
            })
            .collect();
        assert_eq!(cells, [("repeat", 8, 21), ("repeat", 40, 117), ("copy", 8, 12), ("copy", 40, 12)]);
        for row in results.as_array().unwrap() {
            let loss = |name: &str| row[name]["value"].as_f64().unwrap();
            assert!(
                loss("loss") > 0.0 && loss("first_loss") > 0.0 && row["low"].as_f64() <= row["high"].as_f64()
            );
            assert_eq!(row["whole"].is_object(), row["task"] == "copy");
        }
    }
    assert_eq!(result, work.ok_json(&format!("{line} --json")));
    assert_ne!(result["results"], work.ok_json(&format!("{line} --json --seed 1"))["results"]);
    let table = work.ok(line);
    assert!(table.contains("whole copies at 40") && table.lines().count() == 7, "{table}");
}
