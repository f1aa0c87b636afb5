//! The parts alone: sums over queries against the definition, causes, intervals, broken runs, massive activations.

use crate::sinks::cause::{Cause, Estimate};
use crate::sinks::interventions::donors;
use crate::sinks::lab::{Lab, MAX_NLL_RISE, Outcome};
use crate::sinks::massive::MassiveSums;
use crate::sinks::measure::{masses, median, norm_ratios, strengths, uniform_masses};
use crate::sinks::{Absorbing, Found};
use crate::testing::{exec, model, noise, tokens};
use kernels::MatRef;
use model::{CutPart, NoObserver, TokenBatch};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const D: usize = 8;
/// Scores in f32 from gemm against f64: 1e-5 of sums of a few hundred terms.
const TOLERANCE: f64 = 2e-5;

fn random(seed: u64, seq: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (noise(&mut rng, seq * D, 1.5), noise(&mut rng, seq * D, 1.5))
}

/// Attention weights of the query at `i`, in f64.
fn row(q: &[f32], k: &[f32], scale: f64, i: usize) -> Vec<f64> {
    let dot = |j: usize| (0..D).map(|c| f64::from(q[i * D + c]) * f64::from(k[j * D + c])).sum::<f64>();
    let weights: Vec<f64> = (0..=i).map(|j| (scale * dot(j)).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[test]
fn shares_and_strengths_are_the_definition() {
    for seq in [2, 3, 31, 32, 33, 64, 65, 127, 128, 200] {
        let ((q, k), exec) = (random(seq as u64, seq), exec());
        let (queries, keys) = (MatRef::dense(&q, seq, D), MatRef::dense(&k, seq, D));
        let found = masses(&exec, queries, keys, 0.7);
        let all: Vec<usize> = (0..seq).collect();
        let strong = strengths(&exec, queries, keys, 0.7, &all);
        let uniform = uniform_masses(seq);
        let rows: Vec<Vec<f64>> = (seq / 2..seq).map(|i| row(&q, &k, 0.7f32.into(), i)).collect();
        for j in 0..seq {
            let n = rows.len() as f64;
            let mass = rows.iter().map(|a| a.get(j).copied().unwrap_or(0.0)).sum::<f64>() / n;
            assert!((found[j] - mass).abs() < TOLERANCE, "T {seq}, key {j}: {}, {mass}", found[j]);
            let even = rows.iter().map(|a| if j < a.len() { 1.0 / a.len() as f64 } else { 0.0 }).sum::<f64>();
            assert!((uniform[j] - even / n).abs() < 1e-12);
            let logs: Vec<f64> = rows
                .iter()
                .filter(|a| j + 1 < a.len())
                .map(|a| a[j].ln() - middle(a.iter().map(|a| a.ln()).collect()))
                .collect();
            let strength = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
            assert!((strong[j] - strength).abs() < 1e-4, "T {seq}, key {j}: {}, {strength}", strong[j]);
        }
        let some = strengths(&exec, queries, keys, 0.7, &[1, 0]);
        assert_eq!(some, [strong[1], strong[0]]);
    }
}

#[test]
fn medians_and_norms() {
    for n in 1..20 {
        let values = noise(&mut ChaCha8Rng::seed_from_u64(n), n as usize, 1.0);
        let expected = middle(values.iter().map(|&x| f64::from(x)).collect());
        assert_eq!(median(&mut values.clone()), expected);
    }
    let ratios = norm_ratios(MatRef::dense(&[3.0, 4.0, 0.0, 0.0, 0.0, 2.5], 3, 2));
    assert_eq!(ratios, [2.0, 0.0, 1.0]);
    assert_eq!(norm_ratios(MatRef::dense(&[0.0; 4], 2, 2)), [0.0, 0.0]);
}

#[test]
fn causes_follow_from_shares() {
    let (no, yes) = (Some(0.49), Some(0.5));
    assert_eq!(Cause::of(0, yes, no, no), Cause::PositionalEncoding);
    assert_eq!(Cause::of(0, no, yes, no), Cause::Lexical);
    assert_eq!(Cause::of(0, no, no, yes), Cause::MaskInduced);
    assert_eq!(Cause::of(0, no, no, no), Cause::None);
    for (codes, tokens, alone) in [(yes, yes, no), (no, yes, yes), (yes, no, yes), (yes, yes, yes)] {
        assert_eq!(Cause::of(0, codes, tokens, alone), Cause::Mixed);
    }
    // Later positions do not see only themselves.
    assert_eq!(Cause::of(5, no, yes, yes), Cause::Lexical);
    assert_eq!(Cause::of(5, no, no, None), Cause::None);
    for (codes, tokens, alone) in [(None, yes, no), (yes, None, no), (no, no, None)] {
        assert_eq!(Cause::of(0, codes, tokens, alone), Cause::Unknown);
    }
}

#[test]
fn intervals_hold_the_mean_and_follow_from_the_seed() {
    let estimate = |runs: &[Vec<f64>]| Estimate::of(runs, &mut ChaCha8Rng::seed_from_u64(1));
    assert_eq!(estimate(&[]), None);
    assert_eq!(estimate(&[vec![], vec![]]), None);
    let one = estimate(&[vec![0.7]]).unwrap();
    assert_eq!((one.mean, one.low, one.high, one.runs), (0.7, 0.7, 0.7, 1));
    assert!(!one.is_clear(), "one run says nothing about its spread");
    // Means of sequences count alike, however many runs each has.
    let runs = [vec![0.0, 0.2, 0.1, 0.1], vec![0.9], vec![]];
    let found = estimate(&runs).unwrap();
    assert!((found.mean - 0.5).abs() < 1e-12 && found.runs == 5);
    assert!(found.low < 0.2 && found.high > 0.85 && !found.is_clear());
    assert_eq!(estimate(&runs), Some(found));
    // Of 64 values 0 or 1 the mean has a standard error of 1/16: 95 % lie within about 0.12.
    let coins = [(0..64).map(|i| f64::from(i % 2)).collect()];
    let found = estimate(&coins).unwrap();
    assert!((0.08..0.16).contains(&(0.5 - found.low)) && (0.08..0.16).contains(&(found.high - 0.5)));
    assert!(estimate(&[vec![0.8, 0.9, 1.0]]).unwrap().is_clear());
}

#[test]
fn likelihoods_and_broken_runs() {
    let (exec, model, tokens) = (exec(), model(3), tokens(4, 70));
    let hidden = model.forward_batch(&exec, &TokenBatch::one(&tokens), &mut NoObserver, None).unwrap();
    let lab = Lab::new(&exec, &model, &tokens, &hidden);
    let logits = model.logits(&exec, &hidden);
    let vocab = model.config.vocab;
    let nll = (35..69).map(|t| {
        let row: Vec<f64> = logits[t * vocab..(t + 1) * vocab].iter().map(|&x| f64::from(x)).collect();
        row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[tokens[t + 1] as usize]
    });
    assert!((lab.nll - nll.sum::<f64>() / 34.0).abs() < 1e-4);
    let same = lab.run(&tokens, &model::Intervention::default(), &[], &[]).unwrap();
    assert_eq!((same.nll, same.strengths.len()), (lab.nll, 0));
    let outcome = |rise: f64, strength: f64| Outcome { nll: lab.nll + rise, strengths: vec![vec![strength]] };
    assert!(!lab.is_broken(&outcome(MAX_NLL_RISE - 0.01, 1.0)) && !lab.is_broken(&outcome(-3.0, 1.0)));
    assert!(lab.is_broken(&outcome(MAX_NLL_RISE + 0.01, 1.0)));
    assert!(lab.is_broken(&outcome(f64::NAN, 1.0)) && lab.is_broken(&outcome(0.0, f64::INFINITY)));
    // Nothing is cut, nothing diverges; more heads cost more than none.
    assert!(lab.kl_without(3, CutPart::Key, &[]).unwrap().abs() < 1e-6);
    for part in [CutPart::Key, CutPart::Value] {
        assert!(lab.kl_without(40, part, &[(0, 0), (0, 1), (1, 0)]).unwrap() > 1e-6);
    }
}

#[test]
fn donors_are_ordinary() {
    let absorbing = Absorbing { position: 20, mass: 0.5, strength: 5.0, value_ratio: 0.1 };
    let found = Found { heads: vec![vec![vec![absorbing]]], hidden: vec![] };
    let mut text: Vec<u32> = (0..64).collect();
    text[25] = text[20];
    let draw = |limit, seed| donors(&found, &text, limit, &mut ChaCha8Rng::seed_from_u64(seed));
    let mut all = draw(100, 1);
    all.sort_unstable();
    let expected: Vec<usize> = (8..32).filter(|d| ![20, 25].contains(d)).collect();
    assert_eq!(all, expected);
    assert_eq!(draw(3, 1), draw(3, 1));
    assert!(draw(3, 1).len() == 3 && (2..9).any(|seed| draw(3, seed) != draw(3, 1)));
}

#[test]
fn massive_activations_are_found_with_their_places() {
    let (rows, width) = (10, 50);
    let mut sums = MassiveSums::new(2);
    for sequence in 0..2 {
        let mut h = vec![0.1f32; rows * width];
        sums.add(1, MatRef::dense(&h, rows, width));
        h[7] = -900.0;
        h[3 * width + 7] = 450.0;
        h[4 * width + 9] = 99.0;
        if sequence == 1 {
            h[5 * width + 11] = 2000.0;
        }
        sums.add(0, MatRef::dense(&h, rows, width));
    }
    let layers = sums.finish();
    let [big, small] = &layers[..] else { panic!("two layers") };
    let dims: Vec<(usize, f64, bool)> =
        big.dimensions.iter().map(|d| (d.dimension, d.max, d.massive)).collect();
    assert_eq!(dims, [(11, 2000.0, true), (7, 900.0, true)]);
    assert_eq!(big.dimensions[1].places, [(0, 0), (0, 3), (1, 0), (1, 3)]);
    assert!((big.dimensions[1].ratio - 9000.0).abs() < 1.0 && (big.median - 0.1).abs() < 1e-6);
    assert_eq!((small.dimensions.len(), small.dimensions[0].massive), (1, false));
}
