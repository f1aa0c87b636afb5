//! `recipe.json`: what a work folder is made with, and what every stage did.

use super::Files;
use super::run::Run;
use crate::data::fingerprint;
use crate::error::{Result, TrainError};
use crate::heal::HealMetric;
use crate::state::difference;
use kernels::Exec;
use model::Model;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use weights::files::{atomic_write, read_json, remove_stale};

const VERSION: u32 = 1;

/// The content of `recipe.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Format version, 1.
    pub version: u32,
    /// The base model, as it was named.
    pub base: String,
    /// The text, as it was named.
    pub data: Vec<String>,
    /// Every setting, digests of the base's weights and of the text; equal settings give equal bits.
    pub settings: Value,
    /// The stages that ended or were interrupted, in order.
    pub stages: Vec<StageReport>,
    #[serde(skip)]
    path: PathBuf,
}

/// What a stage did, in all processes that worked on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// `analyze`, `align`, `plan`, `convert` or `heal`.
    pub stage: String,
    /// Tokens it measured or trained on, when it has ended.
    pub tokens: u64,
    /// Seconds it took; of a process that was killed inside it, none.
    pub seconds: f64,
    /// What came out; nothing while it is unfinished.
    pub result: Option<StageResult>,
}

/// What came out of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StageResult {
    /// Of `analyze`.
    Analyze {
        /// Mean over all heads.
        mean_recency_ratio_64: f64,
    },
    /// Of `align`.
    Align {
        /// Mean over all groups of the relative error on held-out text.
        mean_heldout_error: f64,
    },
    /// Of `plan`.
    Plan {
        /// How groups were chosen.
        criterion: String,
        /// KV groups to convert.
        converted: usize,
        /// KV groups in all.
        total: usize,
    },
    /// Of `heal`.
    Heal {
        /// One entry, or one for every budget of an elastic run.
        losses: Vec<Losses>,
    },
    /// Of `convert`: the checkpoint says it all.
    Convert {},
}

/// Losses of a healing run at one budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// The budget, in an elastic run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Optimiser steps.
    pub steps: usize,
    /// Loss of the first.
    pub first: f64,
    /// Loss of the last.
    pub last: f64,
}

impl Losses {
    /// Losses by ascending budget; losses at different budgets do not compare.
    pub fn of(metrics: &[HealMetric]) -> Vec<Self> {
        let mut betas: Vec<Option<f64>> = metrics.iter().map(|m| m.beta).collect();
        betas.sort_by(|a, b| a.unwrap_or(0.0).total_cmp(&b.unwrap_or(0.0)));
        betas.dedup();
        let of = |beta: Option<f64>| {
            let steps: Vec<&HealMetric> = metrics.iter().filter(|m| m.beta == beta).collect();
            let (first, last) = (steps.first()?.loss, steps.last()?.loss);
            Some(Self { beta, steps: steps.len(), first, last })
        };
        betas.into_iter().filter_map(of).collect()
    }
}

impl Record {
    /// Makes the work folder of `run` with a record in it; or, with `resume`, takes up the record there, whose settings must be the same. A folder
    /// that is missing or empty is begun with `resume` as well. `base` and `data` are names for people.
    ///
    /// # Errors
    /// Those of [`Run::check`]; [`TrainError::Argument`] for settings that differ, naming the first; [`TrainError::File`] for a folder that is in use (without `resume`) or holds something else;
    /// [`TrainError::Weights`] when the disk refuses.
    pub fn open(run: &Run<'_>, base: &str, data: &[String], resume: bool) -> Result<Self> {
        run.check()?;
        let path = Files::of(run.work).record;
        let bad = |reason: String| TrainError::File { path: run.work.to_path_buf(), reason };
        let settings = settings(run).map_err(|e| bad(e.to_string()))?;
        let io = |e: std::io::Error| bad(e.to_string());
        if !run.work.exists() || run.work.read_dir().map_err(io)?.next().is_none() {
            std::fs::create_dir_all(run.work).map_err(io)?;
            let (base, data) = (base.to_string(), data.to_vec());
            let record = Self { version: VERSION, base, data, settings, stages: Vec::new(), path };
            record.write(&record.path)?;
            return Ok(record);
        }
        if !resume {
            return Err(bad(
                "holds an interrupted run\nhint: continue it with --resume, or remove the folder".into(),
            ));
        }
        let found = read_json(&path, "recipe.json").ok().and_then(|json| serde_json::from_value(json).ok());
        let Some(found) = found.filter(|found: &Self| found.version == VERSION) else {
            return Err(bad(
                "holds no run of this version\nhint: remove the folder, or choose another output".into(),
            ));
        };
        if let Some(difference) = difference(&flat(&found.settings), &flat(&settings)) {
            return Err(TrainError::Argument(format!(
                "{} was made with {difference}\nhint: repeat the settings of the interrupted run, or remove the folder",
                run.work.display()
            )));
        }
        remove_stale(&path)?;
        Ok(Self { path, ..found })
    }

    /// Enters what a stage did in this process, on top of what it did in earlier ones, and writes the record.
    pub(super) fn enter(&mut self, report: StageReport) -> Result<()> {
        match self.stages.iter_mut().find(|s| s.stage == report.stage) {
            Some(found) => *found = StageReport { seconds: found.seconds + report.seconds, ..report },
            None => self.stages.push(report),
        }
        self.write(&self.path)
    }

    /// Writes it to `path` atomically.
    ///
    /// # Errors
    /// [`TrainError::Weights`] when the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|e| TrainError::File { path: path.to_path_buf(), reason: e.to_string() })?;
        Ok(atomic_write(path, &json)?)
    }
}

/// What may not change between an interrupted run and its continuation.
fn settings(run: &Run<'_>) -> serde_json::Result<Value> {
    let mut budget = run.budget.clone();
    if let super::Budget::Elastic(betas) = &mut budget {
        betas.sort_by(f64::total_cmp);
    }
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "budget": exact(&budget)?,
        "recipe": exact(run.recipe)?,
        "precision": format!("{:?}", run.exec.precision()),
        "base_sha256": digest(run.exec, run.base),
        "train_sha256": fingerprint(run.train),
        "heldout_sha256": fingerprint(run.heldout),
    }))
}

/// By way of text, in which an f32 has as few digits as give it back.
fn exact(value: &impl Serialize) -> serde_json::Result<Value> {
    serde_json::from_str(&serde_json::to_string(value)?)
}

/// Digest of the names and values of all parameters.
fn digest(exec: &Exec, model: &Model) -> String {
    let params: Vec<_> = model.params.iter().map(|(_, param)| param).collect();
    let digests = exec.parallel_map(params.len(), |i| {
        let mut digest = Sha256::new();
        digest.update(&params[i].name);
        params[i].data().iter().for_each(|v| digest.update(v.to_le_bytes()));
        digest.finalize()
    });
    let mut all = Sha256::new();
    digests.iter().for_each(|digest| all.update(digest));
    all.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Objects within an object as entries of the outer one: `{"a": {"b": 1}}` becomes `{"a.b": 1}`.
fn flat(value: &Value) -> Value {
    fn put(prefix: &str, value: &Value, out: &mut Map<String, Value>) {
        match value {
            Value::Object(entries) => entries.iter().for_each(|(key, value)| {
                put(&if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") }, value, out);
            }),
            other => {
                out.insert(prefix.to_string(), other.clone());
            }
        }
    }
    let mut out = Map::new();
    put("", value, &mut out);
    Value::Object(out)
}
