//! Tiny MQAR runs: they learn, resume to the bit, and refuse what cannot be.

use super::*;
use crate::testing::{DieAfter, StopAfter, killed};
use model::Silent;
use std::path::Path;

fn cell(mixing: Mixing) -> MqarCell {
    MqarCell { mixing, length: 8, pairs: 1, width: 16 }
}

fn training(dir: &Path, steps: u64) -> MqarTraining {
    MqarTraining {
        vocab: 32,
        head_dim: 8,
        steps,
        batch_tokens: 256,
        lr: 1e-2,
        warmup: 10,
        check_every: 50,
        check_queries: 50,
        test_queries: 200,
        dir: dir.into(),
        save_every_s: 0,
        ..MqarTraining::default()
    }
}

/// What does not depend on the clock.
fn timeless(outcome: MqarOutcome) -> MqarOutcome {
    MqarOutcome { seconds: 0.0, ..outcome }
}

#[test]
fn every_kind_of_model_learns_one_pair() {
    let exec = Exec::new(2).unwrap();
    for mixing in Mixing::ALL {
        let dir = tempfile::tempdir().unwrap();
        let outcome = train_mqar(&exec, &cell(mixing), &training(dir.path(), 600), &mut Silent).unwrap();
        // 16 values: guessing gives a sixteenth.
        assert!(outcome.correct * 2 > outcome.asked, "{outcome:?}");
        assert_eq!((outcome.asked, outcome.sequences), (200, outcome.steps * 32));
    }
}

#[test]
fn caches_are_those_of_their_mixing() {
    let dir = tempfile::tempdir().unwrap();
    let training = training(dir.path(), 1);
    let exec = Exec::new(1).unwrap();
    let bytes = |mixing, length| {
        let cell = MqarCell { length, ..cell(mixing) };
        let model = cell.model(&training).unwrap();
        Engine::from_model(&exec, &model, EngineOptions::EXACT).unwrap().cache_bytes(length)
    };
    assert_eq!(bytes(Mixing::Recurrent, 64), bytes(Mixing::Recurrent, 640));
    assert!(bytes(Mixing::Attention, 64) < bytes(Mixing::Attention, 640));
    let growth = |mixing| bytes(mixing, 640) - bytes(mixing, 64);
    assert_eq!(2 * growth(Mixing::Hybrid), growth(Mixing::Attention));
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits() {
    let exec = Exec::new(2).unwrap();
    let cell = cell(Mixing::Hybrid);
    let [whole, cut] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut once = training(whole.path(), 30);
    once.solved = 2.0;
    let expected = timeless(train_mqar(&exec, &cell, &once, &mut Silent).unwrap());
    let again = MqarTraining { dir: cut.path().into(), resume: true, ..once.clone() };
    let stopped = train_mqar(&exec, &cell, &again, &mut StopAfter::new(7));
    assert!(matches!(stopped, Err(TrainError::Interrupted)));
    killed(|| train_mqar(&exec, &cell, &again, &mut DieAfter(9)));
    let other = MqarTraining { lr: 2e-2, ..again.clone() };
    let error = train_mqar(&exec, &cell, &other, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("`lr` 0.01") || error.contains("`lr` \"0.01\""), "{error}");
    assert_eq!(timeless(train_mqar(&exec, &cell, &again, &mut Silent).unwrap()), expected);
    // A finished cell is not trained again: asking once whether to stop would end it.
    assert_eq!(timeless(train_mqar(&exec, &cell, &again, &mut StopAfter::new(0)).unwrap()), expected);
    std::fs::write(cut.path().join(format!("{}.json", cell.name())), b"{}").unwrap();
    let error = train_mqar(&exec, &cell, &again, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("is no result") && error.contains("hint: "), "{error}");
}

#[test]
fn cells_that_cannot_be_are_refused() {
    let good = (cell(Mixing::Attention), training(Path::new("unused"), 1));
    assert!(good.0.check(&good.1).is_ok());
    for (cell, training, needle) in [
        (MqarCell { width: 12, ..good.0 }, good.1.clone(), "width of 12"),
        (MqarCell { width: 0, ..good.0 }, good.1.clone(), "width of 0"),
        (good.0, MqarTraining { head_dim: 0, ..good.1.clone() }, "heads of 0"),
        (MqarCell { width: 9, ..good.0 }, MqarTraining { head_dim: 9, ..good.1.clone() }, "heads of 9"),
        (MqarCell { width: 8, mixing: Mixing::Hybrid, ..good.0 }, good.1.clone(), "needs two"),
        (MqarCell { pairs: 3, ..good.0 }, good.1.clone(), "3 pairs in 8"),
        (good.0, MqarTraining { steps: 0, ..good.1.clone() }, "at least one step"),
    ] {
        let error = cell.check(&training).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    }
}
