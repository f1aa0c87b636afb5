//! What training leaves on disk while it runs: one safetensors file with its position in the metadata, and a log of JSON lines.
//! Knows atomic files; knows nothing of what the tensors mean.

use crate::error::{Result, TrainError};
use half::bf16;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use weights::files::atomic_write;
use weights::safetensors::{Metadata, OutTensor, SafetensorsWriter, read_all};
use weights::tensors::Dtype;

/// Metadata key of the JSON that goes with the tensors.
const KEY: &str = "recurformer_training";

/// A tensor to be saved: name, shape, values.
pub type StateTensor<'a> = (String, Vec<usize>, StateValues<'a>);

/// Values of a tensor, saved in the type they have.
#[derive(Clone, Copy, Debug)]
pub enum StateValues<'a> {
    /// In f32.
    F32(&'a [f32]),
    /// In bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for StateValues<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for StateValues<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Self::Bf16(values)
    }
}

/// A state read back.
#[derive(Debug)]
pub struct SavedState<T> {
    /// The JSON part.
    pub info: T,
    path: PathBuf,
    tensors: HashMap<String, Vec<f32>>,
}

/// Writes `info` and `tensors` to `path` atomically.
///
/// # Errors
/// [`TrainError::Weights`] when the disk refuses.
pub fn save_state<T: Serialize>(path: &Path, info: &T, tensors: &[StateTensor<'_>]) -> Result<()> {
    let json = serde_json::to_string(info).map_err(|e| file_error(path, e.to_string()))?;
    let metadata = Metadata::from([(KEY.to_string(), json)]);
    let announced: Vec<OutTensor> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let dtype = match values {
                StateValues::F32(_) => Dtype::F32,
                StateValues::Bf16(_) => Dtype::BF16,
            };
            OutTensor { name: name.clone(), dtype, shape: shape.clone() }
        })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &announced, &metadata)?;
    for (name, _, values) in tensors {
        match values {
            StateValues::F32(values) => writer.write_f32(name, values)?,
            StateValues::Bf16(values) => writer.write_bf16(name, values)?,
        }
    }
    Ok(writer.finish()?)
}

/// Reads a state; `None` when there is no file.
///
/// # Errors
/// [`TrainError::File`] when the file is not a training state, [`TrainError::Weights`] when it is damaged.
pub fn load_state<T: DeserializeOwned>(path: &Path) -> Result<Option<SavedState<T>>> {
    if !path.exists() {
        return Ok(None);
    }
    let (tensors, metadata) = read_all(path)?;
    let json = metadata.get(KEY).ok_or_else(|| file_error(path, "is no training state".into()))?;
    let info = serde_json::from_str(json)
        .map_err(|e| file_error(path, format!("is a training state of another version or stage: {e}")))?;
    let tensors = tensors.into_iter().map(|t| (t.name, t.values)).collect();
    Ok(Some(SavedState { info, path: path.to_path_buf(), tensors }))
}

impl<T> SavedState<T> {
    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Copies the tensor `name` into `target`.
    ///
    /// # Errors
    /// [`TrainError::File`] when it is missing or has another size.
    pub fn copy_into(&self, name: &str, target: &mut [f32]) -> Result<()> {
        target.copy_from_slice(self.found(name, target.len())?);
        Ok(())
    }

    /// Copies the tensor `name`, saved in bfloat16, into `target`.
    ///
    /// # Errors
    /// As [`copy_into`](Self::copy_into).
    pub fn copy_into_bf16(&self, name: &str, target: &mut [bf16]) -> Result<()> {
        let found = self.found(name, target.len())?;
        target.iter_mut().zip(found).for_each(|(to, &from)| *to = bf16::from_f32(from));
        Ok(())
    }

    fn found(&self, name: &str, len: usize) -> Result<&[f32]> {
        let found = self
            .tensors
            .get(name)
            .ok_or_else(|| file_error(&self.path, format!("tensor `{name}` is missing")))?;
        if found.len() != len {
            let reason = format!("tensor `{name}` has {} values, expected {len}", found.len());
            return Err(file_error(&self.path, reason));
        }
        Ok(found)
    }
}

fn file_error(path: &Path, reason: String) -> TrainError {
    TrainError::File { path: path.to_path_buf(), reason }
}

/// `path` with `suffix` appended to its file name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

/// Keeps the token ids of a batch that broke training, for a look at it.
///
/// # Errors
/// [`TrainError::Weights`] when the disk refuses.
pub fn save_offending_batch(path: &Path, step: u64, sequences: &[&[u32]]) -> Result<()> {
    let json = serde_json::json!({"step": step, "sequences": sequences});
    Ok(atomic_write(path, json.to_string().as_bytes())?)
}

/// Compares the settings a state was made with to those of this run.
///
/// # Errors
/// [`TrainError::Argument`] naming the first setting that differs, with both values.
pub fn check_same_settings(path: &Path, saved: &serde_json::Value, now: &serde_json::Value) -> Result<()> {
    match difference(saved, now) {
        None => Ok(()),
        Some(difference) => Err(TrainError::Argument(format!(
            "{} was made with {difference}\nhint: repeat the settings of the interrupted run, or start anew without --resume",
            path.display()
        ))),
    }
}

/// The first entry in which two objects of settings differ, in words: "`name` before, this run has now".
pub fn difference(saved: &serde_json::Value, now: &serde_json::Value) -> Option<String> {
    let empty = serde_json::Map::new();
    let (saved, now) = (saved.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let key = now.keys().chain(saved.keys()).find(|key| saved.get(*key) != now.get(*key))?;
    let show = |v: Option<&serde_json::Value>| v.map_or("nothing".into(), ToString::to_string);
    Some(format!("`{key}` {}, this run has {}", show(saved.get(key)), show(now.get(key))))
}

/// A JSON-lines log, one line per step.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log, keeping the lines of steps up to `step` (read from each line's `step` field) and dropping the rest: what was logged
    /// after the state was saved is about to be done again. Returns the kept lines.
    ///
    /// # Errors
    /// [`TrainError::File`], [`TrainError::Weights`] when the disk refuses.
    pub fn open(path: &Path, step: u64) -> Result<(Self, Vec<serde_json::Value>)> {
        let io = |e: std::io::Error| file_error(path, e.to_string());
        let old = match step > 0 && path.exists() {
            true => std::fs::read_to_string(path).map_err(io)?,
            false => String::new(),
        };
        // A line torn by a kill does not parse; it is later than the state.
        let kept: Vec<serde_json::Value> = old
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|line| line["step"].as_u64().is_some_and(|s| s <= step))
            .collect();
        let text: String = kept.iter().map(|line| format!("{line}\n")).collect();
        atomic_write(path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok((Self { path: path.to_path_buf(), file }, kept))
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`TrainError::File`] when the disk refuses.
    pub fn push<T: Serialize>(&mut self, line: &T) -> Result<()> {
        let mut text = serde_json::to_string(line).map_err(|e| file_error(&self.path, e.to_string()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|e| file_error(&self.path, e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reopened_log_forgets_what_came_after_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let (mut log, kept) = MetricsLog::open(&path, 0).unwrap();
        assert!(kept.is_empty());
        for step in 1..=5_u64 {
            log.push(&serde_json::json!({"step": step})).unwrap();
        }
        log.file.write_all(b"{\"step\": 6, \"lo").unwrap();
        let (mut log, kept) = MetricsLog::open(&path, 3).unwrap();
        assert_eq!(kept.len(), 3);
        log.push(&serde_json::json!({"step": 4})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4);
        let (_, kept) = MetricsLog::open(&path, 0).unwrap();
        assert!(kept.is_empty());
    }

    #[test]
    fn states_round_trip_and_refuse_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.state");
        assert!(load_state::<u64>(&path).unwrap().is_none());
        let halves = [1.5, -0.25].map(bf16::from_f32);
        let tensors = [
            ("a".into(), vec![2], [1.0, 2.0].as_slice().into()),
            ("b".into(), vec![0], StateValues::F32(&[])),
            ("c".into(), vec![2], halves.as_slice().into()),
        ];
        save_state(&path, &7_u64, &tensors).unwrap();
        let state = load_state::<u64>(&path).unwrap().unwrap();
        assert_eq!(state.info, 7);
        let mut a = [0.0; 2];
        state.copy_into("a", &mut a).unwrap();
        assert_eq!(a, [1.0, 2.0]);
        assert!(state.copy_into("a", &mut [0.0; 3]).unwrap_err().to_string().contains("expected 3"));
        let mut c = [bf16::ZERO; 2];
        state.copy_into_bf16("c", &mut c).unwrap();
        assert_eq!(c, halves);
        assert!(state.copy_into("d", &mut []).unwrap_err().to_string().contains("missing"));
        assert!(load_state::<Vec<u64>>(&path).is_err());
        std::fs::write(&path, b"short").unwrap();
        assert!(load_state::<u64>(&path).is_err());
    }

    #[test]
    fn changed_settings_are_named() {
        let (a, b) =
            (serde_json::json!({"tokens": 5, "seed": 1}), serde_json::json!({"tokens": 6, "seed": 1}));
        assert!(check_same_settings(Path::new("s"), &a, &a).is_ok());
        let error = check_same_settings(Path::new("s"), &a, &b).unwrap_err().to_string();
        assert!(error.contains("`tokens` 5") && error.contains("has 6"), "{error}");
    }
}
