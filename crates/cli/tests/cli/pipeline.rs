//! analyze → align → plan → convert → heal → eval → bench → inspect → generate, for every mixer and family.

use crate::common::{VOCAB, Work, read_logits, tensors, without_run};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

/// A way through the pipeline.
struct Case {
    family: &'static str,
    mixer: &'static str,
    window: usize,
    stage: &'static str,
    train: &'static str,
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    found.filter(|x| x.is_finite()).unwrap_or_else(|| panic!("no finite number at {path} in {value}"))
}

fn run(case: &Case) {
    let Case { family, mixer, window, stage, train } = *case;
    let work = Work::with_text_model(family);
    analyze(&work, family);
    let bank = if mixer == "none" { "" } else { "--bank bank.safetensors" };
    let kind = if mixer == "none" { format!("--mixer none --window {window}") } else { bank.to_string() };
    if mixer != "none" {
        align(&work, family, mixer, window);
    }

    let summary = work.ok_json(&format!("plan --heads heads.json {kind} --beta 0.5 --out plan.json --json"));
    let total = number(&summary, "/total");
    assert_eq!(number(&summary, "/converted"), (0.5 * total).round());
    let plan = work.json("plan.json");
    assert_eq!(plan["mixer"]["recurrent"], mixer);
    assert_eq!(plan["mixer"]["window"], window);

    work.ok(&format!("convert --model {family} --plan plan.json {bank} --out hybrid"));
    untouched_tensors_are_copied(&work, family, "hybrid");
    assert!(!work.path("hybrid/goldens.json").exists());
    assert_eq!(work.read("hybrid/tokenizer.json"), work.read(&format!("{family}/tokenizer.json")));

    heal(&work, family, stage, train);
    evaluate(&work, family);
    bench_and_inspect(&work, &summary);
    greedy_is_the_argmax(&work);
}

fn analyze(work: &Work, family: &str) {
    let out = work.ok(&format!(
        "analyze --model {family} --data data.npy --tokens 256 --context 64 --out heads.json --html heads.html"
    ));
    assert!(out.contains("recency_ratio_64") && out.contains("wrote heads.json"), "{out}");
    let html = String::from_utf8(work.read("heads.html")).unwrap();
    assert!(html.contains("</html>") && !html.contains("src=\"http") && !html.contains("href=\"http"));
}

fn align(work: &Work, family: &str, mixer: &str, window: usize) {
    let line = format!(
        "align --model {family} --heads heads.json --data data.npy --context 32 --tokens-per-step 64 --measure-tokens 256 \
         --mixer {mixer} --window {window} --out bank.safetensors"
    );
    let out = work.ok(&format!("{line} --tokens 256 --metrics align.jsonl"));
    assert!(out.contains("mixer-fisher") && out.contains("after 256 tokens"), "{out}");
    assert_eq!(String::from_utf8(work.read("align.jsonl")).unwrap().lines().count(), 4);
    let out = work.ok(&format!("{line} --tokens 128 --extend"));
    assert!(out.contains("after 384 tokens"), "{out}");
}

fn untouched_tensors_are_copied(work: &Work, base: &str, converted: &str) {
    let (before, after) = (tensors(&work.path(base)), tensors(&work.path(converted)));
    for (name, tensor) in &before {
        assert_eq!(after.get(name), Some(tensor), "{name}");
    }
    let new = after.keys().filter(|name| !before.contains_key(*name));
    for name in new {
        assert!(name.contains(".self_attn.recurrent."), "{name}");
    }
}

fn heal(work: &Work, family: &str, stage: &str, train: &str) {
    let out = work.ok(&format!(
        "heal --model hybrid --base {family} --data data.npy --stage {stage} --train {train} --tokens 256 --context 32 --batch 2 \
         --accumulate 2 --out healed"
    ));
    assert!(out.contains("over 256 tokens in 2 steps"), "{out}");
    let log = String::from_utf8(work.read("healed.train/metrics.jsonl")).unwrap();
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(number(&line, "/loss") > 0.0 && number(&line, "/grad_norm") > 0.0, "{line}");
        assert_eq!(line["kl"].is_number(), stage == "distill", "{line}");
    }
    let (hybrid, healed) = (tensors(&work.path("hybrid")), tensors(&work.path("healed")));
    assert_eq!(hybrid.keys().collect::<Vec<_>>(), healed.keys().collect::<Vec<_>>());
    let changed: Vec<&String> = hybrid.keys().filter(|name| hybrid[*name].2 != healed[*name].2).collect();
    assert!(!changed.is_empty(), "nothing was trained");
    let is_head = |name: &str| name.contains(".self_attn.recurrent.");
    let allowed = |name: &str| match train {
        "heads" => is_head(name),
        "norms" => is_head(name) || name.contains("norm"),
        "lora:2" => is_head(name) || name.contains("_proj"),
        _ => true,
    };
    assert!(changed.iter().all(|name| allowed(name)), "--train {train} changed {changed:?}");
}

fn evaluate(work: &Work, family: &str) {
    let common = "--data data.npy --context 64 --max-tokens 256 --json";
    let ppl = work.ok_json(&format!("eval ppl --model healed {common}"));
    let files = ppl["files"].as_array().unwrap();
    assert_eq!(files.len(), 1);
    assert!(number(&files[0], "/ppl") > 1.0 && number(&ppl, "/overall/ppl") > 1.0);
    // Four windows of 64 tokens; the first token of each is not scored.
    assert_eq!(number(&files[0], "/tokens"), 252.0);
    assert_eq!(number(&ppl, "/overall/tokens"), 252.0);
    assert!(files[0].get("kl").is_none());

    let kl = work.ok_json(&format!("eval kl --model healed --base {family} {common}"));
    assert!(number(&kl, "/files/0/kl") > 0.0 && number(&kl, "/overall/kl") > 0.0);
    assert_eq!(number(&kl, "/files/0/tokens"), 252.0);
    let own = work.ok_json(&format!("eval kl --model {family} --base {family} {common}"));
    assert_eq!(number(&own, "/overall/kl"), 0.0);

    // Token by token, the path of generating: the same up to the order of sums.
    let stepped = work.ok_json(&format!("eval ppl --model healed {common} --chunk 1"));
    let ratio = number(&stepped, "/overall/ppl") / number(&ppl, "/overall/ppl");
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");

    let compared = work.ok_json(&format!("eval ppl --model healed --base {family} {common}"));
    assert_eq!(compared["overall"]["ppl"], ppl["overall"]["ppl"]);
    assert!(number(&compared, "/base/overall/ppl") > 1.0);
    let table = work.ok(&format!(
        "eval ppl --model healed --base {family} --data data.npy --context 64 --stride 16 --bos"
    ));
    assert!(table.contains("base ppl") && table.contains("geometric mean"), "{table}");
}

fn bench_and_inspect(work: &Work, summary: &Value) {
    let inspected = work.ok_json("inspect healed --json");
    assert_eq!(inspected["hybrid"], true);
    assert_eq!(inspected["plan"], work.json("plan.json"));
    let per_token = number(&inspected, "/kv_bytes_per_token");
    assert_eq!(per_token, number(summary, "/hybrid_bytes_per_token"));
    assert!(work.ok("inspect healed").contains("converted"));

    let bench = work.ok_json("bench --model healed --depths 16,63 --decode-steps 2 --threads 1 --json");
    let results = bench["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (result, depth) in results.iter().zip([16.0, 63.0]) {
        assert_eq!(number(result, "/depth"), depth);
        assert!(number(result, "/prefill_tok_s") > 0.0 && number(result, "/decode_tok_s") > 0.0);
        // A page of 256 positions, whose heads are padded to whole registers.
        let page = number(result, "/cache_bytes") - number(&inspected, "/cache/constant_bytes");
        assert!((256.0 * per_token..=1024.0 * per_token).contains(&page), "{page} for {per_token} a token");
        assert_eq!(number(result, "/cache_bytes"), number(&results[0], "/cache_bytes"));
    }
}

#[test]
fn training_steps_are_timed() {
    let work = Work::with_model("llama3");
    let timed = work.ok_json(
        "bench-train --model llama3 --batch 2 --context 32 --window 8 --repeats 1 --threads 1 --json",
    );
    let results = timed["results"].as_array().unwrap();
    let steps: Vec<&str> = results.iter().map(|r| r["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["full", "distill", "align"]);
    assert!(results.iter().all(|r| number(r, "/tokens_per_s") > 0.0));
    let line = "bench-train --model llama3 --steps align --context 32 --window 8 --repeats 1 --precision f32";
    assert!(work.ok(line).contains("f32"));
    let mut command = work.command(&line.replace("f32", "bf16"));
    work.fails_as(command.env("RECURFORMER_ISA", "scalar"), 1, &["bfloat16", "scalar", "hint:"]);
}

/// Each line is answered before the next one is sent, and the end of the lines ends the command.
#[test]
fn training_steps_are_taken_on_request() {
    let work = Work::with_model("llama3");
    let line =
        "bench-train --model llama3 --steps align --batch 1 --context 32 --window 8 --threads 1 --paced";
    let mut command = work.command(line);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut requests = child.stdin.take().unwrap();
    for _ in 0..3 {
        requests.write_all(b"\n").unwrap();
        let seconds: f64 = answers.next().unwrap().unwrap().parse().unwrap();
        assert!(seconds > 0.0);
    }
    drop(requests);
    assert!(answers.next().is_none());
    assert!(child.wait().unwrap().success());
}

/// The hybrid's greedy continuation, made token by token from its cache, is what the logits of the whole sequence say.
fn greedy_is_the_argmax(work: &Work) {
    /// Two best logits closer than this may swap between the parallel and the step form; they are of order 1. A 16-bit cache is multiplied in
    /// bfloat16 by the parallel form where the CPU can, not by the step form.
    const TIES: [(&str, f32); 2] = [("f32", 1e-4), ("f16", 1e-2)];
    for (kv_type, tie) in TIES {
        let generated = work.ok_json(&format!(
            "generate --model healed --kv-type {kv_type} --tokens 5,9,33,12 --max-tokens 24 --json"
        ));
        let ids: Vec<usize> =
            generated["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as usize).collect();
        assert!(!ids.is_empty());
        let all: Vec<String> =
            [5, 9, 33, 12].into_iter().chain(ids.iter().copied()).map(|t| t.to_string()).collect();
        let tokens = all.join(",");
        work.ok(&format!("logits --model healed --kv-type {kv_type} --tokens {tokens} --out logits.npy"));
        let logits = read_logits(&work.path("logits.npy"));
        for (step, &id) in ids.iter().enumerate() {
            let row = &logits[3 + step];
            let best = id < VOCAB as usize && row.iter().all(|&x| x <= row[id] + tie);
            assert!(best, "{kv_type}, step {step}: {id}, {row:?}");
        }
    }
}

macro_rules! cases {
    ($($name:ident: $family:literal $mixer:literal $window:literal $stage:literal $train:literal;)*) => {
        $(#[test]
        fn $name() {
            run(&Case { family: $family, mixer: $mixer, window: $window, stage: $stage, train: $train });
        })*
    };
}

cases! {
    mamba: "llama2" "mamba" 0 "distill" "heads";
    mamba_with_window: "qwen3" "mamba" 4 "continue" "norms";
    mamba2: "smollm2" "mamba2" 0 "distill" "lora:2";
    mamba2_with_window: "llama3" "mamba2" 4 "continue" "all";
    gated_delta: "qwen2" "gated-delta" 0 "continue" "heads";
    gated_delta_with_window: "mistral" "gated-delta" 4 "distill" "all";
    window_only: "llama3" "none" 4 "distill" "norms";
}

#[test]
fn without_a_bank_heads_get_their_starting_values() {
    let work = Work::with_model("llama2");
    work.ok("analyze --model llama2 --data data.npy --tokens 128 --context 64 --out heads.json");
    for (mixer, window) in [("mamba", 0), ("mamba2", 4), ("gated-delta", 0)] {
        work.ok(&format!(
            "plan --heads heads.json --mixer {mixer} --window {window} --beta 1 --out plan.json"
        ));
        for (out, seed) in [("a", 1), ("b", 1), ("c", 2)] {
            work.ok(&format!(
                "convert --model llama2 --plan plan.json --heads heads.json --seed {seed} --out {mixer}-{out}"
            ));
        }
        let model = |out: &str| work.read(&format!("{mixer}-{out}/model.safetensors"));
        assert_eq!(model("a"), model("b"), "{mixer}");
        assert_eq!(model("a") == model("c"), mixer != "mamba", "only the paper's mixer is drawn: {mixer}");
        work.ok(&format!("eval ppl --model {mixer}-a --data data.npy --context 64 --max-tokens 128"));
        let bytes = work.ok_json(&format!("inspect {mixer}-a --json"))["kv_bytes_per_token"].clone();
        assert_eq!(bytes, 0, "everything is converted");
    }
}

#[test]
fn every_criterion_and_the_floor_make_plans() {
    let work = Work::with_model("llama2");
    work.make_bank("llama2", "mamba2", 0);
    for criterion in ["recency", "window-error", "kl-fisher", "random", "least-recent", "mixer-fisher"] {
        work.ok(&format!(
            "plan --heads heads.json --bank bank.safetensors --criterion {criterion} --beta 0.5 --keep-at-least-per-layer 1 --out {criterion}.json"
        ));
        let plan = work.json(&format!("{criterion}.json"));
        assert_eq!(plan["criterion"]["name"], criterion);
        for layer in plan["layers"].as_array().unwrap() {
            let kept =
                layer["groups"].as_array().unwrap().iter().filter(|g| g["mixer"] == "attention").count();
            assert!(kept >= 1, "{criterion}: {plan}");
        }
    }
}

#[test]
fn the_list_of_criteria_says_what_each_costs() {
    let work = Work::new();
    let rows = work.ok_json("plan --list-criteria --json");
    let text = work.ok("plan --list-criteria");
    let names: Vec<&str> = rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(
        ["kl", "kl-fisher", "recency", "mixer-fisher", "duo"].iter().all(|name| names.contains(name)),
        "{names:?}"
    );
    for row in rows.as_array().unwrap() {
        for key in ["name", "measures", "cost", "reference"] {
            let value = row[key].as_str().unwrap();
            assert!(!value.is_empty() && text.contains(value), "{key} of {row}");
        }
        assert_eq!(row["needs_bank"] == true, row["name"] == "mixer-fisher");
        assert_eq!(
            row["by_default"] == true,
            ["recency", "window-error", "kl-fisher", "random", "least-recent"]
                .contains(&row["name"].as_str().unwrap())
        );
        assert_eq!(row["seconds"].is_null(), row["seconds_for"].is_null());
    }
}

#[test]
fn criteria_of_many_passes_are_measured_when_named() {
    let work = Work::with_text_model("llama3");
    let line = "analyze --model llama3 --data data.npy --tokens 200 --context 100 --criteria kl,retrieval,duo,recency --needle-prompts 2 \
                --needles 1 --needle-context 250 --duo-steps 3 --duo-window 16 --duo-sinks 2 --out heads.json";
    work.ok(line);
    let heads = work.json("heads.json");
    let names: Vec<&String> = heads["layers"][0]["groups"][0]["scores"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["duo", "kl", "recency", "retrieval"]);
    assert_eq!(heads["needle_prompts"]["prompts"], 2);
    assert!(heads["layers"][0]["head_scores"]["retrieval"].is_array());
    let states = |work: &Work| {
        std::fs::read_dir(work.path("."))
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "state"))
            .count()
    };
    assert_eq!(states(&work), 0, "states go when the report is written");
    // The same command again, from nothing: the same file.
    work.ok(&format!("{line} --resume"));
    assert_eq!(without_run(work.json("heads.json")), without_run(heads.clone()));
    for (criterion, tokens) in [("kl", &heads["tokens"]), ("duo", &heads["needle_prompts"]["tokens"])] {
        work.ok(&format!("plan --heads heads.json --criterion {criterion} --beta 0.5 --out plan.json"));
        let plan = work.json("plan.json");
        assert_eq!((&plan["criterion"]["name"], &plan["criterion"]["tokens"]), (&criterion.into(), tokens));
    }
    work.write("heads.json.kl.state", b"{}");
    work.fails(1, &format!("{line} --resume"), &["heads.json.kl.state", "hint: remove the file"]);
    for (code, options, needle) in [
        (2, "--needle-context 1000", "longer than the model's 256"),
        (1, "--needle-context 60 --needles 1", "choose a longer one"),
        (2, "--needle-context 250 --needles 1 --needle-prompts 0", "at least one prompt"),
        (1, "--needle-context 250 --needles 1", "see everything"),
    ] {
        let line = format!(
            "analyze --model llama3 --data data.npy --tokens 64 --context 64 --criteria duo {options} --out x.json"
        );
        work.fails(code, &line, &[needle]);
    }
}

#[test]
fn a_plan_edited_by_hand_is_applied() {
    let work = Work::with_model("llama3");
    work.make_bank("llama3", "mamba2", 4);
    work.ok("plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json");
    let mut plan = work.json("plan.json");
    for layer in 0..2 {
        for group in 0..2 {
            let mixer = if (layer, group) == (0, 1) { "recurrent" } else { "attention" };
            plan["layers"][layer]["groups"][group] = serde_json::json!({"mixer": mixer});
        }
    }
    plan.as_object_mut().unwrap().remove("criterion");
    work.write("plan.json", plan.to_string().as_bytes());
    let out = work.ok("convert --model llama3 --plan plan.json --bank bank.safetensors --out hybrid");
    assert!(out.contains("1 of 4 KV groups converted"), "{out}");
    assert!(work.ok("inspect hybrid").contains("Ar"));
}
