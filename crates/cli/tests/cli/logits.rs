//! `logits`: the golden results of transformers, bit-identity of an empty plan, instruction sets.

use crate::common::{VOCAB, Work, golden_dir, largest_difference, read_logits, std_dev};
use serde_json::Value;

/// Largest error of a logit, as a share of the standard deviation of all logits: the project's exactness goal.
const LOGIT_TOLERANCE: f64 = 1e-4;
const FAMILIES: [&str; 6] = ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3"];

fn golden_tokens(family: &str) -> String {
    let facts: Value =
        serde_json::from_slice(&std::fs::read(golden_dir(family).join("goldens.json")).unwrap()).unwrap();
    let ids: Vec<String> = facts["tokens"][0].as_array().unwrap().iter().map(ToString::to_string).collect();
    ids.join(",")
}

fn golden_logits(family: &str) -> Vec<Vec<f32>> {
    let (tensors, _) =
        weights::safetensors::read_all(&golden_dir(family).join("goldens.safetensors")).unwrap();
    let logits = tensors.into_iter().find(|t| t.name == "logits").unwrap();
    let rows = logits.shape[1];
    logits.values.chunks(VOCAB as usize).take(rows).map(<[f32]>::to_vec).collect()
}

#[test]
fn equal_those_of_transformers_for_every_family() {
    for family in FAMILIES {
        let work = Work::with_model(family);
        work.ok(&format!("logits --model {family} --tokens {} --out logits.npy", golden_tokens(family)));
        let (found, expected) = (read_logits(&work.path("logits.npy")), golden_logits(family));
        let difference = largest_difference(&found, &expected);
        let limit = LOGIT_TOLERANCE * std_dev(&expected);
        assert!(difference <= limit, "{family}: {difference:e}, at most {limit:e}");
    }
}

#[test]
fn an_empty_plan_gives_the_same_bytes() {
    for family in FAMILIES {
        let work = Work::with_model(family);
        let tokens = golden_tokens(family);
        work.ok(&format!(
            "analyze --model {family} --data data.npy --tokens 128 --context 64 --out heads.json"
        ));
        work.ok("plan --heads heads.json --beta 0 --out plan.json");
        work.ok(&format!("convert --model {family} --plan plan.json --out same"));
        for (model, out) in [(family, "a.npy"), ("same", "b.npy")] {
            work.ok(&format!("logits --model {model} --tokens {tokens} --out {out}"));
        }
        assert_eq!(work.read("a.npy"), work.read("b.npy"), "{family}");
        assert_eq!(
            crate::common::tensors(&work.path(family)),
            crate::common::tensors(&work.path("same")),
            "{family}"
        );
    }
}

#[test]
fn plain_rust_gives_the_same_logits_and_a_wrong_name_is_refused() {
    let work = Work::with_model("llama3");
    work.make_hybrid("llama3", "gated-delta", 4);
    let tokens = golden_tokens("llama3");
    for (isa, out) in [("", "default.npy"), ("scalar", "scalar.npy")] {
        let line = format!("logits --model hybrid --tokens {tokens} --out {out}");
        let output = work.command(&line).env("RECURFORMER_ISA", isa).output().unwrap();
        crate::common::succeed(output, &line);
    }
    let (default, scalar) = (read_logits(&work.path("default.npy")), read_logits(&work.path("scalar.npy")));
    let difference = largest_difference(&default, &scalar);
    assert!(difference <= LOGIT_TOLERANCE * std_dev(&default), "{difference:e}");

    let mut wrong = work.command("logits --model hybrid --tokens 1,2 --out wrong.npy");
    work.fails_as(wrong.env("RECURFORMER_ISA", "bogus"), 1, &["bogus", "scalar"]);
}
