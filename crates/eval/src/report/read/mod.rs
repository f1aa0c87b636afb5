//! Result files, recognised by their content. Files are hostile until checked: sizes are bounded, counts must agree, nothing is sized by a number in a file.

mod compare;
mod heads;
mod metrics;
mod peers;
mod quality;
mod sinks;
mod speed;
mod tables;
mod tasks;
#[cfg(test)]
mod tests;

pub use quality::QuickstartResults;

use super::{Report, SourceFile, Table};
use crate::error::{EvalError, Result};
use crate::run::RunInfo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use surgery::SurgeryError;

/// Largest file that is read, far above any that the commands write.
const MAX_BYTES: u64 = 64 << 20;
/// Longest reason in a message: parsers repeat what they found.
const MAX_REASON: usize = 300;
/// Result files that a folder may hold, by the names that the commands' examples give them.
const IN_FOLDERS: [&str; 9] = [
    "results.json",
    "heads.json",
    "plan.json",
    "head_plan.json",
    "align-metrics.jsonl",
    "healed.train/metrics.jsonl",
    "metrics.jsonl",
    "compare.jsonl",
    "sinks.json",
];
const KNOWN: &str = "give heads.json, plan.json, head_plan.json, sinks.json, quickstart's results.json, metrics of align or heal and \
    results of eval compare (.jsonl), what eval, bench, generate, train-mqar, bench-train or doctor print with --json, or the results of peers/compare.py; \
    or a folder with some of them";

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Heads,
    Plan,
    Quickstart,
    Quality,
    Passkey,
    HashHop,
    Ruler,
    Induction,
    Choice,
    LastWord,
    Mqar,
    Compare,
    Sinks,
    Bench,
    BenchTrain,
    Doctor,
    Generation,
    Peers,
    AlignMetrics,
    HealMetrics,
}

impl Kind {
    /// For people.
    fn name(self) -> &'static str {
        match self {
            Self::Heads => "head statistics (analyze)",
            Self::Plan => "head plan",
            Self::Quickstart => "quickstart results",
            Self::Quality => "perplexity and KL (eval)",
            Self::Passkey => "passkey (eval)",
            Self::HashHop => "HashHop (eval)",
            Self::Ruler => "RULER (eval)",
            Self::Induction => "induction (eval)",
            Self::Choice => "multiple choice (eval)",
            Self::LastWord => "last words (eval)",
            Self::Mqar => "MQAR (train-mqar)",
            Self::Compare => "conversions compared (eval compare)",
            Self::Sinks => "attention sinks (sinks)",
            Self::Bench => "speed (bench)",
            Self::BenchTrain => "speed of training (bench-train)",
            Self::Doctor => "a machine (doctor)",
            Self::Generation => "text (generate)",
            Self::Peers => "comparison with peers",
            Self::AlignMetrics => "metrics of align",
            Self::HealMetrics => "metrics of heal",
        }
    }

    /// By the fields that only this kind has.
    fn of(value: &Value) -> Option<Self> {
        let has = |keys: &[&str]| keys.iter().all(|key| value.get(key).is_some());
        let first = |list: &str, key: &str| value[list].get(0).is_some_and(|item| item.get(key).is_some());
        let row = |key: &str| first("results", key);
        let result = |key: &str| value["results"].get(key).is_some();
        Some(match value {
            _ if has(&["data_sha256", "layers", "config"]) => Self::Heads,
            _ if has(&["model", "beta"]) && first("layers", "groups") => Self::Plan,
            _ if has(&["generations"]) && first("models", "converted") => Self::Quickstart,
            _ if has(&["files", "overall"]) => Self::Quality,
            _ if value["settings"].get("text_sha256").is_some() => Self::Compare,
            _ if has(&["sinks", "activations", "no_op_heads"]) => Self::Sinks,
            _ if row("distance") && row("task") => Self::Induction,
            _ if row("mixing") && row("pairs") => Self::Mqar,
            _ if row("step") && row("tokens_per_s") => Self::BenchTrain,
            _ if result("acc") && result("acc_norm") => Self::Choice,
            _ if result("acc") && result("perplexity") => Self::LastWord,
            _ if has(&["features", "memory_read_gigabytes_per_second"]) => Self::Doctor,
            _ if row("context") && row("hops") => Self::HashHop,
            _ if row("context") && row("task") => Self::Ruler,
            _ if row("context") && row("samples") => Self::Passkey,
            _ if row("depth") && row("decode_tok_s") => Self::Bench,
            _ if has(&["text", "prompt_tokens", "finish"]) => Self::Generation,
            _ if value["settings"].get("format").is_some()
                && (has(&["rows"]) || has(&["quality"]) || has(&["chart"])) =>
            {
                Self::Peers
            }
            _ if has(&["step", "tokens", "error", "layers"]) => Self::AlignMetrics,
            _ if has(&["step", "tokens", "loss", "ce"]) => Self::HealMetrics,
            _ => return None,
        })
    }
}

/// Gathers files into a [`Report`].
#[derive(Default)]
pub struct Reader {
    report: Report,
}

/// One file while it is read.
struct Input<'a> {
    path: &'a Path,
    value: Value,
}

impl Input<'_> {
    /// An error about this file, without control characters.
    fn bad(&self, reason: impl Into<String>) -> EvalError {
        bad(self.path, &reason.into())
    }

    /// An error of surgery's own reading of this file.
    fn unreadable(&self, error: SurgeryError) -> EvalError {
        match error {
            SurgeryError::File { reason, .. } => self.bad(reason),
            other => self.bad(other.to_string()),
        }
    }

    /// The whole file as a `T`.
    fn parse<T: DeserializeOwned>(&self, kind: Kind) -> Result<T> {
        T::deserialize(&self.value).map_err(|e| self.bad(format!("malformed {}: {e}", kind.name())))
    }

    /// Its `run` object, if it has one.
    fn run(&self) -> Result<Option<RunInfo>> {
        let Some(run) = self.value.get("run").filter(|run| !run.is_null()) else { return Ok(None) };
        serde::Deserialize::deserialize(run).map(Some).map_err(|e| self.bad(format!("malformed `run`: {e}")))
    }

    /// Its name without extension.
    fn stem(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Names of the measured model and its base: as the run names them, else the file's own name.
    fn names(&self, run: Option<&RunInfo>) -> (String, String) {
        let name = |index: usize| run.and_then(|run| run.models.get(index)).map(|model| model.name.clone());
        let own = name(0).unwrap_or_else(|| self.stem());
        let base = name(1).unwrap_or_else(|| format!("base of {}", self.stem()));
        (own, base)
    }
}

fn bad(path: &Path, reason: &str) -> EvalError {
    let (text, hint) = reason.split_once("\nhint: ").unwrap_or((reason, "make it again, or leave it out"));
    let text: String =
        text.chars().take(MAX_REASON).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect();
    EvalError::File { path: path.into(), reason: format!("{text}\nhint: {hint}") }
}

impl Reader {
    /// Adds a file, or the result files of a folder.
    ///
    /// # Errors
    /// [`EvalError::File`] naming the file; the report then lacks some or all of it.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        if path.is_dir() {
            let found: Vec<PathBuf> =
                IN_FOLDERS.iter().map(|name| path.join(name)).filter(|p| p.is_file()).collect();
            if found.is_empty() {
                return Err(bad(path, &format!("no result file in this folder\nhint: {KNOWN}")));
            }
            return found.iter().try_for_each(|path| self.add_file(path));
        }
        self.add_file(path)
    }

    /// The report, with a general title if no file gave one.
    pub fn finish(mut self) -> Report {
        if self.report.title.is_empty() {
            self.report.title = match &self.report.maps[..] {
                [map] if self.report.sources.len() == 1 => format!("Heads of a {} model", map.model),
                _ => "RecurFormer results".into(),
            };
        }
        self.report
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let text = read(path)?;
        let unknown = || bad(path, &format!("not a result file that a report can show\nhint: {KNOWN}"));
        // A file of lines is JSON only when it has one line.
        let (value, whole) = match serde_json::from_str::<Value>(&text) {
            Ok(value) => (value, true),
            Err(error) => match metrics::first_line(&text) {
                Some(first) => (first, false),
                None => return Err(bad(path, &format!("not JSON: {error}\nhint: {KNOWN}"))),
            },
        };
        let kind = Kind::of(&value).ok_or_else(unknown)?;
        let has_lines = matches!(kind, Kind::AlignMetrics | Kind::HealMetrics | Kind::Compare);
        if !whole && !has_lines {
            return Err(unknown());
        }
        let input = Input { path, value };
        let run = input.run()?;
        let mut facts = Vec::new();
        match kind {
            Kind::Heads => facts = self.heads(&input)?,
            Kind::Plan => facts = self.plan(&input)?,
            Kind::Quickstart => self.quickstart(&input)?,
            Kind::Quality => self.quality(&input, run.as_ref())?,
            Kind::Passkey | Kind::HashHop | Kind::Ruler | Kind::Induction => {
                self.task(&input, kind, run.as_ref())?;
            }
            Kind::Choice => self.choice(&input, run.as_ref())?,
            Kind::LastWord => self.lastword(&input, run.as_ref())?,
            Kind::Mqar => facts = self.mqar(&input)?,
            Kind::Compare => facts = self.compare(&input, &text)?,
            Kind::Sinks => facts = self.sinks(&input)?,
            Kind::Bench => self.bench(&input, run.as_ref())?,
            Kind::BenchTrain => self.bench_train(&input)?,
            Kind::Doctor => facts = self.doctor(&input)?,
            Kind::Generation => self.generation(&input, run.as_ref())?,
            Kind::Peers => facts = self.peers(&input)?,
            Kind::AlignMetrics | Kind::HealMetrics => facts = self.metrics(&input, &text, kind)?,
        }
        let path = path.display().to_string();
        self.report.sources.push(SourceFile { path, kind: kind.name().into(), facts, run });
        Ok(())
    }
}

/// The file's text, bounded before it is read.
fn read(path: &Path) -> Result<String> {
    let failed = |e: std::io::Error| bad(path, &format!("{e}\nhint: check the path and its permissions"));
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut text)).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(bad(path, &format!("more than {} MiB\nhint: {KNOWN}", MAX_BYTES >> 20)));
    }
    let text = String::from_utf8(text).map_err(|_| bad(path, &format!("not UTF-8 text\nhint: {KNOWN}")))?;
    if text.trim().is_empty() {
        return Err(bad(path, &format!("the file is empty\nhint: {KNOWN}")));
    }
    Ok(text)
}

impl Report {
    /// Adds a table, unless it is there already.
    pub(super) fn add_table(&mut self, table: Table) {
        if !self.tables.contains(&table) {
            self.tables.push(table);
        }
    }
}

/// `name`, or with the file's name behind it when `taken`.
fn distinct(name: &str, input: &Input<'_>, taken: impl Fn(&str) -> bool) -> String {
    if !taken(name) {
        return name.into();
    }
    let named = format!("{name} ({})", input.stem());
    if !taken(&named) {
        return named;
    }
    format!("{name} ({})", input.path.display())
}
