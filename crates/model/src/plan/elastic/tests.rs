use super::*;
use crate::plan::tests::{config, mixer};
use proptest::prelude::*;
use weights::ModelConfig;

/// Four layers of three groups.
fn large() -> ModelConfig {
    ModelConfig { layers: 4, heads: 6, kv_heads: 3, ..config() }
}

/// A plan that converts what `converted` says, with scores.
fn scored(converted: &[bool], scores: &[f64]) -> HeadPlan {
    let mut plan = HeadPlan::empty(&large());
    for (i, (&converted, &score)) in converted.iter().zip(scores).enumerate() {
        let group = &mut plan.layers[i / 3].groups[i % 3];
        group.score = Some(score);
        if converted {
            group.mixer = GroupMixer::Recurrent;
        }
    }
    plan.mixer = (plan.converted() > 0).then(mixer);
    plan.beta = plan.converted() as f64 / 12.0;
    plan
}

fn all(scores: [f64; 12]) -> HeadPlan {
    scored(&[true; 12], &scores)
}

fn chosen(plan: &HeadPlan) -> Vec<usize> {
    (0..12).filter(|&i| plan.is_converted(i / 3, i % 3)).collect()
}

fn message(result: Result<HeadPlan>) -> String {
    result.expect_err("should be refused").to_string()
}

#[test]
fn the_best_stay_and_ties_go_to_lower_layers_then_groups() {
    let plan = all([0.0, 3.0, -1.0, -0.0, 0.0, 2.0, 0.0, -5.0, 0.0, 1.0, 0.0, 0.0]);
    for (beta, groups) in [(0.25, &[1, 5, 9][..]), (0.34, &[0, 1, 5, 9]), (0.5, &[0, 1, 3, 4, 5, 9])] {
        let lower = plan.at_beta(beta).unwrap();
        assert_eq!(chosen(&lower), groups);
        assert_eq!((lower.beta, lower.mixer), (beta, plan.mixer));
        assert!(lower.layers.iter().flat_map(|l| &l.groups).all(|g| g.score.is_some()));
        lower.validate(&large()).unwrap();
    }
}

#[test]
fn the_plans_own_beta_is_the_plan_and_zero_is_the_base() {
    let plan = all([1.0; 12]);
    assert_eq!(plan.at_beta(1.0).unwrap(), plan);
    let base = plan.at_beta(0.0).unwrap();
    assert_eq!((base.converted(), base.mixer, base.beta), (0, None, 0.0));
    base.validate(&large()).unwrap();
}

#[test]
fn budgets_that_cannot_be_met_are_named() {
    let mut plan = scored(
        &[true, true, true, false, false, false, false, false, false, false, false, false],
        &[0.5, 0.25, 0.75, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0],
    );
    let above = message(plan.at_beta(0.5));
    assert!(above.starts_with("beta 0.5: that is 6 of 12 groups") && above.contains("converts 3"), "{above}");
    assert!(above.contains("\nhint: at most beta 0.2500"), "{above}");
    // The groups decide, not the number.
    assert_eq!(plan.at_beta(0.27).unwrap().converted(), 3);
    for beta in [-0.1, 1.5, f64::NAN] {
        assert!(message(plan.at_beta(beta)).contains("between 0 and 1"));
    }
    for missing in [None, Some(f64::NAN), Some(f64::INFINITY)] {
        plan.layers[0].groups[1].score = missing;
        let text = message(plan.at_beta(0.1));
        assert!(text.contains("group 1 of layer 0 has no score") && text.contains("\nhint: "), "{text}");
        // Nothing to choose.
        assert_eq!(plan.at_beta(0.25).unwrap().converted(), 3);
        assert_eq!(plan.at_beta(0.0).unwrap().converted(), 0);
    }
    // Kept groups need no score.
    plan.layers[0].groups[1].score = Some(0.25);
    plan.layers[3].groups[1].score = None;
    assert_eq!(chosen(&plan.at_beta(0.1).unwrap()), [2]);
}

#[test]
fn the_mark_keeps_the_betas_that_fit() {
    let mut plan = all([1.0; 12]);
    plan.elastic = Some(Elastic { betas: vec![0.25, 0.5, 1.0] });
    plan.validate(&large()).unwrap();
    let betas = |beta| plan.at_beta(beta).unwrap().elastic.map(|e| e.betas);
    assert_eq!(betas(1.0), Some(vec![0.25, 0.5, 1.0]));
    assert_eq!(betas(0.75), Some(vec![0.25, 0.5]));
    assert_eq!(betas(0.2), None);
    let again = HeadPlan::from_json(&plan.to_json(), &large()).unwrap();
    assert_eq!(again, plan);
    assert!(!all([1.0; 12]).to_json().contains("elastic"));
    for wrong in [vec![], vec![0.5, 0.25], vec![0.5, 0.5], vec![0.5, 1.5], vec![f64::NAN]] {
        plan.elastic = Some(Elastic { betas: wrong });
        assert!(plan.validate(&large()).unwrap_err().to_string().contains("elastic betas"));
    }
}

proptest! {
    #[test]
    fn lower_budgets_are_nested_and_hold_the_best(
        converted in prop::collection::vec(any::<bool>(), 12),
        values in prop::collection::vec(-3i32..3, 12),
        betas in (0.0f64..=1.0, 0.0f64..=1.0),
    ) {
        let scores: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        let plan = scored(&converted, &scores);
        let (low, high) = (betas.0.min(betas.1), betas.0.max(betas.1));
        let Ok(large) = plan.at_beta(high) else {
            prop_assert!(groups_at(high, 12) > plan.converted());
            return Ok(());
        };
        let small = plan.at_beta(low).unwrap();
        prop_assert_eq!(&large.at_beta(low).unwrap(), &small);
        let (inside, outside) = (chosen(&small), chosen(&plan));
        prop_assert_eq!(inside.len(), groups_at(low, 12));
        prop_assert!(inside.iter().all(|i| outside.contains(i) && chosen(&large).contains(i)));
        for i in outside.iter().filter(|i| !inside.contains(i)) {
            prop_assert!(inside.iter().all(|j| scores[*j] > scores[*i] || (scores[*j] == scores[*i] && j < i)));
        }
    }
}
