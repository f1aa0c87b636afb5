//! Alignment of tiny random models: it learns, resumes to the bit, extends, and stops at NaN.

use super::*;
use crate::state::load_state;
use crate::testing::{
    DieAfter, StopAfter, documents_of_odd_lengths, fresh_bank, killed, mixer_specs, random_documents,
    tiny_config, tiny_model,
};
use model::mixers::TensorClass;
use model::{MixerSpec, RecurrentKind, Silent};
use std::path::Path;

const SEQ: usize = 24;
const VOCAB: u32 = 60;

/// Share of the starting error that training has to get below.
const LEARNT: f64 = 0.9;
/// The same beside a window: what random weights attend to further back is nearly unpredictable.
const LEARNT_BESIDE_WINDOW: f64 = 0.98;

fn stream() -> SequenceStream {
    SequenceStream::new(&random_documents(6, 100, VOCAB, 1), SEQ, 7).unwrap()
}

/// Enough text not to be learnt by heart.
fn long_stream() -> SequenceStream {
    SequenceStream::new(&random_documents(60, 100, VOCAB, 1), SEQ, 7).unwrap()
}

fn sequences(count: usize, seed: u64) -> Vec<Vec<u32>> {
    random_documents(count, SEQ, VOCAB, seed).into_iter().map(|d| d.tokens).collect()
}

fn options(dir: &Path, steps: u64) -> AlignOptions {
    AlignOptions {
        tokens: steps * 2 * SEQ as u64,
        tokens_per_step: 2 * SEQ,
        warmup: 3,
        heldout: sequences(2, 50),
        fisher: sequences(1, 60),
        out: dir.join("bank.safetensors"),
        save_every_s: u64::MAX,
        metrics: Some(dir.join("align.jsonl")),
        ..AlignOptions::default()
    }
}

fn spec(recurrent: RecurrentKind) -> MixerSpec {
    mixer_specs(8).into_iter().find(|s| s.recurrent == recurrent && s.window > 0).unwrap()
}

fn mean(errors: &[Vec<f64>]) -> f64 {
    errors.iter().flatten().sum::<f64>() / errors.iter().map(Vec::len).sum::<usize>() as f64
}

#[test]
fn errors_of_packed_documents_are_those_of_the_documents() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    let documents = documents_of_odd_lengths(VOCAB);
    let packed: TokenBatch = documents.iter().map(Vec::as_slice).collect();
    let joined = TokenBatch::one(&documents.concat());
    // The same sums in another order.
    const ROUNDING: f64 = 1e-5;
    for spec in mixer_specs(8) {
        let bank = fresh_bank(&base, spec, 1);
        let expected: Vec<f64> = heldout_errors(&exec, &base, &bank, &documents, &mut Silent)
            .unwrap()
            .iter()
            .map(|layer| layer.iter().sum::<f64>() / layer.len() as f64)
            .collect();
        let mut aligner = Aligner::new(&exec, &base, &bank, Frozen::Nothing).unwrap();
        let close = |found: Vec<f64>| found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < ROUNDING * e);
        assert!(close(aligner.accumulate(&exec, &packed, false).unwrap()), "{spec:?}");
        assert!(!close(aligner.accumulate(&exec, &joined, false).unwrap()), "{spec:?}: boundaries matter");
    }
}

#[test]
fn every_mixer_learns() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    for spec in mixer_specs(8) {
        let dir = tempfile::tempdir().unwrap();
        let bank = fresh_bank(&base, spec, 1);
        let options = options(dir.path(), 120);
        let before = mean(&heldout_errors(&exec, &base, &bank, &options.heldout, &mut Silent).unwrap());
        let bank = align(&exec, &base, bank, &mut long_stream(), &options, &mut Silent).unwrap();
        let after = mean(&bank.info.heldout_error);
        let limit = if spec.window > 0 { LEARNT_BESIDE_WINDOW } else { LEARNT };
        assert!(after < limit * before, "{spec:?}: {before} to {after}");
        assert_eq!(bank.info.tokens, options.tokens);
        assert_eq!(bank.info.fisher_tokens, SEQ);
        assert!(bank.info.mixer_fisher.iter().flatten().all(|f| f.is_finite() && *f >= 0.0));
        let read = HeadBank::read(&options.out, &base.config).unwrap();
        assert_eq!(read.groups, bank.groups);
    }
}

#[test]
fn interrupted_anywhere_it_ends_with_the_same_bits() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    for recurrent in [RecurrentKind::Mamba2, RecurrentKind::GatedDelta, RecurrentKind::Mamba] {
        let bank = fresh_bank(&base, spec(recurrent), 3);
        let dir = tempfile::tempdir().unwrap();
        let whole =
            align(&exec, &base, bank.clone(), &mut stream(), &options(dir.path(), 12), &mut Silent).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let options = AlignOptions { resume: true, ..options(dir.path(), 12) };
        let mut interruptions = 0;
        let stopped = loop {
            match align(&exec, &base, bank.clone(), &mut stream(), &options, &mut StopAfter::new(7)) {
                Ok(bank) => break bank,
                Err(TrainError::Interrupted) => interruptions += 1,
                Err(other) => panic!("{other}"),
            }
        };
        assert!(interruptions >= 1);
        assert_eq!(stopped, whole, "{recurrent:?}");
        let log = std::fs::read_to_string(options.metrics.as_ref().unwrap()).unwrap();
        let steps: Vec<u64> =
            log.lines().map(|l| serde_json::from_str::<AlignMetric>(l).unwrap().step).collect();
        assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    }
}

#[test]
fn killed_without_a_word_it_ends_with_the_same_bits() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    let bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 3);
    let dir = tempfile::tempdir().unwrap();
    let whole =
        align(&exec, &base, bank.clone(), &mut stream(), &options(dir.path(), 9), &mut Silent).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let options = AlignOptions { resume: true, save_every_steps: Some(3), ..options(dir.path(), 9) };
    // Before the first state, and between two.
    for after in [1, 5, 2] {
        killed(|| align(&exec, &base, bank.clone(), &mut stream(), &options, &mut DieAfter(after)));
    }
    let resumed = align(&exec, &base, bank, &mut stream(), &options, &mut Silent).unwrap();
    assert_eq!(resumed, whole);
    let log = std::fs::read_to_string(options.metrics.as_ref().unwrap()).unwrap();
    assert_eq!(log.lines().count(), 9);
}

#[test]
fn a_changed_setting_is_refused_but_the_learning_rate_may_change() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    let bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 3);
    let dir = tempfile::tempdir().unwrap();
    let options = AlignOptions { resume: true, ..options(dir.path(), 6) };
    let run = |options: &AlignOptions, progress: &mut dyn Progress| {
        align(&exec, &base, bank.clone(), &mut stream(), options, progress)
    };
    assert!(matches!(run(&options, &mut StopAfter::new(2)), Err(TrainError::Interrupted)));
    let other = AlignOptions { warmup: 4, ..options.clone() };
    assert!(run(&other, &mut Silent).unwrap_err().to_string().contains("`warm-up`"));
    // So is a state whose data were cut by another rule.
    let path = with_suffix(&options.out, ".state");
    let state = std::fs::read(&path).unwrap();
    let (now, before) = (b"-pieces", b"-joined");
    let at = state.windows(now.len()).position(|w| w == now).expect("the rule is part of the fingerprint");
    let old = [&state[..at], before, &state[at + now.len()..]].concat();
    std::fs::write(&path, old).unwrap();
    let error = run(&options, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("`data`") && error.contains("-joined") && error.contains("hint: "), "{error}");
    std::fs::write(&path, state).unwrap();
    run(&AlignOptions { lr: 1e-3, ..options }, &mut Silent).unwrap();
}

#[test]
fn a_finished_bank_is_extended_with_its_moments() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), 20);
    let bank = fresh_bank(&base, spec(RecurrentKind::GatedDelta), 3);
    let first = align(&exec, &base, bank, &mut stream(), &options, &mut Silent).unwrap();
    let mut data = stream();
    let second = align(&exec, &base, first.clone(), &mut data, &options, &mut Silent).unwrap();
    assert_eq!(data.position(), 80);
    assert_eq!(second.info.tokens, 2 * options.tokens);
    assert!(mean(&second.info.heldout_error) < mean(&first.info.heldout_error));
    // A bank that the state does not belong to starts with fresh moments and fresh data.
    let mut data = stream();
    align(&exec, &base, first, &mut data, &options, &mut Silent).unwrap();
    assert_eq!(data.position(), 40);
}

/// Of every mixer and also when interrupted: copied projections stay as they are to the bit, the rest learns.
#[test]
fn frozen_projections_stay_while_the_rest_learns() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 1);
    for spec in mixer_specs(8) {
        let fresh = fresh_bank(&base, spec, 1);
        let classes: Vec<TensorClass> =
            fresh.layout(&base.config).tensors().iter().map(|t| t.class).collect();
        let dir = tempfile::tempdir().unwrap();
        let frozen = AlignOptions { projection_lr_scale: 0.0, ..options(dir.path(), 8) };
        let bank = align(&exec, &base, fresh.clone(), &mut stream(), &frozen, &mut Silent).unwrap();
        for (then, now) in fresh.groups.iter().flatten().zip(bank.groups.iter().flatten()) {
            for ((then, now), &class) in then.values.iter().zip(&now.values).zip(&classes) {
                assert_eq!(then == now, class == TensorClass::Projection, "{spec:?}");
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let frozen = AlignOptions { resume: true, projection_lr_scale: 0.0, ..options(dir.path(), 8) };
        let stopped = align(&exec, &base, fresh.clone(), &mut stream(), &frozen, &mut StopAfter::new(5));
        assert!(matches!(stopped, Err(TrainError::Interrupted)), "{spec:?}");
        assert_eq!(
            align(&exec, &base, fresh, &mut stream(), &frozen, &mut Silent).unwrap(),
            bank,
            "{spec:?}"
        );
    }
}

/// A bank is extended with more or less trained than before; what the state knows of moments is taken up.
#[test]
fn what_is_frozen_may_differ_in_an_extension() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    let fresh = fresh_bank(&base, spec(RecurrentKind::GatedDelta), 3);
    for scales in [[0.0, 0.05], [0.05, 0.0]] {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] =
            scales.map(|projection_lr_scale| AlignOptions { projection_lr_scale, ..options(dir.path(), 10) });
        let once = align(&exec, &base, fresh.clone(), &mut stream(), &first, &mut Silent).unwrap();
        let mut data = stream();
        let twice = align(&exec, &base, once.clone(), &mut data, &second, &mut Silent).unwrap();
        assert_eq!(data.position(), 40, "the state was taken up");
        let q = |bank: &HeadBank| bank.groups[0][0].values[0].clone();
        assert_eq!(q(&once) == q(&fresh), scales[0] == 0.0);
        assert_eq!(q(&twice) == q(&once), scales[1] == 0.0);
        assert!(mean(&twice.info.heldout_error) < mean(&once.info.heldout_error));
    }
}

#[test]
fn an_interrupted_extension_resumes_to_the_same_bits() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    // Extends a finished bank, interrupted after these many steps each time.
    let extended = |interruptions: &[u64]| {
        let dir = tempfile::tempdir().unwrap();
        let options = AlignOptions { metrics: None, ..options(dir.path(), 6) };
        let bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 3);
        align(&exec, &base, bank, &mut stream(), &options, &mut Silent).unwrap();
        let given = || HeadBank::read(&options.out, &base.config).unwrap();
        let mut resume = false;
        for &after in interruptions {
            let options = AlignOptions { resume, ..options.clone() };
            let result = align(&exec, &base, given(), &mut stream(), &options, &mut StopAfter::new(after));
            assert!(matches!(result, Err(TrainError::Interrupted)));
            resume = true;
        }
        let options = AlignOptions { resume, ..options.clone() };
        align(&exec, &base, given(), &mut stream(), &options, &mut Silent).unwrap()
    };
    let whole = extended(&[]);
    assert_eq!(extended(&[2]), whole);
    assert_eq!(extended(&[0, 3, 1]), whole);
}

#[test]
fn what_a_killed_save_left_is_removed() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    let dir = tempfile::tempdir().unwrap();
    let options = AlignOptions { resume: true, ..options(dir.path(), 2) };
    let left =
        ["bank.safetensors", "bank.safetensors.state", "align.jsonl"].map(|n| format!(".{n}.tmp-aB3dE6"));
    let others = [".other.tmp-aB3dE6".to_string(), ".bank.safetensors.tmp-".to_string()];
    left.iter().chain(&others).for_each(|name| std::fs::write(dir.path().join(name), b"half").unwrap());
    let bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 3);
    align(&exec, &base, bank, &mut stream(), &options, &mut Silent).unwrap();
    assert!(left.iter().all(|name| !dir.path().join(name).exists()));
    assert!(others.iter().all(|name| dir.path().join(name).exists()));
}

#[test]
fn nan_stops_before_the_update_and_keeps_the_last_state() {
    let exec = Exec::new(2).unwrap();
    let mut base = tiny_model(&tiny_config(), 5);
    // A token whose norm is 0 / 0, in one place of the text.
    let poison = 60;
    let id = base.params.id("model.embed_tokens.weight").unwrap();
    let width = base.config.d_model;
    base.params.data_mut(id)[poison * width..(poison + 1) * width].fill(0.0);
    base.config.rms_eps = 0.0;
    let mut documents = random_documents(6, 100, VOCAB, 1);
    documents[3].tokens[50] = poison as u32;
    let stream = || SequenceStream::new(&documents, SEQ, 7).unwrap();
    let mut data = stream();
    let step = (1..).find(|_| data.next_batch(2).tokens().contains(&(poison as u32))).unwrap();
    assert!((2..12).contains(&step), "the seed puts the poison at step {step}");

    let bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 3);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), 30);
    let error = align(&exec, &base, bank.clone(), &mut stream(), &options, &mut Silent).unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { step: s, .. } if s == step), "{error}");
    let saved: serde_json::Value =
        serde_json::from_slice(&std::fs::read(with_suffix(&options.out, ".nonfinite.json")).unwrap())
            .unwrap();
    assert_eq!(saved["step"].as_u64(), Some(step));
    assert!(saved["sequences"].to_string().contains("60"));
    assert!(!options.out.exists());

    // The kept state is that of a run stopped just before.
    let other = tempfile::tempdir().unwrap();
    let stopped =
        AlignOptions { out: other.path().join("bank.safetensors"), metrics: None, ..options.clone() };
    let result = align(&exec, &base, bank, &mut stream(), &stopped, &mut StopAfter::new(step - 1));
    assert!(matches!(result, Err(TrainError::Interrupted)));
    let states = [&options.out, &stopped.out].map(|p| std::fs::read(with_suffix(p, ".state")).unwrap());
    assert!(states[0] == states[1]);
    let kept = load_state::<serde_json::Value>(&with_suffix(&options.out, ".state")).unwrap().unwrap();
    assert_eq!(kept.info["step"].as_u64(), Some(step - 1));
}

#[test]
fn training_free_heads_are_only_measured() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 6);
    let spec = MixerSpec {
        recurrent: RecurrentKind::None,
        window: 4,
        sinks: 1,
        d_state: 0,
        d_conv: 0,
        dropped: Default::default(),
    };
    let dir = tempfile::tempdir().unwrap();
    let bank =
        align(&exec, &base, fresh_bank(&base, spec, 1), &mut stream(), &options(dir.path(), 5), &mut Silent);
    let bank = bank.unwrap();
    assert_eq!(bank.info.tokens, 0);
    assert!(mean(&bank.info.heldout_error) > 0.0);
}

#[test]
fn the_error_is_the_relative_error_after_the_output_projection() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 7);
    let mut bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 1);
    // Heads whose output is zero have an error of exactly one.
    let spec = MixerSpec { window: 0, sinks: 0, ..bank.info.spec };
    bank.info.spec = spec;
    let gain = bank.layout(&base.config).tensors().iter().position(|t| t.name == "out_gain").unwrap();
    bank.groups.iter_mut().flatten().for_each(|g| g.values[gain].fill(0.0));
    let errors = heldout_errors(&exec, &base, &bank, &sequences(3, 9), &mut Silent).unwrap();
    // One, but for the rounding of two products.
    const ROUNDING: f64 = 1e-6;
    assert!(errors.iter().flatten().all(|e| (e - 1.0).abs() < ROUNDING), "{errors:?}");
}

#[test]
fn unusable_arguments_are_named() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 6);
    let dir = tempfile::tempdir().unwrap();
    let mut bank = fresh_bank(&base, spec(RecurrentKind::Mamba2), 1);
    let bad = AlignOptions { lr: f32::NAN, ..options(dir.path(), 1) };
    let error = align(&exec, &base, bank.clone(), &mut stream(), &bad, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("lr is NaN"));
    bank.info.model.layers = 9;
    let error = align(&exec, &base, bank, &mut stream(), &options(dir.path(), 1), &mut Silent).unwrap_err();
    assert!(error.to_string().contains("9 layers"));
}
