//! GGUF metadata → a `config.json` in Hugging Face form, read back by the one parser of configurations.

use super::reader::{GgufTensor, Metadata, Value};
use crate::config::{Family, RopeScaling, unsupported};
use crate::error::{Result, WeightsError};
use serde_json::json;
use std::path::Path;

/// Relative agreement between `rope_freqs.weight` (stored in f32) and the llama3 scaling found for it.
const ROPE_FACTOR_TOLERANCE: f64 = 1e-4;
/// The llama3 scaling of every released model apart from its factor: low and high frequency factors, original context.
const LLAMA3_USUAL: (f64, f64, f64) = (1.0, 4.0, 8192.0);

struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'a str,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    fn bad(&self, reason: String) -> WeightsError {
        WeightsError::malformed(self.path, "GGUF", reason)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&format!("{}.{key}", self.arch))
    }

    /// A number, or an array of one repeated number (some writers store per-layer values).
    fn uint(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let name = format!("{}.{key}", self.arch);
        let one = |v: &Value| {
            v.as_u64().ok_or_else(|| self.bad(format!("`{name}` is {v:?}, expected a non-negative integer")))
        };
        match value {
            Value::Array(list) => {
                let first =
                    one(list.first().ok_or_else(|| self.bad(format!("`{name}` is an empty array")))?)?;
                for v in list {
                    if one(v)? != first {
                        return Err(unsupported(format!("`{name}` that differs by layer")));
                    }
                }
                Ok(Some(first))
            }
            v => one(v).map(Some),
        }
    }

    fn required(&self, key: &str) -> Result<u64> {
        self.uint(key)?.ok_or_else(|| self.bad(format!("the metadata key `{}.{key}` is missing", self.arch)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|v| {
                v.as_f64()
                    .ok_or_else(|| self.bad(format!("`{}.{key}` is {v:?}, expected a number", self.arch)))
            })
            .transpose()
    }
}

/// The family of `general.architecture`.
pub(super) fn family(metadata: &Metadata, path: &Path) -> Result<Family> {
    let arch = metadata
        .get("general.architecture")
        .and_then(Value::as_str)
        .ok_or_else(|| WeightsError::malformed(path, "GGUF", "`general.architecture` is missing"))?;
    match arch {
        "llama" => Ok(Family::Llama),
        "qwen2" => Ok(Family::Qwen2),
        "qwen3" => Ok(Family::Qwen3),
        other => Err(unsupported(format!(
            "GGUF architecture `{other}`; supported are llama (also holds mistral), qwen2 and qwen3"
        ))),
    }
}

/// Makes the `config.json`. `rope_factors` are the values of `rope_freqs.weight`, when the file has it.
pub(super) fn to_hf_json(
    metadata: &Metadata,
    tensors: &[GgufTensor],
    rope_factors: Option<&[f32]>,
    path: &Path,
) -> Result<serde_json::Value> {
    let family = family(metadata, path)?;
    let keys = Keys { metadata, arch: family.model_type(), path };
    refuse_unsupported(&keys)?;
    let vocab =
        tensors.iter().find(|t| t.name == "token_embd.weight").and_then(|t| t.shape.first()).ok_or_else(
            || WeightsError::MissingTensor { path: path.into(), name: "token_embd.weight".into() },
        )?;
    let d_model = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = match keys.uint("attention.key_length")? {
        Some(length) => length,
        None if heads == 0 || d_model % heads != 0 => {
            return Err(
                keys.bad(format!("the embedding length {d_model} is not a multiple of {heads} heads"))
            );
        }
        None => d_model / heads,
    };
    if let Some(value_length) = keys.uint("attention.value_length")?.filter(|&length| length != head_dim) {
        return Err(unsupported(format!("values of {value_length} per head beside keys of {head_dim}")));
    }
    if let Some(rotated) = keys.uint("rope.dimension_count")?.filter(|&n| n != head_dim) {
        return Err(unsupported(format!(
            "RoPE over {rotated} of {head_dim} values per head; supported is the whole head"
        )));
    }
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    let mut config = json!({
        "architectures": [family.architecture()],
        "model_type": family.model_type(),
        "vocab_size": vocab,
        "hidden_size": d_model,
        "intermediate_size": keys.required("feed_forward_length")?,
        "num_hidden_layers": keys.required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.uint("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.required("context_length")?,
        "rms_norm_eps": keys.float("attention.layer_norm_rms_epsilon")?.map(shortest),
        "rope_theta": shortest(theta),
        "rope_scaling": rope_scaling(&keys, rope_factors, theta, head_dim)?,
        "tie_word_embeddings": !tensors.iter().any(|t| t.name == "output.weight"),
        "attention_bias": false,
    });
    let token = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_u64);
    config["bos_token_id"] = json!(token("bos"));
    let mut eos: Vec<u64> = Vec::new();
    for id in ["eos", "eot"].into_iter().filter_map(token) {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    config["eos_token_id"] = match eos.as_slice() {
        [] => serde_json::Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    config["pad_token_id"] = json!(token("padding"));
    Ok(config)
}

/// The f64 with the shortest text of an f32: 1e-5 instead of 9.999999747378752e-6.
fn shortest(value: f64) -> f64 {
    let narrow = value as f32;
    if f64::from(narrow) == value { narrow.to_string().parse().unwrap_or(value) } else { value }
}

fn refuse_unsupported(keys: &Keys) -> Result<()> {
    let general = |key: &str| keys.metadata.get(key).and_then(Value::as_u64);
    if general("split.count").is_some_and(|n| n > 1) {
        return Err(unsupported(
            "a GGUF split over several files; join it with llama.cpp's `llama-gguf-split --merge`",
        ));
    }
    if keys.uint("expert_count")?.is_some_and(|n| n > 0) {
        return Err(unsupported("mixture of experts (`expert_count`); supported are dense models"));
    }
    let context = keys.required("context_length")?;
    if let Some(window) = keys.uint("attention.sliding_window")?.filter(|&w| w > 0 && w < context) {
        return Err(unsupported(format!(
            "sliding-window attention ({window} of {context}); supported is full attention"
        )));
    }
    Ok(())
}

fn rope_scaling(
    keys: &Keys,
    factors: Option<&[f32]>,
    theta: f64,
    head_dim: u64,
) -> Result<serde_json::Value> {
    let kind = keys.get("rope.scaling.type").and_then(Value::as_str).unwrap_or("none");
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    // Without a type, a factor means linear scaling, as in llama.cpp.
    let linear = match kind {
        "none" if keys.get("rope.scaling.type").is_some() => None,
        "none" | "linear" => factor.filter(|&f| f != 1.0 && f != 0.0),
        other => {
            return Err(unsupported(format!(
                "RoPE scaling `{other}`; supported are none, linear and llama3"
            )));
        }
    };
    match (factors, linear) {
        (None, None) => Ok(serde_json::Value::Null),
        (None, Some(factor)) => Ok(json!({"rope_type": "linear", "factor": shortest(factor)})),
        (Some(_), Some(_)) => Err(unsupported("linear RoPE scaling together with `rope_freqs.weight`")),
        (Some(factors), None) => llama3_scaling(keys, factors, theta, head_dim),
    }
}

/// llama.cpp stores llama3 scaling as one divisor per frequency; this finds the parameters that make those divisors.
fn llama3_scaling(keys: &Keys, factors: &[f32], theta: f64, head_dim: u64) -> Result<serde_json::Value> {
    let n = factors.len();
    if n as u64 * 2 != head_dim {
        return Err(keys.bad(format!("`rope_freqs.weight` has {n} values, expected {}", head_dim / 2)));
    }
    if let Some(bad) = factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
        return Err(keys.bad(format!("`rope_freqs.weight` holds {bad}, expected positive numbers")));
    }
    let factors: Vec<f64> = factors.iter().copied().map(f64::from).collect();
    if factors.iter().all(|&f| f == 1.0) {
        return Ok(serde_json::Value::Null);
    }
    let frequencies: Vec<f64> = (0..n).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let factor = shortest(factors.iter().copied().fold(0.0, f64::max));
    let fits = |&(low, high, context): &(f64, f64, f64)| {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_context: context as usize,
        };
        frequencies.iter().zip(&factors).all(|(&frequency, &divisor)| {
            let found = frequency / scaling.apply(frequency);
            (found - divisor).abs() <= ROPE_FACTOR_TOLERANCE * divisor
        })
    };
    // Between the two bounds 1/divisor = (1 - s)/factor + s, and s is linear in the frequency: context/(2π(high - low))
    // times frequency, minus low/(high - low). Two such points give the line; low = 1 fixes the free scale.
    let middle: Vec<(f64, f64)> = frequencies
        .iter()
        .zip(&factors)
        .filter(|&(_, &d)| d > 1.0 && d < factor)
        .map(|(&f, &d)| (f, (1.0 / d - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    let solved = match (middle.first(), middle.last()) {
        (Some(&(f0, s0)), Some(&(f1, s1))) if f0 != f1 => {
            let slope = (s0 - s1) / (f0 - f1);
            let high = 1.0 + 1.0 / (slope * f0 - s0);
            let context = slope * 2.0 * std::f64::consts::PI * (high - 1.0);
            let rounded = (high * 1000.0).round() / 1000.0;
            (rounded > 1.0 && context.is_finite() && (1.0..1e12).contains(&context))
                .then(|| (1.0, rounded, context.round()))
        }
        _ => None,
    };
    let (low, high, context) = [Some(LLAMA3_USUAL), solved]
        .into_iter()
        .flatten()
        .find(fits)
        .ok_or_else(|| unsupported("`rope_freqs.weight` that is not llama3 RoPE scaling"))?;
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context as u64,
    }))
}
