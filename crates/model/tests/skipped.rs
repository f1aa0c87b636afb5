//! A model that leaves a layer out is the model without that layer.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{base, configs, engine_of, exec, relative_error, tokens};
use recurformer_model::{
    Grads, HeadPlan, LogitRows, Model, ModelConfig, ModelError, NoObserver, ParamStore, Tape, TokenBatch,
};

/// Orders of summation.
const TOLERANCE: f64 = 5e-5;

/// The model with `layer` left out by its plan, and its twin whose configuration never had it.
fn twins(config: &ModelConfig, layer: usize) -> (Model, Model) {
    let whole = base(config, 1);
    let mut plan = HeadPlan::empty(config);
    plan.layers[layer].skipped = true;
    let skipping = whole.with_plan(plan, &mut |_, _| unreachable!("nothing is converted")).unwrap();
    let shorter = ModelConfig { layers: config.layers - 1, ..config.clone() };
    let mut params = ParamStore::default();
    for (name, shape) in shorter.tensor_shapes() {
        let source = (layer..shorter.layers).find_map(|l| {
            name.strip_prefix(&format!("model.layers.{l}."))
                .map(|rest| format!("model.layers.{}.{rest}", l + 1))
        });
        let id = whole.params.id(source.as_ref().unwrap_or(&name)).unwrap();
        params.insert(name, shape, whole.params.data(id).to_vec());
    }
    let twin = Model::from_parts(shorter.clone(), HeadPlan::empty(&shorter), params).unwrap();
    (skipping, twin)
}

#[test]
fn every_pass_is_that_of_the_shorter_model() {
    let (exec, tokens) = (exec(), tokens(41, 3));
    for config in configs() {
        for layer in 0..config.layers {
            let (skipping, twin) = twins(&config, layer);
            let (engine, shorter) = (engine_of(&skipping), engine_of(&twin));
            let expected = shorter.forward(&exec, &tokens, &mut shorter.new_cache(), LogitRows::All).unwrap();
            let mut cache = engine.new_cache();
            let mut found = engine.forward(&exec, &tokens[..30], &mut cache, LogitRows::All).unwrap();
            let mut fork = cache.clone();
            for &token in &tokens[30..] {
                found.extend(engine.forward(&exec, &[token], &mut fork, LogitRows::All).unwrap());
            }
            assert!(relative_error(&found, &expected) < TOLERANCE, "layer {layer}");
            assert_eq!(engine.cache_bytes(41), shorter.cache_bytes(41));
            assert_eq!(
                (fork.bytes(), engine.weight_bytes()),
                (engine.cache_bytes(41), shorter.weight_bytes())
            );
            fork.truncate(7).unwrap();
            let whole = engine_of(&base(&config, 1));
            assert!(whole.cache_bytes(41) > engine.cache_bytes(41));
            let foreign = whole.forward(&exec, &[1], &mut fork, LogitRows::Last);
            assert!(matches!(foreign, Err(ModelError::Cache(_))), "a cache of the model with all layers");

            let batch = TokenBatch::one(&tokens);
            let run = |model: &Model| {
                let mut tape = Tape::default();
                let hidden = model.forward_batch(&exec, &batch, &mut NoObserver, Some(&mut tape)).unwrap();
                let mut grads =
                    Grads::zeros(&model.params, &model.params.iter().map(|(id, _)| id).collect::<Vec<_>>());
                model.backward(&exec, &batch, &tape, &hidden, &mut grads, &mut NoObserver, false);
                let embedding = model.params.id("model.embed_tokens.weight").unwrap();
                let grad = grads.get(embedding).unwrap().to_vec();
                (hidden, grad, tape)
            };
            let ((hidden, grad, tape), (expected, expected_grad, _)) = (run(&skipping), run(&twin));
            assert_eq!(hidden, expected);
            assert_eq!(grad, expected_grad);
            assert_eq!(tape.residual(layer), tape.residual(layer + 1), "what goes in comes out");
        }
    }
}
