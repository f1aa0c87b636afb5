//! A small file of every kind.

use crate::answers::Score;
use crate::bench::BenchResult;
use crate::compare::{BaseRow, Configuration, Distance, Estimate, Method, PasskeyScore, Row, Settings};
use crate::hashhop::HashHopResult;
use crate::passkey::PasskeyResult;
use crate::report::QuickstartResults;
use crate::ruler::RulerResult;
use crate::run::{RunInfo, RunModel};
use model::HeadPlan;
use model::plan::{GroupMixer, PlanModel};
use serde_json::{Value, json};
use surgery::HeadsReport;
use surgery::stats::{GroupStats, HeadStats, LayerHeads};
use weights::ModelConfig;

pub(super) fn config() -> ModelConfig {
    let json = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 2
    });
    ModelConfig::from_hf_json(&json).unwrap()
}

pub(super) fn heads() -> Value {
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

pub(super) fn plan() -> Value {
    let mut plan = HeadPlan::empty(&config());
    plan.layers[1].groups[0].mixer = GroupMixer::Recurrent;
    plan.beta = 0.25;
    plan.to_value()
}

pub(super) fn run(names: &[&str]) -> Value {
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

pub(super) fn quality(ppl: f64, kl: f64) -> Value {
    let file =
        json!({"name": "book", "ppl": ppl, "nll": 1.0, "kl": kl, "top1_agreement": 0.9, "tokens": 500});
    json!({"files": [file], "overall": {"ppl": ppl, "kl": kl, "top1_agreement": 0.9, "tokens": 500}})
}

pub(super) fn ppl_file(name: &str) -> Value {
    let mut value = quality(20.0, 0.1);
    value["base"] = quality(19.0, 0.0);
    value["base"]["overall"]["top1_agreement"] = json!(1.0);
    value["context"] = json!(1024);
    value["run"] = run(&[name, "base"]);
    value
}

pub(super) fn kl_file(name: &str) -> Value {
    let mut value = quality(21.0, 0.2);
    value["context"] = json!(1024);
    value["run"] = run(&[name, "base"]);
    value
}

pub(super) fn bench(model: &str) -> Value {
    let at = |depth| BenchResult { depth, prefill_tok_s: 100.0, decode_tok_s: 10.0, cache_bytes: depth };
    json!({"model": model, "threads": 2, "isa": "avx2", "results": [at(512), at(1024)], "base": {"model": "base", "results": [at(512)]}})
}

pub(super) fn passkey() -> Value {
    let at = |context, correct| PasskeyResult { context, correct, samples: 12 };
    json!({"results": [at(512, 9), at(1024, 3)], "base": {"results": [at(512, 12)]}, "seed": 0, "run": run(&["healed", "base"])})
}

pub(super) fn hashhop() -> Value {
    let score = Score { low: 0.0, high: 9.0, ..Score::new(32, 64) };
    let cell = |hops| HashHopResult { hops, context: 512, prompts: 8, score };
    json!({"results": [cell(1), cell(2)], "seed": 0})
}

pub(super) fn ruler() -> Value {
    let cell =
        RulerResult { task: "niah_single".into(), context: 512, prompts: 20, score: Score::new(5, 20) };
    json!({"results": [cell], "seed": 0})
}

pub(super) fn peers() -> Value {
    let call = json!([["abc", "python3 peers/compare.py", 0.1]]);
    json!({
        "settings": {"format": 1, "machine": "CPU, 2 cores", "threads": 2},
        "rows": {"sources": call, "flash": {}, "constants": {}, "rounds": [
            {"ours/base/q8_0/512:decode": 200.0, "ours/base/q8_0/512:cache": 1.0, "llama/decode/q8_0/512:speed": 100.0, "doctor:memory": 28.0},
            {"ours/base/q8_0/512:decode": 100.0, "llama/decode/q8_0/512:speed": 50.0,
             "train/full/2x512:ours": 90.0, "train/full/2x512:torch": 60.0, "train/full/2x512:ratio": 1.75, "train/full/2x512:ours-mib": 9.0}]},
        "quality": {"sources": call, "types": {
            "f32": {"ppl": 24.0, "tokens": 9}, "q8_0": {"prompts": {"ppl": 24.1, "kl": 0.001, "top1_agreement": 0.99, "tokens": 9}}}},
        "chart": {"sources": call, "models": {"base": [{"depth": 256, "prefill_tok_s": 1.0, "decode_tok_s": 2.0, "cache_bytes": 3}]}}
    })
}

pub(super) fn quickstart() -> Value {
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
pub(super) fn compare_lines() -> Vec<Value> {
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

pub(super) fn compare_jsonl() -> String {
    compare_lines().iter().map(|line| format!("{line}\n")).collect()
}

/// What `--json` prints of the same.
pub(super) fn compare_json() -> Value {
    let lines = compare_lines();
    let rows: Vec<&Value> = lines[2..].iter().map(|line| &line["row"]).collect();
    let rho = json!({"criteria": ["recency", "kl-fisher"], "rho": [[1.0, 0.25], [0.25, null]]});
    json!({"settings": lines[0]["settings"], "base": lines[1]["base"], "rows": rows, "rank_correlation": rho, "run": run(&[])})
}

pub(super) fn sinks() -> Value {
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

pub(super) fn questions(measures: Value) -> Value {
    json!({"data": "q.jsonl", "results": measures, "base": {"results": measures}, "run": run(&["healed", "base"])})
}

pub(super) fn choice() -> Value {
    let mean = json!({"value": 0.5, "stderr": 0.1});
    questions(
        json!({"acc": mean, "acc_norm": {"value": 0.25}, "acc_bytes": mean, "items": 20, "truncated": 0}),
    )
}

pub(super) fn lastword() -> Value {
    let mean = |value: f64| json!({"value": value, "stderr": 0.1});
    questions(json!({"acc": mean(0.5), "perplexity": mean(12.0), "items": 20, "truncated": 0}))
}

pub(super) fn induction() -> Value {
    let mean = json!({"value": 0.5});
    let row = |distance: usize| {
        json!({"task": "copy", "distance": distance, "sequences": 2, "correct": 9, "asked": 10, "low": 0.0, "high": 1.0,
        "loss": mean, "first_loss": mean})
    };
    json!({"results": [row(512), row(64)], "seed": 0, "run": run(&["healed"])})
}

pub(super) fn mqar() -> Value {
    let row = json!({"mixing": "attention", "length": 64, "pairs": 4, "width": 64, "parameters": 1000, "cache_bytes": 2048, "steps": 500,
        "sequences": 9, "train_loss": 0.1, "correct": 99, "asked": 100, "seconds": 12.5, "low": 0.0, "high": 1.0});
    json!({"results": [row], "seed": 0, "vocab": 8192, "head_dim": 16, "run": run(&[])})
}

pub(super) fn bench_train() -> Value {
    let row = json!({"step": "align", "sequences": 2, "seq_len": 512, "tokens_per_s": 1234.56});
    json!({"model": "tiny", "threads": 2, "isa": "amx", "precision": "bf16", "beta": 0.5, "mixer": null, "results": [row], "run": run(&[])})
}

pub(super) fn doctor() -> Value {
    json!({"cpu": "CPU", "features": ["avx2"], "available": ["avx2", "scalar"], "isa": "avx2", "threads": 2, "parallel_region_microseconds": 1.5,
        "f32_gemm_gflops": 100.0, "bf16_gemm_gflops": 200.0, "q8_gemm_gops": 300.0, "memory_read_gigabytes_per_second": 20.0, "run": run(&[])})
}

pub(super) fn generation(model: &str, text: &str) -> Value {
    json!({"prompt": "The whale", "text": text, "tokens": [1], "prompt_tokens": 2, "finish": "stop", "run": run(&[model])})
}

pub(super) const ALIGN: &str = r#"{"step":1,"tokens":512,"error":0.5,"layers":[0.5],"grad_norms":[1.0],"lr":0.1,"tokens_per_s":9.0}
{"step":2,"tokens":1024,"error":0.25,"layers":[0.5],"grad_norms":[1.0],"lr":0.1,"tokens_per_s":9.0}
"#;
pub(super) const HEAL: &str = r#"{"step":1,"tokens":512,"loss":0.5,"kl":0.1,"ce":3.0,"lr":0.1,"grad_norm":1.0,"beta":0.5,"tokens_per_s":9.0}
{"step":2,"tokens":1024,"loss":0.4,"kl":null,"ce":3.0,"lr":0.1,"grad_norm":1.0,"beta":0.25,"tokens_per_s":9.0}
"#;
