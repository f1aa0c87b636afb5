//! A configuration → llama.cpp's metadata: the inverse of `config`.

use super::writer::MetadataBuilder;
use crate::config::{Family, ModelConfig, RopeScaling, unsupported};
use crate::error::Result;
use kernels::quant::Dtype;

/// llama.cpp's architecture that computes `family`.
pub(super) fn architecture(family: Family) -> &'static str {
    match family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    }
}

/// `general.file_type` for files whose matrices are mostly `dtype` (llama.cpp's `llama_ftype`).
pub(super) fn file_type(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q4_1 => 3,
        Dtype::Q8_0 => 7,
        Dtype::Q5_0 => 8,
        Dtype::Q5_1 => 9,
        Dtype::Q4K => 14,
        Dtype::Q5K => 16,
        Dtype::Q6K => 18,
        Dtype::BF16 => 32,
    }
}

/// Adds everything that llama.cpp asks of `config`.
///
/// # Errors
/// [`WeightsError::Unsupported`](crate::WeightsError::Unsupported) for a RoPE scaling that llama.cpp lacks in this family.
pub(super) fn describe(config: &ModelConfig, out: &mut MetadataBuilder) -> Result<()> {
    let arch = architecture(config.family);
    let sizes = [
        ("vocab_size", config.vocab),
        ("context_length", config.max_context),
        ("embedding_length", config.d_model),
        ("block_count", config.layers),
        ("feed_forward_length", config.d_ff),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ];
    for (key, value) in sizes {
        let value = u32::try_from(value)
            .map_err(|_| unsupported(format!("`{key}` {value} in GGUF, which holds up to {}", u32::MAX)))?;
        out.u32(&format!("{arch}.{key}"), value);
    }
    out.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), config.rms_eps);
    out.f32(&format!("{arch}.rope.freq_base"), config.rope_theta as f32);
    match config.rope_scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => {
            out.text(&format!("{arch}.rope.scaling.type"), "linear");
            out.f32(&format!("{arch}.rope.scaling.factor"), factor as f32);
        }
        RopeScaling::Llama3 { .. } if arch == "llama" => {}
        RopeScaling::Llama3 { .. } => {
            return Err(unsupported(format!("llama3 RoPE scaling of {arch} models in GGUF files")));
        }
    }
    Ok(())
}

/// Values of `rope_freqs.weight`, by which llama.cpp divides the frequencies; none without llama3 scaling.
pub(super) fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = config.rope_scaling else { return None };
    let d = config.head_dim as f64;
    let frequencies = (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / d));
    Some(frequencies.map(|f| (f / config.rope_scaling.apply(f)) as f32).collect())
}
