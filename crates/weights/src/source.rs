//! Where models come from: a folder, a GGUF file, a hub id, a built-in name.

use crate::{ModelConfig, TensorSource, Tokenizer, error::Result};
use std::path::{Path, PathBuf};

/// A parsed model argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// Folder in Hugging Face layout.
    Directory(PathBuf),
    /// GGUF file.
    Gguf(PathBuf),
    /// Hub id `owner/name`.
    Hub(String),
    /// Built-in name (`smollm2-135m`).
    Builtin(String),
}

impl ModelSource {
    /// Decides what `arg` names: an existing path, a built-in name, then a hub id.
    pub fn parse(arg: &str) -> Result<Self> {
        let _ = arg;
        todo!()
    }
    /// Makes the files present locally (downloads when needed) and returns the folder or file. `progress` gets short messages.
    pub fn fetch(&self, progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
        let _ = progress;
        todo!()
    }
    /// [`fetch`](Self::fetch), then opens what came.
    pub fn open(&self, progress: &mut dyn FnMut(&str)) -> Result<Checkpoint> {
        Checkpoint::open(&self.fetch(progress)?)
    }
}

/// An opened checkpoint: configuration, tensors, tokenizer, and the hybrid's plan when there is one.
pub struct Checkpoint {
    /// Folder or file it came from.
    pub path: PathBuf,
    /// Normalised configuration.
    pub config: ModelConfig,
    /// The `config.json` as it was read (made up from metadata for GGUF), for writing converted checkpoints.
    pub config_json: serde_json::Value,
    /// All tensors.
    pub tensors: Box<dyn TensorSource>,
    /// Content of `head_plan.json` when the folder holds a hybrid.
    pub plan_json: Option<serde_json::Value>,
}

impl Checkpoint {
    /// Opens a Hugging Face folder or a GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let _ = path;
        todo!()
    }
    /// Loads the tokenizer (an error when the checkpoint carries none).
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        todo!()
    }
}
