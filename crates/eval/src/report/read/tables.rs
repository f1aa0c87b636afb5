//! Results that are shown as plain tables: questions of the user's own, MQAR, training speed, machines.

use super::{Input, Kind, Reader, distinct};
use crate::answers::Score;
use crate::choice::ChoiceResult;
use crate::error::Result;
use crate::lastword::LastWordResult;
use crate::likelihood::Mean;
use crate::report::Table;
use crate::report::format::{bytes, count};
use crate::run::RunInfo;
use serde::Deserialize;

const QUESTIONS: &str = "Questions and last words";

/// What a model and perhaps its base got on a file of the user's.
#[derive(Deserialize)]
struct Measured<T> {
    data: String,
    results: T,
    base: Option<Base<T>>,
}

#[derive(Deserialize)]
struct Base<T> {
    results: T,
}

#[derive(Deserialize)]
struct MqarFile {
    results: Vec<MqarRow>,
    seed: u64,
}

/// One trained model, as far as it is shown; the interval is computed again.
#[derive(Deserialize)]
struct MqarRow {
    mixing: String,
    length: usize,
    pairs: usize,
    width: usize,
    parameters: usize,
    cache_bytes: usize,
    steps: usize,
    correct: usize,
    asked: usize,
    seconds: f64,
}

#[derive(Deserialize)]
struct BenchTrainFile {
    model: String,
    threads: usize,
    isa: String,
    precision: String,
    results: Vec<StepRow>,
}

#[derive(Deserialize)]
struct StepRow {
    step: String,
    sequences: usize,
    seq_len: usize,
    tokens_per_s: f64,
}

#[derive(Deserialize)]
struct DoctorFile {
    cpu: Option<String>,
    features: Vec<String>,
    available: Vec<String>,
    isa: String,
    threads: usize,
    parallel_region_microseconds: f64,
    f32_gemm_gflops: f64,
    bf16_gemm_gflops: f64,
    q8_gemm_gops: f64,
    memory_read_gigabytes_per_second: f64,
}

impl Reader {
    pub(super) fn choice(&mut self, input: &Input<'_>, run: Option<&RunInfo>) -> Result<()> {
        let file: Measured<ChoiceResult> = input.parse(Kind::Choice)?;
        let title = format!("Multiple choice, {} questions of {}", count(file.results.items), file.data);
        let measures = |r: &ChoiceResult| vec![percent(r.acc), percent(r.acc_norm), percent(r.acc_bytes)];
        let columns = ["model", "acc", "acc_norm", "acc by bytes"];
        self.questions(input, run, (title, &columns), &file, &measures);
        Ok(())
    }

    pub(super) fn lastword(&mut self, input: &Input<'_>, run: Option<&RunInfo>) -> Result<()> {
        let file: Measured<LastWordResult> = input.parse(Kind::LastWord)?;
        let title = format!("Last words, {} texts of {}", count(file.results.items), file.data);
        let measures = |r: &LastWordResult| vec![percent(r.acc), r.perplexity.to_string()];
        self.questions(input, run, (title, &["model", "acc", "perplexity"]), &file, &measures);
        Ok(())
    }

    /// Models asked the same questions stand in one table.
    fn questions<T>(
        &mut self,
        input: &Input<'_>,
        run: Option<&RunInfo>,
        (title, columns): (String, &[&str]),
        file: &Measured<T>,
        measures: &dyn Fn(&T) -> Vec<String>,
    ) {
        let (own, base) = input.names(run);
        let of_base = file.base.iter().map(|found| (base.clone(), &found.results));
        let found: Vec<(String, &T)> = of_base.chain([(own, &file.results)]).collect();
        let tables = &mut self.report.tables;
        let at = tables.iter().position(|t| t.title == title).unwrap_or_else(|| {
            tables.push(Table {
                section: QUESTIONS.into(),
                title,
                note: "Scored as lm-evaluation-harness does; means with their standard errors.".into(),
                columns: columns.iter().map(|name| name.to_string()).collect(),
                rows: Vec::new(),
            });
            tables.len() - 1
        });
        for (name, result) in found {
            let mut row: Vec<String> = std::iter::once(name).chain(measures(result)).collect();
            let rows = &mut tables[at].rows;
            if !rows.contains(&row) {
                row[0] = distinct(&row[0], input, |name| rows.iter().any(|row| row[0] == name));
                rows.push(row);
            }
        }
    }

    pub(super) fn mqar(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let file: MqarFile = input.parse(Kind::Mqar)?;
        let mut rows = Vec::with_capacity(file.results.len());
        for r in file.results {
            if r.asked == 0 || r.correct > r.asked {
                return Err(input.bad(format!("{} right answers of {}", r.correct, r.asked)));
            }
            rows.push(vec![
                r.mixing,
                count(r.length),
                count(r.pairs),
                count(r.width),
                count(r.parameters),
                Score::new(r.correct, r.asked).to_string(),
                bytes(r.cache_bytes),
                count(r.steps),
                format!("{:.0}", r.seconds),
            ]);
        }
        let columns = [
            "model",
            "tokens",
            "pairs",
            "width",
            "parameters",
            "answers (95 %)",
            "cache, f32",
            "steps",
            "seconds",
        ];
        self.report.add_table(Table {
            section: "Associative recall from scratch".into(),
            title: "MQAR".into(),
            note: "Small models trained from scratch; right answers of the test, share, and its 95 % interval (Wilson).".into(),
            columns: columns.map(String::from).into(),
            rows,
        });
        Ok(vec![("seed".into(), file.seed.to_string())])
    }

    pub(super) fn bench_train(&mut self, input: &Input<'_>) -> Result<()> {
        let file: BenchTrainFile = input.parse(Kind::BenchTrain)?;
        let row = |r: StepRow| {
            vec![r.step, format!("{} × {}", r.sequences, count(r.seq_len)), format!("{:.1}", r.tokens_per_s)]
        };
        self.report.add_table(Table {
            section: "Training speed".into(),
            title: format!("Training steps of {}", file.model),
            note: format!("{} threads, {}, {}.", file.threads, file.isa, file.precision),
            columns: ["step", "batch", "tokens/s"].map(String::from).into(),
            rows: file.results.into_iter().map(row).collect(),
        });
        Ok(())
    }

    pub(super) fn doctor(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let file: DoctorFile = input.parse(Kind::Doctor)?;
        let measured = [
            ("overhead of a parallel region", format!("{:.2} µs", file.parallel_region_microseconds)),
            ("f32 GEMM", format!("{:.0} GFLOP/s", file.f32_gemm_gflops)),
            ("bf16 GEMM", format!("{:.0} GFLOP/s", file.bf16_gemm_gflops)),
            ("8-bit GEMM", format!("{:.0} GOP/s", file.q8_gemm_gops)),
            ("memory read", format!("{:.1} GB/s", file.memory_read_gigabytes_per_second)),
        ];
        self.report.add_table(Table {
            section: "Machine".into(),
            title: file.cpu.unwrap_or_else(|| "CPU without a name".into()),
            note: format!("{} threads, {}.", file.threads, file.isa),
            columns: ["what", "measured"].map(String::from).into(),
            rows: measured.map(|(what, value)| vec![what.to_string(), value]).into(),
        });
        Ok(vec![
            ("features".into(), file.features.join(" ")),
            ("instruction sets available".into(), file.available.join(", ")),
        ])
    }
}

fn percent(mean: Mean) -> String {
    let error = mean.stderr.map_or(String::new(), |e| format!(" ± {:.1}", 100.0 * e));
    format!("{:.1}{error} %", 100.0 * mean.value)
}
