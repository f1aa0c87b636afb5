//! Tiny random models of every feature combination, and ways to compare results.
#![allow(dead_code, reason = "each test file uses its part")]

use kernels::Exec;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use recurformer_model::mixers;
use recurformer_model::{
    Dropped, Engine, EngineOptions, Family, GroupMixer, HeadPlan, MixerSpec, Model, ModelConfig, ParamStore,
    RecurrentKind,
};
use weights::RopeScaling;

pub const VOCAB: usize = 37;

/// GQA and tied; biases, untied, three groups; q/k norms, own head_dim, one query head per group.
pub fn configs() -> Vec<ModelConfig> {
    let llama = ModelConfig {
        family: Family::Llama,
        vocab: VOCAB,
        d_model: 24,
        d_ff: 40,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        rms_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::Default,
        max_context: 200,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
        bos_token_id: None,
        eos_token_ids: vec![],
    };
    let qwen2 = ModelConfig {
        family: Family::Qwen2,
        heads: 6,
        kv_heads: 3,
        head_dim: 4,
        layers: 2,
        tie_embeddings: false,
        qkv_bias: true,
        ..llama.clone()
    };
    let qwen3 = ModelConfig {
        family: Family::Qwen3,
        heads: 3,
        kv_heads: 3,
        head_dim: 10,
        layers: 2,
        qk_norm: true,
        rope_scaling: RopeScaling::Linear { factor: 2.0 },
        ..llama.clone()
    };
    vec![llama, qwen2, qwen3]
}

/// Every recurrent kind, with and without its local window, and every way of dropping tokens.
pub fn specs(head_dim: usize) -> Vec<MixerSpec> {
    let spec = |recurrent, window, sinks, d_state, d_conv| MixerSpec {
        recurrent,
        window,
        sinks,
        d_state,
        d_conv,
        dropped: Default::default(),
    };
    let averaged = |spec| MixerSpec { dropped: Dropped::Averaged, ..spec };
    let weighed = |spec| MixerSpec { dropped: Dropped::Weighed, ..spec };
    vec![
        spec(RecurrentKind::None, 5, 2, 0, 0),
        spec(RecurrentKind::Mamba2, 4, 1, head_dim, 4),
        spec(RecurrentKind::Mamba2, 0, 0, head_dim, 3),
        spec(RecurrentKind::GatedDelta, 3, 1, head_dim, 4),
        spec(RecurrentKind::GatedDelta, 0, 0, head_dim, 4),
        spec(RecurrentKind::Mamba, 6, 0, 5, 4),
        spec(RecurrentKind::Mamba, 0, 0, 16, 2),
        averaged(spec(RecurrentKind::None, 4, 1, 0, 0)),
        averaged(spec(RecurrentKind::GatedDelta, 3, 2, head_dim, 4)),
        averaged(spec(RecurrentKind::Mamba, 6, 0, 5, 4)),
        weighed(spec(RecurrentKind::Mamba2, 4, 0, head_dim, 4)),
        weighed(spec(RecurrentKind::GatedDelta, 5, 2, head_dim, 3)),
    ]
}

/// Which groups a plan of the tests converts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    Some,
    All,
}

pub fn plan(config: &ModelConfig, spec: MixerSpec, share: Share) -> HeadPlan {
    let mut plan = HeadPlan::empty(config);
    plan.mixer = Some(spec);
    for (l, layer) in plan.layers.iter_mut().enumerate() {
        for (g, group) in layer.groups.iter_mut().enumerate() {
            // Layer 0 keeps what is around a converted group, layer 1 the reverse, layer 2 everything.
            let some = (l == 0 && g == 1) || (l == 1 && g != 1);
            if share == Share::All || some {
                group.mixer = GroupMixer::Recurrent;
            }
        }
    }
    plan.beta = plan.converted() as f64 / plan.total() as f64;
    plan
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn uniform(rng: &mut ChaCha8Rng, n: usize, around: f32, spread: f32) -> Vec<f32> {
    (0..n).map(|_| around + spread * rng.random_range(-1.0f32..1.0)).collect()
}

/// A random base model; activations stay around 1.
pub fn base(config: &ModelConfig, seed: u64) -> Model {
    let mut rng = rng(seed);
    let mut params = ParamStore::default();
    for (name, shape) in config.tensor_shapes() {
        let n = shape.iter().product();
        let values = if name.contains("norm") {
            uniform(&mut rng, n, 1.0, 0.3)
        } else if shape.len() == 1 {
            uniform(&mut rng, n, 0.0, 0.3)
        } else if name.contains("embed") {
            uniform(&mut rng, n, 0.0, 1.0)
        } else {
            uniform(&mut rng, n, 0.0, (3.0 / shape[1] as f32).sqrt())
        };
        params.insert(name, shape, values);
    }
    Model::from_parts(config.clone(), HeadPlan::empty(config), params).unwrap()
}

/// `base` under `plan`, heads initialised as for training and then moved off their special starting point (zero gates, unit gains,
/// identity convolutions would hide faults).
pub fn hybrid(base: &Model, plan: HeadPlan, seed: u64) -> Model {
    let layout = mixers::HeadLayout::new(plan.mixer.unwrap(), &base.config);
    let mut rng = rng(seed);
    base.with_plan(plan, &mut |layer, group| {
        let distances = vec![8.0; base.config.group_size()];
        let mut tensors = mixers::init(&layout, &base.base_group(layer, group), &distances, seed);
        for value in tensors.values.iter_mut().flatten() {
            *value += rng.random_range(-0.2f32..0.2);
        }
        Ok(tensors)
    })
    .unwrap()
}

/// Every base and hybrid of a configuration with a name for messages.
pub fn all_models(config: &ModelConfig) -> Vec<(String, Model)> {
    let base = base(config, 1);
    let name = config.family.model_type();
    let mut models = Vec::new();
    for spec in specs(config.head_dim) {
        for share in [Share::Some, Share::All] {
            let label = format!("{name} {share:?} {} window {}", spec.recurrent.name(), spec.window);
            models.push((label, hybrid(&base, plan(config, spec, share), 2)));
        }
    }
    models.push((format!("{name} base"), base));
    models
}

pub fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = rng(seed);
    (0..n).map(|_| rng.random_range(0..VOCAB as u32)).collect()
}

pub fn exec() -> Exec {
    Exec::new(2).unwrap()
}

/// Largest difference as a share of the expected values' root mean square; infinite when anything is not finite.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square: f64 = expected.iter().map(|&e| f64::from(e).powi(2)).sum();
    let rms = (square / expected.len().max(1) as f64).sqrt().max(1e-30);
    let largest = found
        .iter()
        .zip(expected)
        .map(|(f, e)| f64::from((f - e).abs()))
        .fold(0.0f64, |a, b| if b.is_finite() { a.max(b) } else { f64::INFINITY });
    largest / rms
}

/// The engine of a model's f32 parameters, with an f32 cache.
pub fn engine_of(model: &Model) -> Engine {
    Engine::from_model(&exec(), model, EngineOptions::EXACT).expect("a valid model")
}
