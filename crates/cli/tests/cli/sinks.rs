//! `sinks` and `analyze --sinks found`: what they print and write, and what they refuse.

use crate::common::{Work, npy, random_tokens, without_run};

const LINE: &str = "sinks --model llama3 --data data.npy --tokens 256 --context 64 --donors 2";

#[test]
fn the_table_the_json_and_the_file_agree() {
    let work = Work::with_text_model("llama3");
    let printed = work.ok_json(&format!("{LINE} --json --out sinks.json"));
    assert_eq!(printed, work.json("sinks.json"));
    assert_eq!(
        (&printed["version"], &printed["sequences"], &printed["tokens"]),
        (&1.into(), &4.into(), &256.into())
    );
    assert_eq!(printed["activations"].as_array().unwrap().len(), printed["model"]["layers"]);
    let printed = without_run(printed);
    assert_eq!(
        without_run(work.ok_json(&format!("{LINE} --json"))),
        printed,
        "the same seed gives the same report"
    );
    let table = work.ok(&format!("{LINE} --out again.json"));
    assert!(table.contains("4 sequences of up to 64 tokens") && table.contains("no-op heads"), "{table}");
    assert!(table.contains("wrote again.json"), "{table}");
    assert_eq!(without_run(work.json("again.json")), printed);
    for sink in printed["sinks"].as_array().unwrap().iter().take(12) {
        assert!(
            table.lines().any(|line| line.trim_start().starts_with(&sink["position"].to_string())),
            "{table}"
        );
    }
}

#[test]
fn analysis_leaves_out_what_was_found() {
    let work = Work::with_model("llama3");
    let line = "analyze --model llama3 --data data.npy --tokens 256 --context 64 --criteria recency";
    let out = work.ok(&format!("{line} --sinks found --out found.json"));
    assert!(out.contains("sinks left out: "), "{out}");
    let (found, first) = (work.json("found.json"), {
        work.ok(&format!("{line} --out first.json"));
        work.json("first.json")
    });
    assert_eq!((found["sinks"].to_string(), first["sinks"].to_string()), ("[]".into(), "[0]".into()));
    assert!(first.get("found_sinks").is_none());
    let share =
        |json: &serde_json::Value| json["layers"][0]["heads"][0]["recency_ratio_16"].as_f64().unwrap();
    assert_ne!(share(&found), share(&first));
    work.ok("plan --heads found.json --criterion recency --beta 0.5 --out plan.json");
}

#[test]
fn what_cannot_be_examined() {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    let rest = "--data data.npy --tokens 256";
    work.fails(1, &format!("sinks --model hybrid {rest} --context 64"), &["hybrid", "base model"]);
    work.fails(1, &format!("sinks --model llama3 {rest} --context 31"), &["32 tokens", "hint:"]);
    work.fails(2, &format!("sinks --model llama3 {rest} --context 64 --donors 0"), &["donors"]);
    work.fails(2, &format!("sinks --model llama3 {rest} --context 257"), &["256"]);
    work.fails(1, &format!("sinks --model llama3 {rest} --context 64 --out no/sinks.json"), &["folder no"]);
    work.write("few.npy", &npy(&random_tokens(50, 3)));
    work.fails(1, "sinks --model llama3 --data few.npy --context 64", &["50", "hint:"]);
}
