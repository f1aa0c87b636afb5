//! Every kind of file is recognised and read; wrong and damaged ones are refused by name.

mod samples;

use super::*;
use crate::answers::Score;
use crate::report::TokensOf;
use crate::report::testing::ATTACK;
use proptest::prelude::*;
use samples::*;
use serde_json::json;

/// A folder with these files, and their paths.
fn files(contents: &[(&str, String)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let write = |(name, text): &(&str, String)| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let paths = contents.iter().map(write).collect();
    (dir, paths)
}

fn every_kind() -> Vec<(&'static str, String)> {
    let json = |value: Value| value.to_string();
    vec![
        ("plan.json", json(plan())),
        ("heads.json", json(heads())),
        ("results.json", json(quickstart())),
        ("ppl.json", json(ppl_file("healed"))),
        ("kl.json", json(kl_file("hybrid"))),
        ("passkey.json", json(passkey())),
        ("hashhop.json", json(hashhop())),
        ("ruler.json", json(ruler())),
        ("induction.json", json(induction())),
        ("choice.json", json(choice())),
        ("lastword.json", json(lastword())),
        ("mqar.json", json(mqar())),
        ("compare.jsonl", compare_jsonl()),
        ("compare.json", json(compare_json())),
        ("sinks.json", json(sinks())),
        ("bench.json", json(bench("healed"))),
        ("bench-train.json", json(bench_train())),
        ("doctor.json", json(doctor())),
        ("a.json", json(generation("base", "one"))),
        ("b.json", json(generation("healed", "two"))),
        ("peers.json", json(peers())),
        ("align.jsonl", ALIGN.into()),
        ("heal.jsonl", HEAL.into()),
    ]
}

#[test]
fn every_kind_is_recognised() {
    let (_dir, paths) = files(&every_kind());
    let report = Report::from_files(&paths).unwrap();
    let kinds: Vec<&str> = report.sources.iter().map(|s| s.kind.as_str()).collect();
    let expected = [
        Kind::Plan,
        Kind::Heads,
        Kind::Quickstart,
        Kind::Quality,
        Kind::Quality,
        Kind::Passkey,
        Kind::HashHop,
        Kind::Ruler,
        Kind::Induction,
        Kind::Choice,
        Kind::LastWord,
        Kind::Mqar,
        Kind::Compare,
        Kind::Compare,
        Kind::Sinks,
        Kind::Bench,
        Kind::BenchTrain,
        Kind::Doctor,
        Kind::Generation,
        Kind::Generation,
        Kind::Peers,
        Kind::AlignMetrics,
        Kind::HealMetrics,
    ];
    assert_eq!(kinds, expected.map(Kind::name));
    assert_eq!(report.title, "RecurFormer on tiny");

    // The plan that came first lies over the statistics that came later.
    assert_eq!(report.maps.len(), 1);
    assert!(report.maps[0].heads.is_some());
    assert_eq!(report.maps[0].plans[0].1.converted(), 1);

    let titles: Vec<&str> = report.comparisons.iter().map(|c| c.title.as_str()).collect();
    assert_eq!(
        titles,
        [
            "Held-out text of book",
            "Held-out text, context 1,024",
            "Conversions, context 1,024",
            "Weight types"
        ]
    );
    // ppl and kl on the same text: one table, the base once and first, its cache from the run.
    let rows = &report.comparisons[1].rows;
    assert_eq!(rows.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["base", "healed", "hybrid"]);
    assert_eq!((rows[0].ppl, rows[0].kl, rows[0].cache_bytes_8k), (Some(19.0), Some(0.0), Some(2000)));
    assert_eq!((rows[2].kl, rows[2].cache_bytes_8k, rows[2].converted), (Some(0.2), Some(1000), 1));

    let tasks: Vec<&str> = report.tasks.iter().map(|t| t.title.as_str()).collect();
    assert_eq!(
        tasks[..5],
        ["Passkey", "HashHop, 1 hop", "HashHop, 2 hops", "RULER, niah single", "Induction, copy"]
    );
    assert_eq!(report.tasks[0].rows[0].model, "base");
    assert_eq!(report.tasks[0].rows[1].scores, [(512, Score::new(9, 12)), (1024, Score::new(3, 12))]);
    // Intervals are computed, whatever the file says.
    assert_eq!(report.tasks[1].rows[0].scores[0].1, Score::new(32, 64));

    let speeds: Vec<usize> = report.speeds.iter().map(|s| s.series.len()).collect();
    assert_eq!(speeds, [2, 2, 1]);
    assert_eq!(report.generations.len(), 1);
    let texts =
        [("base", "one"), ("healed", "two")].map(|(model, text)| (model.to_string(), text.to_string()));
    assert_eq!(report.generations[0].texts, texts);
    let table = |title: &str| report.tables.iter().find(|t| t.title == title).unwrap();
    assert_eq!(
        table("Beside llama.cpp and PyTorch").rows,
        [
            ["decode, base", "q8_0", "512", "150.0", "75.0", "–", "2.00×"],
            ["training step (full, 2 × 512)", "–", "1,024", "90.0", "–", "60.0", "1.75×"],
        ]
    );

    let curves: Vec<(&str, usize)> =
        report.curves.iter().map(|c| (c.y_label.as_str(), c.points.len())).collect();
    assert_eq!(curves.iter().filter(|c| c.0 == "heal: loss" && c.1 == 1).count(), 2, "{curves:?}");
    assert_eq!(curves.iter().filter(|c| c.0.contains("KL")).count(), 1, "{curves:?}");
    assert_eq!(report.curves[0].points, [(512.0, 0.5), (1024.0, 0.25)]);
    report.to_html().unwrap();
}

#[test]
fn both_forms_of_a_comparison_say_the_same() {
    let (_dir, paths) = files(&[("a.jsonl", compare_jsonl()), ("a.json", compare_json().to_string())]);
    let [lines, object] = [&paths[0], &paths[1]].map(|path| Report::from_files(&[path]).unwrap());
    assert_eq!((&lines.comparisons, &lines.tasks), (&object.comparisons, &object.tasks));
    let comparison = &lines.comparisons[0];
    assert_eq!((comparison.context, comparison.rows.len()), (Some(1024), 3));
    assert!(comparison.rows[0].is_base());
    let row = &comparison.rows[1];
    assert_eq!(
        (row.name.as_str(), row.series.as_deref()),
        ("window, recency, β 0.5", Some("window, recency"))
    );
    assert_eq!((row.kl, row.kl_interval, row.cache_bytes), (Some(0.2), Some((0.1, 0.4)), Some(1000)));
    assert!((row.ppl.unwrap() - 22.0).abs() < 1e-9);
    let text = comparison.table().to_markdown();
    assert!(
        text.contains("| 1.100 (1.050–1.150) | 0.2000 (0.1000–0.4000) | 90.0 % | 1000 B | 7.8 KiB |"),
        "{text}"
    );
    // Intervals of counts are computed, whatever the file says.
    let passkeys = &lines.tasks[0];
    assert_eq!(passkeys.title, "Passkey of conversions, β 0.5");
    assert_eq!(
        passkeys.rows.iter().map(|r| r.model.as_str()).collect::<Vec<_>>(),
        ["base", "window, recency", "window, kl-fisher"]
    );
    assert_eq!(passkeys.rows[1].scores, [(512, Score::new(6, 12))]);
    // Only what is printed knows how alike the criteria are.
    assert!(lines.tables.is_empty());
    assert_eq!(object.tables[0].rows[1], ["kl-fisher", "0.25", "–"]);

    let lines = compare_lines();
    refused("begun.jsonl", &lines[0].to_string(), &["not judged yet", "hint: run the same eval compare"]);
    refused(
        "twice.jsonl",
        &[&compare_jsonl(), lines[2].to_string().as_str()].concat(),
        &["line 5 is out of place"],
    );
    let mut bent = compare_json();
    bent["rank_correlation"]["rho"] = json!([[1.0]]);
    refused("bent.json", &bent.to_string(), &["not square"]);
    bent = compare_json();
    bent["base"]["passkey"][0]["correct"] = json!(13);
    refused("bent.json", &bent.to_string(), &["impossible counts"]);
}

#[test]
fn other_results_are_tables() {
    let (_dir, paths) = files(&every_kind());
    let report = Report::from_files(&paths).unwrap();
    let rows = |title: &str| &report.tables.iter().find(|t| t.title == title).unwrap().rows;
    assert_eq!(
        rows("Multiple choice, 20 questions of q.jsonl")[1],
        ["healed", "50.0 ± 10.0 %", "25.0 %", "50.0 ± 10.0 %"]
    );
    assert_eq!(rows("Last words, 20 texts of q.jsonl")[0][..2], ["base", "50.0 ± 10.0 %"]);
    assert_eq!(rows("MQAR")[0][..4], ["attention", "64", "4", "64"]);
    assert_eq!(rows("Training steps of tiny")[0], ["align", "2 × 512", "1234.6"]);
    assert_eq!(rows("CPU")[4], ["memory read", "20.0 GB/s"]);
    let positions = rows("Absorbing positions");
    assert_eq!(positions[0][..4], ["0", "\"the\"", "1/1", "50.0 %"]);
    assert_eq!(positions[0][11..], ["0.90 [0.80, 1.00]", "feature-based, mask-induced", "yes"]);
    assert_eq!(positions[1][12], "not tested");
    assert_eq!(*rows("Massive activations"), [["1", "3", "5,000", "2,500", "0, 4"]]);
    // Columns and cells agree in number everywhere.
    for table in &report.tables {
        assert!(table.rows.iter().all(|row| row.len() == table.columns.len()), "{}", table.title);
    }
    let induction = report.tasks.iter().find(|t| t.title == "Induction, copy").unwrap();
    assert_eq!(induction.by, TokensOf::Distance);
    assert_eq!(induction.rows[0].scores.iter().map(|s| s.0).collect::<Vec<_>>(), [64, 512]);
    let mut impossible = mqar();
    impossible["results"][0]["asked"] = json!(0);
    refused("mqar.json", &impossible.to_string(), &["99 right answers of 0"]);
}

#[test]
fn a_folder_stands_for_its_result_files() {
    let (dir, _) = files(&[
        ("results.json", quickstart().to_string()),
        ("heads.json", heads().to_string()),
        ("quickstart.json", "{}".into()),
    ]);
    let report = Report::from_files(&[dir.path()]).unwrap();
    assert_eq!(report.sources.len(), 2);
    let empty = tempfile::tempdir().unwrap();
    refused_path(empty.path(), &["no result file", "hint: give heads.json"]);
}

#[test]
fn the_same_file_twice_adds_nothing_but_a_source() {
    for name in [
        "ppl.json",
        "passkey.json",
        "bench.json",
        "choice.json",
        "compare.json",
        "mqar.json",
        "sinks.json",
        "doctor.json",
    ] {
        let content: Vec<_> = every_kind().into_iter().filter(|f| f.0 == name).collect();
        let (_dir, paths) = files(&content);
        let once = Report::from_files(&paths).unwrap();
        let twice = Report::from_files(&[&paths[0], &paths[0]]).unwrap();
        assert_eq!(
            (once.comparisons, once.tasks, once.speeds, once.tables),
            (twice.comparisons, twice.tasks, twice.speeds, twice.tables)
        );
        assert_eq!(twice.sources.len(), 2);
    }
}

#[test]
fn another_result_of_the_same_name_gets_a_name_of_its_own() {
    let mut other = kl_file("healed");
    other["overall"]["kl"] = json!(0.7);
    let (_dir, paths) =
        files(&[("one.json", kl_file("healed").to_string()), ("two.json", other.to_string())]);
    let rows = &Report::from_files(&paths).unwrap().comparisons[0].rows;
    assert_eq!(rows.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["base", "healed", "healed (two)"]);
}

#[test]
fn long_runs_are_drawn_as_means() {
    let line = |i: u64| format!("{{\"step\":{i},\"tokens\":{i},\"error\":{},\"layers\":[]}}\n", i % 2);
    let (_dir, paths) = files(&[("long.jsonl", (1..=2000).map(line).collect())]);
    let curve = &Report::from_files(&paths).unwrap().curves[0];
    assert_eq!((curve.points.len(), curve.steps_per_point), (1000, 2));
    assert!(curve.points.iter().all(|p| p.1 == 0.5));
    assert_eq!(curve.points[999].0, 2000.0);
}

fn refused_path(path: &Path, needles: &[&str]) {
    let error = Report::from_files(&[path]).unwrap_err().to_string();
    for needle in needles.iter().copied().chain([path.to_str().unwrap()]) {
        assert!(error.contains(needle), "`{needle}` is not in {error}");
    }
    assert!(error.contains("\nhint: "), "{error}");
    assert!(!error.replace("\nhint: ", "").contains(char::is_control), "{error:?}");
}

fn refused(name: &str, text: &str, needles: &[&str]) {
    let (_dir, paths) = files(&[(name, text.into())]);
    refused_path(&paths[0], needles);
}

/// `value` with the entry at `pointer` replaced.
fn with(mut value: Value, pointer: &str, new: Value) -> String {
    *value.pointer_mut(pointer).unwrap() = new;
    value.to_string()
}

#[test]
fn files_that_are_no_results() {
    refused("none.json", "", &["empty"]);
    refused("text.json", "hello", &["not JSON"]);
    refused("list.json", "[1, 2]", &["not a result file"]);
    refused("config.json", r#"{"model_type": "llama"}"#, &["not a result file"]);
    refused("lines.jsonl", "{\"a\": 1}\n{\"a\": 2}\n", &["not a result file"]);
    refused("deep.json", &"[".repeat(100_000), &["not JSON", "recursion"]);
    refused_path(Path::new("/nonexistent/heads.json"), &["check the path"]);
    let (_dir, paths) = files(&[("binary.json", String::new())]);
    std::fs::write(&paths[0], [0xff, 0xfe, 0x00]).unwrap();
    refused_path(&paths[0], &["UTF-8"]);
    let file = File::create(&paths[0]).unwrap();
    file.set_len(MAX_BYTES + 1).unwrap();
    refused_path(&paths[0], &["more than 64 MiB"]);
}

#[test]
fn results_that_contradict_themselves() {
    refused("h.json", &with(heads(), "/layers", json!([])), &["0 layers listed"]);
    refused("h.json", &with(heads(), "/version", json!(2)), &["version 2"]);
    refused("h.json", &with(heads(), "/layers/0/heads/0/entropy", json!("x")), &["malformed"]);
    refused("p.json", &with(plan(), "/model/layers", json!(3)), &["2 layers", "has 3"]);
    refused("p.json", &with(plan(), "/model/kv_heads", json!(0)), &["0 groups"]);
    refused("p.json", &with(plan(), "/model/heads", json!(0)), &["0 heads"]);
    refused("p.json", &with(plan(), "/model/heads", json!(1_u64 << 40)), &["heads in each group"]);
    refused("p.json", &with(plan(), "/layers/1/groups", json!([])), &["layer 1", "0 groups"]);
    refused("p.json", &with(plan(), "/version", json!(9)), &["version 9"]);
    refused("t.json", &with(passkey(), "/results/0/correct", json!(13)), &["13 right answers of 12"]);
    refused("t.json", &with(passkey(), "/results/0/samples", json!(0)), &["of 0 at 512 tokens"]);
    refused("t.json", &with(passkey(), "/results/0/correct", json!(-1)), &["malformed passkey"]);
    refused("q.json", &with(ppl_file("x"), "/overall/ppl", json!(null)), &["malformed perplexity"]);
    refused("q.json", &with(ppl_file("x"), "/run", json!(7)), &["malformed `run`"]);
    refused("b.json", &with(bench("x"), "/results/1", json!({})), &["malformed speed"]);
    refused("c.json", &with(peers(), "/settings/format", json!(7)), &["format 7"]);
    refused("c.json", &with(peers(), "/chart/models/base", json!(1)), &["malformed `chart`"]);
    let comparison = json!({"settings": {"model": {}}, "base": {}, "rows": []}).to_string();
    refused("e.json", &comparison, &["not a result file", "eval compare"]);
    refused("g.json", &with(generation("x", "y"), "/text", json!(null)), &["without text"]);
    refused("m.jsonl", &format!("{ALIGN}{{\"step\": 3}}\n"), &["line 3: not a line of metrics of align"]);
    refused("m.jsonl", &format!("{ALIGN}{}", &ALIGN[..20]), &["line 3: not JSON"]);
    refused("m.jsonl", &HEAL.replace("0.4", "\"x\""), &["line 2: `loss` is no number"]);
    // Parsers repeat what they found; a terminal does not obey it.
    let mut hostile = plan();
    hostile["\u{1b}[31m".repeat(500)] = json!(1);
    refused("p.json", &hostile.to_string(), &["unknown field"]);
}

#[test]
fn hostile_names_are_text() {
    let mut ppl = ppl_file(ATTACK);
    ppl["files"][0]["name"] = json!(ATTACK);
    ppl["run"]["command"] = json!(ATTACK);
    let mut text = generation(ATTACK, ATTACK);
    text["prompt"] = json!(ATTACK);
    let mut scores = heads();
    scores["layers"][0]["groups"][0]["scores"] = json!({ATTACK: 1.0});
    scores["layers"][0]["groups"][1]["scores"] = json!({ATTACK: 1.0});
    let (_dir, paths) =
        files(&[("q.json", ppl.to_string()), ("g.json", text.to_string()), ("h.json", scores.to_string())]);
    let page = Report::from_files(&paths).unwrap().to_html().unwrap();
    assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2));
    assert!(!page.contains("<img"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Damaged files are read or refused, never a panic; what is read can be shown.
    #[test]
    fn damaged_files_do_not_panic(which in 0..every_kind().len(), cuts in prop::collection::vec((any::<prop::sample::Index>(), 0_u8..128), 1..6)) {
        let (name, text) = every_kind().swap_remove(which);
        let mut bytes = text.into_bytes();
        for (at, byte) in cuts {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (_dir, paths) = files(&[(name, text)]);
        if let Ok(report) = Report::from_files(&paths) {
            report.to_html().unwrap();
            report.to_markdown();
        }
    }
}
