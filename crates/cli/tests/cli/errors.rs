//! Wrong usage and bad data: one clear error with a hint, the right exit code, nothing left half-written.

use crate::common::{Work, npy, random_tokens};
#[cfg(unix)]
use std::process::Command;

fn without_hybrid() -> Work {
    let work = Work::with_model("llama3");
    work.make_bank("llama3", "mamba2", 4);
    work.ok("plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json");
    work
}

fn with_hybrid() -> Work {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    work
}

#[test]
fn wrong_usage_is_2() {
    let work = with_hybrid();
    let data = "--data data.npy";
    let too_many = vec!["1"; 257].join(",");
    for (line, needle) in [
        ("analyze --bogus", "--bogus"),
        ("analyze --model llama3 --data data.npy --criteria bogus --out x.json", "bogus"),
        ("analyze --model llama3 --data data.npy --criteria mixer-fisher --out x.json", "mixer-fisher"),
        (
            "analyze --model llama3 --data data.npy --out x.json",
            "context 1024 must be between 2 and the model's 256",
        ),
        ("plan --heads heads.json --beta 2 --out x.json", "between 0 and 1"),
        ("plan --heads heads.json --beta nan --out x.json", "between 0 and 1"),
        ("plan --heads heads.json --criterion bogus --beta 0.5 --out x.json", "bogus"),
        ("plan --heads heads.json --criterion mixer-fisher --beta 0.5 --out x.json", "--bank"),
        ("plan --heads heads.json --bank bank.safetensors --mixer mamba --beta 0.5 --out x.json", "--mixer"),
        ("plan --heads heads.json --mixer none --window 0 --beta 0.5 --out x.json", "window"),
        ("align --model llama3 --heads heads.json --data data.npy --mixer none --out x", "nothing to train"),
        ("align --model llama3 --heads heads.json --data data.npy --mixer bogus --out x", "bogus"),
        (
            "align --model llama3 --heads heads.json --data data.npy --context 32 --window 0 --sinks 2 --out x",
            "sinks",
        ),
        ("align --model llama3 --heads heads.json --data data.npy --context 257 --out x", "256"),
        ("align --model llama3 --heads heads.json --data data.npy --context 193 --out x", "nothing to learn"),
        ("heal --model hybrid --base llama3 --data data.npy --train lora:0 --out x", "lora:RANK"),
        ("heal --model hybrid --base llama3 --data data.npy --stage bogus --out x", "bogus"),
        ("heal --model hybrid --base llama3 --data data.npy --context 32 --batch 0 --out x", "--batch"),
        ("heal --model hybrid --base llama3 --data data.npy --out x", "256"),
        ("eval kl --model hybrid --data data.npy --context 64", "--base"),
        ("eval ppl --model hybrid --data data.npy --context 257", "256"),
        ("eval ppl --model hybrid --data data.npy --context 1", "between 2"),
        ("eval ppl --model hybrid --data data.npy --context 64 --stride 0", "stride"),
        ("eval ppl --model hybrid --context 64", "--data"),
        ("eval passkey --model hybrid --contexts 100 --samples 1", "128"),
        ("eval passkey --model hybrid --contexts 512 --samples 1", "256"),
        ("eval hashhop --model hybrid --contexts 30 --samples 1", "30 tokens"),
        ("eval hashhop --model hybrid --contexts 200 --hops 17", "between 1 and 16"),
        ("eval hashhop --model hybrid --contexts 200 --queries 0", "at least one"),
        ("eval hashhop --model hybrid --contexts 200 --hash-length 1", "longer hashes"),
        ("eval ruler --model hybrid --contexts 256 --samples 1", "niah_single"),
        ("eval ruler --model hybrid --contexts 256 --tasks bogus", "bogus"),
        ("eval induction --model hybrid --distances 200 --samples 1", "different tokens"),
        ("eval induction --model hybrid --distances 8 --samples 1", "span of 16"),
        ("eval induction --model hybrid --distances 16 --samples 0", "at least one"),
        ("eval choice --model hybrid", "--data"),
        ("eval choice --model hybrid --data data.npy --details", "--json"),
        ("train-mqar --sizes 64 --out x", "TOKENS:PAIRS"),
        ("train-mqar --sizes 64:17 --out x", "17 pairs in 64"),
        ("train-mqar --widths 63 --out x", "width of 63"),
        ("train-mqar --models bogus --out x", "bogus"),
        ("train-mqar --steps 0 --out x", "at least one step"),
        ("bench --model hybrid --depths 0", "depth"),
        ("bench --model hybrid --depths 250 --decode-steps 16", "256"),
        ("bench-train --model llama3 --context 257", "256"),
        ("bench-train --model llama3 --context 32 --repeats 0", "--repeats"),
        ("bench-train --model llama3 --context 32 --paced", "--steps"),
        ("bench-train --model llama3 --context 32 --steps align --paced --json", "--json"),
        ("eval ppl --model hybrid --data data.npy --context 64 --chunk 0", "--chunk"),
        ("generate --model hybrid", "--prompt"),
        ("generate --model hybrid --tokens 1 --temperature=-1", "temperature"),
        ("generate --model hybrid --tokens 1 --top-p 2", "top_p"),
        ("logits --model hybrid --tokens x --out x.npy", "x"),
        ("quickstart --model llama3 --data data.npy --beta=-0.5 --out qs", "beta"),
        ("frobnicate", "frobnicate"),
    ] {
        assert!(line.contains(data) || !line.contains("--data "), "{line}");
        work.fails(2, line, &[needle]);
    }
    work.fails(2, &format!("logits --model hybrid --tokens {too_many} --out x.npy"), &["257", "256"]);
    work.fails(2, &format!("generate --model hybrid --tokens {too_many}"), &["257", "256"]);
}

#[test]
fn models_that_cannot_be_used() {
    let work = without_hybrid();
    for (line, needles) in [
        ("inspect nowhere", &["nowhere", "hint:"][..]),
        ("inspect ./nowhere/model.gguf", &["nowhere/model.gguf", "hint:"]),
        ("inspect data.npy", &["not GGUF", "hint:"]),
        ("inspect .", &["config.json", "hint:"]),
    ] {
        work.fails(1, line, needles);
    }
    work.write("short.gguf", b"GGUF\x03\0\0\0\xff\xff");
    work.fails(1, "inspect short.gguf", &["short.gguf", "GGUF"]);

    let whole = work.read("llama3/model.safetensors");
    for (bytes, what) in [
        (whole[..whole.len() - 100].to_vec(), "truncated"),
        (whole[..5].to_vec(), "shorter than a header length"),
        ([&u64::MAX.to_le_bytes(), &whole[8..]].concat(), "huge header"),
        (Vec::new(), "empty"),
    ] {
        work.write("llama3/model.safetensors", &bytes);
        for line in [
            "inspect llama3",
            "logits --model llama3 --tokens 1,2 --out x.npy",
            "convert --model llama3 --plan plan.json --bank bank.safetensors --out x",
        ] {
            let text = work.fails(1, line, &["model.safetensors"]);
            assert!(text.contains("safetensors"), "{what}: {text}");
        }
    }

    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    work.write("llama3/model.safetensors", &nan);
    for line in [
        "logits --model llama3 --tokens 1,2 --out x.npy",
        "convert --model llama3 --plan plan.json --bank bank.safetensors --out x",
        "analyze --model llama3 --data data.npy --context 64 --out x.json",
    ] {
        work.fails(1, line, &["non-finite", "tensor `"]);
    }

    work.model("llama2", "sharded");
    std::fs::remove_file(work.path("sharded/model-00003-of-00005.safetensors")).unwrap();
    work.fails(1, "logits --model sharded --tokens 1,2 --out x.npy", &["model-00003-of-00005.safetensors"]);
}

#[test]
fn configurations_that_are_not_computed() {
    let work = Work::with_model("qwen2");
    let config = work.json("qwen2/config.json");
    for (key, value, needle) in [
        ("model_type", "mixtral".into(), "mixtral"),
        ("hidden_act", "gelu".into(), "gelu"),
        ("num_key_value_heads", 3.into(), "3"),
        ("hidden_size", 0.into(), "hidden_size"),
        ("num_hidden_layers", 3.into(), "model.layers.2"),
        ("vocab_size", 65.into(), "65"),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        work.write("qwen2/config.json", changed.to_string().as_bytes());
        work.fails(1, "inspect qwen2", &[needle]);
    }
    let mut sliding = config.clone();
    (sliding["use_sliding_window"], sliding["sliding_window"], sliding["max_window_layers"]) =
        (true.into(), 32.into(), 0.into());
    sliding["layer_types"] = serde_json::json!(["sliding_attention", "sliding_attention"]);
    work.write("qwen2/config.json", sliding.to_string().as_bytes());
    work.fails(1, "inspect qwen2", &["sliding"]);
    work.write("qwen2/config.json", b"{\"model_type\": ");
    work.fails(1, "inspect qwen2", &["config.json"]);
}

#[test]
fn plans_banks_and_statistics_of_another_model() {
    let work = without_hybrid();
    work.model("llama2", "other");
    let align = "--data data.npy --tokens 64 --context 32 --window 4 --out x";
    for (line, needle) in [
        (
            "convert --model other --plan plan.json --bank bank.safetensors --out x".to_string(),
            "another model",
        ),
        ("convert --model other --plan plan.json --out x".to_string(), "another model"),
        (format!("align --model other --heads heads.json {align}"), "another model"),
    ] {
        work.fails(1, &line, &[needle]);
    }
    work.ok("analyze --model other --data data.npy --tokens 128 --context 64 --out other.json");
    work.fails(
        1,
        "plan --heads other.json --bank bank.safetensors --beta 0.5 --out x.json",
        &["another model"],
    );
    work.ok("plan --heads other.json --mixer mamba2 --beta 0.5 --out other-plan.json");
    work.fails(
        1,
        "convert --model other --plan other-plan.json --bank bank.safetensors --out x",
        &["another model"],
    );
    work.fails(
        1,
        "convert --model other --plan other-plan.json --heads heads.json --out x",
        &["another model"],
    );
    // A bank with another mixer than the plan's.
    work.ok("plan --heads heads.json --mixer gated-delta --beta 0.5 --out gated.json");
    work.fails(1, "convert --model llama3 --plan gated.json --bank bank.safetensors --out x", &["hint:"]);
    work.fails(1, "plan --heads plan.json --beta 0.5 --out x.json", &["plan.json"]);
    work.fails(
        1,
        "plan --heads heads.json --bank llama3/model.safetensors --beta 0.5 --out x.json",
        &["head bank"],
    );

    work.ok("convert --model llama3 --plan plan.json --bank bank.safetensors --out hybrid");
    let heal = "--data data.npy --tokens 64 --context 32 --out x";
    for line in [
        "convert --model hybrid --plan plan.json --bank bank.safetensors --out x".to_string(),
        "analyze --model hybrid --data data.npy --context 64 --out x.json".to_string(),
        format!("align --model hybrid --heads heads.json {align}"),
        format!("heal --model llama3 --base llama3 {heal}"),
    ] {
        work.fails(1, &line, &[]);
    }
    work.fails(1, &format!("heal --model hybrid --base other {heal}"), &[]);
    work.fails(1, "eval kl --model hybrid --base qwen --data data.npy --context 64", &["qwen"]);
}

#[test]
fn damaged_plans() {
    let work = without_hybrid();
    let plan = work.json("plan.json");
    let text = plan.to_string();
    let replaced = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    for (bad, needle) in [
        (text[..text.len() / 2].to_string(), "EOF"),
        ("[]".to_string(), ""),
        (replaced("\"version\":1", "\"version\":99"), "99"),
        (replaced("\"recurrent\":\"mamba2\"", "\"recurrent\":\"rwkv\""), "rwkv"),
        (replaced("\"mixer\":\"recurrent\"", "\"mixer\":\"convolution\""), "convolution"),
        (replaced("\"d_state\":8", "\"d_state\":7"), "d_state"),
        (replaced("\"window\":4", "\"window\":400000000"), "window"),
        (replaced("\"kv_heads\":2", "\"kv_heads\":4"), "kv_heads"),
        (replaced("\"beta\"", "\"gamma\""), "gamma"),
        (replaced("\"mixer\":{", "\"mixers\":{"), "mixer"),
    ] {
        work.write("bad.json", bad.as_bytes());
        let text = work.fails(
            1,
            "convert --model llama3 --plan bad.json --bank bank.safetensors --out x",
            &[needle],
        );
        assert!(text.contains("bad.json"), "the file is not named: {text}");
    }
    work.fails(1, "convert --model llama3 --plan nothing.json --out x", &["nothing.json"]);
}

#[test]
fn data_that_cannot_be_used() {
    let work = Work::with_text_model("llama3");
    let files: [(&str, Vec<u8>, &str); 13] = [
        ("empty.txt", Vec::new(), "holds no text"),
        ("empty.npy", npy(&[]), "holds no text"),
        ("latin.txt", b"caf\xe9 au lait".to_vec(), "offset 3"),
        ("outside.npy", npy(&[1, 2, 64]), "64"),
        ("negative.npy", npy(&[1, -2]), "negative"),
        ("torn.npy", npy(&random_tokens(100, 3))[..200].to_vec(), "npy"),
        ("not.npy", b"hello".to_vec(), "npy"),
        ("line.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\"}\n".to_vec(), "line 2"),
        ("torn.jsonl", b"{\"text\": \"a".to_vec(), "line 1"),
        ("not.txt.gz", b"hello".to_vec(), "gz"),
        ("not.txt.zst", b"hello".to_vec(), "zst"),
        ("one.npy", npy(&[7]), "shorter than 2 tokens"),
        ("floats.npy", float_npy(), "int32"),
    ];
    for (name, bytes, needle) in files {
        work.write(name, &bytes);
        work.fails(1, &format!("eval ppl --model llama3 --data {name} --context 64"), &[needle]);
    }
    work.fails(1, "eval ppl --model llama3 --data nowhere.txt --context 64", &["nowhere.txt", "hint:"]);
    work.fails(1, "eval ppl --model llama3 --data llama3 --context 64", &["folder"]);
    for (arg, needle) in [("retrieval:hops=2", "`hops=2` is unknown"), ("hashhop:length=0", "out of range")] {
        work.fails(1, &format!("eval ppl --model llama3 --data {arg} --context 64"), &[needle, "hint:"]);
    }
    work.write("few.npy", &npy(&random_tokens(50, 3)));
    work.fails(1, "analyze --model llama3 --data few.npy --context 64 --out x.json", &["50", "hint:"]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let work = Work::with_model("llama3");
    work.write("text.txt", b"some text");
    work.fails(1, "eval ppl --model llama3 --data text.txt --context 64", &["tokenizer.json"]);
    work.fails(1, "generate --model llama3 --prompt hello", &["tokenizer.json", "hint:"]);
    work.fails(1, "generate --model llama3 --tokens 1,2", &["tokenizer.json"]);
    work.fails(1, "generate --model llama3 --tokens 1,2 --json --stop x", &["tokenizer.json"]);
    work.write("llama3/tokenizer.model", b"\0");
    work.fails(1, "generate --model llama3 --prompt hello", &["tokenizer.model"]);
    work.write("llama3/tokenizer.json", b"{}");
    work.fails(1, "generate --model llama3 --prompt hello", &["tokenizer.json"]);
}

#[test]
fn outputs_are_not_overwritten_or_misplaced() {
    let work = with_hybrid();
    std::fs::create_dir(work.path("taken")).unwrap();
    work.write("taken/note.txt", b"mine");
    let heal = "heal --model hybrid --base llama3 --data data.npy --tokens 64 --context 32";
    let align = "align --model llama3 --heads heads.json --data data.npy --tokens 64 --context 32 --window 4";
    let convert = "convert --model llama3 --plan plan.json --bank bank.safetensors";
    for line in [heal, align, convert] {
        work.fails(1, &format!("{line} --out taken"), &["taken exists already", "hint:"]);
    }
    let analyze = "analyze --model llama3 --data data.npy --context 64";
    let logits = "logits --model llama3 --tokens 1,2";
    let plan = "plan --heads heads.json --beta 0.5";
    for line in [heal, align, convert, analyze, logits, plan] {
        work.fails(1, &format!("{line} --out no/where/x"), &["no/where", "hint:"]);
    }
    work.fails(1, "quickstart --model llama3 --data data.npy --out taken", &["taken", "hint:"]);
}

/// Writes beyond a few blocks fail as on a full disk; the signal that goes with it is ignored.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let work = with_hybrid();
    let full = |blocks: u32, line: &str| {
        let inner = work.command(line);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""));
        shell.arg(inner.get_program()).args(inner.get_args()).current_dir(work.path("."));
        shell
    };
    let many = (0..200).map(|i| (i % 64).to_string()).collect::<Vec<_>>().join(",");
    for (blocks, line) in [
        (8, format!("logits --model llama3 --tokens {many} --out x.npy")),
        (2, "analyze --model llama3 --data data.npy --context 64 --out x.json".to_string()),
        (20, "convert --model llama3 --plan plan.json --bank bank.safetensors --out x".to_string()),
        (
            20,
            "align --model llama3 --heads heads.json --data data.npy --tokens 64 --context 32 --window 4 --out x"
                .to_string(),
        ),
        (0, "plan --heads heads.json --beta 0.5 --out x.json".to_string()),
    ] {
        work.fails_as(&mut full(blocks, &line), 1, &["File too large"]);
    }
    // The log of a training run that broke stays; the model does not appear.
    let line = "heal --model hybrid --base llama3 --data data.npy --tokens 64 --context 32 --out x";
    let output = full(20, line).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: ") && text.contains("File too large"), "{text}");
    assert!(!work.path("x").exists());
    let left: Vec<_> = work.listing().into_keys().filter(|name| name.contains(".tmp-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn float_npy() -> Vec<u8> {
    use npyz::WriterBuilder;
    let mut bytes = Vec::new();
    let mut writer =
        npyz::WriteOptions::new().default_dtype().shape(&[3]).writer(&mut bytes).begin_nd().unwrap();
    writer.extend([1.0_f32, 2.0, 3.0]).unwrap();
    writer.finish().unwrap();
    bytes
}
