//! Ten optimiser steps of a tiny model against PyTorch: losses, gradient norms, and the logits afterwards.

use kernels::Exec;
use model::{Model, NoObserver, TokenBatch};
use recurformer_train::heal::{HealOptions, Stage, Trainable, Trainer};
use serde::Deserialize;
use std::path::Path;
use weights::Checkpoint;
use weights::safetensors::read_all;

#[derive(Deserialize)]
struct Golden {
    model: String,
    optimizer: Optimizer,
    clip_global_norm: f32,
    tokens: Vec<Vec<Vec<u32>>>,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
}

#[derive(Deserialize)]
struct Optimizer {
    lr: f32,
    betas: [f32; 2],
    weight_decay: f32,
}

/// Both sides compute in f32; ten steps of Adam amplify differences of the last bit, which is 1e-7.
const LOSS_TOLERANCE: f64 = 2e-5;
/// Norms of gradients carry the rounding of a backward pass.
const NORM_TOLERANCE: f64 = 1e-4;
/// Share of the logits' standard deviation after ten steps.
const LOGIT_TOLERANCE: f32 = 2e-3;

fn batch(sequences: &[Vec<u32>]) -> TokenBatch {
    sequences.iter().map(Vec::as_slice).collect()
}

#[test]
fn ten_steps_agree_with_pytorch() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden: Golden =
        serde_json::from_slice(&std::fs::read(here.join("tests/data/ten_steps.json")).unwrap()).unwrap();
    let exec = Exec::new(2).unwrap();
    let base = Model::load(&Checkpoint::open(&here.join("../..").join(&golden.model)).unwrap()).unwrap();
    let mut model = base.clone();
    let options = HealOptions {
        stage: Stage::Continue,
        trainable: Trainable::All,
        base_lr_scale: 1.0,
        betas: golden.optimizer.betas.into(),
        weight_decay: golden.optimizer.weight_decay,
        clip: golden.clip_global_norm,
        ..HealOptions::default()
    };
    let mut trainer = Trainer::new(&exec, Some(&base), &model, &options).unwrap();
    for (step, sequences) in golden.tokens.iter().enumerate() {
        let report = trainer.step(&mut model, &[batch(sequences)], golden.optimizer.lr).unwrap();
        let (loss, norm) = (golden.losses[step], golden.gradient_norms[step]);
        assert!(
            (report.loss - loss).abs() < LOSS_TOLERANCE * loss,
            "step {step}: loss {} and {loss}",
            report.loss
        );
        assert!(
            (report.grad_norm - norm).abs() < NORM_TOLERANCE * norm,
            "step {step}: norm {} and {norm}",
            report.grad_norm
        );
    }
    let (tensors, _) = read_all(&here.join("tests/data/ten_steps.safetensors")).unwrap();
    let expected = &tensors.iter().find(|t| t.name == "final_logits").unwrap().values;
    let hidden = model.forward_batch(&exec, &batch(&golden.tokens[0]), &mut NoObserver, None).unwrap();
    let logits = model.logits(&exec, &hidden);
    assert_eq!(logits.len(), expected.len());
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let deviation = (expected.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
    let worst = logits.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < LOGIT_TOLERANCE * deviation, "logits differ by {worst}, their deviation is {deviation}");
}
