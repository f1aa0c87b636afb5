//! Updates made in the backward pass.

use super::*;
use crate::optim::AnyMoments;

/// What the twins share: no clipping, one batch a step.
fn unclipped(dir: &Path, steps: u64) -> HealOptions {
    HealOptions { clip: 0.0, accumulate: 1, batch: 2, ..options(dir, steps) }
}

/// Both ways give the same weights, moments and losses, with and without checkpointed activations.
fn check_twins(base: &Model, start: &Model, options: HealOptions) {
    let exec = Exec::new(2).unwrap();
    let train = |optimizer_in_backward, checkpointed_layers| {
        let dir = tempfile::tempdir().unwrap();
        let mut hybrid = start.clone();
        let options = HealOptions {
            optimizer_in_backward,
            checkpointed_layers,
            weight_decay: 0.1,
            ..HealOptions { state_dir: dir.path().join("heal"), ..options.clone() }
        };
        let metrics = heal(&exec, Some(base), &mut hybrid, &mut stream(), &options, &mut Silent).unwrap();
        let state = std::fs::read(options.state_dir.join("state.safetensors")).unwrap();
        (values(&hybrid), state, metrics)
    };
    let what = format!("{:?}, {:?}, {:?}", start.plan.mixer, options.trainable, options.stage);
    let (expected, expected_state, expected_metrics) = train(false, 0);
    assert!(expected != values(start), "{what}");
    for checkpointed in [0, 1] {
        let (found, state, metrics) = train(true, checkpointed);
        assert!(found == expected, "{what}");
        assert!(state == expected_state, "{what}: moments");
        assert_eq!(metrics.len(), expected_metrics.len());
        for (found, expected) in metrics.iter().zip(&expected_metrics) {
            assert_eq!((found.loss, found.beta), (expected.loss, expected.beta));
            // The same squares, summed in another order.
            let difference = (found.grad_norm - expected.grad_norm).abs();
            assert!(difference < 1e-12 * expected.grad_norm, "{what}: {found:?}, {expected:?}");
        }
    }
}

const DISTILL: Stage = Stage::Distill { kl: 0.9, ce: 0.1 };

#[test]
fn updates_in_the_backward_pass_change_no_bit() {
    let tied = model::ModelConfig { tie_embeddings: true, ..tiny_config() };
    let options = unclipped(Path::new(""), 4);
    for config in [tiny_config(), tied] {
        let base = tiny_model(&config, 1);
        for spec in mixer_specs(8) {
            for (trainable, stage) in [
                (Trainable::All, Stage::Continue),
                (Trainable::All, DISTILL),
                (Trainable::HeadsAndNorms, DISTILL),
                (Trainable::Heads, DISTILL),
            ] {
                let options = HealOptions { trainable, stage, ..options.clone() };
                check_twins(&base, &hybrid_of(&base, spec), options);
            }
        }
    }
}

#[test]
fn neither_do_they_in_elastic_runs_or_with_moments_in_bf16() {
    let base = tiny_model(&tiny_config(), 4);
    for trainable in [Trainable::All, Trainable::Heads] {
        let elastic = elastic::BETAS.to_vec();
        let options = HealOptions {
            trainable,
            elastic,
            moments: MomentType::Bf16,
            stage: DISTILL,
            ..unclipped(Path::new(""), 7)
        };
        check_twins(&base, &elastic::wide(&base), options);
    }
}

#[test]
fn skipped_layers_decay_all_the_same() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    let train = |optimizer_in_backward| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = HeadPlan::empty(&base.config);
        plan.layers[1].skipped = true;
        let mut hybrid = base.with_plan(plan, &mut |_, _| unreachable!()).unwrap();
        let options = HealOptions {
            trainable: Trainable::All,
            stage: Stage::Continue,
            optimizer_in_backward,
            weight_decay: 0.1,
            ..unclipped(dir.path(), 3)
        };
        heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, &mut Silent).unwrap();
        assert_eq!(changed(&base, &hybrid).len(), base.params.len());
        values(&hybrid)
    };
    assert!(train(true) == train(false));
}

#[test]
fn nan_keeps_the_state_last_saved() {
    let exec = Exec::new(2).unwrap();
    let (base, documents, bad) = poisoned(2);
    let start = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let dir = tempfile::tempdir().unwrap();
    let options = HealOptions {
        optimizer_in_backward: true,
        save_every_steps: Some(bad - 1),
        ..unclipped(dir.path(), 30)
    };
    let run = |progress: &mut dyn Progress| {
        let mut data = SequenceStream::new(&documents, SEQ, 7).unwrap();
        heal(&exec, Some(&base), &mut start.clone(), &mut data, &options, progress).unwrap_err()
    };
    assert!(matches!(run(&mut StopAfter::new(bad - 1)), TrainError::Interrupted));
    let state = || std::fs::read(options.state_dir.join("state.safetensors")).unwrap();
    let saved = state();
    assert!(matches!(run(&mut Silent), TrainError::NonFinite { step, .. } if step == bad));
    assert!(state() == saved);
    assert!(options.state_dir.join("nonfinite.json").exists());
}

/// The loss is finite here, in f64; gradients in f32 are not.
#[test]
fn gradients_that_are_not_finite_are_not_applied() {
    let exec = Exec::new(2).unwrap();
    let mut base = tiny_model(&tiny_config(), 5);
    let norm = base.params.id("model.layers.1.post_attention_layernorm.weight").unwrap();
    base.params.data_mut(norm).fill(1e3);
    let mut hybrid = hybrid_of(&base, spec(RecurrentKind::Mamba2));
    let dir = tempfile::tempdir().unwrap();
    let options = HealOptions {
        trainable: Trainable::All,
        stage: Stage::Distill { kl: 3e38, ce: 0.0 },
        optimizer_in_backward: true,
        ..unclipped(dir.path(), 1)
    };
    let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &options).unwrap();
    let error = trainer.step(&mut hybrid, &[stream().next_batch(1)], 1e-3).unwrap_err();
    assert!(
        matches!(&error, TrainError::NonFinite { step: 1, what } if what == "the gradient norm"),
        "{error}"
    );
    assert!(values(&hybrid).iter().all(|(_, values)| values.iter().all(|value| value.is_finite())));
    let moments = trainer.full.iter().map(|full| match &full.moments {
        AnyMoments::F32(moments) => moments,
        AnyMoments::Bf16(_) => unreachable!("not asked for"),
    });
    assert!(moments.into_iter().all(|moments| moments.m.iter().chain(&moments.v).all(|m| !m.is_nan())));
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn what_it_cannot_do_is_named() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    let dir = tempfile::tempdir().unwrap();
    let good =
        HealOptions { trainable: Trainable::All, optimizer_in_backward: true, ..unclipped(dir.path(), 1) };
    let refused = |options: HealOptions| match Trainer::new(&exec, Some(&base), &base, &options) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(Trainer::new(&exec, Some(&base), &base, &good).is_ok());
    assert!(refused(HealOptions { clip: 1.0, ..good.clone() }).contains("hint: turn clipping off"));
    assert!(refused(HealOptions { accumulate: 2, ..good.clone() }).contains("micro-batches"));
    assert!(refused(HealOptions { trainable: Trainable::Lora(2), ..good }).contains("low-rank"));
}
