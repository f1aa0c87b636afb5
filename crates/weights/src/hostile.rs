//! Entry points for untrusted bytes, shared by the fuzz targets and the mutation tests: each must return, never panic.

use crate::{ModelConfig, Tokenizer, gguf, safetensors};
use std::path::Path;

/// Largest tokenizer a fuzzed GGUF file may ask for, in tokens and in bytes of `tokenizer.json`: building one takes time in
/// its size, which is not a fault.
const MAX_TOKENS: usize = 4096;
const MAX_TOKENIZER_JSON: usize = 1 << 16;

/// Parses `bytes` as a safetensors file.
pub fn safetensors(bytes: &[u8]) {
    if let Ok((infos, _)) = safetensors::parse(bytes) {
        let total: usize = infos.iter().map(|info| info.bytes).sum();
        assert!(total <= bytes.len(), "tensors of {total} bytes in a file of {}", bytes.len());
    }
}

/// Parses `bytes` as a GGUF file and makes its configuration and tokenizer.
pub fn gguf(bytes: &[u8]) {
    let Ok(header) = gguf::parse(bytes, Path::new("fuzz.gguf")) else { return };
    for tensor in &header.tensors {
        assert!(tensor.range.end <= bytes.len(), "{tensor:?} in a file of {}", bytes.len());
    }
    if let Ok(source) = gguf::GgufSource::from_bytes(bytes.to_vec(), Path::new("fuzz.gguf")) {
        config_value(source.config_json());
    }
    let tokens = header.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.as_array().map(<[_]>::len));
    let own = header.metadata.get(gguf::own::TOKENIZER_KEY).and_then(|v| v.as_str().map(str::len));
    if tokens.is_none_or(|n| n <= MAX_TOKENS)
        && own.is_none_or(|n| n <= MAX_TOKENIZER_JSON)
        && let Ok(tokenizer) = Tokenizer::from_gguf(&header.metadata)
        && let Ok(ids) = tokenizer.encode("Hi 12 é <|end|>", true)
    {
        // Whether these ids decode depends on the vocabulary; that it returns does not.
        let _ = tokenizer.decode(&ids, false);
    }
}

/// Parses `bytes` as a `config.json`.
pub fn config_json(bytes: &[u8]) {
    if let Ok(json) = serde_json::from_slice(bytes) {
        config_value(&json);
    }
}

fn config_value(json: &serde_json::Value) {
    if let Ok(config) = ModelConfig::from_hf_json(json) {
        assert!(config.group_size() * config.kv_heads == config.heads, "{config:?}");
        assert!(config.rope_inv_freq().iter().all(|f| f.is_finite()), "{config:?}");
        let _ = config.kv_bytes_per_token(4);
    }
}
