//! This project's own metadata keys: what a GGUF file needs beyond llama.cpp's to give back a checkpoint exactly.
//! A hybrid's file has the architecture [`ARCHITECTURE`], and its tensors have Hugging Face names and row order.

use super::reader::{Metadata, Value};
use crate::config::unsupported;
use crate::error::{Result, WeightsError};
use std::path::Path;

/// `general.architecture` of a hybrid; no other program computes it.
pub const ARCHITECTURE: &str = "recurformer";
/// Version of these keys.
pub const VERSION_KEY: &str = "recurformer.version";
/// Text of `config.json`.
pub const CONFIG_KEY: &str = "recurformer.config";
/// Text of `head_plan.json`; hybrids only.
pub const PLAN_KEY: &str = "recurformer.head_plan";
/// Text of `tokenizer.json`.
pub const TOKENIZER_KEY: &str = "recurformer.tokenizer";
/// Text of `tokenizer_config.json`, the chat template in it.
pub const TOKENIZER_CONFIG_KEY: &str = "recurformer.tokenizer_config";
/// The version written and read.
pub const VERSION: u32 = 1;

/// Whether the metadata are a hybrid's.
pub fn is_hybrid(metadata: &Metadata) -> bool {
    metadata.get("general.architecture").and_then(Value::as_str) == Some(ARCHITECTURE)
}

/// Refuses a file of a later version of these keys. A file without any of them passes.
pub fn check_version(metadata: &Metadata, path: &Path) -> Result<()> {
    match metadata.get(VERSION_KEY) {
        None if is_hybrid(metadata) => {
            Err(WeightsError::malformed(path, "GGUF", format!("`{VERSION_KEY}` is missing")))
        }
        None => Ok(()),
        Some(value) if value.as_u64() == Some(u64::from(VERSION)) => Ok(()),
        Some(Value::Unsigned(version)) => Err(unsupported(format!(
            "`{VERSION_KEY}` {version} in {}; supported is {VERSION}",
            path.display()
        ))),
        Some(other) => Err(WeightsError::malformed(
            path,
            "GGUF",
            format!("`{VERSION_KEY}` is {other:?}, expected a version number"),
        )),
    }
}

/// The text of `key`, when it is there.
pub fn text<'a>(metadata: &'a Metadata, key: &str, path: &Path) -> Result<Option<&'a str>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    value
        .as_str()
        .map(Some)
        .ok_or_else(|| WeightsError::malformed(path, "GGUF", format!("`{key}` is not a text")))
}

/// The JSON object in the text of `key`, when it is there.
pub fn json(metadata: &Metadata, key: &str, path: &Path) -> Result<Option<serde_json::Value>> {
    let Some(text) = text(metadata, key, path)? else { return Ok(None) };
    let bad = |reason: String| WeightsError::malformed(path, "GGUF", format!("`{key}`: {reason}"));
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    if value.is_object() { Ok(Some(value)) } else { Err(bad("expected a JSON object".to_string())) }
}
