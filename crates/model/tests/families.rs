//! Every family and both config forms against transformers: logits at every position and gradients of every parameter
//! (`tests/data/<family>/`, made by `testdata/make_goldens.py`).
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kernels::Exec;
use kernels::loss::cross_entropy;
use recurformer_model::{
    Engine, EngineOptions, Grads, LogitRows, Model, ModelConfig, NoObserver, ParamId, Tape, TokenBatch,
};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use weights::Checkpoint;

/// Largest error of a logit, as a share of the standard deviation of all logits: the project's exactness goal.
const LOGIT_TOLERANCE: f64 = 1e-4;
/// Largest error of a gradient entry, as a share of the largest entry of its tensor (f32 rounding gives about 1e-6).
const GRAD_TOLERANCE: f64 = 1e-4;
/// Largest error of a sampled gradient entry, as a share of its tensor's root mean square; a largest entry is up to some
/// tens of that, so this is the same rounding seen on another scale.
const SAMPLE_TOLERANCE: f64 = 1e-3;
/// Relative error of gradient norms and of the loss: they are sums over many entries of rounding around 1e-6.
const SUM_TOLERANCE: f64 = 1e-5;

const FAMILIES: [&str; 6] = ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3"];
const FULL_GRADIENTS: [&str; 2] = ["llama3", "qwen3"];

struct Golden {
    folder: PathBuf,
    facts: Value,
    tensors: Vec<u8>,
}

impl Golden {
    fn open(family: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(family);
        let facts = read_json(&folder.join("goldens.json"));
        let tensors = std::fs::read(folder.join("goldens.safetensors")).unwrap();
        Self { folder, facts, tensors }
    }
    fn tensor(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = file.tensor(name).unwrap();
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    fn model(&self) -> Model {
        Model::load(&Checkpoint::open(&self.folder).unwrap()).unwrap()
    }
    fn batch(&self) -> TokenBatch {
        let rows: Vec<Vec<u32>> = serde_json::from_value(self.facts["tokens"].clone()).unwrap();
        rows.iter().map(Vec::as_slice).collect()
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn std_dev(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Fails on NaN as well.
fn check_within(what: &str, found: &[f32], expected: &[f32], limit: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let close = (f64::from(*f) - f64::from(*e)).abs() <= limit;
        assert!(close, "{what}[{i}]: found {f}, expected {e} within {limit}");
    }
}

#[test]
fn both_config_forms_mean_the_same() {
    for family in FAMILIES {
        let golden = Golden::open(family);
        let one = ModelConfig::from_hf_json(&read_json(&golden.folder.join("config.json"))).unwrap();
        let other = ModelConfig::from_hf_json(&read_json(&golden.folder.join("config.alt.json"))).unwrap();
        assert_eq!(one, other, "{family}");
    }
}

#[test]
fn logits_match_transformers() {
    let exec = Exec::new(2).unwrap();
    for family in FAMILIES {
        let golden = Golden::open(family);
        let (model, batch) = (golden.model(), golden.batch());
        let expected = golden.tensor("logits");
        let limit = LOGIT_TOLERANCE * std_dev(&expected);

        let hidden = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
        check_within(&format!("{family}, batch"), &model.logits(&exec, &hidden), &expected, limit);

        let engine = Engine::from_model(&exec, &model, EngineOptions::EXACT).unwrap();
        let per_sequence = expected.len() / batch.sequences();
        let sequences = batch.iter().zip(expected.chunks(per_sequence));
        for (tokens, expected) in sequences {
            let mut cache = engine.new_cache();
            let found = engine.forward(&exec, tokens, &mut cache, LogitRows::All).unwrap();
            check_within(&format!("{family}, cached"), &found, expected, limit);

            let mut cache = engine.new_cache();
            for (token, expected) in tokens.iter().zip(expected.chunks(model.config.vocab)) {
                let found = engine.forward(&exec, &[*token], &mut cache, LogitRows::Last).unwrap();
                check_within(&format!("{family}, token by token"), &found, expected, limit);
            }
        }
    }
}

/// Loss and gradients of every parameter of the mean next-token cross-entropy over all sequences of the batch.
fn loss_and_gradients(exec: &Exec, model: &Model, batch: &TokenBatch) -> (f64, Grads) {
    let ids: Vec<ParamId> = model.params.iter().map(|(id, _)| id).collect();
    let mut grads = Grads::zeros(&model.params, &ids);
    let mut tape = Tape::default();
    let hidden = model.forward_batch(exec, batch, &mut NoObserver, Some(&mut tape)).unwrap();
    let logits = model.logits(exec, &hidden);
    let mut targets = Vec::with_capacity(batch.rows());
    for tokens in batch.iter() {
        targets.extend_from_slice(&tokens[1..]);
        targets.push(u32::MAX); // nothing follows the last token
    }
    let scored = (batch.rows() - batch.sequences()) as f64;
    let (mut nll, mut dlogits) = (vec![0.0; targets.len()], vec![0.0; logits.len()]);
    let weight = (1.0 / scored) as f32;
    cross_entropy(exec, &logits, model.config.vocab, &targets, weight, &mut nll, Some(&mut dlogits));
    let dhidden = model.logits_backward(exec, &hidden, &dlogits, None, &mut grads);
    model.backward(exec, batch, &tape, &dhidden, &mut grads, &mut NoObserver, false);
    (nll.iter().map(|&v| f64::from(v)).sum::<f64>() / scored, grads)
}

#[test]
fn gradients_match_transformers() {
    let exec = Exec::new(2).unwrap();
    for family in FAMILIES {
        let golden = Golden::open(family);
        let model = golden.model();
        let (loss, grads) = loss_and_gradients(&exec, &model, &golden.batch());
        let expected_loss = golden.facts["loss"].as_f64().unwrap();
        assert!(
            (loss - expected_loss).abs() <= SUM_TOLERANCE * expected_loss,
            "{family}: {loss}, {expected_loss}"
        );

        let expected = golden.facts["gradients"].as_object().unwrap();
        assert_eq!(model.params.len(), expected.len(), "{family}: number of parameters");
        for (name, facts) in expected {
            let what = format!("{family}, gradient of {name}");
            let id = model.params.id(name).unwrap_or_else(|| panic!("{family}: no parameter {name}"));
            let grad = grads.get(id).unwrap();
            let norm = grad.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let expected_norm = facts["norm"].as_f64().unwrap();
            let close = (norm - expected_norm).abs() <= SUM_TOLERANCE * expected_norm;
            assert!(close, "{what}: norm {norm}, expected {expected_norm}");

            let index: Vec<usize> = serde_json::from_value(facts["index"].clone()).unwrap();
            let value: Vec<f32> = serde_json::from_value(facts["value"].clone()).unwrap();
            let found: Vec<f32> = index.iter().map(|&i| grad[i]).collect();
            let rms = expected_norm / (grad.len() as f64).sqrt();
            check_within(&format!("{what} at {index:?}"), &found, &value, SAMPLE_TOLERANCE * rms);

            if FULL_GRADIENTS.contains(&family) {
                let expected = golden.tensor(&format!("grad.{name}"));
                let largest = expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
                check_within(&what, grad, &expected, GRAD_TOLERANCE * f64::from(largest));
            }
        }
    }
}
