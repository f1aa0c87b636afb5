//! Training on labels against its twins: the healing trainer where every position has one, f64 where few have, differences for gradients.

use super::*;
use crate::heal::{HealOptions, Stage, Trainable, Trainer};
use crate::testing::{mixer_specs, random_documents, tiny_config};

const VOCAB: u32 = 60;
const ADAM: Optimiser = Optimiser { betas: (0.9, 0.95), weight_decay: 0.01, clip: 1.0 };

fn batch() -> TokenBatch {
    random_documents(3, 17, VOCAB, 5).iter().map(|d| d.tokens.as_slice()).collect()
}

/// Next tokens of every sequence.
fn next_tokens(batch: &TokenBatch) -> Vec<u32> {
    batch.iter().flat_map(|s| s[1..].iter().copied().chain([IGNORED])).collect()
}

/// Attention, and every mixer in one group of each layer.
fn models() -> Vec<Model> {
    let base = random_model(&tiny_config(), 1.0, 3).unwrap();
    let hybrids =
        mixer_specs(8).into_iter().map(|spec| with_random_heads(&base, spec, |_, g| g == 1, 4).unwrap());
    std::iter::once(base.clone()).chain(hybrids.collect::<Vec<_>>()).collect()
}

#[test]
fn labels_everywhere_train_as_healing_does() {
    let exec = Exec::new(2).unwrap();
    for start in models() {
        let options = HealOptions {
            stage: Stage::Continue,
            trainable: Trainable::All,
            projection_lr_scale: 1.0,
            base_lr_scale: 1.0,
            betas: ADAM.betas,
            weight_decay: ADAM.weight_decay,
            clip: ADAM.clip,
            ..HealOptions::default()
        };
        let (mut ours, mut theirs) = (start.clone(), start.clone());
        let mut trainer = LabelTrainer::new(&exec, &ours, ADAM);
        let mut healer = Trainer::new(&exec, Some(&start), &theirs, &options).unwrap();
        for _ in 0..3 {
            let report = trainer.step(&mut ours, &batch(), &next_tokens(&batch()), 1e-3).unwrap();
            let expected = healer.step(&mut theirs, &[batch()], 1e-3).unwrap();
            assert!((report.loss - expected.ce).abs() < 1e-5 * expected.ce, "{report:?} {expected:?}");
            assert!((report.grad_norm - expected.grad_norm).abs() < 1e-4 * expected.grad_norm);
        }
        for (id, param) in ours.params.iter() {
            let other = theirs.params.get(id);
            let off = param.data().iter().zip(other.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Adam's steps have the size of the learning rate however small a gradient is; three of them.
            assert!(off < 1e-4, "{} {off}", param.name);
        }
    }
}

/// Mean loss and right answers in f64, from all logits.
fn naive(model: &Model, batch: &TokenBatch, labels: &[u32]) -> (f64, usize) {
    let exec = Exec::new(1).unwrap();
    let hidden = model.forward_batch(&exec, batch, &mut NoObserver, None).unwrap();
    let logits = model.logits(&exec, &hidden);
    let (mut loss, mut correct, mut count) = (0.0, 0, 0);
    for (row, &label) in logits.chunks(model.config.vocab).zip(labels).filter(|(_, l)| **l != IGNORED) {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        loss += sum.ln() - f64::from(row[label as usize]);
        correct += usize::from(row.iter().all(|x| *x <= row[label as usize]));
        count += 1;
    }
    (loss / f64::from(count), correct)
}

#[test]
fn few_labels_give_their_loss_and_its_gradient() {
    let exec = Exec::new(2).unwrap();
    let batch = batch();
    let mut labels = vec![IGNORED; batch.rows()];
    for (row, label) in [(2, 7), (3, 59), (16, 0), (20, 20), (50, 31)] {
        labels[row] = label;
    }
    for model in models() {
        let mut trainer = LabelTrainer::new(&exec, &model, ADAM);
        let report = trainer.accumulate(&model, &batch, &labels).unwrap();
        let (loss, correct) = naive(&model, &batch, &labels);
        assert!((report.loss - loss).abs() < 1e-4, "{report:?} {loss}");
        assert_eq!((report.correct, report.labels), (correct, 5));
        let judged = answered(&exec, &model, &batch, &labels).unwrap();
        assert_eq!((judged.correct, judged.labels, judged.grad_norm), (correct, 5, 0.0));
        assert!((judged.loss - loss).abs() < 1e-4);
        // Along the gradient the loss rises by its norm.
        let eps = 1e-2 / report.grad_norm;
        let moved = |sign: f64| {
            let mut model = model.clone();
            for Trained { id, .. } in &trainer.trained {
                let grad = trainer.grads.get(*id).unwrap();
                let values = model.params.data_mut(*id);
                values.iter_mut().zip(grad).for_each(|(v, g)| *v += (sign * eps) as f32 * g);
            }
            naive(&model, &batch, &labels).0
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * eps * report.grad_norm);
        assert!((slope / report.grad_norm - 1.0).abs() < 0.02, "{slope} {}", report.grad_norm);
    }
}

#[test]
fn no_labels_change_nothing_and_nan_is_refused() {
    let exec = Exec::new(1).unwrap();
    let mut model = random_model(&tiny_config(), 1.0, 3).unwrap();
    let before = model.params.data(model.params.id("model.embed_tokens.weight").unwrap()).to_vec();
    let mut trainer = LabelTrainer::new(&exec, &model, Optimiser { weight_decay: 0.0, ..ADAM });
    let report = trainer.step(&mut model, &batch(), &vec![IGNORED; batch().rows()], 1.0).unwrap();
    assert_eq!((report.loss, report.labels, report.grad_norm), (0.0, 0, 0.0));
    let id = model.params.id("model.embed_tokens.weight").unwrap();
    assert_eq!(model.params.data(id), before);
    model.params.data_mut(id).fill(f32::NAN);
    let error = trainer.step(&mut model, &batch(), &next_tokens(&batch()), 1.0).unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { step: 2, .. }), "{error}");
}

#[test]
fn projections_that_nothing_reads_do_not_train() {
    let exec = Exec::new(1).unwrap();
    let base = random_model(&tiny_config(), 1.0, 3).unwrap();
    let count = |model: &Model| LabelTrainer::new(&exec, model, ADAM).parameters();
    let all: usize = base.params.iter().map(|(_, p)| p.data().len()).sum();
    assert_eq!(count(&base), all);
    let spec = mixer_specs(8).remove(0);
    let converted = with_random_heads(&base, spec, |layer, _| layer == 0, 4).unwrap();
    let total: usize = converted.params.iter().map(|(_, p)| p.data().len()).sum();
    // q of 4 heads, k and v of 2, 8 values each, of width 24.
    assert_eq!(count(&converted), total - (4 + 2 + 2) * 8 * 24);
}
