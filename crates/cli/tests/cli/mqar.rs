//! `train-mqar`: every kind of model is trained and tested, results are kept, tables and JSON say the same.

use crate::common::{Work, without_run};
use serde_json::json;

#[test]
fn small_models_are_trained_tested_and_kept() {
    let work = Work::new();
    let line = "train-mqar --sizes 8:1,12:2 --widths 16 --head-dim 8 --vocab 64 --steps 3 --batch-tokens 64 --test-queries 20 --out mqar";
    let first = work.ok_json(&format!("{line} --json"));
    let rows = first["results"].as_array().unwrap();
    let cells: Vec<_> =
        rows.iter().map(|r| (r["mixing"].as_str().unwrap(), r["length"].as_u64().unwrap())).collect();
    let expected =
        [8, 12].into_iter().flat_map(|t| ["attention", "recurrent", "hybrid"].map(|mixing| (mixing, t)));
    assert_eq!(cells, expected.collect::<Vec<_>>());
    for row in rows {
        assert_eq!((&row["steps"], &row["asked"]), (&json!(3), &json!(20)));
        assert!(row["cache_bytes"].as_u64().unwrap() > 0 && row["low"].as_f64() <= row["high"].as_f64());
    }
    // Kept results are given back with their seconds; new runs give the same numbers.
    assert_eq!(without_run(work.ok_json(&format!("{line} --json --resume"))), without_run(first.clone()));
    let again = work.ok_json(&format!("{line}-again --json"));
    for (row, other) in rows.iter().zip(again["results"].as_array().unwrap()) {
        assert_eq!((&row["correct"], &row["train_loss"]), (&other["correct"], &other["train_loss"]));
    }
    let table = work.ok(&format!("{line} --resume"));
    assert_eq!(table.lines().count(), 7, "{table}");
    let error = work.fails(1, &format!("{line} --resume --lr 0.5"), &["`lr`", "hint:"]);
    assert!(error.contains("attention-8-1-16.json"), "{error}");
}
