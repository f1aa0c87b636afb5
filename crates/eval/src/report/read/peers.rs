//! Results of `peers/compare.py`: medians over the rounds, the quality of weight types, speed against depth.

use super::speed::point;
use super::{Input, Kind, Reader};
use crate::bench::BenchResult;
use crate::error::Result;
use crate::quality::OverallQuality;
use crate::report::format::count;
use crate::report::{Comparison, SpeedSeries, Table, VariantRow};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// The format that is read.
const FORMAT: u32 = 1;
/// Contestants, in the order of the columns.
const CONTESTANTS: [&str; 3] = ["ours", "llama", "torch"];
/// Beside the contestants: a ratio that was measured step by step.
const RATIO: usize = CONTESTANTS.len();

#[derive(Deserialize)]
struct PeersFile {
    settings: Settings,
    rows: Option<Rows>,
    quality: Option<Types>,
    chart: Option<Chart>,
}

#[derive(Deserialize)]
struct Settings {
    format: u32,
    machine: String,
    threads: usize,
}

/// `(commit, command, load average)` of every call that measured a section.
type Calls = Vec<(String, String, f64)>;

#[derive(Deserialize)]
struct Rows {
    sources: Calls,
    rounds: Vec<BTreeMap<String, f64>>,
}

#[derive(Deserialize)]
struct Types {
    sources: Calls,
    types: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct Chart {
    sources: Calls,
    models: serde_json::Map<String, Value>,
}

impl Reader {
    pub(super) fn peers(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let file: PeersFile = input.parse(Kind::Peers)?;
        let Settings { format, machine, threads } = file.settings;
        if format != FORMAT {
            return Err(input.bad(format!("format {format} of peers/compare.py, expected {FORMAT}")));
        }
        let conditions = format!("{machine}, {threads} threads");
        let mut facts = vec![("machine".into(), machine), ("threads".into(), threads.to_string())];
        let mut calls = |calls: Calls| {
            facts.extend(calls.into_iter().map(|(commit, command, load)| {
                (format!("commit {commit}, load average {load:.1}"), command)
            }));
        };
        if let Some(rows) = file.rows {
            let rounds = rows.rounds.len();
            let table = speeds(&rows.rounds);
            if !table.is_empty() {
                let heads = ["what", "weights", "tokens", "ours", "llama.cpp", "PyTorch", "ours / best peer"];
                self.report.tables.push(Table {
                    section: "Beside other programs".into(),
                    title: "Beside llama.cpp and PyTorch".into(),
                    note: format!(
                        "Tokens per second, medians of {rounds} rounds, and the ratio of the medians (of training steps: the median ratio of \
                         neighbouring steps). {conditions}."
                    ),
                    columns: heads.map(String::from).into(),
                    rows: table,
                });
            }
            calls(rows.sources);
        }
        if let Some(quality) = file.quality {
            let rows = types(&quality.types).map_err(|e| input.bad(format!("malformed `quality`: {e}")))?;
            self.report.comparisons.push(Comparison {
                title: "Weight types".into(),
                note: format!("Beside the same model in exact f32, read as prompts are and as text is generated. {conditions}."),
                context: None,
                rows,
            });
            calls(quality.sources);
        }
        if let Some(chart) = file.chart {
            for (name, results) in &chart.models {
                let results = Vec::<BenchResult>::deserialize(results)
                    .map_err(|e| input.bad(format!("malformed `chart`: {e}")))?;
                let name = if name == "base" { name.clone() } else { format!("β {name}") };
                let points = results.iter().map(point).collect();
                self.report.add_speed(&conditions, SpeedSeries { name, points }, input);
            }
            calls(chart.sources);
        }
        Ok(facts)
    }
}

/// One row per task, weight type and length; the medians of who took part.
fn speeds(rounds: &[BTreeMap<String, f64>]) -> Vec<Vec<String>> {
    let mut metrics: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (name, &value) in rounds.iter().flatten() {
        metrics.entry(name).or_default().push(value);
    }
    // (task, model, weights, tokens) → contestant, or a ratio that was measured as such → median.
    let mut rows: BTreeMap<(String, String, String, usize), [Option<f64>; RATIO + 1]> = BTreeMap::new();
    for (name, values) in metrics {
        if let Some((column, key)) = place(name) {
            rows.entry(key).or_default()[column] = Some(median(values));
        }
    }
    let shown = |rate: Option<f64>| {
        rate.map_or("–".into(), |r| if r >= 1000.0 { count(r as usize) } else { format!("{r:.1}") })
    };
    rows.into_iter()
        .map(|((task, model, weights, tokens), rates)| {
            let [own, llama, torch, ratio] = rates;
            let peer = [llama, torch].into_iter().flatten().reduce(f64::max);
            let of_medians = own.zip(peer).filter(|(_, peer)| *peer > 0.0).map(|(own, peer)| own / peer);
            let ratio = ratio.or(of_medians);
            let what = if model.is_empty() { task } else { format!("{task}, {model}") };
            let mut cells = vec![what, weights, count(tokens)];
            cells.extend([own, llama, torch].map(shown));
            cells.push(ratio.map_or("–".into(), |r| format!("{r:.2}×")));
            cells
        })
        .collect()
}

/// Column and row of a metric `RUN:METRIC` that is a speed, by the names of peers/runs.py.
fn place(metric: &str) -> Option<(usize, (String, String, String, usize))> {
    let (run, measure) = metric.rsplit_once(':')?;
    let parts: Vec<&str> = run.split('/').collect();
    let column = |who: &str| CONTESTANTS.iter().position(|c| *c == who);
    let model = |name: &str| if name == "base" { "base".to_string() } else { format!("hybrid β {name}") };
    let (column, task, model, weights, tokens) = match (&parts[..], measure) {
        (["ours", name, weights, depth], "prefill" | "decode") => {
            (column("ours")?, measure, model(name), *weights, *depth)
        }
        ([who @ "llama", task, weights, depth], "speed") => {
            (column(who)?, *task, model("base"), *weights, *depth)
        }
        ([who @ "torch", task, depth], "speed") => (column(who)?, *task, model("base"), "bf16", *depth),
        (["train", step, shape], measure @ ("ours" | "torch" | "ratio")) => {
            let tokens: usize = shape
                .split('x')
                .map(|n| n.parse().ok())
                .try_fold(1_usize, |product, n: Option<usize>| product.checked_mul(n?))?;
            let task = format!("training step ({step}, {})", shape.replace('x', " × "));
            return Some((column(measure).unwrap_or(RATIO), (task, String::new(), "–".into(), tokens)));
        }
        _ => return None,
    };
    Some((column, (task.to_string(), model, weights.to_string(), tokens.parse().ok()?)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// One row per weight type and path.
fn types(types: &serde_json::Map<String, Value>) -> serde_json::Result<Vec<VariantRow>> {
    let row = |name: String, value: &Value| -> serde_json::Result<VariantRow> {
        let overall = OverallQuality::deserialize(value)?;
        Ok(VariantRow {
            name,
            ppl: Some(overall.ppl),
            kl: overall.kl,
            top1_agreement: overall.top1_agreement,
            ..VariantRow::default()
        })
    };
    let mut rows = Vec::new();
    for (kind, value) in types {
        match value.as_object().filter(|_| value.get("ppl").is_none()) {
            Some(paths) => {
                for (path, value) in paths {
                    rows.push(row(format!("{kind}, {path}"), value)?);
                }
            }
            None => rows.push(row(kind.clone(), value)?),
        }
    }
    Ok(rows)
}
