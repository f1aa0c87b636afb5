//! The normalised model configuration, read from Hugging Face `config.json` (old and new form) or GGUF metadata.

use crate::error::Result;
use serde::{Deserialize, Serialize};

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

/// How RoPE frequencies are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Unscaled.
    Default,
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

impl ModelConfig {
    /// Parses a Hugging Face `config.json`. An architecture feature that is not implemented is an error naming it.
    pub fn from_hf_json(json: &serde_json::Value) -> Result<Self> {
        let _ = json;
        todo!()
    }
    /// Query heads per KV group.
    pub fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// `head_dim / 2` RoPE frequencies (radians per position), scaling applied.
    pub fn rope_inv_freq(&self) -> Vec<f64> {
        todo!()
    }
    /// KV-cache bytes per token at `bytes_per_value`, all groups kept.
    pub fn kv_bytes_per_token(&self, bytes_per_value: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value
    }
}
