//! `config.json` → [`ModelConfig`]: keys, types and per-family defaults as in transformers 5.

use super::{Family, ModelConfig, RopeScaling, unsupported};
use crate::error::{Result, WeightsError};
use serde_json::Value;

/// A malformed `config.json`; the caller that knows the path puts it in.
pub(super) fn bad(reason: String) -> WeightsError {
    WeightsError::Malformed { path: "config.json".into(), format: "config.json", reason }
}

/// The value of `key` unless absent or null.
fn get<'a>(json: &'a Value, key: &str) -> Option<&'a Value> {
    json.get(key).filter(|v| !v.is_null())
}

fn uint(json: &Value, key: &str) -> Result<Option<usize>> {
    get(json, key)
        .map(|v| {
            v.as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| bad(format!("`{key}` is {v}, expected a non-negative integer")))
        })
        .transpose()
}

fn required(json: &Value, key: &str) -> Result<usize> {
    uint(json, key)?.ok_or_else(|| bad(format!("`{key}` is missing")))
}

fn float(json: &Value, key: &str) -> Result<Option<f64>> {
    get(json, key)
        .map(|v| v.as_f64().ok_or_else(|| bad(format!("`{key}` is {v}, expected a number"))))
        .transpose()
}

fn boolean(json: &Value, key: &str) -> Result<Option<bool>> {
    get(json, key)
        .map(|v| v.as_bool().ok_or_else(|| bad(format!("`{key}` is {v}, expected true or false"))))
        .transpose()
}

/// A token id or a list of them under `key`; `None` when absent or null.
pub(super) fn token_ids(json: &Value, key: &str, file: &'static str) -> Result<Option<Vec<u32>>> {
    let one = |v: &Value| {
        v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| WeightsError::Malformed {
            path: file.into(),
            format: file,
            reason: format!("`{key}` holds {v}, expected a token id or a list of them"),
        })
    };
    match get(json, key) {
        None => Ok(None),
        Some(Value::Array(list)) => list.iter().map(one).collect::<Result<Vec<_>>>().map(Some),
        Some(v) => Ok(Some(vec![one(v)?])),
    }
}

fn family(json: &Value) -> Result<Family> {
    let supported = "supported are llama, mistral, qwen2 and qwen3";
    let model_type = json
        .get("model_type")
        .and_then(Value::as_str)
        .ok_or_else(|| bad(format!("`model_type` is missing or not a string; {supported}")))?;
    Family::ALL
        .into_iter()
        .find(|f| f.model_type() == model_type)
        .ok_or_else(|| unsupported(format!("model family `{model_type}`; {supported}")))
}

/// Refuses what the forward pass does not compute.
fn refuse_unsupported(json: &Value, family: Family) -> Result<()> {
    let name = family.model_type();
    if let Some(act) = get(json, "hidden_act").filter(|act| !matches!(act.as_str(), Some("silu" | "swish"))) {
        return Err(unsupported(format!("activation {act} (`hidden_act`); supported is silu")));
    }
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if uint(json, key)?.is_some_and(|n| n > 0) {
            return Err(unsupported(format!("mixture of experts (`{key}`); supported are dense models")));
        }
    }
    if boolean(json, "mlp_bias")? == Some(true) {
        return Err(unsupported("`mlp_bias`; supported are MLPs without biases"));
    }
    if family != Family::Qwen2 && boolean(json, "attention_bias")? == Some(true) {
        return Err(unsupported(format!(
            "`attention_bias` in {name} (it includes an output-projection bias); supported are the q/k/v biases of qwen2"
        )));
    }
    if let Some(quantization) = get(json, "quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        return Err(unsupported(format!(
            "weights quantised with `{method}` (`quantization_config`); supported are F32, F16 and BF16 safetensors, and GGUF"
        )));
    }
    let sliding_layers = get(json, "layer_types")
        .and_then(Value::as_array)
        .is_some_and(|types| types.iter().any(|t| t.as_str() != Some("full_attention")));
    if sliding_layers {
        return Err(unsupported("`layer_types` other than full_attention (sliding windows)"));
    }
    Ok(())
}

/// Refuses a sliding window that would be in use within `max_context`.
fn refuse_sliding_window(json: &Value, family: Family, layers: usize, max_context: usize) -> Result<()> {
    let window = match family {
        Family::Llama => None,
        // transformers gives a mistral config without the key a window of 4096.
        Family::Mistral if json.get("sliding_window").is_none() => Some(4096),
        Family::Mistral => uint(json, "sliding_window")?,
        Family::Qwen2 | Family::Qwen3 => {
            let in_use = boolean(json, "use_sliding_window")?.unwrap_or(false)
                && get(json, "layer_types").is_none()
                && uint(json, "max_window_layers")?.unwrap_or(28) < layers;
            if !in_use {
                None
            } else if json.get("sliding_window").is_none() {
                Some(4096)
            } else {
                uint(json, "sliding_window")?
            }
        }
    };
    match window {
        Some(window) if window < max_context => Err(unsupported(format!(
            "sliding-window attention (`sliding_window` {window} below `max_position_embeddings` {max_context}); \
             supported is full attention: set `sliding_window` to null, or `max_position_embeddings` to {window}"
        ))),
        _ => Ok(()),
    }
}

fn rope(json: &Value, max_context: usize) -> Result<(f64, RopeScaling)> {
    let empty = Value::Object(serde_json::Map::new());
    let filled = |key: &str| -> Result<Option<&Value>> {
        match get(json, key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(v @ Value::Object(_)) => Ok(Some(v)),
            Some(v) => Err(bad(format!("`{key}` is {v}, expected an object"))),
        }
    };
    let params = match filled("rope_scaling")? {
        Some(v) => v,
        None => filled("rope_parameters")?.unwrap_or(&empty),
    };
    if params.get("full_attention").is_some() || params.get("sliding_attention").is_some() {
        return Err(unsupported(
            "`rope_parameters` that differ by layer; supported is one set for all layers",
        ));
    }
    for source in [params, json] {
        if let Some(share) = float(source, "partial_rotary_factor")?.filter(|&share| share != 1.0) {
            return Err(unsupported(format!(
                "`partial_rotary_factor` {share}; supported is 1 (the whole head)"
            )));
        }
    }
    let theta = match float(params, "rope_theta")? {
        Some(theta) => theta,
        None => float(json, "rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = get(params, "rope_type").or_else(|| get(params, "type"));
    let kind = match kind {
        None => "default",
        Some(v) => v.as_str().ok_or_else(|| bad(format!("`rope_type` is {v}, expected a string")))?,
    };
    let need = |key: &str| {
        float(params, key)?.ok_or_else(|| bad(format!("`{key}` of the `{kind}` RoPE scaling is missing")))
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context: match uint(json, "original_max_position_embeddings")? {
                Some(n) => n,
                None => uint(params, "original_max_position_embeddings")?.unwrap_or(max_context),
            },
        },
        other => {
            return Err(unsupported(format!(
                "RoPE scaling `{other}`; supported are default, linear and llama3"
            )));
        }
    };
    Ok((theta, scaling))
}

pub(super) fn parse(json: &Value) -> Result<ModelConfig> {
    if !json.is_object() {
        return Err(bad("expected a JSON object".to_string()));
    }
    let family = family(json)?;
    refuse_unsupported(json, family)?;
    let layers = required(json, "num_hidden_layers")?;
    let d_model = required(json, "hidden_size")?;
    let heads = required(json, "num_attention_heads")?;
    if heads == 0 {
        return Err(bad("`num_attention_heads` is 0".to_string()));
    }
    let kv_heads = match (json.get("num_key_value_heads"), family) {
        (None, Family::Mistral) => 8,
        (None, Family::Qwen2 | Family::Qwen3) => 32,
        _ => uint(json, "num_key_value_heads")?.unwrap_or(heads),
    };
    let head_dim = match (uint(json, "head_dim")?, family) {
        (Some(head_dim), _) => head_dim,
        (None, Family::Qwen3) => 128,
        (None, _) if !d_model.is_multiple_of(heads) => {
            return Err(bad(format!(
                "`hidden_size` {d_model} is not a multiple of `num_attention_heads` {heads} and `head_dim` is missing"
            )));
        }
        (None, _) => d_model / heads,
    };
    let max_context = uint(json, "max_position_embeddings")?.unwrap_or(match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 => 32_768,
    });
    refuse_sliding_window(json, family, layers, max_context)?;
    let (rope_theta, rope_scaling) = rope(json, max_context)?;
    // Llama and mistral configs default to <s> = 1 and </s> = 2; an explicit null means none.
    let default_token = |key: &str, id: u32| match (json.get(key), family) {
        (None, Family::Llama | Family::Mistral) => vec![id],
        _ => Vec::new(),
    };
    let bos =
        token_ids(json, "bos_token_id", "config.json")?.unwrap_or_else(|| default_token("bos_token_id", 1));
    let eos =
        token_ids(json, "eos_token_id", "config.json")?.unwrap_or_else(|| default_token("eos_token_id", 2));
    let config = ModelConfig {
        family,
        vocab: required(json, "vocab_size")?,
        d_model,
        d_ff: required(json, "intermediate_size")?,
        layers,
        heads,
        kv_heads,
        head_dim,
        rms_eps: float(json, "rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta,
        rope_scaling,
        max_context,
        tie_embeddings: boolean(json, "tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        bos_token_id: bos.first().copied(),
        eos_token_ids: eos,
    };
    config.validate()?;
    Ok(config)
}
