//! One hybrid at several budgets: --beta computes what a conversion for that budget computes, and `heal --elastic` trains for them.

use crate::common::{Work, read_logits, succeed};
use serde_json::{Value, json};

const TOKENS: &str = "1,5,9,2,33,60,7,7,12,40";

/// `wide` converts all four groups, `narrow` the best one, both from one bank.
fn with_hybrids(mixer: &str) -> Work {
    let work = Work::with_text_model("llama3");
    work.make_bank("llama3", mixer, 4);
    for (name, beta) in [("wide", "1"), ("narrow", "0.25")] {
        work.ok(&format!("plan --heads heads.json --bank bank.safetensors --beta {beta} --out {name}.json"));
        work.ok(&format!("convert --model llama3 --plan {name}.json --bank bank.safetensors --out {name}"));
    }
    work
}

/// Logits, and what was said on the way.
fn logits(work: &Work, model: &str) -> (Vec<Vec<f32>>, String) {
    let line = format!("logits --model {model} --tokens {TOKENS} --out x.npy");
    let run = succeed(work.command(&line).output().unwrap(), &line);
    (read_logits(&work.path("x.npy")), run.stderr)
}

#[test]
fn a_lower_beta_is_the_conversion_for_it() {
    for mixer in ["mamba2", "gated-delta", "mamba"] {
        let work = with_hybrids(mixer);
        let (narrow, silent) = logits(&work, "narrow");
        assert!(!silent.contains("note: "), "{silent}");
        let (found, said) = logits(&work, "wide --beta 0.25");
        assert!(found == narrow, "{mixer}");
        assert!(said.contains("note: wide is not marked elastic") && said.contains("beta 1"), "{said}");
        assert!(!logits(&work, "wide --beta 1").1.contains("note: "), "its own budget");
        assert!(logits(&work, "wide --beta 0").0 == logits(&work, "llama3").0, "{mixer}");
        assert!(logits(&work, "wide").0 != narrow);
        for weights in ["q8_0", "bf16"] {
            let options = format!("--weights {weights} --kv-type f16");
            let (found, expected) = (
                logits(&work, &format!("wide --beta 0.25 {options}")).0,
                logits(&work, &format!("narrow {options}")).0,
            );
            assert!(found == expected, "{mixer} {weights}");
        }

        // In one file, with all heads and with those of one budget only, made of the folder or of the file.
        work.ok("export --model wide --gguf wide.gguf --weights f32");
        assert!(logits(&work, "wide.gguf --beta 0.25").0 == narrow, "{mixer}");
        let made = work.ok_json("export --model wide --beta 0.25 --gguf a.gguf --weights f32 --json");
        assert_eq!(made["converted"], 1);
        work.ok("export --model wide.gguf --beta 0.25 --gguf b.gguf --weights f32");
        let whole = work.ok_json("inspect narrow --json");
        for file in ["a.gguf", "b.gguf"] {
            assert!(logits(&work, file).0 == narrow, "{mixer} {file}");
            let inspected = work.ok_json(&format!("inspect {file} --json"));
            for key in ["parameters", "plan", "cache", "elastic"] {
                assert_eq!(inspected[key], whole[key], "{mixer} {file} {key}");
            }
        }
        assert!(work.read("a.gguf").len() < work.read("wide.gguf").len());
        let inspected = work.ok_json("inspect wide --beta 0.25 --json");
        for key in ["parameters", "plan", "cache", "dtypes"] {
            assert_eq!(inspected[key], whole[key], "{mixer} {key}");
        }
    }
}

#[test]
fn every_command_takes_a_beta() {
    let work = with_hybrids("mamba2");
    let same = |line: &str| {
        let [mut found, mut expected] =
            ["wide --beta 0.25", "narrow"].map(|model| work.ok_json(&line.replace("MODEL", model)));
        // What was run differs, by its name; what it was does not.
        let run = [&mut found, &mut expected].map(|value| value.as_object_mut().unwrap().remove("run"));
        let [found_run, expected_run] = run.map(Option::unwrap);
        for of in ["converted", "total", "cache_bytes_8k", "weights", "kv_type"] {
            assert_eq!(found_run["models"][0][of], expected_run["models"][0][of], "{line} {of}");
        }
        assert_eq!(found_run["models"][0]["name"], "wide at beta 0.25");
        assert_eq!(found, expected, "{line}");
    };
    same("eval ppl --model MODEL --data data.npy --context 64 --max-tokens 256 --json");
    same("eval kl --model MODEL --base llama3 --data data.npy --context 64 --max-tokens 256 --json");
    same("eval ppl --model MODEL --data self --context 64 --max-tokens 64 --json");
    same("eval passkey --model MODEL --base wide --contexts 200 --samples 1 --json");
    let text = |line: &str, of: &str| work.ok_json(line)[of].clone();
    let generate = |model| format!("generate --model {model} --tokens 5,9,33 --max-tokens 8 --json");
    for of in ["tokens", "cache_bytes"] {
        assert_eq!(text(&generate("wide --beta 0.25"), of), text(&generate("narrow"), of));
    }
    let bench = |model: &str| {
        let line = format!("bench --model {model} --base llama3 --depths 16 --decode-steps 1 --json");
        let value = work.ok_json(&line);
        [&value["results"], &value["base"]["results"]].map(|r| r[0]["cache_bytes"].as_u64().unwrap())
    };
    assert_eq!(bench("wide --beta 0.25"), bench("narrow"));
    assert_ne!(bench("wide")[0], bench("narrow")[0]);
    work.ok("chat --model wide --beta 0.25");
}

#[test]
fn one_run_heals_for_several_budgets() {
    let work = with_hybrids("gated-delta");
    let heal = "heal --base llama3 --data data.npy --context 32 --batch 2";
    let out = work.ok(&format!("{heal} --model wide --elastic 1,0.25,0.5 --tokens 768 --out elastic"));
    for beta in ["0.25", "0.5", "1"] {
        assert!(out.contains(&format!("beta {beta}: loss ")), "{out}");
    }
    assert_eq!(out.matches(" in 4 steps").count(), 3, "{out}");
    let log = String::from_utf8(work.read("elastic.train/metrics.jsonl")).unwrap();
    let used: Vec<Value> =
        log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["beta"].clone()).collect();
    for beta in [0.25, 0.5, 1.0] {
        assert_eq!(used.iter().filter(|used| used.as_f64() == Some(beta)).count(), 4, "{used:?}");
    }

    assert_eq!(work.json("elastic/head_plan.json")["elastic"], json!({"betas": [0.25, 0.5, 1.0]}));
    work.ok("export --model elastic --gguf elastic.gguf --weights f32");
    for model in ["elastic", "elastic.gguf"] {
        let inspected = work.ok_json(&format!("inspect {model} --json"));
        assert_eq!(inspected["elastic"], json!({"betas": [0.25, 0.5, 1.0]}));
        let shown = work.ok(&format!("inspect {model}"));
        assert!(shown.contains("elastic ") && shown.contains("--beta 0.25   1 of 4 groups"), "{shown}");
        assert!(work.ok(&format!("inspect {model} --beta 0.5")).contains("trained for 2 budgets"));
        let (values, said) = logits(&work, &format!("{model} --beta 0.25"));
        assert!(!said.contains("note: ") && values != logits(&work, "narrow").0, "{said}");
    }
    assert_eq!(work.ok_json("inspect wide --json")["elastic"], Value::Null);
    assert!(!work.ok("inspect wide").contains("elastic"));

    // Neither new heads under its plan nor a run for one budget are elastic.
    work.ok("convert --model llama3 --plan elastic/head_plan.json --bank bank.safetensors --out fresh");
    assert!(work.read("fresh/head_plan.json") == work.read("wide/head_plan.json"));
    let line = format!("{heal} --model elastic --tokens 64 --stage continue --out plain");
    let run = succeed(work.command(&line).output().unwrap(), &line);
    assert!(run.stderr.contains("note: the hybrid is elastic"), "{}", run.stderr);
    assert_eq!(work.ok_json("inspect plain --json")["elastic"], Value::Null);
    let line = format!("{heal} --model elastic --elastic 1,0.5 --tokens 128 --stage continue --out again");
    work.ok(&line);
    assert_eq!(work.ok_json("inspect again --json")["elastic"], json!({"betas": [0.5, 1.0]}));
}

#[test]
fn budgets_that_cannot_be_met() {
    let work = with_hybrids("mamba2");
    work.ok("export --model llama3 --gguf base.gguf");
    for command in [
        "inspect MODEL",
        "generate --tokens 1,2 --json --model MODEL",
        "chat --model MODEL",
        "eval ppl --data data.npy --context 64 --model MODEL",
        "eval kl --base llama3 --data data.npy --context 64 --model MODEL",
        "eval passkey --contexts 200 --model MODEL",
        "bench --depths 16 --model MODEL",
        "logits --tokens 1,2 --out x.npy --model MODEL",
        "export --gguf x.gguf --model MODEL",
    ] {
        for (model, needles) in [
            ("llama3 --beta 0.5", &["beta 0.5: llama3 is a base model", "hint: "][..]),
            ("base.gguf --beta 0", &["base.gguf is a base model", "hint: "]),
            ("narrow --beta 0.5", &["that is 2 of 4 groups", "converts 1", "hint: at most beta 0.2500"]),
            ("wide --beta 1.5", &["between 0 and 1"]),
            ("wide --beta nan", &["between 0 and 1"]),
            ("wide --beta half", &["half"]),
        ] {
            work.fails(2, &command.replace("MODEL", model), needles);
        }
    }
    let mut plan = work.json("wide/head_plan.json");
    plan["layers"][1]["groups"][0].as_object_mut().unwrap().remove("score");
    work.write("wide/head_plan.json", plan.to_string().as_bytes());
    work.fails(2, "inspect wide --beta 0.5", &["group 0 of layer 1 has no score", "hint: "]);
    plan["elastic"] = json!({"betas": [0.5, 0.25]});
    work.write("wide/head_plan.json", plan.to_string().as_bytes());
    work.fails(1, "inspect wide", &["elastic betas are [0.5, 0.25]"]);

    let heal = "heal --model narrow --base llama3 --data data.npy --tokens 64 --context 32 --out x";
    for (betas, needle) in [
        ("0.25,0.5", "converts 1"),
        ("0,0.25", "no head to train"),
        ("0.25,0.3", "the same groups"),
        ("0.25,2", "between 0 and 1"),
        ("0.25,x", "'x'"),
    ] {
        work.fails(2, &format!("{heal} --elastic {betas}"), &[needle]);
    }
}
