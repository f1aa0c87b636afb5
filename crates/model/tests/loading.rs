//! Checkpoints on disk: what is saved comes back and goes on as before; what does not fit is refused by name.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Share, base, configs, engine_of, exec, hybrid, plan, specs, tokens};
use kernels::kv::KvType;
use kernels::quant::Dtype;
use recurformer_model::{
    Engine, EngineOptions, HeadPlan, LogitRows, Model, ModelConfig, ModelError, NoObserver, RecurrentKind,
    TokenBatch, narrow,
};
use serde_json::json;
use std::path::Path;
use weights::Checkpoint;

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn tensors_of(model: &Model) -> Tensors {
    model.params.iter().map(|(_, p)| (p.name.clone(), p.shape.clone(), p.data().to_vec())).collect()
}

fn save(dir: &Path, config: &ModelConfig, tensors: &Tensors, plan: Option<&str>) {
    let json = json!({
        "model_type": config.family.model_type(),
        "architectures": [config.family.architecture()],
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    });
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    if let Some(plan) = plan {
        std::fs::write(dir.join("head_plan.json"), plan).unwrap();
    }
    let views: Vec<_> = tensors.iter().map(|(n, s, v)| (n.as_str(), s.as_slice(), v.as_slice())).collect();
    weights::safetensors::write_f32(&dir.join("model.safetensors"), &views, &Default::default()).unwrap();
}

fn load(dir: &Path) -> Result<Model, ModelError> {
    Model::load(&Checkpoint::open(dir)?)
}

#[test]
fn save_load_continue() {
    for config in &configs()[..2] {
        let base = base(config, 1);
        let mut models: Vec<Model> = specs(config.head_dim)
            .into_iter()
            .map(|s| hybrid(&base, plan(config, s, Share::Some), 2))
            .collect();
        models.push(base);
        for model in models {
            let dir = tempfile::tempdir().unwrap();
            let converted = model.plan.converted() > 0;
            save(dir.path(), config, &tensors_of(&model), converted.then(|| model.plan.to_json()).as_deref());
            let loaded = load(dir.path()).unwrap();
            let (bos_token_id, eos_token_ids) =
                (loaded.config.bos_token_id, loaded.config.eos_token_ids.clone());
            assert_eq!(loaded.config, ModelConfig { bos_token_id, eos_token_ids, ..config.clone() });
            assert_eq!(loaded.plan, model.plan);
            let (exec, tokens) = (exec(), tokens(30, 3));
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let engines = [
                engine_of(&model),
                engine_of(&loaded),
                Engine::load(&exec, &checkpoint, EngineOptions::EXACT).unwrap(),
            ];
            let mut cache = engines[0].new_cache();
            engines[0].forward(&exec, &tokens[..17], &mut cache, LogitRows::None).unwrap();
            let [expected, found, packed] = engines.map(|engine| {
                engine.forward(&exec, &tokens[17..], &mut cache.clone(), LogitRows::All).unwrap()
            });
            assert_eq!(found, expected, "a loaded model continues a cache bit for bit");
            assert_eq!(packed, expected, "packing the stored tensors gives the same bits");
            if converted {
                let layer = 0;
                assert_eq!(loaded.head_tensors(layer, 1), model.head_tensors(layer, 1));
                assert_eq!(loaded.head_tensors(layer, 0), None);
            }
        }
    }
}

/// Everything converted, with scores that rank the groups across layers.
fn everything(config: &ModelConfig, spec: recurformer_model::MixerSpec) -> HeadPlan {
    let mut plan = plan(config, spec, Share::All);
    for (l, layer) in plan.layers.iter_mut().enumerate() {
        for (g, group) in layer.groups.iter_mut().enumerate() {
            group.score = Some(((5 * l + 3 * g) % 7) as f64);
        }
    }
    plan
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let exec = exec();
    let batch = TokenBatch::one(tokens);
    model.logits(&exec, &model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap())
}

#[test]
fn a_hybrid_at_a_lower_beta_is_the_hybrid_of_that_plan() {
    let (exec, tokens) = (exec(), tokens(30, 3));
    let small = EngineOptions { weights: Some(Dtype::Q8_0), kv_type: KvType::F16 };
    for config in &configs()[..2] {
        let base = base(config, 1);
        for spec in specs(config.head_dim) {
            let mut wide = hybrid(&base, everything(config, spec), 2);
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), config, &tensors_of(&wide), Some(&wide.plan.to_json()));
            for beta in [0.0, 0.4, 0.7, 1.0] {
                let plan = wide.plan.at_beta(beta).unwrap();
                assert_eq!(plan.converted(), (beta * plan.total() as f64).round() as usize);
                let expected =
                    base.with_plan(plan.clone(), &mut |l, g| Ok(wide.head_tensors(l, g).unwrap())).unwrap();
                let own = tempfile::tempdir().unwrap();
                save(own.path(), config, &tensors_of(&expected), Some(&plan.to_json()));

                let open = || narrow(Checkpoint::open(dir.path()).unwrap(), beta).unwrap();
                let loaded = Model::load(&open()).unwrap();
                assert_eq!(loaded.plan, plan);
                assert_eq!(loaded.params.len(), expected.params.len(), "heads without use are not read");
                let values = logits(&expected, &tokens);
                assert_eq!(logits(&loaded, &tokens), values, "{spec}, beta {beta}");
                if beta == 0.0 {
                    assert_eq!(values, logits(&base, &tokens));
                }
                let before = logits(&wide, &tokens);
                let mut resolved = wide.resolve(plan.clone()).unwrap();
                wide.swap_plan(&mut resolved);
                assert_eq!((&wide.plan, logits(&wide, &tokens)), (&plan, values));
                wide.swap_plan(&mut resolved);
                assert_eq!((resolved.plan(), logits(&wide, &tokens)), (&plan, before));

                for options in [EngineOptions::EXACT, EngineOptions::default(), small] {
                    let there = Checkpoint::open(own.path()).unwrap();
                    let [expected, found] = [&there, &open()].map(|checkpoint| {
                        let engine = Engine::load(&exec, checkpoint, options).unwrap();
                        let mut cache = engine.new_cache();
                        let logits = engine.forward(&exec, &tokens, &mut cache, LogitRows::All).unwrap();
                        (logits, cache.bytes(), engine.cache_bytes(1000), engine.weight_bytes())
                    });
                    assert_eq!(found, expected, "{spec}, beta {beta}");
                }
            }
        }
    }
}

#[test]
fn budgets_that_a_checkpoint_cannot_meet() {
    let config = &configs()[0];
    let base = base(config, 1);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), config, &tensors_of(&base), None);
    let refused = |beta| narrow(Checkpoint::open(dir.path()).unwrap(), beta).err().unwrap().to_string();
    assert!(refused(0.5).contains("is a base model") && refused(0.0).contains("\nhint: "));
    let model = hybrid(&base, plan(config, specs(config.head_dim)[1], Share::Some), 2);
    save(dir.path(), config, &tensors_of(&model), Some(&model.plan.to_json()));
    assert!(refused(0.7).contains("converts 2"), "{}", refused(0.7));
    assert!(refused(0.2).contains("no score"));

    // A tensor that not even the wider plan asks for stays an error.
    let wide = hybrid(&base, everything(config, specs(config.head_dim)[1]), 2);
    let mut tensors = tensors_of(&wide);
    tensors.push(("model.layers.0.self_attn.recurrent.7.d_skip".into(), vec![2], vec![0.0; 2]));
    save(dir.path(), config, &tensors, Some(&wide.plan.to_json()));
    let narrowed = narrow(Checkpoint::open(dir.path()).unwrap(), 0.4).unwrap();
    assert!(matches!(Model::load(&narrowed).err().unwrap(), ModelError::Unexpected { .. }));
    // What is left out is not there.
    let hidden = wide.head_param_ids(0, 0).first().map(|&id| wide.params.get(id).name.clone()).unwrap();
    assert_eq!(narrowed.tensors.info(&hidden), None);
    assert!(narrowed.tensors.read_f32(&hidden).is_err() && narrowed.tensors.stored(&hidden).is_err());
}

/// Replaced by NaN in the file.
const BECOMES_NAN: f32 = 1234.5678;

fn refused(change: impl FnOnce(&mut Tensors, &mut String)) -> ModelError {
    let config = &configs()[0];
    let spec = specs(config.head_dim)[1];
    assert_eq!(spec.recurrent, RecurrentKind::Mamba2);
    let model = hybrid(&base(config, 1), plan(config, spec, Share::Some), 2);
    let (mut tensors, mut plan) = (tensors_of(&model), model.plan.to_json());
    change(&mut tensors, &mut plan);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), config, &tensors, Some(&plan));
    // The writer refuses NaN, so a hostile file is made by hand.
    let file = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    for value in bytes.chunks_exact_mut(4).filter(|b| **b == BECOMES_NAN.to_le_bytes()) {
        value.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    std::fs::write(&file, bytes).unwrap();
    load(dir.path()).err().expect("should be refused")
}

#[test]
fn misfits_are_named() {
    let head = "model.layers.0.self_attn.recurrent.1.d_skip";
    let error = refused(|t, _| t.retain(|(n, ..)| n != head));
    assert!(
        matches!(&error, ModelError::Param { name, found, .. } if name == head && found == "nothing"),
        "{error}"
    );

    let error = refused(|t, _| {
        let norm = t.iter_mut().find(|(n, ..)| n == "model.norm.weight").unwrap();
        (norm.1, norm.2) = (vec![2], vec![1.0; 2]);
    });
    let text = error.to_string();
    assert!(text.contains("model.norm.weight") && text.contains("[24]") && text.contains("[2]"), "{text}");

    // The plan keeps this group, so its tensors would be left out.
    let extra = "model.layers.2.self_attn.recurrent.0.d_skip";
    let error = refused(|t, _| t.push((extra.into(), vec![2], vec![0.0; 2])));
    assert!(matches!(&error, ModelError::Unexpected { name } if name == extra), "{error}");

    let error = refused(|_, plan| *plan = plan.replace("\"layers\": 3", "\"layers\": 30"));
    assert!(matches!(&error, ModelError::Plan(text) if text.contains("30")), "{error}");

    let error = refused(|t, _| t.iter_mut().find(|(n, ..)| n == head).unwrap().2[1] = BECOMES_NAN);
    assert!(error.to_string().contains(head), "{error}");
}

#[test]
fn old_rotary_buffers_are_ignored() {
    let config = &configs()[0];
    let mut tensors = tensors_of(&base(config, 1));
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![3], vec![1.0; 3]));
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), config, &tensors, None);
    assert_eq!(load(dir.path()).unwrap().plan.converted(), 0);
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let config = &configs()[0];
    let base = base(config, 1);
    let plan = plan(config, specs(config.head_dim)[1], Share::All);
    let model = hybrid(&base, plan.clone(), 2);
    let attempt = |change: &dyn Fn(&mut Vec<Vec<f32>>)| {
        let result = base.with_plan(plan.clone(), &mut |l, g| {
            let mut tensors = model.head_tensors(l, g).unwrap();
            if (l, g) == (2, 1) {
                change(&mut tensors.values);
            }
            Ok(tensors)
        });
        result.err().map(|e| e.to_string())
    };
    assert_eq!(attempt(&|_| ()), None);
    let prefix = "model.layers.2.self_attn.recurrent.1.";
    for (change, word) in [
        (&(|v: &mut Vec<Vec<f32>>| v[0].truncate(5)) as &dyn Fn(&mut Vec<Vec<f32>>), "5 values"),
        (&|v| v.truncate(3), "nothing"),
        (&|v| v[1][2] = f32::INFINITY, "non-finite value at index 2"),
    ] {
        let text = attempt(change).expect(word);
        assert!(text.contains(prefix) && text.contains(word), "{text}");
    }
    assert!(attempt(&|v| v.push(vec![])).unwrap().contains("layer 2 group 1"));
}
