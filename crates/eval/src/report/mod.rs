//! One self-contained HTML page, or Markdown, from any set of result files: no network, works from `file://`, light and dark.
//! The page is a fixed template; results travel inside it as JSON and are drawn as SVG by the page's own script. Knows files and pages; measures nothing.

mod format;
mod markdown;
mod page;
mod read;
#[cfg(test)]
mod testing;

pub(crate) use format::{between, escape};
pub use format::{bytes, number};
pub use read::{QuickstartResults, Reader};

use crate::answers::Score;
use crate::compare::Estimate;
use crate::error::Result;
use crate::quality::FileQuality;
use crate::run::RunInfo;
use model::HeadPlan;
use model::plan::PlanModel;
use serde::{Deserialize, Serialize};
use std::path::Path;
use surgery::HeadsReport;

/// One model of a comparison. Absent measurements are shown as dashes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VariantRow {
    /// Short name.
    pub name: String,
    /// What it is, in a few words.
    pub description: String,
    /// KV groups converted.
    pub converted: usize,
    /// KV groups in all; 0 where that is not known.
    pub total: usize,
    /// Held-out perplexity, geometric mean over files.
    pub ppl: Option<f64>,
    /// Mean KL to the base, nats per token.
    pub kl: Option<f64>,
    /// Share of positions where the best token is the base's.
    pub top1_agreement: Option<f64>,
    /// Bytes of an f16 cache after 8192 tokens.
    pub cache_bytes_8k: Option<usize>,
    /// Line of the charts that it is a point of; absent: a point of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub series: Option<String>,
    /// Perplexity over the base's on the same tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppl_ratio: Option<Estimate>,
    /// 95 % interval of `kl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_interval: Option<(f64, f64)>,
    /// 95 % interval of `top1_agreement`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1_interval: Option<(f64, f64)>,
    /// Bytes of an f16 cache after the tokens that the comparison names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<usize>,
    /// Decode tokens per second, `(depth, rate)`.
    #[serde(default)]
    pub decode_tok_s: Vec<(usize, f64)>,
    /// Perplexity by file.
    #[serde(default)]
    pub files: Vec<FileQuality>,
}

impl VariantRow {
    /// Whether this is known to be an unconverted model.
    pub fn is_base(&self) -> bool {
        self.total > 0 && self.converted == 0
    }
}

/// Models judged on the same text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What they were judged on.
    pub title: String,
    /// How, in a sentence; may be empty.
    pub note: String,
    /// Tokens of the windows it was judged on, which the rows' `cache_bytes` are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// The models.
    pub rows: Vec<VariantRow>,
}

/// Scores of several models on one long-range task.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskTable {
    /// The task.
    pub title: String,
    /// What the tokens are that scores are by.
    pub by: TokensOf,
    /// One row per model.
    pub rows: Vec<TaskRow>,
}

/// What a task's numbers of tokens count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokensOf {
    /// Prompt and answer.
    #[default]
    Context,
    /// From what is asked for to the question.
    Distance,
}

/// One model on a task.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskRow {
    /// Name of the model.
    pub model: String,
    /// `(tokens, score)`, by tokens.
    pub scores: Vec<(usize, Score)>,
}

/// Speeds and caches measured under the same conditions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpeedTable {
    /// The conditions.
    pub title: String,
    /// One per model.
    pub series: Vec<SpeedSeries>,
}

/// One model's speed and cache against depth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpeedSeries {
    /// Name of the model.
    pub name: String,
    /// By depth.
    pub points: Vec<SpeedPoint>,
}

/// Speed and cache at one depth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpeedPoint {
    /// Tokens in the cache.
    pub depth: usize,
    /// Tokens per second from an empty cache to `depth`.
    pub prefill_tok_s: Option<f64>,
    /// Tokens per second of decoding at `depth`.
    pub decode_tok_s: Option<f64>,
    /// Cache bytes at `depth`.
    pub cache_bytes: Option<usize>,
}

/// A table of finished text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Heading of the part of the page that it stands in, together with others.
    pub section: String,
    /// Heading.
    pub title: String,
    /// A sentence below it.
    pub note: String,
    /// Column heads.
    pub columns: Vec<String>,
    /// Cells, as many in each row as columns.
    pub rows: Vec<Vec<String>>,
}

/// Head statistics of a model and plans for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadMap {
    /// Where the statistics come from.
    pub title: String,
    /// The model.
    pub model: PlanModel,
    /// Its statistics; absent where only plans were given.
    pub heads: Option<HeadsReport>,
    /// `(name, plan)`, each drawn over the map when chosen.
    pub plans: Vec<(String, HeadPlan)>,
}

/// A line of a chart; lines with the same labels share one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Name in the legend.
    pub name: String,
    /// Meaning of x.
    pub x_label: String,
    /// Meaning of y.
    pub y_label: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
    /// Steps that each point is the mean of.
    pub steps_per_point: usize,
}

/// One prompt continued by several models.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// The prompt.
    pub prompt: String,
    /// `(model name, text)`.
    pub texts: Vec<(String, String)>,
}

/// A file that the page was made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its path as it was given.
    pub path: String,
    /// What it is.
    pub kind: String,
    /// `(name, value)` of what it says of itself.
    pub facts: Vec<(String, String)>,
    /// The run that made it, where it tells.
    pub run: Option<RunInfo>,
}

/// Everything a page can show; empty parts are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// A paragraph below it.
    pub summary: String,
    /// Quality, by text.
    pub comparisons: Vec<Comparison>,
    /// Long-range tasks.
    pub tasks: Vec<TaskTable>,
    /// Speed and cache against depth, by conditions.
    pub speeds: Vec<SpeedTable>,
    /// Other tables.
    pub tables: Vec<Table>,
    /// Head maps.
    pub maps: Vec<HeadMap>,
    /// Learning curves.
    pub curves: Vec<Curve>,
    /// Generations side by side.
    pub generations: Vec<Generation>,
    /// Where everything comes from.
    pub sources: Vec<SourceFile>,
}

impl Report {
    /// Everything in `paths`, each recognised by its content; a folder stands for the result files in it.
    ///
    /// # Errors
    /// [`EvalError::File`](crate::EvalError::File) naming the file that cannot be read, is none of the known kinds, or is malformed.
    pub fn from_files<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let mut reader = Reader::default();
        for path in paths {
            reader.add(path.as_ref())?;
        }
        Ok(reader.finish())
    }

    /// Writes the page atomically.
    ///
    /// # Errors
    /// [`EvalError::Weights`](crate::EvalError::Weights) when the file cannot be written.
    pub fn write_html(&self, path: &Path) -> Result<()> {
        weights::files::atomic_write(path, self.to_html()?.as_bytes())?;
        Ok(())
    }
}
