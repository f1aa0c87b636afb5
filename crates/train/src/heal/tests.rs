//! Healing of tiny hybrids: the divergence falls, runs resume to the bit, NaN stops them, and low-rank gradients are right.

use super::*;
use crate::data::Document;
use crate::testing::{
    DieAfter, StopAfter, documents_of_odd_lengths, fresh_bank, killed, mixer_specs, random_documents,
    tiny_config, tiny_model,
};
use model::{GroupMixer, HeadPlan, MixerSpec, RecurrentKind, Silent};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

mod elastic;
mod in_backward;
mod packed;

const SEQ: usize = 20;
const VOCAB: u32 = 60;

/// Share of the starting divergence that training has to get below; a random base is hard to imitate with half of its attention.
const LEARNT: f64 = 0.95;
/// The same for heads that start from random weights instead of the base's projections.
const LEARNT_FROM_RANDOM: f64 = 0.98;

fn stream() -> SequenceStream {
    SequenceStream::new(&random_documents(6, 100, VOCAB, 1), SEQ, 7).unwrap()
}

/// Enough text not to be learnt by heart.
fn long_stream() -> SequenceStream {
    SequenceStream::new(&random_documents(60, 100, VOCAB, 1), SEQ, 7).unwrap()
}

fn hybrid_of(base: &Model, spec: MixerSpec) -> Model {
    let mut plan = HeadPlan::empty(&base.config);
    plan.mixer = Some(spec);
    for layer in &mut plan.layers {
        layer.groups[1].mixer = GroupMixer::Recurrent;
    }
    plan.beta = 0.5;
    let bank = fresh_bank(base, spec, 11);
    base.with_plan(plan, &mut |l, g| Ok(bank.groups[l][g].clone())).unwrap()
}

fn spec(recurrent: RecurrentKind) -> MixerSpec {
    mixer_specs(8).into_iter().find(|s| s.recurrent == recurrent && s.window > 0).unwrap()
}

fn options(dir: &Path, steps: u64) -> HealOptions {
    HealOptions {
        tokens: steps * 2 * SEQ as u64,
        batch: 1,
        accumulate: 2,
        warmup: 2,
        state_dir: dir.join("heal"),
        save_every_s: u64::MAX,
        ..HealOptions::default()
    }
}

fn values(model: &Model) -> Vec<(String, Vec<f32>)> {
    model.params.iter().map(|(_, p)| (p.name.clone(), p.data().to_vec())).collect()
}

fn changed(before: &Model, after: &Model) -> Vec<String> {
    let pairs = before.params.iter().zip(after.params.iter());
    pairs.filter(|((_, a), (_, b))| a.data() != b.data()).map(|((_, p), _)| p.name.clone()).collect()
}

/// Mean KL to the base on some sequences.
fn divergence(exec: &Exec, base: &Model, hybrid: &Model) -> f64 {
    let options = HealOptions { trainable: Trainable::All, ..HealOptions::default() };
    let mut trainer = Trainer::new(exec, Some(base), hybrid, &options).unwrap();
    let mut data = SequenceStream::new(&random_documents(4, 100, VOCAB, 99), SEQ, 1).unwrap();
    trainer.accumulate(hybrid, &[data.next_batch(8)]).unwrap().kl.unwrap()
}

#[test]
fn distillation_lowers_the_divergence_of_every_mixer() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    for spec in mixer_specs(8) {
        let dir = tempfile::tempdir().unwrap();
        let mut hybrid = hybrid_of(&base, spec);
        let before = divergence(&exec, &base, &hybrid);
        let options = HealOptions { lr: 1e-2, ..options(dir.path(), 120) };
        let metrics =
            heal(&exec, Some(&base), &mut hybrid, &mut long_stream(), &options, &mut Silent).unwrap();
        let after = divergence(&exec, &base, &hybrid);
        let limit = if spec.recurrent == RecurrentKind::Mamba { LEARNT_FROM_RANDOM } else { LEARNT };
        assert!(after < limit * before, "{spec:?}: {before} to {after}");
        assert_eq!(metrics.len(), 120);
        assert_eq!(metrics[119].tokens, options.tokens);
        assert!(metrics.iter().all(|m| m.loss.is_finite() && m.kl.is_some()));
    }
}

#[test]
fn checkpointed_activations_change_no_bit() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    for spec in mixer_specs(8) {
        let train = |checkpointed_layers| {
            let dir = tempfile::tempdir().unwrap();
            let mut hybrid = hybrid_of(&base, spec);
            let trainable = Trainable::All;
            let options = HealOptions { trainable, checkpointed_layers, ..options(dir.path(), 3) };
            heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, &mut Silent).unwrap();
            values(&hybrid)
        };
        let expected = train(0);
        for layers in [1, 2, usize::MAX] {
            assert!(train(layers) == expected, "{spec:?}, {layers} layers");
        }
    }
}

#[test]
fn moments_in_bf16_train_as_well() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    let start = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let train = |moments| {
        let dir = tempfile::tempdir().unwrap();
        let mut hybrid = start.clone();
        let options = HealOptions { lr: 1e-2, moments, ..options(dir.path(), 120) };
        heal(&exec, Some(&base), &mut hybrid, &mut long_stream(), &options, &mut Silent).unwrap();
        (divergence(&exec, &base, &hybrid), values(&hybrid))
    };
    let ((full, full_values), (half, half_values)) = (train(MomentType::F32), train(MomentType::Bf16));
    assert!(half < 1.02 * full, "{half} instead of {full}");
    assert!(full_values != half_values);
}

#[test]
fn each_setting_trains_what_it_says() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    let start = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let run = |trainable, stage| {
        let dir = tempfile::tempdir().unwrap();
        let mut hybrid = start.clone();
        let options = HealOptions { trainable, stage, ..options(dir.path(), 3) };
        heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, &mut Silent).unwrap();
        changed(&start, &hybrid)
    };
    let distill = Stage::Distill { kl: 1.0, ce: 0.0 };
    let is_head = |n: &String| n.contains("recurrent");
    assert!(run(Trainable::Heads, distill).iter().all(is_head));
    let norms = run(Trainable::HeadsAndNorms, Stage::Continue);
    assert!(norms.iter().all(|n| is_head(n) || n.ends_with("norm.weight")));
    assert_eq!(norms.iter().filter(|n| n.ends_with("norm.weight")).count(), 5);
    let lora = run(Trainable::Lora(2), distill);
    assert_eq!(lora.iter().filter(|n| !is_head(n)).count(), 8, "{lora:?}");
    assert!(lora.iter().all(|n| is_head(n) || n.contains("o_proj") || n.contains("mlp")));
    let all = run(Trainable::All, Stage::Continue);
    assert!(all.len() > lora.len() && all.iter().any(|n| n == "lm_head.weight"));
    // What does not train is still shared with the base.
    assert!(values(&base) == values(&tiny_model(&tiny_config(), 1)));
}

#[test]
fn interrupted_or_killed_it_ends_with_the_same_bits() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    let distill = Stage::Distill { kl: 0.9, ce: 0.1 };
    for (trainable, stage, moments) in [
        (Trainable::Heads, distill, MomentType::F32),
        (Trainable::HeadsAndNorms, Stage::Continue, MomentType::Bf16),
        (Trainable::Lora(3), distill, MomentType::F32),
        (Trainable::All, Stage::Continue, MomentType::F32),
        (Trainable::All, distill, MomentType::Bf16),
    ] {
        let start = hybrid_of(&base, spec(RecurrentKind::GatedDelta));
        let dir = tempfile::tempdir().unwrap();
        let whole_options = HealOptions { trainable, stage, moments, ..options(dir.path(), 9) };
        let mut whole = start.clone();
        let whole_metrics =
            heal(&exec, Some(&base), &mut whole, &mut stream(), &whole_options, &mut Silent).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let options = HealOptions {
            trainable,
            stage,
            moments,
            resume: true,
            save_every_steps: Some(2),
            ..options(dir.path(), 9)
        };
        let run = |progress: &mut dyn Progress| {
            let mut hybrid = start.clone();
            heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, progress).map(|m| (hybrid, m))
        };
        killed(|| run(&mut DieAfter(1)));
        assert!(matches!(run(&mut StopAfter::new(3)), Err(TrainError::Interrupted)));
        killed(|| run(&mut DieAfter(2)));
        assert!(matches!(run(&mut StopAfter::new(0)), Err(TrainError::Interrupted)));
        let (resumed, metrics) = run(&mut Silent).unwrap();
        assert!(values(&resumed) == values(&whole), "{trainable:?}, {moments:?}");
        let strip = |m: &[HealMetric]| {
            m.iter().map(|m| HealMetric { tokens_per_s: 0.0, ..m.clone() }).collect::<Vec<_>>()
        };
        assert_eq!(strip(&metrics), strip(&whole_metrics));
        // A finished run is not repeated.
        assert!(values(&run(&mut Silent).unwrap().0) == values(&whole));
    }
}

#[test]
fn a_changed_setting_is_refused() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    let start = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let dir = tempfile::tempdir().unwrap();
    let options = HealOptions { resume: true, ..options(dir.path(), 4) };
    let run = |options: &HealOptions, start: &Model, progress: &mut dyn Progress| {
        heal(&exec, Some(&base), &mut start.clone(), &mut stream(), options, progress)
    };
    assert!(matches!(run(&options, &start, &mut StopAfter::new(2)), Err(TrainError::Interrupted)));
    let other = HealOptions { clip: 2.0, ..options.clone() };
    assert!(run(&other, &start, &mut Silent).unwrap_err().to_string().contains("`clip`"));
    let another = hybrid_of(&tiny_model(&tiny_config(), 3), spec(RecurrentKind::Mamba2));
    assert!(run(&options, &another, &mut Silent).unwrap_err().to_string().contains("`hybrid`"));
    run(&HealOptions { lr: 1e-4, ..options }, &start, &mut Silent).unwrap();
}

/// A base whose loss is NaN for one token, documents with it, and the first step, of `per_step` items each, that reads it.
fn poisoned(per_step: usize) -> (Model, Vec<Document>, u64) {
    let mut base = tiny_model(&tiny_config(), 5);
    let poison = 60;
    let id = base.params.id("model.embed_tokens.weight").unwrap();
    let width = base.config.d_model;
    base.params.data_mut(id)[poison * width..(poison + 1) * width].fill(0.0);
    base.config.rms_eps = 0.0;
    let mut documents = random_documents(6, 100, VOCAB, 1);
    documents[3].tokens[50] = poison as u32;
    let mut data = SequenceStream::new(&documents, SEQ, 7).unwrap();
    let bad = (1..).find(|_| data.next_batch(per_step).tokens().contains(&(poison as u32))).unwrap();
    assert!((2..15).contains(&bad), "the seed puts the poison at step {bad}");
    (base, documents, bad)
}

#[test]
fn nan_stops_before_the_update_and_keeps_the_last_state() {
    let exec = Exec::new(2).unwrap();
    let (base, documents, bad) = poisoned(2);
    let stream = || SequenceStream::new(&documents, SEQ, 7).unwrap();
    let start = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), 30);
    let mut hybrid = start.clone();
    let error = heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, &mut Silent).unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { step, .. } if step == bad), "{error}");
    assert!(std::fs::read_to_string(options.state_dir.join("nonfinite.json")).unwrap().contains("60"));

    let other = tempfile::tempdir().unwrap();
    let stopped = HealOptions { state_dir: other.path().join("heal"), ..options.clone() };
    let mut before = start.clone();
    let result = heal(&exec, Some(&base), &mut before, &mut stream(), &stopped, &mut StopAfter::new(bad - 1));
    assert!(matches!(result, Err(TrainError::Interrupted)));
    let read = |o: &HealOptions| std::fs::read(o.state_dir.join("state.safetensors")).unwrap();
    assert!(read(&options) == read(&stopped));
    assert!(changed(&before, &hybrid).is_empty());
}

#[test]
fn low_rank_gradients_agree_with_finite_differences() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 8);
    let mut hybrid = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let options = HealOptions { trainable: Trainable::Lora(3), ..HealOptions::default() };
    let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &options).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for low_rank in &mut trainer.low_rank {
        low_rank.factors.b.iter_mut().for_each(|v| *v = rng.random_range(-0.1..0.1));
    }
    trainer.resume_at(&mut hybrid, 0);
    let batch = [stream().next_batch(2)];
    trainer.accumulate(&hybrid, &batch).unwrap();
    // Loss differences carry the f32 noise of a whole forward pass, about 1e-6 of the loss, over a step of 2e-2.
    const STEP: f32 = 1e-2;
    const TOLERANCE: f64 = 2e-2;
    for index in [0, 1, 3, trainer.low_rank.len() - 1] {
        for part in ["a", "b"] {
            let grads = trainer.low_rank_grads(index).clone();
            let grad = if part == "a" { grads.a } else { grads.b };
            let norm = grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
            assert!(norm > 1e-4, "a gradient to compare with");
            // Along the gradient the loss changes by its norm.
            let loss_at = |trainer: &mut Trainer<'_>, hybrid: &mut Model, step: f32| {
                let original = trainer.low_rank[index].factors.clone();
                let factors = &mut trainer.low_rank[index].factors;
                let target = if part == "a" { &mut factors.a } else { &mut factors.b };
                target.iter_mut().zip(&grad).for_each(|(v, g)| *v += step * g / norm as f32);
                trainer.resume_at(hybrid, 0);
                let loss = trainer.accumulate(hybrid, &batch).unwrap().loss;
                trainer.low_rank[index].factors = original;
                trainer.resume_at(hybrid, 0);
                loss
            };
            let slope = (loss_at(&mut trainer, &mut hybrid, STEP)
                - loss_at(&mut trainer, &mut hybrid, -STEP))
                / (2.0 * f64::from(STEP));
            assert!((slope - norm).abs() < TOLERANCE * norm, "{index} {part}: {slope} and {norm}");
            trainer.accumulate(&hybrid, &batch).unwrap();
        }
    }
}

#[test]
fn accumulation_equals_one_large_batch() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 9);
    let hybrid = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &HealOptions::default()).unwrap();
    let large = stream().next_batch(4);
    let mut data = stream();
    let small: Vec<TokenBatch> = (0..4).map(|_| data.next_batch(1)).collect();
    let (a, b) =
        (trainer.accumulate(&hybrid, &[large]).unwrap(), trainer.accumulate(&hybrid, &small).unwrap());
    // The same sums in another order.
    const ROUNDING: f64 = 1e-5;
    assert!((a.loss - b.loss).abs() < ROUNDING * a.loss);
    assert!((a.grad_norm - b.grad_norm).abs() < ROUNDING * a.grad_norm);
}

#[test]
fn unusable_arguments_are_named() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 9);
    let free = MixerSpec {
        recurrent: RecurrentKind::None,
        window: 4,
        sinks: 1,
        d_state: 0,
        d_conv: 0,
        dropped: Default::default(),
    };
    let new = |hybrid: &Model, trainable| {
        let options = HealOptions { trainable, ..HealOptions::default() };
        Trainer::new(&exec, Some(&base), hybrid, &options).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(new(&hybrid_of(&base, free), Trainable::Heads).unwrap_err().contains("nothing to train"));
    assert!(new(&base, Trainable::Heads).unwrap_err().contains("nothing to train"));
    assert!(new(&base, Trainable::Lora(0)).unwrap_err().contains("rank"));
    assert!(new(&base, Trainable::HeadsAndNorms).is_ok());
    let wider = model::ModelConfig { layers: 3, ..tiny_config() };
    let text = new(&tiny_model(&wider, 1), Trainable::All).unwrap_err();
    assert!(
        text.contains("expected family llama, 3 layers") && text.contains("found family llama, 2 layers"),
        "{text}"
    );
    assert!(text.contains("\nhint: ") && !text.contains('{'), "{text}");
}
