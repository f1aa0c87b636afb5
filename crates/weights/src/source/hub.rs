//! Models of the Hugging Face hub, in the cache that other programs of the hub share.

use crate::error::{Result, WeightsError};
use crate::files::read_json;
use crate::safetensors::{INDEX_FILE, SINGLE_FILE, is_plain_file_name};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const REQUIRED: &str = "config.json";
/// Fetched when the repository has them, before the weights: a snapshot with weights is complete.
const OPTIONAL: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "head_plan.json",
    INDEX_FILE,
];

/// What the environment says about the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSettings {
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME` (default `~/.cache/huggingface`).
    pub cache: PathBuf,
    /// `HF_TOKEN`, else the file `token` in `HF_HOME`.
    pub token: Option<String>,
    /// `HF_ENDPOINT`.
    pub endpoint: Option<String>,
    /// `HF_HUB_OFFLINE`: use the cache only.
    pub offline: bool,
}

impl HubSettings {
    /// Reads the process's environment.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// [`from_env`](Self::from_env) with the environment given as a function.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| variable(name).filter(|v| !v.is_empty());
        let text = |name: &str| set(name).and_then(|v| v.into_string().ok());
        let home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache
                .or_else(|| set("HOME").or_else(|| set("USERPROFILE")).map(|h| Path::new(&h).join(".cache")));
            cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let stored = || {
            let token = std::fs::read_to_string(home.join("token")).ok()?;
            Some(token.trim().to_string()).filter(|t| !t.is_empty())
        };
        Self {
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: text("HF_TOKEN").or_else(stored),
            endpoint: text("HF_ENDPOINT"),
            offline: text("HF_HUB_OFFLINE")
                .is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")),
        }
    }
}

/// The snapshot folder of the model `id`: from the cache when it is complete there, else downloaded.
pub(super) fn fetch(id: &str, settings: &HubSettings, progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let cache = Cache::new(settings.cache.clone());
    if let Some(folder) = cached(&cache.model(id.to_string()))? {
        return Ok(folder);
    }
    let failed = |reason: String, hint: &str| WeightsError::Source {
        what: format!("`{id}` from the hub"),
        reason,
        hint: hint.to_string(),
    };
    if settings.offline {
        return Err(failed(
            format!("HF_HUB_OFFLINE is set and {} does not hold the model", settings.cache.display()),
            "unset HF_HUB_OFFLINE, or give the path of a model folder or .gguf file",
        ));
    }
    let mut builder =
        ApiBuilder::from_cache(cache).with_token(settings.token.clone()).with_progress(false).with_retries(2);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
    }
    let api = builder.build().map_err(|e| failed(e.to_string(), "check HF_ENDPOINT and HF_TOKEN"))?;
    let repo = api.model(id.to_string());
    let get = |name: &str| repo.get(name).map_err(|e| explain(id, name, &e));
    progress(&format!("fetching {id}"));
    let config = get(REQUIRED)?;
    let mut index = None;
    for name in OPTIONAL {
        let path = optional(&repo, id, name)?;
        if name == INDEX_FILE {
            index = path;
        }
    }
    let weights = match &index {
        Some(index) => shards(index)?,
        None => BTreeSet::from([SINGLE_FILE.to_string()]),
    };
    let count = weights.len();
    for (i, name) in weights.iter().enumerate() {
        progress(&format!("fetching {name} ({} of {count})", i + 1));
        get(name)?;
    }
    config
        .parent()
        .map(Path::to_path_buf)
        .ok_or_else(|| failed("the cached config.json has no folder".into(), "clear the hub's cache"))
}

/// The snapshot folder when configuration and all weights are in the cache.
fn cached(repo: &CacheRepo) -> Result<Option<PathBuf>> {
    let Some(config) = repo.get(REQUIRED) else { return Ok(None) };
    let complete = match repo.get(INDEX_FILE) {
        Some(index) => shards(&index)?.iter().all(|name| repo.get(name).is_some()),
        None => repo.get(SINGLE_FILE).is_some(),
    };
    Ok(config.parent().filter(|_| complete).map(Path::to_path_buf))
}

/// Names of the files an index lists.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    const FORMAT: &str = "safetensors index";
    let bad = |reason: &str| WeightsError::malformed(index, FORMAT, reason);
    let json = read_json(index, FORMAT)?;
    let map = json
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| bad("`weight_map` is missing or not an object"))?;
    map.values()
        .map(|v| match v.as_str() {
            Some(name) if is_plain_file_name(name) => Ok(name.to_string()),
            _ => Err(bad("a shard is not a file name inside the folder")),
        })
        .collect()
}

fn optional(repo: &ApiRepo, id: &str, name: &str) -> Result<Option<PathBuf>> {
    match repo.get(name) {
        Ok(path) => Ok(Some(path)),
        Err(error) if status(&error) == Some(404) => Ok(None),
        Err(error) => Err(explain(id, name, &error)),
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Some(*code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn explain(id: &str, name: &str, error: &ApiError) -> WeightsError {
    let hint = match status(error) {
        Some(401 | 403) => {
            "the model does not exist, is private or gated: check the id, accept its licence on the hub, and set HF_TOKEN"
        }
        Some(404) if name == SINGLE_FILE => {
            "the repository has no safetensors weights; download a .gguf file and give its path"
        }
        Some(404) => "there is no such model on the hub: check the id `owner/name`",
        Some(429) => "the hub asks to slow down: try later, or set HF_TOKEN",
        _ => {
            "check the network (HF_ENDPOINT names a mirror), or give the path of a model folder or .gguf file"
        }
    };
    WeightsError::Source {
        what: format!("`{name}` of `{id}` from the hub"),
        reason: error.to_string(),
        hint: hint.to_string(),
    }
}
