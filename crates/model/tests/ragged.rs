//! Sequences of different lengths in one batch are the sequences one by one: outputs, losses, gradients and what observers see. Nothing of
//! one reaches another.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{VOCAB, all_models, configs, engine_of, exec, relative_error, tokens};
use kernels::loss::cross_entropy;
use kernels::{Exec, MatRef};
use recurformer_model::observe::AttnView;
use recurformer_model::{GradObserver, Grads, LayerObserver, Model, NoObserver, ParamId, Tape, TokenBatch};

/// Around the blocks of every kernel, and nothing at all.
const LENS: [usize; 6] = [1, 65, 2, 0, 63, 64];
/// Products of more rows sum in another order: f32 rounding (6e-8) through a few layers stays two orders below.
const ORDER_TOLERANCE: f64 = 5e-5;
/// The same through forward and backward.
const GRADIENT_TOLERANCE: f64 = 2e-4;
/// Joining the sequences changes outputs by far more than rounding: this part of their root mean square at least.
const JOINED: f64 = 0.05;

fn documents() -> Vec<Vec<u32>> {
    LENS.iter().zip(20..).map(|(&len, seed)| tokens(len, seed)).collect()
}

fn packed(documents: &[Vec<u32>]) -> TokenBatch {
    documents.iter().map(Vec::as_slice).collect()
}

fn all_params(model: &Model) -> Vec<ParamId> {
    model.params.iter().map(|(id, _)| id).collect()
}

/// Rows that observers saw, layer after layer.
#[derive(Default)]
struct Seen {
    sequences: Vec<(usize, usize)>,
    rows: Vec<f32>,
}

impl Seen {
    fn push(&mut self, layer: usize, sequence: usize, mats: &[MatRef<'_>]) {
        self.sequences.push((layer, sequence));
        for mat in mats {
            (0..mat.rows()).for_each(|t| self.rows.extend_from_slice(mat.row(t)));
        }
    }
}

impl LayerObserver for Seen {
    fn attention(&mut self, view: AttnView<'_>) {
        self.push(view.layer, view.sequence, &[view.x, view.out]);
    }
}

impl GradObserver for Seen {
    fn head_outputs(&mut self, layer: usize, sequence: usize, grad: MatRef<'_>) {
        self.push(layer, sequence, &[grad]);
    }
}

/// Final hidden states, and the next-token losses of every position, whose gradients are added to `grads`.
fn run(exec: &Exec, model: &Model, batch: &TokenBatch, grads: &mut Grads) -> (Vec<f32>, Vec<f32>) {
    let mut tape = Tape::default();
    let hidden = model.forward_batch(exec, batch, &mut NoObserver, Some(&mut tape)).unwrap();
    let logits = model.logits(exec, &hidden);
    let mut targets = Vec::new();
    for sequence in batch.iter().filter(|sequence| !sequence.is_empty()) {
        targets.extend_from_slice(&sequence[1..]);
        targets.push(u32::MAX); // nothing follows the last token
    }
    let (mut nll, mut dlogits) = (vec![0.0; targets.len()], vec![0.0; logits.len()]);
    cross_entropy(exec, &logits, VOCAB, &targets, 1.0, &mut nll, Some(&mut dlogits));
    let dhidden = model.logits_backward(exec, &hidden, &dlogits, None, grads);
    model.backward(exec, batch, &tape, &dhidden, grads, &mut NoObserver, false);
    (hidden, nll)
}

#[test]
fn a_ragged_batch_is_its_documents_one_by_one() {
    let documents = documents();
    for config in configs() {
        for (name, model) in all_models(&config) {
            let exec = exec();
            let ids = all_params(&model);
            let [mut found, mut expected] = [(); 2].map(|()| Grads::zeros(&model.params, &ids));
            let (hidden, losses) = run(&exec, &model, &packed(&documents), &mut found);
            let (mut hidden_alone, mut losses_alone) = (Vec::new(), Vec::new());
            for document in &documents {
                let (hidden, losses) = run(&exec, &model, &TokenBatch::one(document), &mut expected);
                hidden_alone.extend(hidden);
                losses_alone.extend(losses);
            }
            for (what, found, expected) in
                [("hidden", &hidden, &hidden_alone), ("losses", &losses, &losses_alone)]
            {
                let error = relative_error(found, expected);
                assert!(error < ORDER_TOLERANCE, "{name}, {what}: {error:e}");
            }
            for id in ids {
                let error = relative_error(found.get(id).unwrap(), expected.get(id).unwrap());
                let nothing = expected.get(id).unwrap().iter().all(|g| g.abs() < 1e-5);
                let what = &model.params.get(id).name;
                assert!(nothing || error < GRADIENT_TOLERANCE, "{name}, {what}: {error:e}");
            }
            // Without boundaries all of this would be different.
            let joined = TokenBatch::one(&documents.concat());
            let joined = model.forward_batch(&exec, &joined, &mut NoObserver, None).unwrap();
            let error = relative_error(&joined, &hidden_alone);
            assert!(error > JOINED, "{name}: joined documents differ by {error:e} only");
        }
    }
}

#[test]
fn a_document_does_not_reach_the_others_by_a_bit() {
    let documents = documents();
    let batch = packed(&documents);
    for config in configs() {
        for (name, model) in all_models(&config) {
            let (exec, ids, d_model) = (exec(), all_params(&model), config.d_model);
            // Of the hidden states of one document, and the gradients of their sum.
            let of = |batch: &TokenBatch, document: usize| {
                let mut tape = Tape::default();
                let hidden = model.forward_batch(&exec, batch, &mut NoObserver, Some(&mut tape)).unwrap();
                let rows = batch.range(document);
                let values = rows.start * d_model..rows.end * d_model;
                let mut dhidden = vec![0.0; hidden.len()];
                dhidden[values.clone()].fill(1.0);
                let mut grads = Grads::zeros(&model.params, &ids);
                model.backward(&exec, batch, &tape, &dhidden, &mut grads, &mut NoObserver, false);
                (hidden[values].to_vec(), grads)
            };
            for document in [1, 4] {
                let others: Vec<Vec<u32>> = (0..)
                    .zip(&documents)
                    .map(|(i, d)| if i == document { d.clone() } else { tokens(d.len(), 90 + i as u64) })
                    .collect();
                let (hidden, grads) = of(&batch, document);
                let (hidden_beside_others, grads_beside_others) = of(&packed(&others), document);
                assert_eq!(hidden, hidden_beside_others, "{name}, document {document}");
                for &id in &ids {
                    let what = &model.params.get(id).name;
                    assert_eq!(grads.get(id), grads_beside_others.get(id), "{name}, {document}, {what}");
                }
            }
        }
    }
}

#[test]
fn observers_and_the_engine_see_every_document_alone() {
    let documents = documents();
    let batch = packed(&documents);
    for config in configs() {
        for (name, model) in all_models(&config) {
            let (exec, engine, layers) = (exec(), engine_of(&model), config.layers);
            let (mut seen, mut tape) = (Seen::default(), Tape::default());
            let hidden = model.forward_batch(&exec, &batch, &mut seen, Some(&mut tape)).unwrap();
            let in_order = (0..layers).flat_map(|l| (0..LENS.len()).map(move |s| (l, s)));
            assert!(seen.sequences.iter().copied().eq(in_order), "{name}");
            let mut alone: Vec<Seen> = (0..layers).map(|_| Seen::default()).collect();
            for document in &documents {
                let mut seen = Seen::default();
                model.forward_batch(&exec, &TokenBatch::one(document), &mut seen, None).unwrap();
                let per_layer = (seen.rows.len() / layers).max(1);
                for (all, rows) in alone.iter_mut().zip(seen.rows.chunks(per_layer)) {
                    all.rows.extend_from_slice(rows);
                }
            }
            let expected: Vec<f32> = alone.into_iter().flat_map(|seen| seen.rows).collect();
            let error = relative_error(&seen.rows, &expected);
            assert!(error < ORDER_TOLERANCE, "{name}, views: {error:e}");

            // The engine shows a whole layer at once.
            let mut shown = Seen::default();
            let observed = engine
                .observe(&exec, &batch, &mut |layer, x, out| {
                    assert_eq!((x.rows(), out.rows()), (batch.rows(), batch.rows()));
                    for (s, rows) in batch.ranges().enumerate() {
                        shown.push(layer, s, &[x, out].map(|mat| mat.rows_at(rows.start, rows.len())));
                    }
                })
                .unwrap();
            assert!(relative_error(&observed, &hidden) < ORDER_TOLERANCE, "{name}, hidden of the engine");
            let error = relative_error(&shown.rows, &seen.rows);
            assert!(error < ORDER_TOLERANCE, "{name}, shown by the engine: {error:e}");

            let mut grads = Grads::zeros(&model.params, &[]);
            let mut seen = Seen::default();
            model.backward(&exec, &batch, &tape, &hidden, &mut grads, &mut seen, true);
            let in_order = (0..layers).rev().flat_map(|l| (0..LENS.len()).map(move |s| (l, s)));
            assert!(seen.sequences.iter().copied().eq(in_order), "{name}");
            let width = config.heads * config.head_dim;
            assert_eq!(seen.rows.len(), layers * batch.rows() * width);
        }
    }
}

#[test]
fn the_limit_is_one_of_each_sequence() {
    let config = &configs()[0];
    let (_, model) = all_models(config).swap_remove(0);
    let (exec, engine) = (exec(), engine_of(&model));
    let long = packed(&[tokens(150, 1), tokens(150, 2)]);
    assert!(model.forward_batch(&exec, &long, &mut NoObserver, None).is_ok());
    assert!(engine.observe(&exec, &long, &mut |_, _, _| {}).is_ok());
    let longer = packed(&[tokens(3, 1), tokens(201, 2)]);
    let limit = |error: recurformer_model::ModelError| error.to_string();
    assert!(limit(model.forward_batch(&exec, &longer, &mut NoObserver, None).unwrap_err()).contains("201"));
    assert!(limit(engine.observe(&exec, &longer, &mut |_, _, _| {}).unwrap_err()).contains("201"));
}
