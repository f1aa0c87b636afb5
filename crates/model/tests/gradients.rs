//! The batched backward pass: every parameter's gradient against finite differences, and its promises about what runs.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    Share, VOCAB, all_models, base, configs, exec, hybrid, plan, relative_error, rng, specs, tokens,
};
use kernels::loss::cross_entropy;
use kernels::{Exec, MatRef};
use rand::Rng;
use recurformer_model::observe::AttnView;
use recurformer_model::{GradObserver, Grads, LayerObserver, Model, NoObserver, ParamId, Tape, TokenBatch};

/// Step of the finite differences in parameter space. The five-point formula leaves an error of its fourth power: invisible here,
/// while at 1e-2 it shows on skips in front of saturated heads, and at 2e-3 the noise of f32 losses shows instead.
const STEP: f32 = 4e-3;
/// Relative error of a derivative along the gradient itself and along a random direction, as a share of the gradient's norm.
const DIRECTION_TOLERANCE: f64 = 5e-3;
/// Absolute error: f32 noise of the loss (below 1e-6), over the step.
const NOISE: f64 = 2e-4;

const SEQUENCES: usize = 2;
const SEQ_LEN: usize = 11;

fn batch() -> TokenBatch {
    TokenBatch::equal(SEQ_LEN, tokens(SEQUENCES * SEQ_LEN, 11))
}

fn targets() -> Vec<u32> {
    let mut targets = tokens(SEQUENCES * SEQ_LEN, 12);
    targets[SEQ_LEN - 1] = u32::MAX;
    targets
}

fn loss(exec: &Exec, model: &Model) -> f64 {
    let hidden = model.forward_batch(exec, &batch(), &mut NoObserver, None).unwrap();
    let mut nll = vec![0.0; SEQUENCES * SEQ_LEN];
    cross_entropy(exec, &model.logits(exec, &hidden), VOCAB, &targets(), 1.0, &mut nll, None);
    nll.iter().map(|&n| f64::from(n)).sum::<f64>() / nll.len() as f64
}

fn gradients_of(
    exec: &Exec,
    model: &Model,
    trainable: &[ParamId],
    tape: &mut Tape,
    observer: &mut dyn GradObserver,
    observe_all: bool,
) -> Grads {
    let mut grads = Grads::zeros(&model.params, trainable);
    let hidden = model.forward_batch(exec, &batch(), &mut NoObserver, Some(tape)).unwrap();
    let logits = model.logits(exec, &hidden);
    let mut nll = vec![0.0; SEQUENCES * SEQ_LEN];
    let mut dlogits = vec![0.0; logits.len()];
    let weight = 1.0 / nll.len() as f32;
    cross_entropy(exec, &logits, VOCAB, &targets(), weight, &mut nll, Some(&mut dlogits));
    let dhidden = model.logits_backward(exec, &hidden, &dlogits, None, &mut grads);
    model.backward(exec, &batch(), tape, &dhidden, &mut grads, observer, observe_all);
    grads
}

fn gradients(exec: &Exec, model: &Model, trainable: &[ParamId]) -> Grads {
    gradients_of(exec, model, trainable, &mut Tape::default(), &mut NoObserver, false)
}

fn all_params(model: &Model) -> Vec<ParamId> {
    model.params.iter().map(|(id, _)| id).collect()
}

/// Derivative of the loss along `direction` (five-point formula).
fn derivative(exec: &Exec, model: &mut Model, id: ParamId, direction: &[f32]) -> f64 {
    let start = model.params.data(id).to_vec();
    let mut at = |steps: f32| {
        let values = model.params.data_mut(id);
        for ((value, start), d) in values.iter_mut().zip(&start).zip(direction) {
            *value = start + steps * STEP * d;
        }
        loss(exec, model)
    };
    let slope = 8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0));
    model.params.data_mut(id).copy_from_slice(&start);
    slope / (12.0 * f64::from(STEP))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[test]
fn every_parameter_against_finite_differences() {
    let exec = exec().single();
    let mut wrong = Vec::new();
    for config in configs() {
        for (name, mut model) in all_models(&config) {
            let ids = all_params(&model);
            let grads = gradients(&exec, &model, &ids);
            let mut rng = rng(13);
            for id in ids {
                let grad = grads.get(id).unwrap();
                let norm = dot(grad, grad).sqrt();
                let n = grad.len();
                let largest = (0..n).max_by(|&a, &b| grad[a].abs().total_cmp(&grad[b].abs())).unwrap();
                let one_hot = |i: usize| (0..n).map(|j| f32::from(u8::from(i == j))).collect::<Vec<f32>>();
                let scale = 1.0 / (n as f32).sqrt();
                let random: Vec<f32> = (0..n).map(|_| if rng.random() { scale } else { -scale }).collect();
                let mut directions = vec![random, one_hot(largest), one_hot(rng.random_range(0..n))];
                if norm > 0.0 {
                    directions.push(grad.iter().map(|g| g / norm as f32).collect());
                }
                for (i, direction) in directions.iter().enumerate() {
                    let (found, expected) =
                        (dot(grad, direction), derivative(&exec, &mut model, id, direction));
                    let close = (found - expected).abs() <= DIRECTION_TOLERANCE * norm + NOISE;
                    if !close {
                        let what = &model.params.get(id).name;
                        wrong.push(format!(
                            "{name}, {what}, direction {i}: {found:e} is {expected:e}, norm {norm:e}"
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong gradients:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_trainable_subset_gets_the_same_bits() {
    let exec = exec();
    for config in configs() {
        for (name, model) in all_models(&config) {
            let all = gradients(&exec, &model, &all_params(&model));
            let repeated = gradients(&exec, &model, &all_params(&model));
            let last = config.layers - 1;
            let is_head = |n: &str| n.contains("recurrent");
            let subsets: [&dyn Fn(&str) -> bool; 6] = [
                &is_head,
                &|n| is_head(n) && n.contains(&format!("layers.{last}.")),
                &|n| n.contains("norm"),
                &|n| n.contains("layers.1.self_attn.q_proj"),
                &|n| n.contains("embed"),
                &|n| n.contains("layers.1.mlp.down_proj"),
            ];
            for subset in subsets {
                let ids: Vec<ParamId> =
                    model.params.iter().filter(|(_, p)| subset(&p.name)).map(|(id, _)| id).collect();
                let some = gradients(&exec, &model, &ids);
                assert!(some.ids().eq(ids.iter().copied()));
                for id in ids {
                    let what = &model.params.get(id).name;
                    assert_eq!(some.get(id), all.get(id), "{name}, {what}");
                    assert_eq!(repeated.get(id), all.get(id), "{name}, {what}, repeated");
                }
            }
        }
    }
}

/// Gradients with one and several threads differ by rounding only.
const THREADS_TOLERANCE: f64 = 1e-4;

#[test]
fn threads_and_reused_tapes_change_nothing() {
    let (exec, one) = (exec(), exec().single());
    for config in configs() {
        for (name, model) in all_models(&config) {
            let ids = all_params(&model);
            let expected = gradients(&exec, &model, &ids);
            let mut tape = Tape::default();
            let other = TokenBatch::equal(20, tokens(60, 3));
            model.forward_batch(&exec, &other, &mut NoObserver, Some(&mut tape)).unwrap();
            let reused = gradients_of(&exec, &model, &ids, &mut tape, &mut NoObserver, false);
            let alone = gradients(&one, &model, &ids);
            for id in ids {
                let what = &model.params.get(id).name;
                let expected = expected.get(id).unwrap();
                assert_eq!(reused.get(id).unwrap(), expected, "{name}, {what}");
                let error = relative_error(alone.get(id).unwrap(), expected);
                let nothing = expected.iter().all(|g| g.abs() < 1e-7);
                assert!(nothing || error < THREADS_TOLERANCE, "{name}, {what}: {error:e}");
            }
        }
    }
}

#[test]
fn checkpointed_tapes_give_the_same_bits() {
    let exec = exec();
    for config in configs() {
        for (name, model) in all_models(&config) {
            let ids = all_params(&model);
            let expected = gradients(&exec, &model, &ids);
            let mut tape = Tape::checkpointed(model.config.layers);
            let other = TokenBatch::equal(20, tokens(60, 3));
            model.forward_batch(&exec, &other, &mut NoObserver, Some(&mut tape)).unwrap();
            let found = gradients_of(&exec, &model, &ids, &mut tape, &mut NoObserver, false);
            let mut full = Tape::default();
            model.forward_batch(&exec, &batch(), &mut NoObserver, Some(&mut full)).unwrap();
            for layer in 0..=config.layers {
                assert_eq!(tape.residual(layer), full.residual(layer), "{name}, layer {layer}");
            }
            for id in ids {
                let what = &model.params.get(id).name;
                assert_eq!(found.get(id).unwrap(), expected.get(id).unwrap(), "{name}, {what}");
            }
        }
    }
}

#[test]
fn gradients_add_up() {
    let exec = exec();
    let config = &configs()[1];
    let model = base(config, 1);
    let ids = all_params(&model);
    let once = gradients(&exec, &model, &ids);
    let mut tape = Tape::default();
    let hidden = model.forward_batch(&exec, &batch(), &mut NoObserver, Some(&mut tape)).unwrap();
    let dhidden = vec![1.0; hidden.len()];
    let mut twice = Grads::zeros(&model.params, &ids);
    for _ in 0..2 {
        model.backward(&exec, &batch(), &tape, &dhidden, &mut twice, &mut NoObserver, false);
    }
    let mut single = Grads::zeros(&model.params, &ids);
    model.backward(&exec, &batch(), &tape, &dhidden, &mut single, &mut NoObserver, false);
    for id in once.ids() {
        let doubled: Vec<f32> = single.get(id).unwrap().iter().map(|g| 2.0 * g).collect();
        if doubled.iter().any(|g| *g != 0.0) {
            assert!(relative_error(twice.get(id).unwrap(), &doubled) < THREADS_TOLERANCE);
        }
    }
}

#[derive(Default)]
struct Seen(Vec<(usize, usize, usize)>);

impl GradObserver for Seen {
    fn head_outputs(&mut self, layer: usize, sequence: usize, grad: MatRef<'_>) {
        assert_eq!(grad.rows(), SEQ_LEN);
        assert!((0..SEQ_LEN).any(|t| grad.row(t).iter().any(|g| *g != 0.0)));
        self.0.push((layer, sequence, grad.cols()));
    }
}

#[test]
fn observers_see_what_they_ask_for() {
    let exec = exec();
    let config = &configs()[0];
    let spec = specs(config.head_dim)[1];
    let model = hybrid(&base(config, 1), plan(config, spec, Share::Some), 2);
    let width = config.heads * config.head_dim;
    let all: Vec<_> = (0..3).rev().flat_map(|l| (0..SEQUENCES).map(move |s| (l, s, width))).collect();
    let last: Vec<ParamId> = model.head_param_ids(1, 0).to_vec();
    for (trainable, observe_all, expected) in [
        (&[][..], true, &all[..]),
        (&[], false, &[]),
        (&last, false, &all[..2 * SEQUENCES]),
        (&last, true, &all),
    ] {
        let mut seen = Seen::default();
        gradients_of(&exec, &model, trainable, &mut Tape::default(), &mut seen, observe_all);
        assert_eq!(seen.0, expected);
    }
}

/// Recomputes attention from what it sees, for kept groups.
struct Recompute<'a> {
    model: &'a Model,
    layers: Vec<usize>,
}

impl LayerObserver for Recompute<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let AttnView { layer, sequence: _, x, q, k, v, out } = view;
        self.layers.push(layer);
        let config = &self.model.config;
        assert_eq!((x.rows(), x.cols()), (SEQ_LEN, config.d_model));
        let d = config.head_dim;
        for head in 0..config.heads {
            let group = head / config.group_size();
            if self.model.plan.is_converted(layer, group) {
                assert!((0..SEQ_LEN).any(|t| out.row(t)[head * d..(head + 1) * d].iter().any(|o| *o != 0.0)));
                continue;
            }
            for t in 0..SEQ_LEN {
                let weights: Vec<f64> = (0..=t)
                    .map(|j| dot(&q.row(t)[head * d..][..d], &k.row(j)[group * d..][..d]) / (d as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..d {
                    let value = |j: usize| f64::from(v.row(j)[group * d + i]);
                    let expected: f64 = weights.iter().enumerate().map(|(j, w)| w / sum * value(j)).sum();
                    let found = f64::from(out.row(t)[head * d + i]);
                    assert!((found - expected).abs() < 1e-5, "layer {layer} head {head}: {found} {expected}");
                }
            }
        }
    }
}

#[test]
fn attention_views() {
    let exec = exec();
    for config in configs() {
        for (_, model) in all_models(&config) {
            let mut observer = Recompute { model: &model, layers: vec![] };
            model.forward_batch(&exec, &batch(), &mut observer, None).unwrap();
            let seen: Vec<usize> = (0..config.layers * SEQUENCES).map(|i| i / SEQUENCES).collect();
            assert_eq!(observer.layers, seen);
        }
    }
}
