//! `plan --baseline`: windows in every group, streaming heads in chosen groups, groups drawn at random.

use crate::common::{Work, read_logits};
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

#[test]
fn averaged_tokens_go_through_checkpoints_and_gguf() {
    let work = Work::with_model("llama3");
    work.ok("analyze --model llama3 --data data.npy --tokens 128 --context 64 --out heads.json");
    let tokens: Vec<String> = (1..40).map(|t| (t * 7 % 64).to_string()).collect();
    let tokens = tokens.join(",");
    let logits = |model: &str| {
        work.ok(&format!("logits --model {model} --tokens {tokens} --out logits.npy"));
        read_logits(&work.path("logits.npy"))
    };
    for dropped in ["forgotten", "averaged"] {
        work.ok(&format!(
            "plan --heads heads.json --mixer none --window 4 --dropped {dropped} --beta 0.5 --out plan.json"
        ));
        work.ok(&format!("convert --model llama3 --plan plan.json --out {dropped}"));
        work.ok(&format!("export --model {dropped} --gguf {dropped}.gguf --weights f32"));
        let (folder, file) = (logits(dropped), logits(&format!("{dropped}.gguf")));
        assert_eq!(folder, file, "{dropped}");
    }
    let averaged = work.ok_json("inspect averaged.gguf --json");
    assert_eq!(averaged["plan"]["mixer"]["dropped"], "averaged");
    let forgotten = work.ok_json("inspect forgotten --json");
    assert!(forgotten["plan"]["mixer"].get("dropped").is_none());
    let bytes = |model: &Value| model["cache"]["constant_bytes"].as_u64().unwrap();
    assert!(bytes(&averaged) > bytes(&forgotten));
    // The same, to the rounding of another kernel, up to the first query that has dropped a token: the sixth, behind a window of four and a sink.
    let (averaged, forgotten) = (logits("averaged"), logits("forgotten"));
    let apart = |t: usize| {
        let pairs = averaged[t].iter().zip(&forgotten[t]);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!((0..5).all(|t| apart(t) < 1e-5), "{:?}", (0..5).map(apart).collect::<Vec<_>>());
    assert!((5..39).all(|t| apart(t) > 1e-3), "{:?}", (5..39).map(apart).collect::<Vec<_>>());
    work.fails(
        2,
        "plan --heads heads.json --bank x --dropped averaged --beta 0.5 --out p.json",
        &["cannot be used"],
    );
}

#[test]
fn comparisons_go_on_and_draw() {
    let work = Work::with_text_model("llama3");
    work.make_bank("llama3", "mamba2", 4);
    let line = |out: &str, rest: &str| {
        format!(
            "eval compare --model llama3 --heads heads.json --bank bank.safetensors --data data.npy --context 64 --max-tokens 192 --window 4 \
             --out {out} {rest}"
        )
    };
    let first = line("few.jsonl", "--criteria recency,random --draws 2 --betas 0.5 --samples 0 --json");
    let few = work.ok_json(&first);
    // Four methods by one criterion and two draws, and two baselines.
    let rows = few["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4 * 3 + 2);
    for row in rows {
        // Streaming heads longer than the text change nothing but the order of sums.
        assert!(row["kl"]["value"].as_f64().unwrap() > -1e-6 && row["kl"]["interval"].is_array(), "{row}");
        assert_eq!(row["tokens"], 189);
        assert!(row["cache_bytes_8k"].as_u64() < few["base"]["cache_bytes_8k"].as_u64(), "{row}");
        let (converted, chosen) = match row["method"].as_str().unwrap() {
            "streaming-llm" => (4, false),
            "skipped-layers" => (0, false),
            _ => (2, true),
        };
        assert_eq!((row["converted"].as_u64(), row.get("criterion").is_some()), (Some(converted), chosen));
    }
    assert_eq!(few["rank_correlation"]["criteria"].as_array().unwrap().len(), 2);
    let written = work.read("few.jsonl");
    assert_eq!(work.ok_json(&first)["rows"], few["rows"]);
    assert_eq!(work.read("few.jsonl"), written, "nothing was left to measure");

    let table = work.ok(&line(
        "keys.jsonl",
        "--criteria mixer-fisher --methods window,bank --betas 0.25,0.75 --passkey-contexts 256 --samples 2 --html page.html --svg chart.svg",
    ));
    assert!(
        table.contains("| bank, mixer-fisher, β 0.75 | 3/4 |") && table.contains("passkey 256"),
        "{table}"
    );
    let (page, chart) = (work.read("page.html"), work.read("chart.svg"));
    let page = String::from_utf8(page).unwrap();
    assert!(page.contains("bank, mixer-fisher, β 0.75") && page.contains("Passkey of conversions, β 0.25"));
    // The same page comes of the results file.
    work.ok("report keys.jsonl --out again.html");
    let again = String::from_utf8(work.read("again.html")).unwrap();
    let drawn = |page: &str| {
        page[page.find("\"comparisons\"").unwrap()..page.find("\"speeds\"").unwrap()].to_string()
    };
    assert_eq!(drawn(&again), drawn(&page));
    assert_eq!(String::from_utf8(chart).unwrap().matches("<circle").count(), 4);
    work.fails(1, &line("few.jsonl", "--samples 0 --sinks 2"), &["made with other settings (sinks)"]);
    work.fails(2, &line("few.jsonl", "--samples 0 --betas 2"), &["between 0 and 1"]);
    let without = "eval compare --model llama3 --heads heads.json --data data.npy --context 64 --samples 0 --methods bank --out x.jsonl";
    work.fails(2, without, &["needs a head bank"]);
}

#[test]
fn a_layer_is_left_out() {
    let work = Work::with_model("llama3");
    work.ok("analyze --model llama3 --data data.npy --tokens 128 --context 64 --out heads.json");
    let out =
        work.ok("plan --heads heads.json --baseline skipped-layers --beta 0.5 --at 100 --out plan.json");
    assert!(out.contains("1 of 2 layers left out"), "{out}");
    let plan = work.json("plan.json");
    let heads = work.json("heads.json");
    let similarity = |layer: usize| heads["layers"][layer]["similarity"].as_f64().unwrap();
    let skipped = usize::from(similarity(1) > similarity(0));
    assert_eq!(plan["layers"][skipped]["skipped"], true);
    work.ok("convert --model llama3 --plan plan.json --out shorter");
    work.ok("export --model shorter --gguf shorter.gguf --weights f32");
    let inspected = work.ok_json("inspect shorter.gguf --json");
    assert_eq!((&inspected["hybrid"], &inspected["plan"]), (&true.into(), &plan));
    let base = work.ok_json("inspect llama3 --json");
    assert_eq!(
        inspected["kv_bytes_per_token"].as_u64().unwrap() * 2,
        base["kv_bytes_per_token"].as_u64().unwrap()
    );
    assert!(work.ok("inspect shorter").contains("--"));
    let logits = |model: &str| {
        work.ok(&format!("logits --model {model} --tokens 1,2,3,4 --out logits.npy"));
        read_logits(&work.path("logits.npy"))
    };
    assert_eq!(logits("shorter"), logits("shorter.gguf"));
    assert_ne!(logits("shorter"), logits("llama3"));
    let again = "convert --model shorter --plan plan.json --out twice";
    work.fails(1, again, &["hybrid already", "1 layers skipped"]);
    work.fails(
        2,
        "plan --heads heads.json --baseline skipped-layers --beta 0.5 --window 4 --out p.json",
        &["converts no groups"],
    );
}
