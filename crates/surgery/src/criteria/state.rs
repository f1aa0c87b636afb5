//! Measurements of many passes that survive an interruption: a small file beside the statistics, written whole after every part.

use super::Inputs;
use super::needle::prompts_sha256;
use crate::error::{Result, SurgeryError};
use crate::stats::tokens_sha256;
use model::Model;
use model::plan::PlanModel;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use weights::files::{atomic_write, read_json};

/// The format version written and accepted.
const VERSION: u32 = 1;

/// Values of every parameter that tell models of the same shape apart.
const SAMPLED_VALUES: usize = 64;

/// Where criteria of many passes keep what they have measured so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct States {
    /// The `heads.json` to be written; a criterion's state lies beside it as `<heads.json>.<criterion>.state`.
    pub heads: PathBuf,
    /// Whether to go on from states that lie there; without one, a measurement starts at the beginning.
    pub resume: bool,
}

impl States {
    /// The state file of a criterion.
    pub fn path(&self, criterion: &str) -> PathBuf {
        let mut name = OsString::from(self.heads.as_os_str());
        name.push(format!(".{criterion}.state"));
        name.into()
    }

    /// Removes the states of all criteria, once the statistics are written.
    ///
    /// # Errors
    /// [`SurgeryError::File`] when one cannot be removed.
    pub fn remove(&self) -> Result<()> {
        for name in super::NAMES {
            let path = self.path(name);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(SurgeryError::File { path, reason: format!("cannot be removed: {e}") });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    /// SHA-256 of what is measured on what.
    key: String,
    /// Parts measured.
    done: usize,
    /// Sums or whatever goes on from there.
    values: Vec<f64>,
}

/// A measurement in parts.
pub struct Saved {
    path: Option<PathBuf>,
    key: String,
    /// Parts measured.
    pub done: usize,
    /// What they left.
    pub values: Vec<f64>,
}

impl Saved {
    /// The measurement of `criterion` with `settings` as far as it is on disk, else `initial`.
    ///
    /// # Errors
    /// [`SurgeryError::Weights`] or [`SurgeryError::File`] for a state that cannot be read, is malformed, or is of other data, another model or
    /// other settings.
    pub fn open(
        inputs: &Inputs<'_>,
        criterion: &str,
        settings: &str,
        parts: usize,
        initial: Vec<f64>,
    ) -> Result<Self> {
        let key = key(inputs, criterion, settings);
        let path = inputs.states.map(|states| states.path(criterion));
        let mut saved = Self { path, key, done: 0, values: initial };
        let Some(path) =
            saved.path.as_ref().filter(|path| inputs.states.is_some_and(|s| s.resume) && path.exists())
        else {
            return Ok(saved);
        };
        let content = read(path)?;
        let bad = |reason: &str| {
            let reason = format!("{reason}\nhint: remove the file, or analyze without resuming");
            Err(SurgeryError::File { path: path.clone(), reason })
        };
        if content.key != saved.key {
            return bad("this state is of another model, other data or other settings");
        }
        if content.values.len() != saved.values.len() || content.done > parts {
            return bad("this state has another size than this measurement");
        }
        (saved.done, saved.values) = (content.done, content.values);
        Ok(saved)
    }

    /// Counts `parts` more as measured and writes the state.
    ///
    /// # Errors
    /// [`SurgeryError::Weights`] when the file cannot be written.
    pub fn advance(&mut self, parts: usize) -> Result<()> {
        self.done += parts;
        let Some(path) = &self.path else { return Ok(()) };
        let content =
            Content { version: VERSION, key: self.key.clone(), done: self.done, values: self.values.clone() };
        let json = serde_json::to_vec(&content)
            .map_err(|e| SurgeryError::File { path: path.clone(), reason: e.to_string() })?;
        Ok(atomic_write(path, &json)?)
    }
}

fn read(path: &Path) -> Result<Content> {
    let bad = |reason: String| SurgeryError::File { path: path.to_path_buf(), reason };
    let content: Content = serde_json::from_value(read_json(path, "criterion state")?).map_err(|e| {
        bad(format!("malformed state: {e}\nhint: remove the file, or analyze without resuming"))
    })?;
    if content.version != VERSION {
        return Err(bad(format!("state has version {}, expected {VERSION}", content.version)));
    }
    Ok(content)
}

fn key(inputs: &Inputs<'_>, criterion: &str, settings: &str) -> String {
    let mut hash = Sha256::new();
    let lengths: Vec<usize> = inputs.sequences.iter().map(Vec::len).collect();
    let facts = [
        criterion.to_string(),
        settings.to_string(),
        PlanModel::of(&inputs.model.config).to_string(),
        inputs.seed.to_string(),
        format!("{lengths:?}"),
        tokens_sha256(inputs.sequences),
        prompts_sha256(inputs.prompts),
    ];
    for fact in facts {
        hash.update(fact);
        hash.update([0]);
    }
    hash_weights(&mut hash, inputs.model);
    format!("{:x}", hash.finalize())
}

fn hash_weights(hash: &mut Sha256, model: &Model) {
    for (_, param) in model.params.iter() {
        param.data().iter().take(SAMPLED_VALUES).for_each(|x| hash.update(x.to_le_bytes()));
    }
}
