//! `plan --baseline`: windows in every group, streaming heads in chosen groups, groups drawn at random.

use crate::common::Work;
use serde_json::Value;

fn converted(plan: &Value) -> Vec<(usize, usize)> {
    let layers = plan["layers"].as_array().unwrap().iter().enumerate();
    layers
        .flat_map(|(l, layer)| {
            let groups = layer["groups"].as_array().unwrap().iter().enumerate();
            groups.filter(|(_, g)| g["mixer"] == "recurrent").map(move |(g, _)| (l, g)).collect::<Vec<_>>()
        })
        .collect()
}

/// Bytes after 1024 tokens.
fn bytes_at_1024(summary: &Value) -> u64 {
    assert_eq!(summary["contexts"][0]["tokens"], 1024);
    summary["contexts"][0]["hybrid_bytes"].as_u64().unwrap()
}

#[test]
fn streaming_llm_fits_the_cache_of_a_budget() {
    let work = Work::with_model("llama2");
    work.make_bank("llama2", "mamba2", 4);
    for bank in ["", "--bank bank.safetensors"] {
        let budget = match bank {
            "" => "--mixer none --window 64",
            bank => bank,
        };
        let hybrid =
            work.ok_json(&format!("plan --heads heads.json {budget} --beta 0.5 --out beta.json --json"));
        let line = format!(
            "plan --heads heads.json {bank} --baseline streaming-llm --beta 0.5 --at 1024 --out streaming.json --json"
        );
        let summary = work.ok_json(&line);
        assert_eq!(summary["converted"], summary["total"]);
        let plan = work.json("streaming.json");
        assert_eq!(
            (&plan["criterion"]["name"], &plan["mixer"]["sinks"]),
            (&"streaming-llm".into(), &4.into())
        );
        // One more token in every window would be too much.
        let window = plan["mixer"]["window"].as_u64().unwrap();
        let entry = bytes_at_1024(&summary) / (window + 4);
        assert!(bytes_at_1024(&summary) <= bytes_at_1024(&hybrid), "{summary} {hybrid}");
        assert!(bytes_at_1024(&summary) + entry > bytes_at_1024(&hybrid), "{summary} {hybrid}");
    }
    let out =
        work.ok("plan --heads heads.json --baseline streaming-llm --window 6 --sinks 2 --out given.json");
    assert!(
        out.contains("8 of 8 KV groups converted by streaming-llm; mixer none, window 6, sinks 2"),
        "{out}"
    );
    work.ok("convert --model llama2 --plan given.json --out streaming");
    work.ok("eval ppl --model streaming --data data.npy --context 64 --max-tokens 128");
}

#[test]
fn streaming_heads_take_the_groups_of_any_criterion() {
    let work = Work::with_model("llama2");
    work.make_bank("llama2", "mamba2", 4);
    for criterion in ["recency", "mixer-fisher"] {
        let bank = "--bank bank.safetensors";
        work.ok(&format!("plan --heads heads.json {bank} --criterion {criterion} --beta 0.5 --out own.json"));
        work.ok(&format!(
            "plan --heads heads.json {bank} --baseline duo-attention --criterion {criterion} --beta 0.5 --out duo.json"
        ));
        let (own, duo) = (work.json("own.json"), work.json("duo.json"));
        assert_eq!(converted(&own), converted(&duo), "{criterion}");
        assert_eq!(converted(&duo).len(), 4);
        let mixer = &duo["mixer"];
        assert_eq!(
            (&mixer["recurrent"], &mixer["window"], &mixer["sinks"]),
            (&"none".into(), &256.into(), &64.into())
        );
        // The bank is behind the choice of mixer-fisher only.
        assert_eq!(duo["criterion"]["bank_sha256"].is_string(), criterion == "mixer-fisher");
    }
    work.ok("plan --heads heads.json --baseline random --seed 3 --beta 0.5 --out a.json");
    work.ok("plan --heads heads.json --criterion random --seed 3 --beta 0.5 --out b.json");
    assert_eq!(work.json("a.json"), work.json("b.json"));
}

#[test]
fn contradictions_are_refused() {
    let work = Work::with_model("llama2");
    work.ok("analyze --model llama2 --data data.npy --tokens 128 --context 64 --out heads.json");
    let fails = |line: &str, needle: &str| {
        work.fails(2, &format!("plan --heads heads.json {line} --out plan.json"), &[needle]);
    };
    fails("--baseline streaming-llm", "either --beta or --window");
    fails("--baseline streaming-llm --beta 0.5 --window 8", "either --beta or --window");
    fails("--baseline streaming-llm --beta 0.5 --criterion recency", "chooses no groups");
    fails("--baseline duo-attention --beta 0.5 --mixer mamba2", "windows only");
    fails("--baseline random --beta 0.5 --criterion recency", "chooses its groups itself");
    fails("--baseline duo-attention", "--beta");
    fails("--criterion mixer-fisher --beta 0.5", "give --bank");
    let line = "plan --heads heads.json --baseline streaming-llm --beta 1 --at 2 --sinks 400 --out plan.json";
    work.fails(1, line, &["no window beside 400 sinks"]);
}
