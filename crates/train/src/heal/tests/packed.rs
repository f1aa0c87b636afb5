//! A batch of several documents trains as the documents one by one.

use super::*;

/// The same sums in another order.
const ROUNDING: f64 = 1e-5;

#[test]
fn packed_documents_train_as_documents_one_by_one() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 9);
    let documents = documents_of_odd_lengths(VOCAB);
    let packed: TokenBatch = documents.iter().map(Vec::as_slice).collect();
    let alone: Vec<TokenBatch> = documents.iter().map(|d| TokenBatch::one(d)).collect();
    let joined = TokenBatch::one(&documents.concat());
    for spec in mixer_specs(8) {
        let hybrid = hybrid_of(&base, spec);
        for stage in [Stage::Distill { kl: 0.7, ce: 0.3 }, Stage::Continue] {
            let options = HealOptions { stage, trainable: Trainable::All, ..HealOptions::default() };
            let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &options).unwrap();
            let mut report = |batches: &[TokenBatch]| {
                let StepReport { loss, kl, ce, grad_norm, .. } =
                    trainer.accumulate(&hybrid, batches).unwrap();
                [loss, kl.unwrap_or(1.0), ce, grad_norm]
            };
            let expected = report(&alone);
            let close = |found: [f64; 4]| {
                found.iter().zip(expected).all(|(found, e)| (found - e).abs() < ROUNDING * e.abs())
            };
            let found = report(std::slice::from_ref(&packed));
            assert!(close(found), "{spec:?}, {stage:?}: {found:?}, one by one {expected:?}");
            assert!(!close(report(std::slice::from_ref(&joined))), "{spec:?}, {stage:?}: boundaries matter");
        }
    }
}

#[test]
fn no_target_lies_beyond_a_boundary() {
    let batch: TokenBatch = [&[1, 2, 3][..], &[], &[4], &[5, 6]].into_iter().collect();
    let nothing = u32::MAX;
    assert_eq!(losses::next_tokens(&batch), [2, 3, nothing, nothing, 6, nothing]);
}
