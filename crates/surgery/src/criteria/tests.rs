mod naive;
mod passes;
mod planted;

use super::fisher::sample_softmax;
use super::kl_fisher::window_fisher;
use super::window_error::WindowError;
use super::*;
use crate::bank::init_bank;
use crate::stats::{AnalyzeOptions, analyze};
use crate::testing::{exec, model, spec, tokens};
use model::{LayerObserver, RecurrentKind, Silent, TokenBatch};
use naive::Naive;

/// f32 passes against f64 finite differences.
const TOLERANCE: f64 = 2e-3;

/// The estimate is of second order in the change; on this model the changes are not small.
const KL_FACTOR: f64 = 2.0;

fn assert_close(what: &str, found: &Scores, expected: &Scores, tolerance: f64) {
    for (layer, (found, expected)) in found.iter().zip(expected).enumerate() {
        for (group, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!(
                (a - b).abs() <= tolerance * b.abs(),
                "{what}: layer {layer} group {group}: {a}, expected {b}"
            );
        }
    }
}

fn window_error(window: usize, sequences: &[Vec<u32>]) -> Scores {
    window_error_with(window, sequences, &[])
}

/// All heads have these sinks.
fn window_error_with(window: usize, sequences: &[Vec<u32>], sinks: &[usize]) -> Scores {
    struct Only<'a>(WindowError<'a>, Vec<Vec<usize>>);
    impl LayerObserver for Only<'_> {
        fn attention(&mut self, view: AttnView<'_>) {
            self.0.attention(&view, &self.1);
        }
    }
    let (exec, model) = (exec(), model(1));
    let sinks = vec![sinks.to_vec(); model.config.heads];
    let mut only = Only(WindowError::new(&exec, &model, window).unwrap(), sinks);
    for sequence in sequences {
        model.forward_batch(&exec, &TokenBatch::one(sequence), &mut only, None).unwrap();
    }
    Box::new(only.0).finish(sequences.iter().map(Vec::len).sum())
}

#[test]
fn a_window_over_everything_costs_exactly_nothing() {
    let sequences = [tokens(1, 65), tokens(2, 30)];
    assert_eq!(window_error(64, &sequences), vec![vec![0.0; 2]; 2]);
    let cost = window_fisher(&exec(), &model(1), 64, &sequences, 0, &mut Silent).unwrap();
    assert_eq!(cost, vec![vec![0.0; 2]; 2]);
    assert!(window_error(64, &[tokens(1, 66)]).iter().flatten().all(|&e| e < 0.0));
}

#[test]
fn window_error_is_the_change_of_the_layers_output() {
    let ids = tokens(3, 9);
    let expected = Naive::new(&model(1), &ids).window_error(3, &[]);
    assert_close("window-error", &window_error(3, &[ids]), &expected, TOLERANCE);
}

#[test]
fn a_window_shows_the_sinks_that_were_found() {
    let ids = tokens(3, 12);
    let naive = Naive::new(&model(1), &ids);
    let found = |sinks: &[usize]| window_error_with(3, std::slice::from_ref(&ids), sinks);
    assert_eq!(found(&[0]), window_error(3, std::slice::from_ref(&ids)), "the first token is shown anyway");
    for sinks in [&[2][..], &[0, 4], &[1, 2, 6]] {
        assert_close("window-error", &found(sinks), &naive.window_error(3, sinks), TOLERANCE);
    }
    let all: Vec<usize> = (0..ids.len()).collect();
    assert!(found(&all).iter().flatten().all(|e| e.abs() < 1e-10), "{:?}", found(&all));
}

#[test]
fn fisher_is_the_mean_square_of_finite_differences() {
    let ids = tokens(3, 9);
    let naive = Naive::new(&model(1), &ids);
    for seed in [0, 1] {
        let found =
            window_fisher(&exec(), &model(1), 3, std::slice::from_ref(&ids), seed, &mut Silent).unwrap();
        assert_close("kl-fisher", &found, &naive.window_fisher(3, seed), TOLERANCE);
    }
}

#[test]
fn fisher_estimates_the_kl_divergence() {
    const DRAWS: u64 = 200;
    let ids = tokens(3, 40);
    let naive = Naive::new(&model(1), &ids);
    let mut mean = vec![vec![0.0; 2]; 2];
    let window = 16;
    for seed in 0..DRAWS {
        let cost =
            window_fisher(&exec(), &model(1), window, std::slice::from_ref(&ids), seed, &mut Silent).unwrap();
        mean.iter_mut().flatten().zip(cost.iter().flatten()).for_each(|(m, c)| *m += c / DRAWS as f64);
    }
    let truth = naive.window_kl(window);
    for (estimate, kl) in mean.iter().flatten().zip(truth.iter().flatten()) {
        let ratio = estimate / kl;
        assert!(ratio > 1.0 / KL_FACTOR && ratio < KL_FACTOR, "estimates {mean:?}, divergences {truth:?}");
    }
}

#[test]
fn the_cost_of_a_bank_of_windows_is_the_cost_of_windowing() {
    let (exec, model) = (exec(), model(1));
    let sequences = [tokens(5, 30), tokens(6, 17)];
    let options = AnalyzeOptions { criteria: vec![], ..Default::default() };
    let heads = analyze(&exec, &model, &sequences, &options, &mut Silent).unwrap();
    let bank = init_bank(&model, spec(RecurrentKind::None, 5), &heads, 0).unwrap();
    let found = mixer_fisher(&exec, &model, &bank, &sequences, 4, &mut Silent).unwrap();
    let expected = window_fisher(&exec, &model, 5, &sequences, 4, &mut Silent).unwrap();
    assert_close("mixer-fisher", &found, &expected, 1e-4);

    let bank = init_bank(&model, spec(RecurrentKind::Mamba2, 5), &heads, 0).unwrap();
    let found = mixer_fisher(&exec, &model, &bank, &sequences, 4, &mut Silent).unwrap();
    assert!(found.iter().flatten().all(|&cost| cost > 0.0 && cost.is_finite()));
    let mut other = bank;
    other.info.model.layers = 5;
    let error = mixer_fisher(&exec, &model, &other, &sequences, 4, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("5 layers"));
}

#[test]
fn scores_come_from_files() {
    let (exec, model) = (exec(), model(1));
    let text = [tokens(5, 80)];
    let options = AnalyzeOptions { criteria: vec!["kl-fisher".into()], seed: 3, ..Default::default() };
    let heads = analyze(&exec, &model, &text, &options, &mut Silent).unwrap();
    let get = |name: &str, seed| scores(name, &heads, None, seed);
    let kl = get("kl-fisher", 0).unwrap();
    let mut cost = window_fisher(&exec, &model, 64, &text, 3, &mut Silent).unwrap();
    cost.iter_mut().flatten().for_each(|c| *c = -*c);
    assert_eq!(kl, cost);
    let recency = get("recency", 0).unwrap();
    assert_eq!(recency[1][0], heads.layers[1].groups[0].stats.recency_ratio_64);
    let least = get("least-recent", 0).unwrap();
    assert!(recency.iter().flatten().zip(least.iter().flatten()).all(|(a, b)| *a == -*b));
    assert_eq!(get("random", 1).unwrap(), get("random", 1).unwrap());
    assert_ne!(get("random", 1).unwrap(), get("random", 2).unwrap());
    let message = |result: Result<Scores>| result.unwrap_err().to_string();
    assert!(message(get("window-error", 0)).contains("hint: analyze again"));
    assert!(message(get("best", 0)).contains("unknown criterion `best`"));
    assert!(message(get("mixer-fisher", 0)).contains("needs a head bank"));

    let mut bank = init_bank(&model, spec(RecurrentKind::Mamba2, 4), &heads, 0).unwrap();
    assert!(
        message(scores("mixer-fisher", &heads, Some(&bank), 0)).contains("no `mixer-fisher` measurement")
    );
    bank.info.mixer_fisher = vec![vec![1.0, 2.0], vec![3.0, 4.0]];
    let scored = scores("mixer-fisher", &heads, Some(&bank), 0).unwrap();
    assert_eq!(scored, [[-1.0, -2.0], [-3.0, -4.0]]);
    bank.info.model.layers = 9;
    assert!(message(scores("mixer-fisher", &heads, Some(&bank), 0)).contains("different models"));
}

#[test]
fn labels_follow_the_softmax() {
    let logits = [0.0f32, 1.0, -1.0, 2.0, -1000.0];
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let mut counts = [0usize; 5];
    const DRAWS: usize = 10_000;
    for i in 0..DRAWS {
        let mut row = logits;
        let label = sample_softmax(&mut row, (i as f64 + 0.5) / DRAWS as f64);
        counts[label] += 1;
        assert!(row.iter().sum::<f32>().abs() < 1e-6 && (-1.0..0.0).contains(&row[label]));
    }
    for (count, logit) in counts.iter().zip(logits) {
        let share = f64::from(logit).exp() / total;
        assert!((*count as f64 / DRAWS as f64 - share).abs() < 1e-3, "{counts:?}");
    }
    assert_eq!(sample_softmax(&mut [5.0], 0.999), 0);
}

#[test]
fn every_criterion_has_its_own_name() {
    assert_eq!(
        NAMES,
        [
            "mixer-fisher",
            "recency",
            "window-error",
            "kl-fisher",
            "kl",
            "retrieval",
            "patching",
            "duo",
            "random",
            "least-recent"
        ]
    );
    assert!(ALL.iter().all(|c| find(c.name).unwrap().about == c.about));
    assert!(ALL.iter().all(|c| ![c.about, c.reference, c.cost.words()].contains(&"")));
}
