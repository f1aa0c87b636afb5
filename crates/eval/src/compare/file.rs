//! The results file: JSON lines, the settings first, then the base, then a line per finished configuration.
//! Every new line replaces the file as a whole, so that it never holds half a line.

use super::{BaseRow, Configuration, Row};
use crate::error::{EvalError, Result};
use crate::text::EvalText;
use model::plan::PlanModel;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use surgery::{HeadBank, HeadsReport};

/// Longest results file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// What all results of a file were measured with. Another value would not be comparable, so it needs another file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Sizes of the base.
    pub model: PlanModel,
    /// Type of weights and cache, as given.
    pub weights: String,
    /// SHA-256 of the windows that are judged.
    pub text_sha256: String,
    /// SHA-256 of the head statistics and scores.
    pub heads_sha256: String,
    /// SHA-256 of the head bank, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bank_sha256: Option<String>,
    /// Tokens per window of text; the depth at which baselines get the cache of a budget.
    pub context: usize,
    /// Window of the method `window`.
    pub window: usize,
    /// Its sinks.
    pub sinks: usize,
    /// Contexts of the passkey test.
    pub passkey_contexts: Vec<usize>,
    /// Prompts per context; 0: no passkey test.
    pub passkey_samples: usize,
    /// Of everything drawn: `random`'s first draw, passkeys, the bootstrap.
    pub seed: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Settings(Settings),
    Base(BaseRow),
    Row(Row),
}

/// Results on disk.
pub struct ResultsFile {
    path: PathBuf,
    settings: Settings,
    base: Option<BaseRow>,
    rows: Vec<Row>,
}

impl Settings {
    /// SHA-256 of the token ids and scored positions of all windows.
    pub fn text_sha256(texts: &[EvalText]) -> String {
        let mut hash = Sha256::new();
        for window in texts.iter().flat_map(|text| &text.windows) {
            hash.update((window.tokens.len() as u64).to_le_bytes());
            hash.update((window.score_from as u64).to_le_bytes());
            window.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
        format!("{:x}", hash.finalize())
    }

    /// SHA-256 of head statistics and scores, whichever run made them.
    pub fn heads_sha256(heads: &HeadsReport) -> String {
        let json = serde_json::to_vec(&HeadsReport { run: None, ..heads.clone() })
            .expect("statistics hold only numbers, strings and lists");
        format!("{:x}", Sha256::digest(json))
    }

    /// Of a head bank.
    pub fn bank_sha256(bank: Option<&HeadBank>) -> Option<String> {
        bank.map(HeadBank::sha256)
    }

    /// Names of the fields that differ.
    fn differences(&self, other: &Self) -> Vec<String> {
        let value = |settings: &Self| serde_json::to_value(settings).expect("settings are plain data");
        let (own, other) = (value(self), value(other));
        let names = ["model", "weights", "text_sha256", "heads_sha256", "bank_sha256", "context", "window"];
        let names = names.into_iter().chain(["sinks", "passkey_contexts", "passkey_samples", "seed"]);
        names.filter(|name| own.get(name) != other.get(name)).map(str::to_string).collect()
    }
}

/// What the lines of a results file say.
pub(crate) struct Found {
    pub settings: Settings,
    /// Absent when the comparison was interrupted before it.
    pub base: Option<BaseRow>,
    pub rows: Vec<Row>,
}

impl Found {
    /// Reads the lines; the error names the one that is wrong.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut found: Option<Self> = None;
        for (i, line) in text.lines().enumerate() {
            let parsed =
                serde_json::from_str(line).map_err(|e| format!("line {} is no result: {e}", i + 1))?;
            match (&mut found, parsed) {
                (None, Line::Settings(settings)) => {
                    found = Some(Self { settings, base: None, rows: Vec::new() });
                }
                (Some(found), Line::Base(base)) if found.base.is_none() => found.base = Some(base),
                (Some(found), Line::Row(row))
                    if found.base.is_some()
                        && found.rows.iter().all(|r| r.configuration != row.configuration) =>
                {
                    found.rows.push(row);
                }
                _ => return Err(format!("line {} is out of place", i + 1)),
            }
        }
        found.ok_or_else(|| "the file is empty".into())
    }
}

impl ResultsFile {
    /// Opens the file to go on with it, or begins it (nothing is written before the first result).
    ///
    /// # Errors
    /// [`EvalError::File`] for a file that cannot be read, holds anything else, or was made with other settings.
    pub fn open(path: &Path, settings: Settings) -> Result<Self> {
        let bad = |reason: String| EvalError::File { path: path.to_path_buf(), reason };
        let mut file = Self { path: path.to_path_buf(), settings, base: None, rows: Vec::new() };
        if !path.exists() {
            return Ok(file);
        }
        let bytes = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
        if bytes > MAX_BYTES {
            return Err(bad(format!("{bytes} bytes, at most {MAX_BYTES} are read as results")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        if text.is_empty() {
            return Ok(file);
        }
        let found = Found::parse(&text).map_err(|e| bad(format!("{e}\nhint: choose another --out")))?;
        let differences = found.settings.differences(&file.settings);
        if !differences.is_empty() {
            return Err(bad(format!(
                "made with other settings ({})\nhint: repeat them to go on, or choose another --out",
                differences.join(", ")
            )));
        }
        (file.base, file.rows) = (found.base, found.rows);
        Ok(file)
    }

    /// What the results were measured with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The base, when it was judged.
    pub fn base(&self) -> Option<&BaseRow> {
        self.base.as_ref()
    }

    /// The results of a configuration, when it was judged.
    pub fn row(&self, configuration: &Configuration) -> Option<&Row> {
        self.rows.iter().find(|row| row.configuration == *configuration)
    }

    /// Adds the base.
    pub(super) fn set_base(&mut self, base: BaseRow) -> Result<()> {
        self.base = Some(base);
        self.write()
    }

    /// Adds a configuration.
    pub(super) fn push(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        self.write()
    }

    fn write(&self) -> Result<()> {
        let lines = std::iter::once(Line::Settings(self.settings.clone()))
            .chain(self.base.iter().cloned().map(Line::Base))
            .chain(self.rows.iter().cloned().map(Line::Row));
        let mut bytes = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut bytes, &line)
                .map_err(|e| EvalError::File { path: self.path.clone(), reason: e.to_string() })?;
            bytes.push(b'\n');
        }
        weights::files::atomic_write(&self.path, &bytes)?;
        Ok(())
    }
}
