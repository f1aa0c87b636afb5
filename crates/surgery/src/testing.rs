//! Tiny random models and checkpoints for tests.

use kernels::Exec;
use model::{HeadPlan, MixerSpec, Model, ModelConfig, NoObserver, ParamStore, RecurrentKind, TokenBatch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use weights::safetensors::{Metadata, OutTensor, SafetensorsWriter};
use weights::{Checkpoint, Dtype};

/// Two layers of four heads in two groups; vocabulary 48.
pub fn config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 1024, "tie_word_embeddings": false,
    })
}

pub fn config() -> ModelConfig {
    ModelConfig::from_hf_json(&config_json()).unwrap()
}

pub fn exec() -> Exec {
    Exec::new(2).unwrap()
}

pub fn noise(rng: &mut ChaCha8Rng, n: usize, scale: f32) -> Vec<f32> {
    // A sum of uniforms is close enough to normal.
    (0..n).map(|_| scale * (0..4).map(|_| rng.random_range(-0.87f32..0.87)).sum::<f32>()).collect()
}

/// Weights large enough that attention is far from uniform.
pub fn model(seed: u64) -> Model {
    model_of(config(), seed)
}

pub fn model_of(config: ModelConfig, seed: u64) -> Model {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut params = ParamStore::default();
    for (name, shape) in config.tensor_shapes() {
        let n = shape.iter().product();
        let data = if name.contains("norm") {
            noise(&mut rng, n, 0.1).iter().map(|x| 1.0 + x).collect()
        } else if name.contains("embed") {
            noise(&mut rng, n, 1.0)
        } else {
            noise(&mut rng, n, 1.5 / (shape[shape.len() - 1] as f32).sqrt())
        };
        params.insert(name, shape, data);
    }
    Model::from_parts(config.clone(), HeadPlan::empty(&config), params).unwrap()
}

pub fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..48)).collect()
}

pub fn spec(recurrent: RecurrentKind, window: usize) -> MixerSpec {
    let (d_state, d_conv) = match recurrent {
        RecurrentKind::None => (0, 0),
        RecurrentKind::Mamba => (16, 4),
        RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => (8, 4),
    };
    MixerSpec {
        recurrent,
        window,
        sinks: usize::from(window > 0),
        d_state,
        d_conv,
        dropped: Default::default(),
    }
}

pub fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let exec = exec();
    let batch = TokenBatch::one(tokens);
    let hidden = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
    model.logits(&exec, &hidden)
}

/// Writes a Hugging Face folder whose tensors alternate between `dtypes`.
pub fn save_base(dir: &Path, model: &Model, dtypes: &[Dtype]) -> PathBuf {
    let path = dir.join("base");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("config.json"), config_json().to_string()).unwrap();
    std::fs::write(path.join("generation_config.json"), r#"{"eos_token_id": 3}"#).unwrap();
    let announced: Vec<OutTensor> = model
        .params
        .iter()
        .zip(dtypes.iter().cycle())
        .map(|((_, p), &dtype)| OutTensor { name: p.name.clone(), dtype, shape: p.shape.clone() })
        .collect();
    let file = path.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&file, &announced, &Metadata::new()).unwrap();
    for (_, param) in model.params.iter() {
        writer.write_f32(&param.name, param.data()).unwrap();
    }
    writer.finish().unwrap();
    path
}

pub fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}
