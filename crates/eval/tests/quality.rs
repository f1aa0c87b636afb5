//! Scores of a tiny model against values worked out from transformers' frozen logits.
#![allow(clippy::unwrap_used)]

use kernels::Exec;
use model::{Engine, EngineOptions, GroupMixer, HeadPlan, MixerSpec, Model, RecurrentKind, Silent};
use recurformer_eval::bench::{BenchOptions, bench};
use recurformer_eval::quality::evaluate;
use recurformer_eval::text::{WindowOptions, windows};
use std::path::Path;
use train::data::Document;
use weights::Checkpoint;

/// The logits agree within 1e-4 of their standard deviation; a mean of log-probabilities cannot be further off.
const NLL_TOLERANCE: f64 = 1e-4;

struct Golden {
    model: Model,
    /// Two sequences.
    tokens: Vec<Vec<u32>>,
    /// `[2, 33, vocab]`.
    logits: Vec<f32>,
}

fn golden() -> Golden {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
    let model = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("goldens.json")).unwrap()).unwrap();
    let tokens = serde_json::from_value(json["tokens"].clone()).unwrap();
    let (tensors, _) = weights::safetensors::read_all(&dir.join("goldens.safetensors")).unwrap();
    let logits = tensors.into_iter().find(|t| t.name == "logits").unwrap().values;
    Golden { model, tokens, logits }
}

fn engine(model: &Model) -> Engine {
    Engine::from_model(&Exec::new(1).unwrap(), model, EngineOptions::EXACT).unwrap()
}

fn documents(tokens: &[Vec<u32>]) -> Vec<Document> {
    tokens
        .iter()
        .enumerate()
        .map(|(i, t)| Document { source: format!("file {i}"), tokens: t.clone() })
        .collect()
}

fn options(context: usize) -> WindowOptions {
    WindowOptions { context, stride: None, bos: None, max_tokens: None }
}

/// `−log softmax(row)[target]` in f64.
fn nll(row: &[f32], target: u32) -> f64 {
    let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln() - f64::from(row[target as usize])
}

#[test]
fn perplexity_is_that_of_the_frozen_logits() {
    let Golden { model, tokens, logits } = golden();
    let exec = Exec::new(2).unwrap();
    let texts = windows(&documents(&tokens), &options(64)).unwrap();
    let quality = evaluate(&exec, None, &[&engine(&model)], &texts, &mut Silent).unwrap().remove(0);
    let vocab = model.config.vocab;
    let mut log_ppl = 0.0;
    for (s, (sequence, file)) in tokens.iter().zip(&quality.files).enumerate() {
        let rows = sequence.len();
        let want: f64 =
            (1..rows).map(|t| nll(&logits[(s * rows + t - 1) * vocab..][..vocab], sequence[t])).sum::<f64>()
                / (rows - 1) as f64;
        assert!((file.nll - want).abs() < NLL_TOLERANCE, "{} {want}", file.nll);
        assert_eq!(file.tokens, rows - 1, "every token but the first is scored");
        assert!((file.ppl - file.nll.exp()).abs() < 1e-9 && file.kl.is_none());
        log_ppl += want / 2.0;
    }
    assert!((quality.overall.ppl.ln() - log_ppl).abs() < NLL_TOLERANCE, "geometric mean over files");
}

#[test]
fn a_model_does_not_diverge_from_itself_and_a_windowed_one_does() {
    let Golden { model, tokens, .. } = golden();
    let exec = Exec::new(2).unwrap();
    let mut plan = HeadPlan::empty(&model.config);
    plan.beta = 1.0;
    plan.mixer = Some(MixerSpec {
        recurrent: RecurrentKind::None,
        window: 2,
        sinks: 0,
        d_state: 0,
        d_conv: 0,
        dropped: Default::default(),
    });
    plan.layers.iter_mut().flat_map(|l| &mut l.groups).for_each(|g| g.mixer = GroupMixer::Recurrent);
    let windowed = model.with_plan(plan, &mut |_, _| Ok(Default::default())).unwrap();
    let texts = windows(&documents(&tokens), &options(33)).unwrap();
    let [base, copy, windowed] = [&model, &model, &windowed].map(engine);
    let results = evaluate(&exec, Some(&base), &[&base, &copy, &windowed], &texts, &mut Silent).unwrap();
    for same in &results[..2] {
        assert_eq!((same.overall.kl, same.overall.top1_agreement), (Some(0.0), Some(1.0)));
    }
    assert_eq!(results[0], results[1], "the base by reference and by copy");
    let other = &results[2].overall;
    assert!(other.kl.unwrap() > 1e-3 && other.top1_agreement.unwrap() < 1.0, "{other:?}");
    assert!((other.ppl - results[0].overall.ppl).abs() > 1e-3);
}

#[test]
fn bench_reports_the_cache_that_the_model_predicts() {
    let model = engine(&golden().model);
    let exec = Exec::new(1).unwrap();
    let options = BenchOptions { depths: vec![20, 5, 20], decode_steps: 3, chunk: 8, seed: 0 };
    let results = bench(&exec, &model, &options, &mut Silent).unwrap();
    assert_eq!(results.iter().map(|r| r.depth).collect::<Vec<_>>(), [5, 20]);
    for r in &results {
        assert_eq!(r.cache_bytes, model.cache_bytes(r.depth));
        assert!(r.prefill_tok_s > 0.0 && r.decode_tok_s > 0.0);
    }
    assert!(bench(&exec, &model, &BenchOptions { depths: vec![0], ..options }, &mut Silent).is_err());
}

#[test]
fn models_of_other_vocabularies_are_not_compared() {
    let Golden { model, tokens, .. } = golden();
    let texts = windows(&documents(&tokens), &options(64)).unwrap();
    let (model, mut other) = (engine(&model), engine(&model));
    other.config.vocab += 1;
    let exec = Exec::new(1).unwrap();
    let error = evaluate(&exec, Some(&other), &[&model], &texts, &mut Silent).unwrap_err().to_string();
    assert!(error.contains(&(model.config.vocab + 1).to_string()) && error.contains("hint:"), "{error}");
}
