//! The fuzz targets' entry points over mutated good files, so that every test run exercises them a little.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use recurformer_weights::{gguf, hostile};
use std::path::Path;

const MUTATIONS: usize = 3000;

fn data(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name))
        .expect("a golden file of this crate")
}

/// A few bytes changed, a piece copied over another, or the end cut; mostly in the first `head` bytes.
fn mutate(good: &[u8], head: usize, rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let head = head.min(bytes.len());
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..head);
        match rng.random_range(0..5) {
            0 => bytes[at] = rng.random(),
            1 => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => {
                let end = (at + 8).min(bytes.len());
                bytes[at..end].fill(if rng.random() { 0xFF } else { 0 });
            }
            3 => {
                let length = rng.random_range(0..64).min(bytes.len() - at);
                let from = rng.random_range(0..=bytes.len() - length);
                bytes.copy_within(from..from + length, at);
            }
            _ => bytes.truncate(bytes.len() - rng.random_range(0..bytes.len().min(64))),
        }
        if bytes.len() < head {
            return bytes;
        }
    }
    bytes
}

#[test]
fn mutated_safetensors() {
    let good = data("quants.safetensors");
    hostile::safetensors(&good);
    let mut rng = StdRng::seed_from_u64(1);
    (0..MUTATIONS).for_each(|_| hostile::safetensors(&mutate(&good, 1200, &mut rng)));
}

/// A hybrid's file: its configuration, plan and tokenizer are JSON in the metadata.
fn hybrid() -> Vec<u8> {
    let mut metadata = gguf::MetadataBuilder::default();
    metadata.text("general.architecture", "recurformer");
    metadata.u32("recurformer.version", 1);
    metadata.text(
        "recurformer.config",
        r#"{"model_type": "llama", "vocab_size": 3, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true}"#,
    );
    metadata
        .text("recurformer.head_plan", r#"{"version": 1, "layers": [{"groups": [{"mixer": "recurrent"}]}]}"#);
    metadata.text(
        "recurformer.tokenizer",
        r#"{"version": "1.0", "added_tokens": [{"id": 2, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}], "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"H": 0, "i": 1, "<|end|>": 2}, "merges": []}}"#,
    );
    metadata.text(
        "recurformer.tokenizer_config",
        r#"{"chat_template": "{{ messages }}", "eos_token": "<|end|>"}"#,
    );
    let tensor = gguf::GgufOut {
        name: "model.embed_tokens.weight".to_string(),
        shape: vec![3, 4],
        dtype: recurformer_weights::Dtype::F16,
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("hybrid.gguf");
    let mut writer = gguf::GgufWriter::create(&path, &metadata, vec![tensor]).expect("a valid file");
    writer.append("model.embed_tokens.weight", &[0; 24]).expect("zeros are finite");
    writer.finish().expect("all tensors are written");
    std::fs::read(&path).expect("just written")
}

#[test]
fn mutated_hybrids() {
    let good = hybrid();
    hostile::gguf(&good);
    let mut rng = StdRng::seed_from_u64(5);
    (0..MUTATIONS).for_each(|_| hostile::gguf(&mutate(&good, good.len(), &mut rng)));
}

#[test]
fn mutated_gguf() {
    let good = data("tiny_llama.gguf");
    hostile::gguf(&good);
    let mut rng = StdRng::seed_from_u64(2);
    (0..MUTATIONS / 4).for_each(|_| hostile::gguf(&mutate(&good, 1200, &mut rng)));
    let header = 14_000;
    (0..MUTATIONS / 4).for_each(|_| hostile::gguf(&mutate(&good, header, &mut rng)));
}

#[test]
fn mutated_config_json() {
    let good = br#"{"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": [1, 2],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}"#;
    hostile::config_json(good);
    let mut rng = StdRng::seed_from_u64(3);
    (0..MUTATIONS).for_each(|_| hostile::config_json(&mutate(good, good.len(), &mut rng)));
}
