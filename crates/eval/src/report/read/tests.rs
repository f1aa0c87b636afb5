//! Every kind of file is recognised and read; wrong and damaged ones are refused by name.

use super::*;
use crate::answers::Score;
use crate::bench::BenchResult;
use crate::compare::{BaseRow, Configuration, Distance, Estimate, Method, PasskeyScore, Row, Settings};
use crate::hashhop::HashHopResult;
use crate::passkey::PasskeyResult;
use crate::report::TokensOf;
use crate::report::testing::ATTACK;
use crate::ruler::RulerResult;
use crate::run::RunModel;
use model::HeadPlan;
use model::plan::{GroupMixer, PlanModel};
use proptest::prelude::*;
use serde_json::json;
use surgery::HeadsReport;
use surgery::stats::{GroupStats, HeadStats, LayerHeads};
use weights::ModelConfig;

fn config() -> ModelConfig {
    let json = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 2
    });
    ModelConfig::from_hf_json(&json).unwrap()
}

fn heads() -> Value {
    let head = HeadStats { recency_ratio_64: 0.5, mass_by_distance: vec![0.5, 0.5], ..HeadStats::default() };
    let group = GroupStats { stats: head.clone(), scores: [("recency".to_string(), 0.5)].into() };
    let layer = LayerHeads {
        heads: vec![head; 4],
        groups: vec![group; 2],
        similarity: None,
        head_scores: Default::default(),
    };
    let report = HeadsReport {
        version: 1,
        model: PlanModel::of(&config()),
        config: config(),
        tokens: 512,
        context: 64,
        sinks: vec![0],
        found_sinks: Vec::new(),
        needle_prompts: None,
        data_sha256: "0".repeat(64),
        seed: 0,
        layers: vec![layer; 2],
        run: None,
    };
    serde_json::to_value(report).unwrap()
}

fn plan() -> Value {
    let mut plan = HeadPlan::empty(&config());
    plan.layers[1].groups[0].mixer = GroupMixer::Recurrent;
    plan.beta = 0.25;
    plan.to_value()
}

fn run(names: &[&str]) -> Value {
    let model = |(i, name): (usize, &&str)| RunModel {
        name: name.to_string(),
        weights: "f32".into(),
        kv_type: "f32".into(),
        converted: if i == 0 { 1 } else { 0 },
        total: 4,
        cache_bytes_8k: 1000 * (i + 1),
    };
    let models = names.iter().enumerate().map(model).collect();
    let info =
        RunInfo { command: "recurformer eval".into(), version: "0.1.0".into(), models, ..RunInfo::default() };
    serde_json::to_value(info).unwrap()
}

fn quality(ppl: f64, kl: f64) -> Value {
    let file =
        json!({"name": "book", "ppl": ppl, "nll": 1.0, "kl": kl, "top1_agreement": 0.9, "tokens": 500});
    json!({"files": [file], "overall": {"ppl": ppl, "kl": kl, "top1_agreement": 0.9, "tokens": 500}})
}

fn ppl_file(name: &str) -> Value {
    let mut value = quality(20.0, 0.1);
    value["base"] = quality(19.0, 0.0);
    value["base"]["overall"]["top1_agreement"] = json!(1.0);
    value["context"] = json!(1024);
    value["run"] = run(&[name, "base"]);
    value
}

fn kl_file(name: &str) -> Value {
    let mut value = quality(21.0, 0.2);
    value["context"] = json!(1024);
    value["run"] = run(&[name, "base"]);
    value
}

fn bench(model: &str) -> Value {
    let at = |depth| BenchResult { depth, prefill_tok_s: 100.0, decode_tok_s: 10.0, cache_bytes: depth };
    json!({"model": model, "threads": 2, "isa": "avx2", "results": [at(512), at(1024)], "base": {"model": "base", "results": [at(512)]}})
}

fn passkey() -> Value {
    let at = |context, correct| PasskeyResult { context, correct, samples: 12 };
    json!({"results": [at(512, 9), at(1024, 3)], "base": {"results": [at(512, 12)]}, "seed": 0, "run": run(&["healed", "base"])})
}

fn hashhop() -> Value {
    let score = Score { low: 0.0, high: 9.0, ..Score::new(32, 64) };
    let cell = |hops| HashHopResult { hops, context: 512, prompts: 8, score };
    json!({"results": [cell(1), cell(2)], "seed": 0})
}

fn ruler() -> Value {
    let cell =
        RulerResult { task: "niah_single".into(), context: 512, prompts: 20, score: Score::new(5, 20) };
    json!({"results": [cell], "seed": 0})
}

fn peers() -> Value {
    let call = json!([["abc", "python3 peers/compare.py", 0.1]]);
    json!({
        "settings": {"format": 1, "machine": "CPU, 2 cores", "threads": 2},
        "rows": {"sources": call, "flash": {}, "constants": {}, "rounds": [
            {"ours/base/q8_0/512:decode": 200.0, "ours/base/q8_0/512:cache": 1.0, "llama/decode/q8_0/512:speed": 100.0, "doctor:memory": 28.0},
            {"ours/base/q8_0/512:decode": 100.0, "llama/decode/q8_0/512:speed": 50.0, "train/torch/full/2x512:speed": 60.0}]},
        "quality": {"sources": call, "types": {
            "f32": {"ppl": 24.0, "tokens": 9}, "q8_0": {"prompts": {"ppl": 24.1, "kl": 0.001, "top1_agreement": 0.99, "tokens": 9}}}},
        "chart": {"sources": call, "models": {"base": [{"depth": 256, "prefill_tok_s": 1.0, "decode_tok_s": 2.0, "cache_bytes": 3}]}}
    })
}

fn quickstart() -> Value {
    let row = |name: &str, converted: usize| crate::report::VariantRow {
        name: name.into(),
        converted,
        total: 4,
        ppl: Some(20.0),
        kl: Some(0.01),
        cache_bytes_8k: Some(1000),
        decode_tok_s: vec![(2048, 30.0), (8192, 20.0)],
        ..Default::default()
    };
    let results = QuickstartResults {
        title: "RecurFormer on tiny".into(),
        text: "book".into(),
        models: vec![row("base", 0), row("ours", 1)],
        ..QuickstartResults::default()
    };
    serde_json::to_value(results).unwrap()
}

/// A base and two conversions on one line each.
fn compare_lines() -> Vec<Value> {
    let score = |correct: usize| {
        let score = Score { low: 0.0, high: 9.0, ..Score::new(correct, 12) };
        vec![PasskeyScore { context: 512, score }]
    };
    let settings = Settings {
        model: PlanModel::of(&config()),
        weights: "bf16, cache F16".into(),
        text_sha256: "1".repeat(64),
        heads_sha256: "2".repeat(64),
        bank_sha256: None,
        context: 1024,
        window: 64,
        sinks: 1,
        passkey_contexts: vec![512],
        passkey_samples: 12,
        seed: 3,
    };
    let base = BaseRow { ppl: 20.0, cache_bytes: 2000, cache_bytes_8k: 16_000, passkey: score(12) };
    let row = |criterion: &str, kl: f64| Row {
        configuration: Configuration {
            method: Method::Window,
            criterion: Some(criterion.into()),
            seed: None,
            hybrid: None,
            sha256: None,
            beta: 0.5,
        },
        mixer: "window 64".into(),
        converted: 2,
        total: 4,
        cache_bytes: 1000,
        cache_bytes_8k: 8000,
        distance: Distance {
            ppl_ratio: Estimate { value: 1.1, interval: Some((1.05, 1.15)) },
            kl: Estimate { value: kl, interval: Some((kl / 2.0, 2.0 * kl)) },
            top1_agreement: Estimate { value: 0.9, interval: None },
            tokens: 4096,
        },
        passkey: score(6),
    };
    let mut lines = vec![json!({"settings": settings}), json!({"base": base})];
    lines.extend([("recency", 0.2), ("kl-fisher", 0.1)].map(|(name, kl)| json!({"row": row(name, kl)})));
    lines
}

fn compare_jsonl() -> String {
    compare_lines().iter().map(|line| format!("{line}\n")).collect()
}

/// What `--json` prints of the same.
fn compare_json() -> Value {
    let lines = compare_lines();
    let rows: Vec<&Value> = lines[2..].iter().map(|line| &line["row"]).collect();
    let rho = json!({"criteria": ["recency", "kl-fisher"], "rho": [[1.0, 0.25], [0.25, null]]});
    json!({"settings": lines[0]["settings"], "base": lines[1]["base"], "rows": rows, "rank_correlation": rho, "run": run(&[])})
}

fn sinks() -> Value {
    let estimate = json!({"mean": 0.9, "low": 0.8, "high": 1.0, "runs": 4});
    let tests = json!({"sequences": 1, "kl_value": 0.1, "kl_key": 0.5, "waiver": true, "codes": null, "tokens": null, "alone": estimate,
        "repeat": null, "control_codes": null, "control_tokens": null, "cause": "mask-induced", "clear": true});
    let sink = |position: usize, tests: Value| {
        json!({"position": position, "sequences": [0], "tokens": [7], "share": 0.5, "mass": 0.4, "strength": 9.0,
        "value_ratio": 0.2, "tests": tests, "heads": []})
    };
    let dimension = |massive: bool| json!({"dimension": 3, "max": 5000.0, "ratio": 2500.0, "massive": massive, "places": [[0, 4], [0, 0], [0, 0]]});
    json!({"version": 1, "model": PlanModel::of(&config()), "sequences": 1, "tokens": 64, "context": 64, "data_sha256": "0", "seed": 5, "donors": 2, "nll": 3.0,
        "sinks": [sink(0, tests), sink(9, Value::Null)], "runs": {}, "constant": null, "texts": {"7": "the"},
        "activations": [{"layer": 1, "median": 2.0, "dimensions": [dimension(true), dimension(false)]}],
        "no_op_heads": [{"layer": 1, "head": 2, "live_mass": 0.01}], "run": run(&[])})
}

fn questions(measures: Value) -> Value {
    json!({"data": "q.jsonl", "results": measures, "base": {"results": measures}, "run": run(&["healed", "base"])})
}

fn choice() -> Value {
    let mean = json!({"value": 0.5, "stderr": 0.1});
    questions(
        json!({"acc": mean, "acc_norm": {"value": 0.25}, "acc_bytes": mean, "items": 20, "truncated": 0}),
    )
}

fn lastword() -> Value {
    let mean = |value: f64| json!({"value": value, "stderr": 0.1});
    questions(json!({"acc": mean(0.5), "perplexity": mean(12.0), "items": 20, "truncated": 0}))
}

fn induction() -> Value {
    let mean = json!({"value": 0.5});
    let row = |distance: usize| {
        json!({"task": "copy", "distance": distance, "sequences": 2, "correct": 9, "asked": 10, "low": 0.0, "high": 1.0,
        "loss": mean, "first_loss": mean})
    };
    json!({"results": [row(512), row(64)], "seed": 0, "run": run(&["healed"])})
}

fn mqar() -> Value {
    let row = json!({"mixing": "attention", "length": 64, "pairs": 4, "width": 64, "parameters": 1000, "cache_bytes": 2048, "steps": 500,
        "sequences": 9, "train_loss": 0.1, "correct": 99, "asked": 100, "seconds": 12.5, "low": 0.0, "high": 1.0});
    json!({"results": [row], "seed": 0, "vocab": 8192, "head_dim": 16, "run": run(&[])})
}

fn bench_train() -> Value {
    let row = json!({"step": "align", "sequences": 2, "seq_len": 512, "tokens_per_s": 1234.56});
    json!({"model": "tiny", "threads": 2, "isa": "amx", "precision": "bf16", "beta": 0.5, "mixer": null, "results": [row], "run": run(&[])})
}

fn doctor() -> Value {
    json!({"cpu": "CPU", "features": ["avx2"], "available": ["avx2", "scalar"], "isa": "avx2", "threads": 2, "parallel_region_microseconds": 1.5,
        "f32_gemm_gflops": 100.0, "bf16_gemm_gflops": 200.0, "q8_gemm_gops": 300.0, "memory_read_gigabytes_per_second": 20.0, "run": run(&[])})
}

fn generation(model: &str, text: &str) -> Value {
    json!({"prompt": "The whale", "text": text, "tokens": [1], "prompt_tokens": 2, "finish": "stop", "run": run(&[model])})
}

const ALIGN: &str = r#"{"step":1,"tokens":512,"error":0.5,"layers":[0.5],"grad_norms":[1.0],"lr":0.1,"tokens_per_s":9.0}
{"step":2,"tokens":1024,"error":0.25,"layers":[0.5],"grad_norms":[1.0],"lr":0.1,"tokens_per_s":9.0}
"#;
const HEAL: &str = r#"{"step":1,"tokens":512,"loss":0.5,"kl":0.1,"ce":3.0,"lr":0.1,"grad_norm":1.0,"beta":0.5,"tokens_per_s":9.0}
{"step":2,"tokens":1024,"loss":0.4,"kl":null,"ce":3.0,"lr":0.1,"grad_norm":1.0,"beta":0.25,"tokens_per_s":9.0}
"#;

/// A folder with these files, and their paths.
fn files(contents: &[(&str, String)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let write = |(name, text): &(&str, String)| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let paths = contents.iter().map(write).collect();
    (dir, paths)
}

fn every_kind() -> Vec<(&'static str, String)> {
    let json = |value: Value| value.to_string();
    vec![
        ("plan.json", json(plan())),
        ("heads.json", json(heads())),
        ("results.json", json(quickstart())),
        ("ppl.json", json(ppl_file("healed"))),
        ("kl.json", json(kl_file("hybrid"))),
        ("passkey.json", json(passkey())),
        ("hashhop.json", json(hashhop())),
        ("ruler.json", json(ruler())),
        ("induction.json", json(induction())),
        ("choice.json", json(choice())),
        ("lastword.json", json(lastword())),
        ("mqar.json", json(mqar())),
        ("compare.jsonl", compare_jsonl()),
        ("compare.json", json(compare_json())),
        ("sinks.json", json(sinks())),
        ("bench.json", json(bench("healed"))),
        ("bench-train.json", json(bench_train())),
        ("doctor.json", json(doctor())),
        ("a.json", json(generation("base", "one"))),
        ("b.json", json(generation("healed", "two"))),
        ("peers.json", json(peers())),
        ("align.jsonl", ALIGN.into()),
        ("heal.jsonl", HEAL.into()),
    ]
}

#[test]
fn every_kind_is_recognised() {
    let (_dir, paths) = files(&every_kind());
    let report = Report::from_files(&paths).unwrap();
    let kinds: Vec<&str> = report.sources.iter().map(|s| s.kind.as_str()).collect();
    let expected = [
        Kind::Plan,
        Kind::Heads,
        Kind::Quickstart,
        Kind::Quality,
        Kind::Quality,
        Kind::Passkey,
        Kind::HashHop,
        Kind::Ruler,
        Kind::Induction,
        Kind::Choice,
        Kind::LastWord,
        Kind::Mqar,
        Kind::Compare,
        Kind::Compare,
        Kind::Sinks,
        Kind::Bench,
        Kind::BenchTrain,
        Kind::Doctor,
        Kind::Generation,
        Kind::Generation,
        Kind::Peers,
        Kind::AlignMetrics,
        Kind::HealMetrics,
    ];
    assert_eq!(kinds, expected.map(Kind::name));
    assert_eq!(report.title, "RecurFormer on tiny");

    // The plan that came first lies over the statistics that came later.
    assert_eq!(report.maps.len(), 1);
    assert!(report.maps[0].heads.is_some());
    assert_eq!(report.maps[0].plans[0].1.converted(), 1);

    let titles: Vec<&str> = report.comparisons.iter().map(|c| c.title.as_str()).collect();
    assert_eq!(
        titles,
        [
            "Held-out text of book",
            "Held-out text, context 1,024",
            "Conversions, context 1,024",
            "Weight types"
        ]
    );
    // ppl and kl on the same text: one table, the base once and first, its cache from the run.
    let rows = &report.comparisons[1].rows;
    assert_eq!(rows.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["base", "healed", "hybrid"]);
    assert_eq!((rows[0].ppl, rows[0].kl, rows[0].cache_bytes_8k), (Some(19.0), Some(0.0), Some(2000)));
    assert_eq!((rows[2].kl, rows[2].cache_bytes_8k, rows[2].converted), (Some(0.2), Some(1000), 1));

    let tasks: Vec<&str> = report.tasks.iter().map(|t| t.title.as_str()).collect();
    assert_eq!(
        tasks[..5],
        ["Passkey", "HashHop, 1 hop", "HashHop, 2 hops", "RULER, niah single", "Induction, copy"]
    );
    assert_eq!(report.tasks[0].rows[0].model, "base");
    assert_eq!(report.tasks[0].rows[1].scores, [(512, Score::new(9, 12)), (1024, Score::new(3, 12))]);
    // Intervals are computed, whatever the file says.
    assert_eq!(report.tasks[1].rows[0].scores[0].1, Score::new(32, 64));

    let speeds: Vec<usize> = report.speeds.iter().map(|s| s.series.len()).collect();
    assert_eq!(speeds, [2, 2, 1]);
    assert_eq!(report.generations.len(), 1);
    let texts =
        [("base", "one"), ("healed", "two")].map(|(model, text)| (model.to_string(), text.to_string()));
    assert_eq!(report.generations[0].texts, texts);
    let table = |title: &str| report.tables.iter().find(|t| t.title == title).unwrap();
    assert_eq!(
        table("Beside llama.cpp and PyTorch").rows[0],
        ["decode, base", "q8_0", "512", "150.0", "75.0", "–", "2.00×"]
    );

    let curves: Vec<(&str, usize)> =
        report.curves.iter().map(|c| (c.y_label.as_str(), c.points.len())).collect();
    assert_eq!(curves.iter().filter(|c| c.0 == "heal: loss" && c.1 == 1).count(), 2, "{curves:?}");
    assert_eq!(curves.iter().filter(|c| c.0.contains("KL")).count(), 1, "{curves:?}");
    assert_eq!(report.curves[0].points, [(512.0, 0.5), (1024.0, 0.25)]);
    report.to_html().unwrap();
}

#[test]
fn both_forms_of_a_comparison_say_the_same() {
    let (_dir, paths) = files(&[("a.jsonl", compare_jsonl()), ("a.json", compare_json().to_string())]);
    let [lines, object] = [&paths[0], &paths[1]].map(|path| Report::from_files(&[path]).unwrap());
    assert_eq!((&lines.comparisons, &lines.tasks), (&object.comparisons, &object.tasks));
    let comparison = &lines.comparisons[0];
    assert_eq!((comparison.context, comparison.rows.len()), (Some(1024), 3));
    assert!(comparison.rows[0].is_base());
    let row = &comparison.rows[1];
    assert_eq!(
        (row.name.as_str(), row.series.as_deref()),
        ("window, recency, β 0.5", Some("window, recency"))
    );
    assert_eq!((row.kl, row.kl_interval, row.cache_bytes), (Some(0.2), Some((0.1, 0.4)), Some(1000)));
    assert!((row.ppl.unwrap() - 22.0).abs() < 1e-9);
    let text = comparison.table().to_markdown();
    assert!(
        text.contains("| 1.100 (1.050–1.150) | 0.2000 (0.1000–0.4000) | 90.0 % | 1000 B | 7.8 KiB |"),
        "{text}"
    );
    // Intervals of counts are computed, whatever the file says.
    let passkeys = &lines.tasks[0];
    assert_eq!(passkeys.title, "Passkey of conversions, β 0.5");
    assert_eq!(
        passkeys.rows.iter().map(|r| r.model.as_str()).collect::<Vec<_>>(),
        ["base", "window, recency", "window, kl-fisher"]
    );
    assert_eq!(passkeys.rows[1].scores, [(512, Score::new(6, 12))]);
    // Only what is printed knows how alike the criteria are.
    assert!(lines.tables.is_empty());
    assert_eq!(object.tables[0].rows[1], ["kl-fisher", "0.25", "–"]);

    let lines = compare_lines();
    refused("begun.jsonl", &lines[0].to_string(), &["not judged yet", "hint: run the same eval compare"]);
    refused(
        "twice.jsonl",
        &[&compare_jsonl(), lines[2].to_string().as_str()].concat(),
        &["line 5 is out of place"],
    );
    let mut bent = compare_json();
    bent["rank_correlation"]["rho"] = json!([[1.0]]);
    refused("bent.json", &bent.to_string(), &["not square"]);
    bent = compare_json();
    bent["base"]["passkey"][0]["correct"] = json!(13);
    refused("bent.json", &bent.to_string(), &["impossible counts"]);
}

#[test]
fn other_results_are_tables() {
    let (_dir, paths) = files(&every_kind());
    let report = Report::from_files(&paths).unwrap();
    let rows = |title: &str| &report.tables.iter().find(|t| t.title == title).unwrap().rows;
    assert_eq!(
        rows("Multiple choice, 20 questions of q.jsonl")[1],
        ["healed", "50.0 ± 10.0 %", "25.0 %", "50.0 ± 10.0 %"]
    );
    assert_eq!(rows("Last words, 20 texts of q.jsonl")[0][..2], ["base", "50.0 ± 10.0 %"]);
    assert_eq!(rows("MQAR")[0][..4], ["attention", "64", "4", "64"]);
    assert_eq!(rows("Training steps of tiny")[0], ["align", "2 × 512", "1234.6"]);
    assert_eq!(rows("CPU")[4], ["memory read", "20.0 GB/s"]);
    let positions = rows("Absorbing positions");
    assert_eq!(positions[0][..4], ["0", "\"the\"", "1/1", "50.0 %"]);
    assert_eq!(positions[0][11..], ["0.90 [0.80, 1.00]", "feature-based, mask-induced", "yes"]);
    assert_eq!(positions[1][12], "not tested");
    assert_eq!(*rows("Massive activations"), [["1", "3", "5,000", "2,500", "0, 4"]]);
    // Columns and cells agree in number everywhere.
    for table in &report.tables {
        assert!(table.rows.iter().all(|row| row.len() == table.columns.len()), "{}", table.title);
    }
    let induction = report.tasks.iter().find(|t| t.title == "Induction, copy").unwrap();
    assert_eq!(induction.by, TokensOf::Distance);
    assert_eq!(induction.rows[0].scores.iter().map(|s| s.0).collect::<Vec<_>>(), [64, 512]);
    let mut impossible = mqar();
    impossible["results"][0]["asked"] = json!(0);
    refused("mqar.json", &impossible.to_string(), &["99 right answers of 0"]);
}

#[test]
fn a_folder_stands_for_its_result_files() {
    let (dir, _) = files(&[
        ("results.json", quickstart().to_string()),
        ("heads.json", heads().to_string()),
        ("quickstart.json", "{}".into()),
    ]);
    let report = Report::from_files(&[dir.path()]).unwrap();
    assert_eq!(report.sources.len(), 2);
    let empty = tempfile::tempdir().unwrap();
    refused_path(empty.path(), &["no result file", "hint: give heads.json"]);
}

#[test]
fn the_same_file_twice_adds_nothing_but_a_source() {
    for name in ["ppl.json", "passkey.json", "bench.json", "choice.json", "compare.json"] {
        let content: Vec<_> = every_kind().into_iter().filter(|f| f.0 == name).collect();
        let (_dir, paths) = files(&content);
        let once = Report::from_files(&paths).unwrap();
        let twice = Report::from_files(&[&paths[0], &paths[0]]).unwrap();
        assert_eq!(
            (once.comparisons, once.tasks, once.speeds, once.tables),
            (twice.comparisons, twice.tasks, twice.speeds, twice.tables)
        );
        assert_eq!(twice.sources.len(), 2);
    }
}

#[test]
fn another_result_of_the_same_name_gets_a_name_of_its_own() {
    let mut other = kl_file("healed");
    other["overall"]["kl"] = json!(0.7);
    let (_dir, paths) =
        files(&[("one.json", kl_file("healed").to_string()), ("two.json", other.to_string())]);
    let rows = &Report::from_files(&paths).unwrap().comparisons[0].rows;
    assert_eq!(rows.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["base", "healed", "healed (two)"]);
}

#[test]
fn long_runs_are_drawn_as_means() {
    let line = |i: u64| format!("{{\"step\":{i},\"tokens\":{i},\"error\":{},\"layers\":[]}}\n", i % 2);
    let (_dir, paths) = files(&[("long.jsonl", (1..=2000).map(line).collect())]);
    let curve = &Report::from_files(&paths).unwrap().curves[0];
    assert_eq!((curve.points.len(), curve.steps_per_point), (1000, 2));
    assert!(curve.points.iter().all(|p| p.1 == 0.5));
    assert_eq!(curve.points[999].0, 2000.0);
}

fn refused_path(path: &Path, needles: &[&str]) {
    let error = Report::from_files(&[path]).unwrap_err().to_string();
    for needle in needles.iter().copied().chain([path.to_str().unwrap()]) {
        assert!(error.contains(needle), "`{needle}` is not in {error}");
    }
    assert!(error.contains("\nhint: "), "{error}");
    assert!(!error.replace("\nhint: ", "").contains(char::is_control), "{error:?}");
}

fn refused(name: &str, text: &str, needles: &[&str]) {
    let (_dir, paths) = files(&[(name, text.into())]);
    refused_path(&paths[0], needles);
}

/// `value` with the entry at `pointer` replaced.
fn with(mut value: Value, pointer: &str, new: Value) -> String {
    *value.pointer_mut(pointer).unwrap() = new;
    value.to_string()
}

#[test]
fn files_that_are_no_results() {
    refused("none.json", "", &["empty"]);
    refused("text.json", "hello", &["not JSON"]);
    refused("list.json", "[1, 2]", &["not a result file"]);
    refused("config.json", r#"{"model_type": "llama"}"#, &["not a result file"]);
    refused("lines.jsonl", "{\"a\": 1}\n{\"a\": 2}\n", &["not a result file"]);
    refused("deep.json", &"[".repeat(100_000), &["not JSON", "recursion"]);
    refused_path(Path::new("/nonexistent/heads.json"), &["check the path"]);
    let (_dir, paths) = files(&[("binary.json", String::new())]);
    std::fs::write(&paths[0], [0xff, 0xfe, 0x00]).unwrap();
    refused_path(&paths[0], &["UTF-8"]);
    let file = File::create(&paths[0]).unwrap();
    file.set_len(MAX_BYTES + 1).unwrap();
    refused_path(&paths[0], &["more than 64 MiB"]);
}

#[test]
fn results_that_contradict_themselves() {
    refused("h.json", &with(heads(), "/layers", json!([])), &["0 layers listed"]);
    refused("h.json", &with(heads(), "/version", json!(2)), &["version 2"]);
    refused("h.json", &with(heads(), "/layers/0/heads/0/entropy", json!("x")), &["malformed"]);
    refused("p.json", &with(plan(), "/model/layers", json!(3)), &["2 layers", "has 3"]);
    refused("p.json", &with(plan(), "/model/kv_heads", json!(0)), &["0 groups"]);
    refused("p.json", &with(plan(), "/model/heads", json!(0)), &["0 heads"]);
    refused("p.json", &with(plan(), "/model/heads", json!(1_u64 << 40)), &["heads in each group"]);
    refused("p.json", &with(plan(), "/layers/1/groups", json!([])), &["layer 1", "0 groups"]);
    refused("p.json", &with(plan(), "/version", json!(9)), &["version 9"]);
    refused("t.json", &with(passkey(), "/results/0/correct", json!(13)), &["13 right answers of 12"]);
    refused("t.json", &with(passkey(), "/results/0/samples", json!(0)), &["of 0 at 512 tokens"]);
    refused("t.json", &with(passkey(), "/results/0/correct", json!(-1)), &["malformed passkey"]);
    refused("q.json", &with(ppl_file("x"), "/overall/ppl", json!(null)), &["malformed perplexity"]);
    refused("q.json", &with(ppl_file("x"), "/run", json!(7)), &["malformed `run`"]);
    refused("b.json", &with(bench("x"), "/results/1", json!({})), &["malformed speed"]);
    refused("c.json", &with(peers(), "/settings/format", json!(7)), &["format 7"]);
    refused("c.json", &with(peers(), "/chart/models/base", json!(1)), &["malformed `chart`"]);
    let comparison = json!({"settings": {"model": {}}, "base": {}, "rows": []}).to_string();
    refused("e.json", &comparison, &["not a result file", "eval compare"]);
    refused("g.json", &with(generation("x", "y"), "/text", json!(null)), &["without text"]);
    refused("m.jsonl", &format!("{ALIGN}{{\"step\": 3}}\n"), &["line 3: not a line of metrics of align"]);
    refused("m.jsonl", &format!("{ALIGN}{}", &ALIGN[..20]), &["line 3: not JSON"]);
    refused("m.jsonl", &HEAL.replace("0.4", "\"x\""), &["line 2: `loss` is no number"]);
    // Parsers repeat what they found; a terminal does not obey it.
    let mut hostile = plan();
    hostile["\u{1b}[31m".repeat(500)] = json!(1);
    refused("p.json", &hostile.to_string(), &["unknown field"]);
}

#[test]
fn hostile_names_are_text() {
    let mut ppl = ppl_file(ATTACK);
    ppl["files"][0]["name"] = json!(ATTACK);
    ppl["run"]["command"] = json!(ATTACK);
    let mut text = generation(ATTACK, ATTACK);
    text["prompt"] = json!(ATTACK);
    let mut scores = heads();
    scores["layers"][0]["groups"][0]["scores"] = json!({ATTACK: 1.0});
    scores["layers"][0]["groups"][1]["scores"] = json!({ATTACK: 1.0});
    let (_dir, paths) =
        files(&[("q.json", ppl.to_string()), ("g.json", text.to_string()), ("h.json", scores.to_string())]);
    let page = Report::from_files(&paths).unwrap().to_html().unwrap();
    assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2));
    assert!(!page.contains("<img"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Damaged files are read or refused, never a panic; what is read can be shown.
    #[test]
    fn damaged_files_do_not_panic(which in 0..every_kind().len(), cuts in prop::collection::vec((any::<prop::sample::Index>(), 0_u8..128), 1..6)) {
        let (name, text) = every_kind().swap_remove(which);
        let mut bytes = text.into_bytes();
        for (at, byte) in cuts {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (_dir, paths) = files(&[(name, text)]);
        if let Ok(report) = Report::from_files(&paths) {
            report.to_html().unwrap();
            report.to_markdown();
        }
    }
}
