//! GGUF tokenizer metadata → `tokenizer.json` and `tokenizer_config.json`.
//! Pre-tokenizers are those of the original tokenizers (llama.cpp `llama-vocab.cpp`, transformers); unknown ones are refused.

use crate::config::unsupported;
use crate::error::{Result, WeightsError};
use crate::gguf::own::{TOKENIZER_CONFIG_KEY, TOKENIZER_KEY};
use crate::gguf::{Metadata, Value as Meta};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// llama.cpp's token types.
pub(super) mod kind {
    pub const NORMAL: u64 = 1;
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

pub(super) const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's own `default`, applied one after the other.
pub(super) const DEFAULT_SPLITS: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];
const NO_TOKENIZER: &str = "the file carries no tokenizer (`tokenizer.ggml.model`)";
/// How SentencePiece writes a space.
pub(super) const SPACE: &str = "\u{2581}";

fn bad(reason: impl Into<String>) -> WeightsError {
    WeightsError::Tokenizer(format!("GGUF metadata: {}", reason.into()))
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<u64>,
}

impl Vocabulary<'_> {
    fn token(&self, metadata: &Metadata, name: &str) -> Result<Option<(u32, &str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(value) = metadata.get(&key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        match id.and_then(|id| Some((id, *self.tokens.get(id as usize)?))) {
            Some(found) => Ok(Some(found)),
            // Writers store -1 (as unsigned) for "none".
            None if value.as_u64() == Some(u64::from(u32::MAX)) => Ok(None),
            None => Err(bad(format!("`{key}` is {value:?}, expected an id below {}", self.tokens.len()))),
        }
    }

    fn to_json(&self) -> Value {
        Value::Object(
            self.tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect(),
        )
    }

    fn added(&self) -> Vec<Value> {
        let added = |kind| matches!(kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN);
        self.tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (token, kind))| added(**kind) && !token.is_empty())
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != kind::USER_DEFINED,
                })
            })
            .collect()
    }
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Result<Option<Vec<&'a str>>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    value
        .as_array()
        .and_then(|list| list.iter().map(Meta::as_str).collect::<Option<Vec<_>>>())
        .map(Some)
        .ok_or_else(|| bad(format!("`{key}` is not an array of strings")))
}

fn vocabulary(metadata: &Metadata) -> Result<Vocabulary<'_>> {
    let tokens = strings(metadata, "tokenizer.ggml.tokens")?
        .filter(|tokens| !tokens.is_empty())
        .ok_or_else(|| bad("`tokenizer.ggml.tokens` is missing or empty"))?;
    let kinds = match metadata.get("tokenizer.ggml.token_type") {
        None => vec![kind::NORMAL; tokens.len()],
        Some(value) => value
            .as_array()
            .and_then(|list| list.iter().map(Meta::as_u64).collect::<Option<Vec<_>>>())
            .filter(|kinds| kinds.len() == tokens.len())
            .ok_or_else(|| {
                bad(format!("`tokenizer.ggml.token_type` is not an array of {} types", tokens.len()))
            })?,
    };
    Ok(Vocabulary { tokens, kinds })
}

/// The text of `tokenizer.json` and the content of `tokenizer_config.json` that this project put into a file.
pub(super) fn own(metadata: &Metadata) -> Result<Option<(Vec<u8>, Value)>> {
    let text = |key: &str| {
        let Some(value) = metadata.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| bad(format!("`{key}` is not a text")))
    };
    let Some(json) = text(TOKENIZER_KEY)? else { return Ok(None) };
    let config = match text(TOKENIZER_CONFIG_KEY)? {
        None => json!({}),
        Some(config) => serde_json::from_str(config)
            .ok()
            .filter(Value::is_object)
            .ok_or_else(|| bad(format!("`{TOKENIZER_CONFIG_KEY}` is not a JSON object")))?,
    };
    Ok(Some((json.as_bytes().to_vec(), config)))
}

/// `tokenizer.json` and `tokenizer_config.json` of the tokenizer that `metadata` describes.
pub(super) fn convert(metadata: &Metadata) -> Result<(Value, Value)> {
    let model = metadata.get("tokenizer.ggml.model").and_then(Meta::as_str).unwrap_or("none");
    if matches!(model, "none" | "no_vocab") {
        return Err(bad(NO_TOKENIZER));
    }
    let vocab = vocabulary(metadata)?;
    let (mut json, bos_by_default) = match model {
        "gpt2" => byte_level(metadata, &vocab)?,
        "llama" => (sentence_piece(metadata, &vocab)?, true),
        other => {
            return Err(unsupported(format!(
                "GGUF tokenizer model `{other}`; supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
            )));
        }
    };
    let flag = |key: &str, default: bool| match metadata.get(key) {
        None => Ok(default),
        Some(v) => v.as_bool().ok_or_else(|| bad(format!("`{key}` is {v:?}, expected a boolean"))),
    };
    let (bos, eos) = (vocab.token(metadata, "bos")?, vocab.token(metadata, "eos")?);
    let add_bos = flag("tokenizer.ggml.add_bos_token", bos_by_default)?;
    let add_eos = flag("tokenizer.ggml.add_eos_token", false)?;
    json["version"] = "1.0".into();
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    json["added_tokens"] = vocab.added().into();
    json["post_processor"] = post_processor(bos.filter(|_| add_bos), eos.filter(|_| add_eos));
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("add_bos_token".into(), add_bos.into());
    config.insert("add_eos_token".into(), add_eos.into());
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")] {
        if let Some((_, token)) = vocab.token(metadata, key)? {
            config.insert(format!("{name}_token"), token.into());
        }
    }
    if let Some(template) = metadata.get("tokenizer.chat_template").and_then(Meta::as_str) {
        config.insert("chat_template".into(), template.into());
    }
    Ok((json, Value::Object(config)))
}

fn post_processor(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let special =
        |(_, token): (u32, &str), type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let template = |parts: &[(&str, u32)]| -> Vec<Value> {
        parts
            .iter()
            .flat_map(|&(id, type_id)| {
                let parts = [
                    bos.map(|t| special(t, type_id)),
                    Some(sequence(id, type_id)),
                    eos.map(|t| special(t, type_id)),
                ];
                parts.into_iter().flatten()
            })
            .collect()
    };
    let tokens: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, token)| (token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": template(&[("A", 0)]),
        "pair": template(&[("A", 0), ("B", 1)]),
        "special_tokens": tokens,
    })
}

/// Byte-level BPE; also tells whether a BOS is added when the file does not say.
fn byte_level(metadata: &Metadata, vocab: &Vocabulary) -> Result<(Value, bool)> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
    let pre = metadata.get("tokenizer.ggml.pre").and_then(Meta::as_str).unwrap_or("default");
    let (pre_tokenizer, normalizer, whole_words_first, bos) = match pre {
        "smollm" => (
            sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]),
            Value::Null,
            false,
            false,
        ),
        "gpt-2" => (bytes(true), Value::Null, false, false),
        "llama-bpe" => (sequence(vec![split(LLAMA3_SPLIT), bytes(false)]), Value::Null, true, true),
        "qwen2" => (sequence(vec![split(QWEN2_SPLIT), bytes(false)]), json!({"type": "NFC"}), false, false),
        "default" => {
            let mut parts: Vec<Value> = DEFAULT_SPLITS.into_iter().map(split).collect();
            parts.push(bytes(false));
            (sequence(parts), Value::Null, false, false)
        }
        other => {
            return Err(unsupported(format!(
                "GGUF pre-tokenizer `{other}`; supported are smollm, llama-bpe, qwen2, gpt-2 and default"
            )));
        }
    };
    let merges = strings(metadata, "tokenizer.ggml.merges")?
        .ok_or_else(|| bad("`tokenizer.ggml.merges` is missing"))?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok(json!([left, right])),
            _ => Err(bad(format!("the merge `{merge}` is not two tokens"))),
        })
        .collect::<Result<Vec<_>>>()?;
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_words_first,
        "vocab": vocab.to_json(), "merges": merges,
    });
    let json = json!({
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": model,
    });
    Ok((json, bos))
}

/// SentencePiece BPE with byte fallback, as the tokenizer.json of Llama 2: spaces become `▁`, one is put in front.
fn sentence_piece(metadata: &Metadata, vocab: &Vocabulary) -> Result<Value> {
    let scores = metadata
        .get("tokenizer.ggml.scores")
        .and_then(Meta::as_array)
        .and_then(|list| list.iter().map(Meta::as_f64).collect::<Option<Vec<_>>>())
        .filter(|scores| scores.len() == vocab.tokens.len() && scores.iter().all(|s| s.is_finite()))
        .ok_or_else(|| {
            bad(format!("`tokenizer.ggml.scores` is not an array of {} numbers", vocab.tokens.len()))
        })?;
    let unknown = vocab
        .token(metadata, "unknown")?
        .map(|(_, token)| token)
        .or_else(|| vocab.kinds.iter().position(|&kind| kind == kind::UNKNOWN).map(|id| vocab.tokens[id]));
    let byte_fallback = vocab.kinds.contains(&kind::BYTE);
    let prefix = match metadata.get("tokenizer.ggml.add_space_prefix") {
        None => true,
        Some(v) => v.as_bool().ok_or_else(|| bad(format!("`tokenizer.ggml.add_space_prefix` is {v:?}")))?,
    };
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": byte_fallback, "ignore_merges": false,
            "vocab": vocab.to_json(), "merges": merges_by_score(vocab, &scores),
        },
    }))
}

/// The merges that a scored vocabulary implies (transformers' `generate_merges`): every way to cut a piece into two
/// pieces, best score first.
fn merges_by_score(vocab: &Vocabulary, scores: &[f64]) -> Vec<Value> {
    let pieces: HashMap<&str, usize> = vocab
        .tokens
        .iter()
        .enumerate()
        .filter(|&(id, _)| matches!(vocab.kinds[id], kind::NORMAL | kind::UNUSED))
        .map(|(id, token)| (*token, id))
        .collect();
    let mut merges = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        if pieces.get(token) != Some(&id) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (pieces.get(left), pieces.get(right)) {
                merges.push((scores[id], l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    merges.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect()
}
