//! The normalised model configuration, read from Hugging Face `config.json` (old and new form) or GGUF metadata.
//! Knows what each family defaults to and refuses what is not computed; knows nothing of tensors' bytes.

use crate::error::{Result, WeightsError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod hf;
#[cfg(test)]
mod tests;

/// Architecture families whose arithmetic is implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 2, Llama 3, SmolLM2.
    Llama,
    /// Mistral without a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: q/k/v biases.
    Qwen2,
    /// Qwen3: q/k norms, own head_dim.
    Qwen3,
}

impl Family {
    /// Every family, in the order messages list them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The `model_type` of `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The first entry of `architectures` in `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// How RoPE frequencies are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Unscaled.
    Default,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// Division of all frequencies.
        factor: f64,
    },
    /// Llama 3's piecewise scaling.
    Llama3 {
        /// Division of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was pretrained with.
        original_context: usize,
    },
}

/// Everything the forward pass needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Architecture family.
    pub family: Family,
    /// Vocabulary rows.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// KV heads per layer; a group is one KV head with its `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// RMSNorm epsilon.
    #[serde(serialize_with = "as_decimal")]
    pub rms_eps: f32,
    /// RoPE base.
    pub rope_theta: f64,
    /// RoPE scaling.
    pub rope_scaling: RopeScaling,
    /// Longest position the model was trained for.
    pub max_context: usize,
    /// Whether the output projection is the embedding.
    pub tie_embeddings: bool,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether q and k are RMS-normalised per head before RoPE.
    pub qk_norm: bool,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

/// Writes the shortest decimal that reads back as the same f32: 1e-5, not 9.999999747378752e-6.
fn as_decimal<S: serde::Serializer>(value: &f32, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_f64(value.to_string().parse().unwrap_or(f64::from(*value)))
}

/// Upper bounds of the sizes in a configuration: far above any model of these families, low enough that no product of
/// two of them overflows.
const MAX_SIZES: [(&str, usize); 7] = [
    ("vocab_size", 1 << 24),
    ("hidden_size", 1 << 20),
    ("intermediate_size", 1 << 22),
    ("num_hidden_layers", 1 << 12),
    ("num_attention_heads", 1 << 14),
    ("head_dim", 1 << 14),
    ("max_position_embeddings", 1 << 32),
];

impl ModelConfig {
    /// Parses a Hugging Face `config.json`, in the old form (`rope_theta`, `rope_scaling`) or the new one
    /// (`rope_parameters`). Absent keys take the defaults that transformers gives the family.
    ///
    /// # Errors
    /// [`WeightsError::Unsupported`] naming the architecture feature that is not computed;
    /// [`WeightsError::Malformed`] for a missing key, a wrong type, or sizes that do not fit together.
    pub fn from_hf_json(json: &Value) -> Result<Self> {
        hf::parse(json)
    }

    /// Takes the `eos_token_id` (a number or a list) of a `generation_config.json`: its tokens come first, those of
    /// `config.json` are kept.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key is neither.
    pub fn merge_generation_config(&mut self, json: &Value) -> Result<()> {
        if let Some(ids) = hf::token_ids(json, "eos_token_id", "generation_config.json")? {
            let mut merged = ids;
            merged.extend(self.eos_token_ids.iter().copied());
            let mut seen = Vec::with_capacity(merged.len());
            for id in merged {
                if !seen.contains(&id) {
                    seen.push(id);
                }
            }
            self.eos_token_ids = seen;
        }
        Ok(())
    }

    /// Checks that the sizes are nonzero, bounded and fit together.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] naming the key, what was expected and what was found.
    pub fn validate(&self) -> Result<()> {
        let sizes =
            [self.vocab, self.d_model, self.d_ff, self.layers, self.heads, self.head_dim, self.max_context];
        for ((name, limit), found) in MAX_SIZES.into_iter().zip(sizes) {
            if found == 0 || found > limit {
                return Err(hf::bad(format!("`{name}` is {found}, expected 1 to {limit}")));
            }
        }
        if self.kv_heads == 0 || self.kv_heads > self.heads || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(hf::bad(format!(
                "`num_attention_heads` {} is not a multiple of `num_key_value_heads` {}",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(hf::bad(format!("`head_dim` is {}, expected an even number", self.head_dim)));
        }
        if !(self.rms_eps.is_finite() && (0.0..1.0).contains(&self.rms_eps)) {
            return Err(hf::bad(format!("`rms_norm_eps` is {}, expected 0 to 1", self.rms_eps)));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return Err(hf::bad(format!("`rope_theta` is {}, expected at least 1", self.rope_theta)));
        }
        match self.rope_scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => check_factor(factor)?,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                check_factor(factor)?;
                let ordered = low_freq_factor.is_finite()
                    && high_freq_factor.is_finite()
                    && low_freq_factor > 0.0
                    && high_freq_factor > low_freq_factor;
                if !ordered || original_context == 0 {
                    return Err(hf::bad(format!(
                        "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor and a nonzero \
                         original_max_position_embeddings, found {low_freq_factor}, {high_freq_factor}, {original_context}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Query heads per KV group.
    pub fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// `head_dim / 2` RoPE frequencies (radians per position), scaling applied. Computed in f64, as
    /// `theta^(-2i/head_dim)`; llama3 scaling as in transformers' `_compute_llama3_parameters`.
    pub fn rope_inv_freq(&self) -> Vec<f64> {
        let d = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| self.rope_scaling.apply(self.rope_theta.powf(-2.0 * i as f64 / d)))
            .collect()
    }

    /// KV-cache bytes per token at `bytes_per_value`, all groups kept.
    pub fn kv_bytes_per_token(&self, bytes_per_value: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value
    }

    /// Name and shape of every tensor a checkpoint of this configuration holds, Hugging Face names, layers in order.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (d_model, d_ff) = (self.d_model, self.d_ff);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut out = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab, d_model])];
        for layer in 0..self.layers {
            let mut push =
                |name: &str, shape: Vec<usize>| out.push((format!("model.layers.{layer}.{name}"), shape));
            push("input_layernorm.weight", vec![d_model]);
            push("self_attn.q_proj.weight", vec![q, d_model]);
            push("self_attn.k_proj.weight", vec![kv, d_model]);
            push("self_attn.v_proj.weight", vec![kv, d_model]);
            push("self_attn.o_proj.weight", vec![d_model, q]);
            if self.qkv_bias {
                push("self_attn.q_proj.bias", vec![q]);
                push("self_attn.k_proj.bias", vec![kv]);
                push("self_attn.v_proj.bias", vec![kv]);
            }
            if self.qk_norm {
                push("self_attn.q_norm.weight", vec![self.head_dim]);
                push("self_attn.k_norm.weight", vec![self.head_dim]);
            }
            push("post_attention_layernorm.weight", vec![d_model]);
            push("mlp.gate_proj.weight", vec![d_ff, d_model]);
            push("mlp.up_proj.weight", vec![d_ff, d_model]);
            push("mlp.down_proj.weight", vec![d_model, d_ff]);
        }
        out.push(("model.norm.weight".to_string(), vec![d_model]));
        if !self.tie_embeddings {
            out.push(("lm_head.weight".to_string(), vec![self.vocab, d_model]));
        }
        out
    }
}

fn check_factor(factor: f64) -> Result<()> {
    if factor.is_finite() && factor > 0.0 {
        Ok(())
    } else {
        Err(hf::bad(format!("RoPE scaling `factor` is {factor}, expected a positive number")))
    }
}

impl RopeScaling {
    /// The scaled frequency (radians per position) of the unscaled `inv_freq`.
    pub fn apply(&self, inv_freq: f64) -> f64 {
        match *self {
            Self::Default => inv_freq,
            Self::Linear { factor } => inv_freq / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = 2.0 * std::f64::consts::PI / inv_freq;
                let context = original_context as f64;
                if wavelength < context / high_freq_factor {
                    inv_freq
                } else if wavelength > context / low_freq_factor {
                    inv_freq / factor
                } else {
                    let smooth =
                        (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
                }
            }
        }
    }
}

/// An [`WeightsError::Unsupported`] naming `what`.
pub(crate) fn unsupported(what: impl Into<String>) -> WeightsError {
    WeightsError::Unsupported { what: what.into() }
}
