//! `quickstart` on a tiny model: it ends with a table and a report, goes on where it stopped, and refuses other options.

use crate::common::{Work, some_text};
use serde_json::Value;

const OPTIONS: &str = "--align-tokens 1024 --heal-tokens 1024 --eval-tokens 256 --analyze-tokens 512";

#[test]
fn a_small_model_and_text() {
    let work = Work::with_text_model("llama3");
    work.write("text.txt", some_text(250).as_bytes());
    let line = format!("quickstart --model llama3 --data text.txt --beta 0.5 --out qs {OPTIONS}");
    let table = work.ok(&line);
    for name in ["base", "paper", "window only", "random groups", "ours, healed"] {
        assert!(table.contains(name), "{name} is not in\n{table}");
    }
    for file in
        ["heads.json", "bank.safetensors", "plan.json", "hybrid/head_plan.json", "healed/model.safetensors"]
    {
        assert!(work.path("qs").join(file).exists(), "{file}");
    }
    let html = String::from_utf8(work.read("qs/report.html")).unwrap();
    assert!(html.contains("</html>") && html.contains("ours, healed"));
    let results = work.json("qs/results.json");
    check(&results["models"]);
    assert_eq!(results["run"]["models"].as_array().unwrap().len(), 6);
    assert_eq!(results["generations"].as_array().unwrap().len(), 2);
    // The report command makes the same page of the folder.
    work.ok("report qs --out again.html");
    assert!(work.read("again.html") == work.read("qs/report.html"));

    // Once more: everything is found; what does not depend on time comes out the same.
    let healed = work.read("qs/healed/model.safetensors");
    let output = crate::common::succeed(work.command(&line).output().unwrap(), &line);
    for found in ["found heads.json", "found bank.safetensors", "found hybrid", "found healed"] {
        assert!(output.stderr.contains(found), "{found} is not in\n{}", output.stderr);
    }
    assert!(work.read("qs/healed/model.safetensors") == healed);
    let again = work.json("qs/results.json");
    let rows = |results: &Value| results["models"].as_array().unwrap().clone();
    for (a, b) in rows(&results).iter().zip(&rows(&again)) {
        for field in ["name", "ppl", "kl", "cache_bytes_8k"] {
            assert_eq!(a[field], b[field]);
        }
    }

    work.fails(1, &line.replace("--beta 0.5", "--beta 0.25"), &["qs", "other options", "hint:"]);
    work.fails(1, &format!("{line} --seed 3"), &["other options"]);
}

fn check(results: &Value) {
    let rows = results.as_array().unwrap();
    assert!(rows.len() >= 5);
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let (base, ours) = (row("base"), row("ours, healed"));
    assert_eq!(base["kl"], 0.0);
    for row in rows {
        assert!(row["ppl"].as_f64().unwrap() > 1.0, "{row}");
        // A model of the same structure as another is not timed again.
        let timed = row["decode_tok_s"].as_array().unwrap().len();
        assert!(
            timed == 2 || (timed == 0 && row["name"] != "base" && row["name"] != "ours, healed"),
            "{row}"
        );
    }
    assert_eq!((&base["converted"], &ours["converted"], &ours["total"]), (&0.into(), &2.into(), &4.into()));
    let bytes = |row: &Value| row["cache_bytes_8k"].as_u64().unwrap();
    assert!(bytes(ours) < bytes(base));
}

#[test]
fn the_models_own_text_where_there_is_none() {
    let work = Work::with_text_model("llama3");
    let line = format!("quickstart --model llama3 --beta 0.5 --out qs {OPTIONS}");
    let output = work.command(&line).env("PATH", "/nonexistent").output().unwrap();
    let run = crate::common::succeed(output, &line);
    assert!(run.stderr.contains("using `self`"), "{}", run.stderr);
    assert!(run.stdout.contains("ours, healed"));
}
