//! llama.cpp tensor names ↔ Hugging Face names. Llama, mistral, qwen2 and qwen3 share one table.

/// Names outside the layers.
const GLOBAL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Names within a layer, without their `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a llama.cpp tensor, `None` when these families have no such tensor.
pub fn hf_name(gguf: &str) -> Option<String> {
    if let Some((_, hf)) = GLOBAL.iter().find(|(name, _)| *name == gguf) {
        return Some(hf.to_string());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let number: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    let (part, kind) = rest.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let (_, hf) = LAYER.iter().find(|(name, _)| *name == part)?;
    Some(format!("model.layers.{number}.{hf}.{kind}"))
}

/// llama.cpp's name of a Hugging Face tensor of these families.
pub fn gguf_name(hf: &str) -> Option<String> {
    if let Some((gguf, _)) = GLOBAL.iter().find(|(_, name)| *name == hf) {
        return Some(gguf.to_string());
    }
    let (layer, rest) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let number: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    let (part, kind) = rest.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let (gguf, _) = LAYER.iter().find(|(_, name)| *name == part)?;
    Some(format!("blk.{number}.{gguf}.{kind}"))
}
