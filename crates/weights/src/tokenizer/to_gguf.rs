//! `tokenizer.json` → GGUF metadata: the text as it is, and for the kinds that `from_gguf` reads also llama.cpp's form.

use super::from_gguf::{DEFAULT_SPLITS, LLAMA3_SPLIT, QWEN2_SPLIT, SPACE, kind};
use super::{Tokenizer, failed};
use crate::error::Result;
use crate::gguf::MetadataBuilder;
use crate::gguf::own::{TOKENIZER_CONFIG_KEY, TOKENIZER_KEY};
use serde_json::Value;
use std::collections::{HashMap, HashSet};

pub(super) fn write_own(tokenizer: &Tokenizer, out: &mut MetadataBuilder) -> Result<()> {
    out.text(TOKENIZER_KEY, std::str::from_utf8(&tokenizer.json).map_err(failed)?);
    out.text(TOKENIZER_CONFIG_KEY, &tokenizer.config.to_string());
    Ok(())
}

/// What llama.cpp calls a tokenizer.
enum Kind {
    /// Byte-level BPE with this pre-tokenizer (`tokenizer.ggml.pre`).
    ByteLevel(&'static str),
    /// SentencePiece BPE.
    SentencePiece { space_prefix: bool },
}

/// Writes llama.cpp's metadata; `false`, and nothing written, when it has no such tokenizer.
pub(super) fn describe(tokenizer: &Tokenizer, vocab: usize, out: &mut MetadataBuilder) -> Result<bool> {
    let json: Value = serde_json::from_slice(&tokenizer.json).map_err(failed)?;
    let known = kind_of(&json).and_then(|kind| Some((kind, tokens(&json, vocab)?, merges(&json)?)));
    let Some((kind, tokens, merges)) = known else { return Ok(false) };
    match kind {
        Kind::ByteLevel(pre) => {
            // A merge is written as two tokens with a space between, which byte-level tokens never hold.
            if merges.iter().any(|(left, right)| left.contains(' ') || right.contains(' ')) {
                return Ok(false);
            }
            out.text("tokenizer.ggml.model", "gpt2");
            out.text("tokenizer.ggml.pre", pre);
            let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
            out.texts("tokenizer.ggml.merges", &merges);
        }
        Kind::SentencePiece { space_prefix } => {
            out.text("tokenizer.ggml.model", "llama");
            out.text("tokenizer.ggml.pre", "default");
            out.f32s("tokenizer.ggml.scores", &scores(&tokens, &merges));
            out.bool("tokenizer.ggml.add_space_prefix", space_prefix);
        }
    }
    let (texts, kinds): (Vec<String>, Vec<i32>) = tokens.into_iter().unzip();
    out.texts("tokenizer.ggml.tokens", &texts);
    out.i32s("tokenizer.ggml.token_type", &kinds);
    let (bos, eos) = (tokenizer.bos_id(), tokenizer.eos_id());
    let unknown = tokenizer.special("unk_token").and_then(|token| tokenizer.token_id(token));
    let padding = tokenizer.special("pad_token").and_then(|token| tokenizer.token_id(token));
    for (name, id) in [("bos", bos), ("eos", eos), ("unknown", unknown), ("padding", padding)] {
        if let Some(id) = id {
            out.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    let (first, last) = frame(&json);
    let adds = |token: Option<&str>, id: Option<u32>| token.is_some_and(|t| tokenizer.token_id(t) == id);
    out.bool("tokenizer.ggml.add_bos_token", bos.is_some() && adds(first, bos));
    out.bool("tokenizer.ggml.add_eos_token", eos.is_some() && adds(last, eos));
    if let Some(template) = tokenizer.chat_template() {
        out.text("tokenizer.chat_template", template);
    }
    Ok(true)
}

fn is(value: &Value, kind: &str) -> bool {
    value["type"].as_str() == Some(kind)
}

/// The parts of a `Sequence` under `key`, or the one part itself.
fn parts<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    match value {
        Value::Null => &[],
        _ if is(value, "Sequence") => value[key].as_array().map_or(&[], Vec::as_slice),
        _ => std::slice::from_ref(value),
    }
}

fn kind_of(json: &Value) -> Option<Kind> {
    let model = &json["model"];
    let flag = |key: &str| model[key].as_bool().unwrap_or(false);
    if !is(model, "BPE") || !model["continuing_subword_prefix"].as_str().unwrap_or("").is_empty() {
        return None;
    }
    let normalizers = parts(&json["normalizer"], "normalizers");
    let pre = parts(&json["pre_tokenizer"], "pretokenizers");
    if flag("byte_fallback") {
        let replaces = |n: &Value| {
            is(n, "Replace")
                && n["pattern"]["String"].as_str() == Some(" ")
                && n["content"].as_str() == Some(SPACE)
        };
        let prepends = |n: &Value| is(n, "Prepend") && n["prepend"].as_str() == Some(SPACE);
        return match normalizers {
            [prepend, replace] if pre.is_empty() && prepends(prepend) && replaces(replace) => {
                Some(Kind::SentencePiece { space_prefix: true })
            }
            [replace] if pre.is_empty() && replaces(replace) => {
                Some(Kind::SentencePiece { space_prefix: false })
            }
            _ => None,
        };
    }
    let (bytes, splits) = pre.split_last()?;
    if !is(bytes, "ByteLevel") || bytes["add_prefix_space"].as_bool() != Some(false) {
        return None;
    }
    let own_regex = bytes["use_regex"].as_bool().unwrap_or(true);
    let regex = |split: &Value| -> Option<String> {
        let plain = is(split, "Split")
            && split["behavior"].as_str() == Some("Isolated")
            && split["invert"].as_bool() == Some(false);
        plain.then(|| split["pattern"]["Regex"].as_str().map(str::to_string)).flatten()
    };
    let regexes: Option<Vec<String>> = splits.iter().map(regex).collect();
    let regexes: Option<Vec<&str>> = regexes.as_ref().map(|r| r.iter().map(String::as_str).collect());
    let digits = |d: &Value| is(d, "Digits") && d["individual_digits"].as_bool() == Some(true);
    let name = match (splits, regexes.as_deref(), own_regex) {
        ([], _, true) => "gpt-2",
        ([one], _, true) if digits(one) => "smollm",
        (_, Some([LLAMA3_SPLIT]), false) => "llama-bpe",
        (_, Some([QWEN2_SPLIT]), false) => "qwen2",
        (_, Some(splits), false) if splits == DEFAULT_SPLITS => "default",
        _ => return None,
    };
    let nfc = matches!(normalizers, [one] if is(one, "NFC"));
    let fits = nfc == (name == "qwen2")
        && (nfc || normalizers.is_empty())
        && flag("ignore_merges") == (name == "llama-bpe");
    fits.then_some(Kind::ByteLevel(name))
}

/// `vocab` tokens with llama.cpp's types; `None` when ids are beyond that or used twice.
fn tokens(json: &Value, vocab: usize) -> Option<Vec<(String, i32)>> {
    let mut tokens: Vec<Option<(String, u64)>> = vec![None; vocab];
    let unknown = json["model"]["unk_token"].as_str();
    let byte_fallback = json["model"]["byte_fallback"].as_bool() == Some(true);
    for (text, id) in json["model"]["vocab"].as_object()? {
        let slot = tokens.get_mut(usize::try_from(id.as_u64()?).ok()?)?;
        let kind = if unknown == Some(text) {
            kind::UNKNOWN
        } else if byte_fallback && is_byte(text) {
            kind::BYTE
        } else {
            kind::NORMAL
        };
        if slot.replace((text.clone(), kind)).is_some() {
            return None;
        }
    }
    for added in json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice) {
        let slot = tokens.get_mut(usize::try_from(added["id"].as_u64()?).ok()?)?;
        let text = added["content"].as_str()?;
        let kind = match slot {
            Some((_, kind::UNKNOWN)) => kind::UNKNOWN,
            _ if added["special"].as_bool() == Some(true) => kind::CONTROL,
            _ => kind::USER_DEFINED,
        };
        *slot = Some((text.to_string(), kind));
    }
    let mut seen = HashSet::new();
    let mut filled = Vec::with_capacity(vocab);
    for (id, token) in tokens.into_iter().enumerate() {
        let (text, kind) = token.unwrap_or_else(|| (format!("[PAD{id}]"), kind::UNUSED));
        if !seen.insert(text.clone()) {
            return None;
        }
        filled.push((text, kind as i32));
    }
    Some(filled)
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The merges, written as pairs or as texts with a space between.
fn merges(json: &Value) -> Option<Vec<(String, String)>> {
    let one = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(l, r)| (l.to_string(), r.to_string())),
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => Some((left.as_str()?.to_string(), right.as_str()?.to_string())),
            _ => None,
        },
        _ => None,
    };
    json["model"]["merges"].as_array()?.iter().map(one).collect()
}

/// Scores that put the merges in their order: minus the rank of the first merge that makes the token. A `tokenizer.json`
/// does not keep SentencePiece's own scores.
fn scores(tokens: &[(String, i32)], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    tokens.iter().map(|(text, _)| -(ranks.get(text).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// The special tokens that the template puts before and after a text.
fn frame(json: &Value) -> (Option<&str>, Option<&str>) {
    let template = parts(&json["post_processor"], "processors").iter().find(|p| is(p, "TemplateProcessing"));
    let Some(single) = template.and_then(|t| t["single"].as_array()) else { return (None, None) };
    (
        single.first().and_then(|p| p["SpecialToken"]["id"].as_str()),
        single.last().and_then(|p| p["SpecialToken"]["id"].as_str()),
    )
}
