use super::*;
use crate::testing::{config, spec};
use model::RecurrentKind;
use proptest::prelude::*;

fn options(beta: f64, keep: usize) -> SelectOptions {
    SelectOptions {
        beta,
        keep_at_least_per_layer: keep,
        mixer: spec(RecurrentKind::Mamba2, 4),
        criterion: PlanCriterion {
            name: "recency".into(),
            tokens: 10,
            bank_sha256: None,
            data_sha256: None,
            seed: None,
        },
    }
}

fn sized(layers: usize, kv_heads: usize) -> ModelConfig {
    ModelConfig { layers, kv_heads, heads: 2 * kv_heads, ..config() }
}

fn chosen(plan: &HeadPlan) -> Vec<(usize, usize)> {
    (0..plan.layers.len())
        .flat_map(|l| (0..plan.layers[l].groups.len()).map(move |g| (l, g)))
        .filter(|&(l, g)| plan.is_converted(l, g))
        .collect()
}

fn message(result: Result<HeadPlan>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn the_best_groups_are_taken_and_the_plan_records_how() {
    let scores = vec![vec![0.1, 0.9], vec![0.5, -0.3]];
    let plan = select(&config(), &scores, &options(0.5, 0)).unwrap();
    assert_eq!(chosen(&plan), [(0, 1), (1, 0)]);
    assert_eq!(plan.layers[1].groups[1].score, Some(-0.3));
    assert_eq!((plan.beta, plan.mixer), (0.5, Some(spec(RecurrentKind::Mamba2, 4))));
    assert_eq!(plan.criterion.as_ref().unwrap().name, "recency");
    let again = HeadPlan::from_json(&plan.to_json(), &config()).unwrap();
    assert_eq!(again, plan);
}

#[test]
fn ties_go_to_lower_layers_then_groups() {
    let plan = select(&config(), &[vec![0.0, -0.0], vec![0.0, 0.0]], &options(0.75, 0)).unwrap();
    assert_eq!(chosen(&plan), [(0, 0), (0, 1), (1, 0)]);
}

#[test]
fn the_floor_skips_to_the_next_best() {
    let scores = vec![vec![5.0, 4.0], vec![1.0, 2.0]];
    assert_eq!(chosen(&select(&config(), &scores, &options(0.5, 1)).unwrap()), [(0, 0), (1, 1)]);
    assert_eq!(chosen(&select(&config(), &scores, &options(0.5, 0)).unwrap()), [(0, 0), (0, 1)]);
}

#[test]
fn what_cannot_be_met_is_an_error() {
    let scores = vec![vec![0.0; 2]; 2];
    let floor = message(select(&config(), &scores, &options(0.75, 1)));
    assert!(floor.contains("3 of 4") && floor.contains("leaves 2") && floor.contains("0.5"), "{floor}");
    assert!(message(select(&config(), &scores, &options(0.25, 3))).contains("keep 3"));
    assert!(message(select(&config(), &scores, &options(0.25, 2))).contains("leaves 0"));
    for beta in [-0.1, 1.1, f64::NAN] {
        assert!(message(select(&config(), &scores, &options(beta, 0))).contains("beta"));
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = message(select(&config(), &[vec![0.0, 1.0], vec![bad, 0.0]], &options(0.5, 0)));
        assert!(error.contains("layer 1 group 0"), "{error}");
    }
    assert!(message(select(&config(), &scores[..1], &options(0.5, 0))).contains("1 layers"));
    assert!(message(select(&config(), &[vec![0.0; 2], vec![0.0; 3]], &options(0.5, 0))).contains("3 groups"));
}

#[test]
fn beta_zero_converts_nothing() {
    let plan = select(&config(), &[vec![1.0; 2], vec![1.0; 2]], &options(0.0, 2)).unwrap();
    assert_eq!((plan.converted(), plan.mixer), (0, None));
}

proptest! {
    #[test]
    fn counts_are_exact_and_floors_hold(
        layers in 1usize..6,
        kv_heads in 1usize..5,
        beta in 0.0f64..=1.0,
        keep in 0usize..3,
        values in prop::collection::vec(-3i32..3, 30),
    ) {
        let config = sized(layers, kv_heads);
        let scores: Vec<Vec<f64>> =
            (0..layers).map(|l| (0..kv_heads).map(|g| f64::from(values[l * kv_heads + g])).collect()).collect();
        let budget = (beta * (layers * kv_heads) as f64).round() as usize;
        let possible = layers * kv_heads.saturating_sub(keep);
        match select(&config, &scores, &options(beta, keep)) {
            Ok(plan) => {
                prop_assert_eq!(plan.converted(), budget);
                for layer in 0..layers {
                    let kept = (0..kv_heads).filter(|&g| !plan.is_converted(layer, g)).count();
                    prop_assert!(kept >= keep.min(kv_heads));
                }
            }
            Err(_) => prop_assert!(budget > possible || keep > kv_heads),
        }
    }

    #[test]
    fn a_higher_beta_contains_a_lower_one(
        low in 0.0f64..=1.0,
        high in 0.0f64..=1.0,
        values in prop::collection::vec(-1.0f64..1.0, 12),
    ) {
        let config = sized(4, 3);
        let scores: Vec<Vec<f64>> = values.chunks(3).map(<[f64]>::to_vec).collect();
        let (low, high) = (low.min(high), low.max(high));
        let small = chosen(&select(&config, &scores, &options(low, 0)).unwrap());
        let large = chosen(&select(&config, &scores, &options(high, 0)).unwrap());
        prop_assert!(small.iter().all(|group| large.contains(group)));
    }

    #[test]
    fn a_plan_at_a_lower_beta_is_the_plan_for_that_beta(
        low in 0.0f64..=1.0,
        high in 0.0f64..=1.0,
        keep in 0usize..3,
        values in prop::collection::vec(-3i32..3, 12),
    ) {
        let config = sized(4, 3);
        let scores: Vec<Vec<f64>> =
            values.chunks(3).map(|layer| layer.iter().map(|&v| f64::from(v)).collect()).collect();
        let possible = (3 - keep) as f64 / 3.0;
        let (low, high) = (possible * low.min(high), possible * low.max(high));
        let plan = select(&config, &scores, &options(high, keep)).unwrap();
        prop_assert_eq!(plan.at_beta(low).unwrap(), select(&config, &scores, &options(low, keep)).unwrap());
    }
}

#[test]
fn the_summary_counts_bytes() {
    let config = config();
    let scores = vec![vec![3.0, 2.0], vec![1.0, 0.0]];
    let mut options = options(0.75, 0);
    options.mixer = spec(RecurrentKind::None, 16);
    let summary = summary(&select(&config, &scores, &options).unwrap(), &config);
    // 2 layers × 2 groups × (k, v) × 8 values × 2 bytes.
    assert_eq!((summary.base_bytes_per_token, summary.hybrid_bytes_per_token), (128, 32));
    assert_eq!((summary.converted, summary.total), (3, 4));
    // 3 groups × (16 + 1) entries × (k, v) × 8 values × 2 bytes, as the cache itself counts.
    assert_eq!(summary.constant_bytes, 3 * HeadLayoutBytes::of(&config, options.mixer));
    assert_eq!(summary.contexts.iter().map(|c| c.tokens).collect::<Vec<_>>(), [1024, 4096, 8192, 32768]);
    for c in &summary.contexts {
        assert_eq!((c.base_bytes, c.hybrid_bytes), (128 * c.tokens, 32 * c.tokens + summary.constant_bytes));
    }
    let from = summary.smaller_from_tokens.unwrap();
    assert!(from * 32 + summary.constant_bytes < from * 128);
    assert!((from - 1) * 32 + summary.constant_bytes >= (from - 1) * 128);
    assert_eq!(summary.kept_groups, [vec![], vec![1]]);
    let empty = super::summary(&HeadPlan::empty(&config), &config);
    assert_eq!(
        (empty.hybrid_bytes_per_token, empty.constant_bytes, empty.smaller_from_tokens),
        (128, 0, None)
    );
}

struct HeadLayoutBytes;

impl HeadLayoutBytes {
    fn of(config: &ModelConfig, spec: MixerSpec) -> usize {
        let bytes = model::mixers::HeadLayout::new(spec, config).cache_bytes(kernels::kv::KvType::F16);
        assert!(bytes >= (spec.window + spec.sinks) * 2 * config.head_dim * 2);
        bytes
    }
}
