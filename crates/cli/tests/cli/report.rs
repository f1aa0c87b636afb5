//! `report` on what the other commands really write, and the `run` object of their JSON outputs.

use crate::common::Work;
use serde_json::Value;

/// A hybrid and one result file of every command.
fn measured() -> Work {
    let work = Work::with_text_model("llama3");
    work.make_hybrid("llama3", "mamba2", 8);
    work.ok(
        "heal --model hybrid --base llama3 --data data.npy --tokens 192 --context 32 --batch 2 --out healed",
    );
    for (file, line) in [
        ("ppl.json", "eval ppl --model hybrid --base llama3 --data data.npy --context 64 --max-tokens 256"),
        ("kl.json", "eval kl --model healed --base llama3 --data data.npy --context 64 --max-tokens 256"),
        ("passkey.json", "eval passkey --model hybrid --base llama3 --contexts 200,240 --samples 1 --seed 3"),
        (
            "hashhop.json",
            "eval hashhop --model hybrid --base llama3 --hops 1 --contexts 200 --hash-length 3 --samples 2",
        ),
        ("bench.json", "bench --model hybrid --base llama3 --depths 16,32 --decode-steps 1"),
        ("base.json", "generate --model llama3 --tokens 5,9,33 --max-tokens 4"),
        ("text.json", "generate --model hybrid --tokens 5,9,33 --max-tokens 4 --seed 7"),
    ] {
        work.write(file, work.ok(&format!("{line} --json")).as_bytes());
    }
    work
}

const FILES: &str = "heads.json plan.json healed healed.train/metrics.jsonl ppl.json kl.json passkey.json hashhop.json bench.json base.json text.json";

#[test]
fn every_result_is_shown() {
    let work = measured();
    let markdown = work.ok(&format!("report {FILES} --out report.html --md --title Everything"));
    for part in [
        "### Held-out text, context 64",
        "| llama3 | 0/4 |",
        "| hybrid | 2/4 |",
        "| healed | 2/4 |",
        "### Passkey",
        "### HashHop, 1 hop",
        "### Speed and cache: ",
        "    recurformer eval kl --model healed --base llama3",
    ] {
        assert!(markdown.contains(part), "`{part}` is not in\n{markdown}");
    }
    // The base stands once, though two files judged it.
    assert_eq!(markdown.matches("| llama3 | 0/4 |").count(), 1, "{markdown}");
    let page = String::from_utf8(work.read("report.html")).unwrap();
    assert!(page.contains("<title>Everything</title>"));
    let start = page.find("application/json\">").unwrap() + "application/json\">".len();
    let data: Value = serde_json::from_str(page[start..].split("</script").next().unwrap()).unwrap();
    let count = |part: &str| data[part].as_array().unwrap().len();
    assert_eq!((count("maps"), count("comparisons"), count("tasks"), count("speeds")), (1, 1, 2, 1));
    assert_eq!((count("curves"), count("generations"), count("sources")), (2, 1, 11));
    assert_eq!(data["maps"][0]["plans"].as_array().unwrap().len(), 2);
    assert_eq!(data["generations"][0]["texts"].as_array().unwrap().len(), 2);

    // The page of analyze is made by the same code.
    work.ok("analyze --model llama3 --data data.npy --tokens 64 --context 32 --out h.json --html h.html");
    let page = String::from_utf8(work.read("h.html")).unwrap();
    assert!(page.contains("Heads of llama3") && page.contains("recurformer analyze --model llama3"));
}

#[test]
fn results_say_what_made_them() {
    let work = measured();
    for (file, models, seeds) in [
        ("ppl.json", &["hybrid", "llama3"][..], None),
        ("passkey.json", &["hybrid", "llama3"], Some(3)),
        ("bench.json", &["hybrid", "llama3"], Some(0)),
        ("text.json", &["hybrid"], Some(7)),
    ] {
        let run = &work.json(file)["run"];
        let names: Vec<&str> =
            run["models"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
        assert_eq!(names, models, "{run}");
        assert_eq!(run["seeds"].get(0).and_then(Value::as_u64), seeds, "{run}");
        assert!(run["command"].as_str().unwrap().starts_with("recurformer "), "{run}");
        assert!(run["command"].as_str().unwrap().ends_with(" --json"), "{run}");
        assert_eq!(run["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(run["date"].as_str().unwrap().len(), "2026-11-26T16:39:21Z".len());
        assert!(run["threads"].as_u64().unwrap() > 0 && run["isa"].is_string(), "{run}");
    }
    let cache =
        |index: usize| work.json("ppl.json")["run"]["models"][index]["cache_bytes_8k"].as_u64().unwrap();
    assert!(cache(0) < cache(1));
}

#[test]
fn files_that_are_no_results() {
    let work = Work::with_model("llama3");
    work.write("notes.json", b"{\"a\": 1}");
    work.write("broken.json", b"{\"a\": ");
    work.fails(
        1,
        "report notes.json --out r.html",
        &["notes.json", "not a result file", "hint: give heads.json"],
    );
    work.fails(1, "report broken.json --md", &["broken.json", "not JSON"]);
    work.fails(1, "report llama3 --md", &["llama3", "no result file in this folder"]);
    work.fails(1, "report missing.json --md", &["missing.json", "hint: check the path"]);
    work.fails(1, "report notes.json --out missing/r.html", &["missing", "create it first"]);
    work.fails(2, "report notes.json", &["--out"]);
    work.fails(2, "report --md", &["FILE"]);
}
