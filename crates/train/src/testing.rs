//! Tiny random models and interrupting progress for this crate's tests.

use crate::data::Document;
use model::mixers::{self, HeadLayout};
use model::plan::PlanModel;
use model::{Dropped, HeadPlan, MixerSpec, Model, ModelConfig, ParamStore, Progress, RecurrentKind};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;
use surgery::{BankInfo, HeadBank};
use weights::{Family, RopeScaling};

/// Two layers of 4 query heads in 2 groups.
pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab: 61,
        d_model: 24,
        d_ff: 40,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        max_context: 256,
        tie_embeddings: false,
        qkv_bias: false,
        qk_norm: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// Random weights large enough that attention is not uniform and logits are not flat; norms near 1.
pub fn tiny_model(config: &ModelConfig, seed: u64) -> Model {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut params = ParamStore::default();
    for (name, shape) in config.tensor_shapes() {
        let len = shape.iter().product();
        let width = *shape.last().unwrap() as f32;
        let data = (0..len)
            .map(|_| match name.ends_with("norm.weight") {
                true => rng.random_range(0.8..1.2),
                false => rng.random_range(-2.5..2.5) / width.sqrt(),
            })
            .collect();
        params.insert(name, shape, data);
    }
    Model::from_parts(config.clone(), HeadPlan::empty(config), params).unwrap()
}

/// Cancels after being asked `after` times.
pub struct StopAfter {
    asked: Cell<u64>,
    after: u64,
}

impl StopAfter {
    pub fn new(after: u64) -> Self {
        Self { asked: Cell::new(0), after }
    }
}

impl Progress for StopAfter {
    fn cancelled(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > self.after
    }
}

/// Behaves as a killed process does after `after` reports of progress: panics, so that nothing is saved on the way out.
pub struct DieAfter(pub u64);

impl Progress for DieAfter {
    fn advance(&mut self, _: u64, message: &str) {
        // Messages come with steps; the report of a resumed position has none.
        if !message.is_empty() {
            assert!(self.0 > 0, "killed");
            self.0 -= 1;
        }
    }
}

/// Runs `f`, which dies by [`DieAfter`], without its message on the terminal.
pub fn killed<T>(f: impl FnOnce() -> T) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    assert!(result.is_err(), "was to be killed");
}

/// Every mixer: each recurrence with and without the local part, and weighed against it.
pub fn mixer_specs(head_dim: usize) -> Vec<MixerSpec> {
    let mut out = Vec::new();
    for (recurrent, d_state) in
        [(RecurrentKind::Mamba2, head_dim), (RecurrentKind::GatedDelta, head_dim), (RecurrentKind::Mamba, 16)]
    {
        for (window, sinks) in [(0, 0), (4, 1)] {
            let spec =
                MixerSpec { recurrent, window, sinks, d_state, d_conv: 4, dropped: Default::default() };
            out.push(spec);
            if spec.can_weigh() {
                out.push(MixerSpec { dropped: Dropped::Weighed, ..spec });
            }
        }
    }
    out
}

/// Fresh heads for every group of `base`.
pub fn fresh_bank(base: &Model, spec: MixerSpec, seed: u64) -> HeadBank {
    let config = &base.config;
    let layout = HeadLayout::new(spec, config);
    let distances = vec![6.0; config.group_size()];
    let groups = (0..config.layers)
        .map(|layer| {
            (0..config.kv_heads)
                .map(|g| {
                    let seed = seed + (layer * config.kv_heads + g) as u64;
                    mixers::init(&layout, &base.base_group(layer, g), &distances, seed)
                })
                .collect()
        })
        .collect();
    let info = BankInfo {
        version: 1,
        model: PlanModel::of(config),
        spec,
        tokens: 0,
        seed,
        heldout_error: Vec::new(),
        mixer_fisher: Vec::new(),
        fisher_tokens: 0,
    };
    HeadBank { info, groups }
}

/// Random documents of `len` tokens below `vocab`, somewhat predictable: a token is often followed by its successor.
pub fn random_documents(count: usize, len: usize, vocab: u32, seed: u64) -> Vec<Document> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count)
        .map(|_| {
            let mut token = 0;
            let tokens = (0..len).map(|_| {
                token = if rng.random_bool(0.6) { (token + 1) % vocab } else { rng.random_range(0..vocab) };
                token
            });
            Document { source: "random".into(), tokens: tokens.collect() }
        })
        .collect()
}

/// Token ids of documents whose lengths lie around those of chunks.
pub fn documents_of_odd_lengths(vocab: u32) -> Vec<Vec<u32>> {
    let documents =
        [1, 2, 63, 64, 65].into_iter().flat_map(|len| random_documents(1, len, vocab, len as u64));
    documents.map(|document| document.tokens).collect()
}
