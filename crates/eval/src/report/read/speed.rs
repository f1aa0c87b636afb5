//! Speed and cache of `bench`.

use super::{Input, Kind, Reader, distinct};
use crate::bench::BenchResult;
use crate::error::Result;
use crate::report::{SpeedPoint, SpeedSeries, SpeedTable};
use crate::run::RunInfo;
use serde::Deserialize;

/// What `bench` prints.
#[derive(Deserialize)]
struct BenchFile {
    model: String,
    threads: usize,
    isa: String,
    results: Vec<BenchResult>,
    base: Option<BaseFile>,
}

#[derive(Deserialize)]
struct BaseFile {
    model: String,
    results: Vec<BenchResult>,
}

impl Reader {
    /// Measurements under the same conditions share a table.
    pub(super) fn bench(&mut self, input: &Input<'_>, run: Option<&RunInfo>) -> Result<()> {
        let file: BenchFile = input.parse(Kind::Bench)?;
        let types = run.and_then(|run| run.models.first());
        let types = types.map_or(String::new(), |m| format!(", {} weights, {} cache", m.weights, m.kv_type));
        let cpu = run.and_then(|run| run.cpu.clone()).map_or(String::new(), |cpu| format!(", {cpu}"));
        let threads = if file.threads == 1 { "1 thread".into() } else { format!("{} threads", file.threads) };
        let title = format!("{threads}, {}{cpu}{types}", file.isa);
        let name = |index: usize, given: String| {
            run.and_then(|run| run.models.get(index)).map_or(given, |model| model.name.clone())
        };
        let own = (name(0, file.model), file.results);
        let base = file.base.map(|base| (name(1, base.model), base.results));
        for (name, results) in base.into_iter().chain([own]) {
            self.report.add_speed(
                &title,
                SpeedSeries { name, points: results.iter().map(point).collect() },
                input,
            );
        }
        Ok(())
    }
}

impl crate::report::Report {
    /// Adds a line to the table of its conditions.
    pub(super) fn add_speed(&mut self, title: &str, mut series: SpeedSeries, input: &Input<'_>) {
        series.points.sort_by_key(|p| p.depth);
        let at = self.speeds.iter().position(|t| t.title == title).unwrap_or_else(|| {
            self.speeds.push(SpeedTable { title: title.into(), series: Vec::new() });
            self.speeds.len() - 1
        });
        let table = &mut self.speeds[at];
        if !table.series.contains(&series) {
            series.name = distinct(&series.name, input, |name| table.series.iter().any(|s| s.name == name));
            table.series.push(series);
        }
    }
}

/// A measurement of the file as a point.
pub(super) fn point(r: &BenchResult) -> SpeedPoint {
    SpeedPoint {
        depth: r.depth,
        prefill_tok_s: Some(r.prefill_tok_s),
        decode_tok_s: Some(r.decode_tok_s),
        cache_bytes: Some(r.cache_bytes),
    }
}
