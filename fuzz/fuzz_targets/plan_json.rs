//! Head plans from hostile text: never a panic, and what is accepted survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use recurformer_model::{Family, HeadPlan, ModelConfig};
use weights::RopeScaling;

fuzz_target!(|data: &[u8]| {
    let Ok(json) = std::str::from_utf8(data) else { return };
    let config = ModelConfig {
        family: Family::Llama,
        vocab: 64,
        d_model: 32,
        d_ff: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        max_context: 128,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    };
    if let Ok(plan) = HeadPlan::from_json(json, &config) {
        assert_eq!(HeadPlan::from_json(&plan.to_json(), &config).expect("written by to_json"), plan);
        assert!(plan.converted() <= plan.total());
    }
});
