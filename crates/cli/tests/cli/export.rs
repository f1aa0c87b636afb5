//! `export`: what is written comes back for every command, base models and hybrids; nothing half-written stays.

use crate::common::{Work, largest_difference, read_logits, std_dev};
use serde_json::Value;

/// Largest error of a logit with 8 bits per weight (the arithmetic is f32), as a share of the standard deviation of all logits. Rounding to 1/127
/// of a block's largest value is 0.5 % of a weight's standard deviation, five times that of bf16, whose largest errors here are 0.02 to 0.04. The largest seen
/// with 8 bits is 0.155, of the family that divides queries and keys by their norm. That the right values were written is checked exactly, beside it.
const Q8_TOLERANCE: f64 = 0.16;
/// The same with 16 bits: bf16 rounds weights to 8 binary digits, 0.1 % of their standard deviation.
const HALF_TOLERANCE: f64 = 0.05;
const TOKENS: &str = "1,5,9,2,33,60,7,7,12,40";

fn logits(work: &Work, model: &str) -> Vec<Vec<f32>> {
    work.ok(&format!("logits --model {model} --tokens {TOKENS} --out {model}.npy"));
    read_logits(&work.path(&format!("{model}.npy")))
}

#[test]
fn a_base_model_computes_the_same() {
    for family in ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3"] {
        let work = Work::with_model(family);
        let expected = logits(&work, family);
        work.ok(&format!("export --model {family} --gguf f32.gguf --weights f32"));
        assert_eq!(logits(&work, "f32.gguf"), expected, "{family}");
        for (weights, tolerance) in [
            ("f16", HALF_TOLERANCE),
            ("bf16", HALF_TOLERANCE),
            ("q8_0", Q8_TOLERANCE),
            ("q6_k", Q8_TOLERANCE),
        ] {
            work.ok(&format!("export --model {family} --gguf {weights}.gguf --weights {weights}"));
            let found = logits(&work, &format!("{weights}.gguf"));
            let share = largest_difference(&found, &expected) / std_dev(&expected);
            assert!(share <= tolerance, "{family} {weights}: {share:e}");
            work.ok(&format!("export --model {weights}.gguf --gguf {weights}-f32.gguf --weights f32"));
            assert_eq!(logits(&work, &format!("{weights}-f32.gguf")), found, "{family} {weights}");
        }
    }
}

#[test]
fn a_hybrid_is_one_file_for_every_command() {
    for mixer in ["mamba2", "gated-delta", "mamba"] {
        let work = Work::with_text_model("llama3");
        work.make_hybrid("llama3", mixer, 4);
        let expected = logits(&work, "hybrid");
        let made = work.ok_json("export --model hybrid --gguf f32.gguf --weights f32 --json");
        assert_eq!((&made["architecture"], &made["hybrid"]), (&Value::from("recurformer"), &true.into()));
        assert_eq!(made["bytes"], work.read("f32.gguf").len());
        assert_eq!(logits(&work, "f32.gguf"), expected, "{mixer}");

        let out = work.ok("export --model f32.gguf --gguf small.gguf --weights Q8_0");
        assert!(out.contains("KV groups converted") && out.contains("Q8_0"), "{out}");
        let share = largest_difference(&logits(&work, "small.gguf"), &expected) / std_dev(&expected);
        assert!(share <= Q8_TOLERANCE, "{mixer}: {share:e}");

        let (file, folder) =
            (work.ok_json("inspect small.gguf --json"), work.ok_json("inspect hybrid --json"));
        for key in ["architecture", "config", "parameters", "kv_bytes_per_token", "hybrid", "cache", "plan"] {
            assert_eq!(file[key], folder[key], "{key}");
        }
        assert_eq!(file["dtypes"][0]["dtype"], "Q8_0");
        let shown = work.ok("inspect small.gguf");
        assert!(
            shown.contains("recurformer") && shown.contains("groups") && shown.contains("Q8_0"),
            "{shown}"
        );

        let prompt =
            ["generate", "--prompt", "the whale", "--max-tokens", "8", "--temperature", "0", "--model"];
        let run = |model: &str| {
            let args: Vec<&str> = prompt.iter().copied().chain([model]).collect();
            crate::common::succeed(work.command_with(&args).output().unwrap(), model).stdout
        };
        assert_eq!(run("f32.gguf"), run("hybrid"));
        work.ok("eval ppl --model small.gguf --data data.npy --context 64 --max-tokens 256");
    }
}

#[test]
fn wrong_uses_write_nothing() {
    let work = Work::with_text_model("llama3");
    work.fails(2, "export --model llama3 --gguf out.bin", &[".gguf"]);
    work.fails(2, "export --model llama3 --gguf out.gguf --weights q3_k", &["q3_k", "q4_k"]);
    work.fails(2, "export --model llama3", &["--gguf"]);
    work.fails(1, "export --model llama3 --gguf no/out.gguf", &["no does not exist"]);
    work.fails(1, "export --model nowhere --gguf out.gguf", &["nowhere"]);
    work.ok("export --model llama3 --gguf out.gguf");
    work.fails(1, "export --model llama3 --gguf out.gguf", &["exists already"]);
}

#[test]
fn damaged_hybrids_are_refused() {
    let work = Work::with_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    work.ok("export --model hybrid --gguf good.gguf --weights q8_0");
    let good = work.read("good.gguf");
    for length in [3, 30, 700, good.len() / 2, good.len() - 33] {
        work.write("bad.gguf", &good[..length]);
        work.fails(1, "inspect bad.gguf", &["bad.gguf", "GGUF"]);
    }
    // The texts inside, changed to others of the same length.
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = good.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        work.write("bad.gguf", &bytes);
    };
    for (from, to, words) in [
        ("\"num_hidden_layers\":2", "\"num_hidden_layers\":3", &["layers"][..]),
        ("\"kv_heads\":2", "\"kv_heads\":1", &["kv_heads", "KV heads"][..1]),
        ("recurformer.head_plan", "recurformer.head_plam", &["head_plan", "missing"]),
        ("self_attn.recurrent.", "self_attn.recurrend.", &["self_attn.recurrend."]),
        ("\"recurrent\":\"mamba2\"", "\"recurrent\":\"mambaX\"", &["mambaX"]),
    ] {
        replaced(from, to);
        work.fails(1, &format!("logits --model bad.gguf --tokens {TOKENS} --out x.npy"), words);
    }
}
