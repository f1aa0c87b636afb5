//! Text in and out: data formats, `generate`, `chat`, long-range tasks.

use crate::common::{Work, npy, some_text, succeed};
use serde_json::{Value, json};
use std::io::Write;
use std::process::Stdio;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_data_format_gives_the_same_tokens() {
    let work = Work::with_text_model("smollm2");
    let text = some_text(60);
    let lines = format!("{}\n\n", json!({"id": 1, "text": text}));
    for (name, plain) in [("a.txt", &text), ("b.jsonl", &lines)] {
        work.write(name, plain.as_bytes());
        work.write(&format!("{name}.gz"), &gzip(plain.as_bytes()));
        work.write(&format!("{name}.zst"), &zstd::encode_all(plain.as_bytes(), 3).unwrap());
    }
    let result = work.ok_json(
        "eval ppl --model smollm2 --data a.txt a.txt.gz a.txt.zst b.jsonl b.jsonl.gz b.jsonl.zst --context 64 --json",
    );
    let files = result["files"].as_array().unwrap();
    assert_eq!(files.len(), 6);
    assert!(files[0]["tokens"].as_u64().unwrap() > 200);
    for file in files {
        assert_eq!(
            (&file["ppl"], &file["tokens"]),
            (&files[0]["ppl"], &files[0]["tokens"]),
            "{}",
            file["name"]
        );
    }
}

#[test]
fn text_goes_through_the_pipeline() {
    let work = Work::with_text_model("llama3");
    work.write("train.txt", some_text(120).as_bytes());
    let docs: String = (0..40).map(|i| format!("{}\n", json!({"text": some_text(6 + i % 3)}))).collect();
    work.write("docs.jsonl", docs.as_bytes());
    work.ok("analyze --model llama3 --data train.txt docs.jsonl --tokens 256 --context 64 --out heads.json");
    work.ok(
        "align --model llama3 --heads heads.json --data train.txt docs.jsonl --tokens 128 --context 32 --measure-tokens 64 \
         --window 4 --out bank.safetensors",
    );
    work.ok("plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json");
    work.ok("convert --model llama3 --plan plan.json --bank bank.safetensors --out hybrid");
    work.ok("heal --model hybrid --base llama3 --data docs.jsonl --tokens 64 --context 32 --out healed");
    work.ok("generate --model healed --prompt whale --max-tokens 4");
}

#[test]
fn generated_tasks_are_data_beside_files() {
    let work = Work::with_text_model("llama3");
    work.write("train.txt", some_text(120).as_bytes());
    let data =
        "--data train.txt retrieval:context=200,tokens=4000 hashhop:context=200,tokens=2000,hops=1,length=3";
    work.ok(&format!("analyze --model llama3 {data} --tokens 1000 --context 200 --out heads.json"));
    work.ok(&format!(
        "align --model llama3 --heads heads.json {data} --tokens 128 --context 32 --measure-tokens 64 --window 4 --out bank.safetensors"
    ));
    work.ok(
        "plan --heads heads.json --bank bank.safetensors --criterion mixer-fisher --beta 0.5 --out plan.json",
    );
    work.ok("convert --model llama3 --plan plan.json --bank bank.safetensors --out hybrid");
    work.ok(&format!("heal --model hybrid --base llama3 {data} --tokens 64 --context 32 --out healed"));
    let line =
        "eval ppl --model healed --base llama3 --data retrieval:context=200,tokens=4000 --context 200 --json";
    let judged = work.ok_json(line);
    assert_eq!(judged["files"][0]["name"], "retrieval:context=200,tokens=4000");
    // Three documents are held out; the first token of each is not scored.
    assert_eq!(judged["overall"]["tokens"], 3 * 199);
    let again = work.ok_json(line);
    // The date apart, everything is the same again.
    for part in ["files", "overall", "base"] {
        assert_eq!(judged[part], again[part], "{part}");
    }
}

fn sampled(work: &Work, more: &str) -> Value {
    work.ok_json(&format!(
        "generate --model hybrid --prompt whale --max-tokens 40 --temperature 1 --json {more}"
    ))
}

#[test]
fn generate_samples_by_seed_stops_and_reports() {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    // A seed whose text is long enough to be stopped inside.
    let length = |value: &Value| value["text"].as_str().unwrap().chars().count();
    let seed = (0..50).find(|seed| length(&sampled(&work, &format!("--seed {seed}"))) > 20).unwrap();
    let first = sampled(&work, &format!("--seed {seed}"));
    let second = sampled(&work, &format!("--seed {seed}"));
    assert_eq!((&first["text"], &first["tokens"]), (&second["text"], &second["tokens"]));
    assert_ne!(first["tokens"], sampled(&work, &format!("--seed {}", seed + 1))["tokens"]);

    let tokens = first["tokens"].as_array().unwrap().len();
    assert_eq!(first["prompt_tokens"], 5);
    assert!(["stop", "length"].contains(&first["finish"].as_str().unwrap()));
    assert!(first["seconds"].is_number() && first["first_token_s"].is_number());
    assert!(first["cache_bytes"].as_u64().unwrap() > 0);
    assert!(first["cache_tokens"].as_u64().unwrap() + 1 >= 5 + tokens as u64);

    let text = first["text"].as_str().unwrap();
    let stop: String = text.chars().skip(9).take(3).collect();
    let line = format!("--seed {seed} --max-tokens 40 --temperature 1");
    let mut args: Vec<&str> =
        vec!["generate", "--model", "hybrid", "--prompt", "whale", "--json", "--stop", &stop];
    args.extend(line.split(' '));
    let stopped: Value =
        serde_json::from_str(&succeed(work.command_with(&args).output().unwrap(), &line).stdout).unwrap();
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["finish"], "stop");
    assert!(stopped["tokens"].as_array().unwrap().len() < tokens);

    let streamed = work.ok(&format!("generate --model hybrid --prompt whale {line}"));
    assert_eq!(streamed, format!("{text}\n"));
    work.write("prompt.txt", b"whale");
    assert_eq!(streamed, work.ok(&format!("generate --model hybrid --prompt-file prompt.txt {line}")));
    let limited = sampled(&work, "--top-k 5 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.3 --seed 3");
    assert!(!limited["tokens"].as_array().unwrap().is_empty());
    let nothing = work.ok_json("generate --model hybrid --prompt whale --max-tokens 0 --json");
    assert_eq!((&nothing["text"], &nothing["finish"]), (&json!(""), &json!("length")));
}

#[test]
fn token_ids_need_no_tokenizer() {
    let work = Work::with_model("llama3");
    let line = "generate --model llama3 --tokens 5,6,7 --max-tokens 4 --json";
    let bare = work.ok_json(line);
    assert_eq!((&bare["text"], &bare["prompt_tokens"]), (&Value::Null, &json!(3)));
    work.write("ids.npy", &npy(&[5, 6, 7]));
    let from_file = work.ok_json("generate --model llama3 --prompt-file ids.npy --max-tokens 4 --json");
    work.add_tokenizer("llama3");
    let with_text = work.ok_json(line);
    assert!(with_text["text"].is_string());
    for other in [from_file, with_text] {
        assert_eq!(other["tokens"], bare["tokens"]);
    }
    work.fails(1, "generate --model llama3 --prompt-file none.npy --json", &["none.npy"]);
}

fn chat(work: &Work, lines: &str, more: &str) -> String {
    let mut command = work.command(&format!("chat --model llama3 --max-tokens 8 {more}"));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    succeed(child.wait_with_output().unwrap(), "chat").stdout
}

#[test]
fn chat_answers_as_generate_does_on_the_rendered_conversation() {
    let work = Work::with_text_model("llama3");
    let generate = |prompt: &str| {
        let args = ["generate", "--model", "llama3", "--max-tokens", "8", "--prompt", prompt];
        succeed(work.command_with(&args).output().unwrap(), prompt).stdout
    };
    let first = generate("user: hello\nassistant: ");
    assert_eq!(chat(&work, "hello\n", ""), first);
    assert_eq!(chat(&work, "\nhello\n/quit\nignored\n", ""), first);
    let asked = generate("system: be brief\nuser: hello\nassistant: ");
    let mut command =
        work.command_with(&["chat", "--model", "llama3", "--max-tokens", "8", "--system", "be brief"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    assert_eq!(succeed(child.wait_with_output().unwrap(), "chat").stdout, asked);
    let two = chat(&work, "hello\nand then?\n", "");
    assert!(two.starts_with(&first) && two.len() > first.len(), "{two:?}");
    assert_eq!(two, chat(&work, "hello\nand then?\n", ""));

    work.write("llama3/tokenizer_config.json", b"{}");
    let mut command = work.command("chat --model llama3");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("chat template"));
}

#[test]
fn passkey_counts_right_answers() {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "gated-delta", 4);
    let result =
        work.ok_json("eval passkey --model hybrid --base llama3 --contexts 240,256 --samples 2 --json");
    for results in [&result["results"], &result["base"]["results"]] {
        for (row, context) in results.as_array().unwrap().iter().zip([240, 256]) {
            assert_eq!((&row["context"], &row["samples"]), (&json!(context), &json!(2)));
            assert!(row["correct"].as_u64().unwrap() <= 2);
        }
    }
    assert!(work.ok("eval passkey --model hybrid --contexts 256 --samples 1").contains("/1"));
}

#[test]
fn hashhop_scores_base_and_hybrid_in_one_run() {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 4);
    let line = "eval hashhop --model hybrid --base llama3 --hops 1,2 --contexts 200,256 --hash-length 3 --samples 5 --queries 2";
    let result = work.ok_json(&format!("{line} --json"));
    for results in [&result["results"], &result["base"]["results"]] {
        let cells: Vec<(u64, u64)> = results
            .as_array()
            .unwrap()
            .iter()
            .map(|row| (row["hops"].as_u64().unwrap(), row["context"].as_u64().unwrap()))
            .collect();
        assert_eq!(cells, [(1, 200), (1, 256), (2, 200), (2, 256)]);
        for row in results.as_array().unwrap() {
            assert_eq!((&row["asked"], &row["prompts"]), (&json!(5), &json!(3)));
            let [low, share, high] =
                [&row["low"], &row["correct"], &row["high"]].map(|value| value.as_f64().unwrap());
            assert!(low <= share / 5.0 && share / 5.0 <= high && high <= 1.0, "{row}");
        }
    }
    let table = work.ok(line);
    assert_eq!(table.lines().count(), 5);
    assert!(table.contains("base") && table.contains("95 %"), "{table}");
}
