//! `heal --recipe`: from a base model to a healed hybrid in one command, for one budget and for several, and after every interruption.

use crate::common::{Work, succeed};
use serde_json::{Value, json};

/// 8 steps of `align` and 4 of `heal` where contexts are cut to the tiny model's 256 tokens.
const TOKENS: &str = "--tokens 10112";

fn line(recipe: &str, out: &str) -> String {
    format!("heal --recipe {recipe} --base llama3 --data data.npy --out {out}")
}

fn stages(record: &Value) -> Vec<(&str, u64)> {
    let stages = record["stages"].as_array().unwrap().iter();
    stages.map(|s| (s["stage"].as_str().unwrap(), s["tokens"].as_u64().unwrap())).collect()
}

#[test]
fn the_default_recipe() {
    let work = Work::with_text_model("llama3");
    let command = format!("{} --beta 0.5 {TOKENS}", line("default", "healed"));
    let run = succeed(work.command(&command).output().unwrap(), &command);
    for needle in ["[1/5] analyze", "[5/5] heal", "cut to the 256 tokens of llama3"] {
        assert!(run.stderr.contains(needle), "{needle} is not in\n{}", run.stderr);
    }
    for needle in [
        "minutes",
        "align",
        " 8192 ",
        "2 of 4 KV groups converted by mixer-fisher",
        " in 8 steps",
        "wrote healed",
    ] {
        assert!(run.stdout.contains(needle), "{needle} is not in\n{}", run.stdout);
    }
    for file in [
        "heads.json",
        "bank.safetensors",
        "plan.json",
        "hybrid/model.safetensors",
        "healed.train/metrics.jsonl",
    ] {
        assert!(work.path("healed.work").join(file).exists(), "{file}");
    }
    let html = String::from_utf8(work.read("healed.work/report.html")).unwrap();
    assert!(
        html.contains("</html>") && html.contains("heal: loss") && html.contains("align: relative error")
    );

    let record = work.json("healed/recipe.json");
    assert_eq!(
        stages(&record),
        [("analyze", 6144), ("align", 8192), ("plan", 0), ("convert", 0), ("heal", 2048)]
    );
    let recipe = &record["settings"]["recipe"];
    assert_eq!((&recipe["name"], &recipe["seeds"]["heal"]), (&json!("default"), &json!(2)));
    let mixer = json!({"recurrent": "gated-delta", "window": 192, "sinks": 1, "dropped": "weighed"});
    assert_eq!(recipe["mixer"], mixer);
    assert_eq!((&recipe["align"]["lr"], &recipe["heal"]["lr"]), (&json!(0.008), &json!(0.0005)));
    assert_eq!(recipe["heal"]["stage"], json!({"distill": {"kl": 1.0, "ce": 0.0}}));
    assert_eq!(recipe["align"]["context"], 256);
    assert_eq!((&record["base"], &record["data"]), (&json!("llama3"), &json!(["data.npy"])));
    assert_eq!(record["settings"]["budget"], json!({"beta": 0.5}));
    assert!(record["stages"].as_array().unwrap().iter().all(|s| s["seconds"].as_f64().unwrap() > 0.0));

    // What the recipe made can be made further use of, command by command.
    let plan = work.json("healed.work/plan.json");
    assert_eq!(work.ok_json("inspect healed --json")["plan"], plan);
    assert_eq!(plan["criterion"]["name"], "mixer-fisher");
    work.ok("generate --model healed --prompt whale --max-tokens 4");
    work.ok(
        "plan --heads healed.work/heads.json --bank healed.work/bank.safetensors --beta 1 --out wide.json",
    );

    // The same again prints the same as JSON.
    let again = work.ok_json(&format!("{} --beta 0.5 {TOKENS} --json", line("default", "again")));
    assert_eq!(again["settings"], record["settings"]);
    assert_eq!(again, work.json("again/recipe.json"));
    assert!(work.read("again/model.safetensors") == work.read("healed/model.safetensors"));
    let other = work.ok_json(&format!("{} --beta 0.5 {TOKENS} --seed 1 --json", line("default", "other")));
    assert_eq!(other["settings"]["recipe"]["seeds"], json!({"main": 1, "fisher": 0, "heal": 3}));
    assert!(work.read("other/model.safetensors") != work.read("healed/model.safetensors"));

    work.fails(1, &command, &["healed exists already"]);
    work.fails(1, &format!("{command} --resume"), &["healed exists already"]);
    std::fs::remove_dir_all(work.path("healed")).unwrap();
    work.fails(1, &command, &["healed.work exists already", "--resume"]);
    work.fails(1, &format!("{command} --seed 1 --resume"), &["`recipe.seeds.main` 0, this run has 1"]);
    let changed = command.replace(TOKENS, "--tokens 20224");
    work.fails(1, &format!("{changed} --resume"), &["`recipe.align.tokens` 8192, this run has 16384"]);
    work.fails(1, &format!("{} --resume", command.replace("0.5", "0.75")), &["`budget.beta`"]);
    work.fails(1, &format!("{} --resume", command.replace("default", "paper")), &["`recipe."]);
    work.write("data.npy", &crate::common::npy(&crate::common::random_tokens(3000, 2)));
    work.fails(1, &format!("{command} --resume"), &["train_sha256"]);
}

#[test]
fn the_default_recipe_for_several_budgets() {
    let work = Work::with_text_model("llama3");
    let out = work.ok(&format!("{} --elastic 1,0.25,0.5 {TOKENS}", line("default", "elastic")));
    for needle in ["beta 0.25: loss ", "beta 0.5: loss ", "beta 1: loss ", "4 of 4 KV groups"] {
        assert!(out.contains(needle), "{needle} is not in\n{out}");
    }
    let inspected = work.ok_json("inspect elastic --json");
    assert_eq!(inspected["elastic"], json!({"betas": [0.25, 0.5, 1.0]}));
    let record = work.json("elastic/recipe.json");
    assert_eq!(record["settings"]["budget"], json!({"elastic": [0.25, 0.5, 1.0]}));
    let losses = record["stages"][4]["result"]["losses"].as_array().unwrap();
    assert_eq!(losses.iter().map(|l| l["steps"].as_u64().unwrap()).sum::<u64>(), 8);
    let line = "generate --model elastic --beta 0.25 --prompt whale --max-tokens 4";
    let run = succeed(work.command(line).output().unwrap(), line);
    assert!(!run.stderr.contains("not marked elastic"), "{}", run.stderr);
}

#[test]
fn the_papers_recipe() {
    let work = Work::with_text_model("llama3");
    let out = work.ok(&format!("{} --beta 0.5 --tokens 1024", line("paper", "paper")));
    assert!(out.contains("2 of 4 KV groups converted by recency") && !out.contains("align "), "{out}");
    let record = work.json("paper/recipe.json");
    assert_eq!(stages(&record), [("analyze", 6144), ("plan", 0), ("convert", 0), ("heal", 1024)]);
    assert_eq!(record["settings"]["recipe"]["align"], Value::Null);
    assert_eq!(record["settings"]["recipe"]["heal"]["stage"], "continue");
    assert!(!work.path("paper.work/bank.safetensors").exists());
    let plan = work.json("paper/head_plan.json");
    assert_eq!((&plan["mixer"]["recurrent"], &plan["mixer"]["window"]), (&json!("mamba"), &json!(0)));
    // All weights were trained.
    let [hybrid, healed] =
        ["paper.work/hybrid", "paper"].map(|name| crate::common::tensors(&work.path(name)));
    assert!(hybrid.keys().eq(healed.keys()));
    let same: Vec<&String> = hybrid.keys().filter(|name| hybrid[*name].2 == healed[*name].2).collect();
    // Projections that only converted groups read are not in use.
    assert!(same.iter().all(|name| name.contains("self_attn.")), "{same:?}");
}

#[test]
fn what_a_recipe_sets_cannot_be_set_beside_it() {
    let work = Work::with_model("llama3");
    let recipe = format!("{} --beta 0.5", line("default", "x"));
    for option in [
        "--model y",
        "--stage continue",
        "--context 32",
        "--batch 2",
        "--accumulate 2",
        "--train all",
        "--lr 1e-3",
    ] {
        let name = option.split(' ').next().unwrap();
        work.fails(2, &format!("{recipe} {option}"), &["--recipe", name, "cannot be used with"]);
    }
    work.fails(2, &format!("{recipe} --kl-weight 1"), &["--kl-weight"]);
    work.fails(2, &format!("{recipe} --ce-weight 1"), &["--ce-weight"]);
    work.fails(2, &format!("{recipe} --elastic 0.5,1"), &["--beta", "--elastic"]);
    work.fails(2, &line("default", "x"), &["needs --beta"]);
    work.fails(2, &line("fastest", "x"), &["fastest", "default, paper"]);
    work.fails(2, "heal --base llama3 --data data.npy --out x", &["--model"]);
    work.fails(2, "heal --model y --base llama3 --data data.npy --out x --beta 0.5", &["--recipe"]);
    work.fails(2, "heal --model y --base llama3 --data data.npy --out x --json", &["--recipe"]);
    for (beta, needle) in [("1.5", "between 0 and 1"), ("nan", "between 0 and 1"), ("0.1", "no group")] {
        work.fails(2, &format!("{} --beta {beta}", line("default", "x")), &[needle]);
    }
    work.fails(2, &format!("{} --elastic 0.5,0.55", line("default", "x")), &["the same groups"]);
    work.fails(1, &format!("{recipe} --tokens 100"), &["leave 81 to align", "hint: "]);
    work.fails(1, &recipe.replace("llama3", "missing"), &["missing"]);
    work.make_hybrid("llama3", "mamba2", 4);
    work.fails(1, &recipe.replace("--base llama3", "--base hybrid"), &["hybrid"]);
}

#[cfg(unix)]
mod interrupted {
    use super::*;
    use std::path::Path;
    use std::process::{Command, ExitStatus, Stdio};
    use std::time::Duration;

    fn steps(path: &Path) -> usize {
        std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    /// Starts the command, sends the signal as soon as `ready` says so, and returns how the process ended and its stderr.
    fn stop(work: &Work, line: &str, signal: &str, ready: impl Fn() -> bool) -> (ExitStatus, String) {
        let mut command = work.command(&format!("{line} --save-every 0"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while !ready() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let id = child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success(), "it had ended already");
        let output = child.wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }

    #[test]
    fn killed_and_interrupted_it_ends_with_the_same_bytes() {
        let work = Work::with_model("llama3");
        // 160 steps of `align` and 150 of `heal`.
        let tokens = "--tokens 202240";
        let reference = format!("{} --beta 0.5 {tokens}", line("default", "reference"));
        work.ok(&reference);
        let it = format!("{} --beta 0.5 {tokens}", line("default", "x"));
        let resumed = format!("{it} --resume");
        let (align, heal) =
            (work.path("x.work/align-metrics.jsonl"), work.path("x.work/healed.train/metrics.jsonl"));

        let killed = |(status, text): (ExitStatus, String)| assert_eq!(status.code(), None, "{text}");
        let interrupted = |(status, text): (ExitStatus, String)| {
            assert_eq!(status.code(), Some(130), "{text}");
            assert!(text.contains("error: interrupted") && text.contains("--resume"), "{text}");
        };
        let record = work.path("x.work/recipe.json");
        killed(stop(&work, &it, "-KILL", || record.exists()));
        killed(stop(&work, &resumed, "-KILL", || steps(&align) >= 3));
        interrupted(stop(&work, &resumed, "-INT", || steps(&align) >= 10));
        let before = work.json("x.work/recipe.json");
        assert_eq!(
            (&before["stages"][1]["stage"], &before["stages"][1]["result"]),
            (&json!("align"), &Value::Null)
        );
        killed(stop(&work, &resumed, "-KILL", || steps(&heal) >= 3));
        interrupted(stop(&work, &resumed, "-INT", || steps(&heal) >= 10));
        assert!(!work.path("x").exists());
        work.fails(1, &format!("{resumed} --precision f32").replace("0.5", "0.25"), &["hint: "]);
        work.ok(&resumed);
        assert!(steps(&align) == 160 && steps(&heal) == 150, "{} {}", steps(&align), steps(&heal));
        for (found, expected) in [
            ("x/model.safetensors", "reference/model.safetensors"),
            ("x.work/bank.safetensors", "reference.work/bank.safetensors"),
            ("x.work/plan.json", "reference.work/plan.json"),
        ] {
            assert!(work.read(found) == work.read(expected), "{found} has other bytes");
        }
        let [found, expected] = ["x", "reference"].map(|name| work.json(&format!("{name}/recipe.json")));
        assert_eq!(found["settings"], expected["settings"]);
        assert_eq!(stages(&found), stages(&expected));
        assert!(found["stages"][1]["seconds"].as_f64() > before["stages"][1]["seconds"].as_f64());
        let left: Vec<_> = work.listing().into_keys().filter(|name| name.contains(".tmp-")).collect();
        assert!(left.is_empty(), "left behind by a kill: {left:?}");
    }
}
