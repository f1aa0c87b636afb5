//! The cached forward pass: every way of feeding a sequence gives the same logits, and the cache keeps its promises.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    Share, VOCAB, all_models, base, configs, engine_of, exec, hybrid, plan, relative_error, specs, tokens,
};
use kernels::kv::KvType;
use kernels::quant::Dtype;
use kernels::{Exec, MatRef};
use recurformer_model::observe::AttnView;
use recurformer_model::{
    Cache, Engine, EngineOptions, LayerObserver, LogitRows, Model, ModelError, NoObserver, RecurrentKind,
    TokenBatch,
};

/// Largest difference between orders of summation as a share of the logits' root mean square: f32 rounding (6e-8) through a few layers
/// and some dozens of recurrent steps stays two orders below.
const ORDER_TOLERANCE: f64 = 5e-5;

const TOKENS: usize = 67;

fn full(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let engine = engine_of(model);
    engine.forward(&exec(), tokens, &mut engine.new_cache(), LogitRows::All).unwrap()
}

fn chunked(engine: &Engine, tokens: &[u32], chunks: &[usize]) -> (Vec<f32>, Cache) {
    let (exec, mut cache, mut logits, mut rest) = (exec(), engine.new_cache(), Vec::new(), tokens);
    for &n in chunks.iter().cycle() {
        let (chunk, tail) = rest.split_at(n.min(rest.len()));
        logits.extend(engine.forward(&exec, chunk, &mut cache, LogitRows::All).unwrap());
        rest = tail;
        if rest.is_empty() {
            return (logits, cache);
        }
    }
    unreachable!("the loop ends with the tokens")
}

#[test]
fn full_is_chunked_is_token_by_token_is_batched() {
    for config in configs() {
        for (name, model) in all_models(&config) {
            let engine = engine_of(&model);
            let tokens = tokens(TOKENS, 5);
            let expected = full(&model, &tokens);
            for chunks in [&[1][..], &[7, 1, 13], &[64], &[2, 3, 0, 31]] {
                let (found, cache) = chunked(&engine, &tokens, chunks);
                let error = relative_error(&found, &expected);
                assert!(error < ORDER_TOLERANCE, "{name}, chunks {chunks:?}: {error:e}");
                assert_eq!(cache.len(), TOKENS);
                assert_eq!(cache.bytes(), engine.cache_bytes(TOKENS), "{name}");
            }
            let batch = TokenBatch::one(&tokens);
            let exec = exec();
            let hidden = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
            let error = relative_error(&model.logits(&exec, &hidden), &expected);
            assert!(error < ORDER_TOLERANCE, "{name}, batched: {error:e}");
        }
    }
}

#[test]
fn a_batch_is_its_sequences() {
    for config in configs() {
        for (name, model) in all_models(&config) {
            let exec = exec();
            let tokens = tokens(3 * 19, 8);
            let batch = TokenBatch::equal(19, tokens.clone());
            let hidden = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
            let logits = model.logits(&exec, &hidden);
            for (s, tokens) in tokens.chunks(19).enumerate() {
                let found = &logits[s * 19 * VOCAB..(s + 1) * 19 * VOCAB];
                let error = relative_error(found, &full(&model, tokens));
                assert!(error < ORDER_TOLERANCE, "{name}, sequence {s}: {error:e}");
            }
        }
    }
}

/// Lengths of the sequences of a batch: nothing, less than a window, and beyond it.
const LENGTHS: [usize; 9] = [3, 0, 65, 1, 17, 8, 33, 2, 64];

#[test]
fn decoding_several_sequences_is_decoding_each() {
    for config in configs() {
        for (name, model) in all_models(&config) {
            let engine = engine_of(&model);
            let exec = exec();
            let prompt = tokens(65, 9);
            let mut prefilled = LENGTHS.map(|_| engine.new_cache());
            for (len, cache) in LENGTHS.into_iter().zip(&mut prefilled) {
                engine.forward(&exec, &prompt[..len], cache, LogitRows::None).unwrap();
            }
            for n in [1, 2, 5, 9] {
                let mut single = prefilled[..n].to_vec();
                let mut batched = single.clone();
                for step in 0..3 {
                    let tokens = tokens(n, 10 + step);
                    let mut caches: Vec<&mut Cache> = batched.iter_mut().collect();
                    let found = engine.decode_batch(&exec, &tokens, &mut caches).unwrap();
                    let expected = each(&engine, &exec, &tokens, &mut single);
                    let error = relative_error(&found, &expected);
                    assert!(error < ORDER_TOLERANCE, "{name}, {n} sequences, step {step}: {error:e}");
                }
                for (s, (batched, single)) in batched.iter_mut().zip(&mut single).enumerate() {
                    assert_eq!((batched.len(), batched.bytes()), (LENGTHS[s] + 3, single.bytes()), "{name}");
                    let [found, expected] = [batched, single]
                        .map(|cache| engine.forward(&exec, &prompt[..7], cache, LogitRows::All).unwrap());
                    let error = relative_error(&found, &expected);
                    assert!(error < ORDER_TOLERANCE, "{name}, {n} sequences, {s} went on: {error:e}");
                }
            }
        }
    }
}

fn each(engine: &Engine, exec: &Exec, tokens: &[u32], caches: &mut [Cache]) -> Vec<f32> {
    let one = |(token, cache)| engine.forward(exec, &[token], cache, LogitRows::Last).unwrap();
    tokens.iter().copied().zip(caches).flat_map(one).collect()
}

#[test]
fn threads_do_not_change_a_batch() {
    let config = &configs()[1];
    for (name, model) in all_models(config) {
        let engine = engine_of(&model);
        let logits = [1, 2, 3].map(|threads| {
            let exec = Exec::new(threads).unwrap();
            let mut caches = LENGTHS.map(|_| engine.new_cache());
            let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
            engine.decode_batch(&exec, &tokens(9, 1), &mut caches).unwrap();
            engine.decode_batch(&exec, &tokens(9, 2), &mut caches).unwrap()
        });
        assert!(logits[0] == logits[1] && logits[0] == logits[2], "{name}");
    }
}

#[test]
fn a_bad_sequence_leaves_the_whole_batch_unchanged() {
    let config = &configs()[0];
    let exec = exec();
    for spec in specs(config.head_dim) {
        let base = base(config, 1);
        let model = hybrid(&base, plan(config, spec, Share::Some), 2);
        let engine = engine_of(&model);
        let mut caches = [5, 200, 0].map(|len| {
            let mut cache = engine.new_cache();
            engine.forward(&exec, &tokens(len, 1), &mut cache, LogitRows::None).unwrap();
            cache
        });
        let before = caches.clone();
        let mut foreign = engine_of(&base).new_cache();
        let [a, full, b] = &mut caches;
        assert!(engine.decode_batch(&exec, &[], &mut []).unwrap().is_empty());
        let error = engine.decode_batch(&exec, &[1, 2], &mut [a, full]).unwrap_err();
        assert!(matches!(error, ModelError::Context { requested: 201, limit: 200 }), "{error}");
        let error = engine.decode_batch(&exec, &[1, 99], &mut [b, a]).unwrap_err();
        assert!(matches!(error, ModelError::Token { token: 99, position: 5, vocab: 37 }), "{error}");
        let error = engine.decode_batch(&exec, &[1, 2], &mut [a, &mut foreign]).unwrap_err();
        assert!(matches!(error, ModelError::Cache(_)), "{error}");
        for (mut cache, mut before) in caches.into_iter().zip(before) {
            assert_eq!((cache.len(), cache.bytes()), (before.len(), before.bytes()));
            if cache.len() < 200 {
                let [found, expected] = [&mut cache, &mut before]
                    .map(|cache| engine.forward(&exec, &[3, 4], cache, LogitRows::All).unwrap());
                assert_eq!(found, expected, "{spec:?}");
            }
        }
    }
}

#[test]
fn logit_rows() {
    for config in configs() {
        let model = base(&config, 1);
        let engine = engine_of(&model);
        let (exec, tokens) = (exec(), tokens(9, 3));
        let all = full(&model, &tokens);
        assert_eq!(all.len(), 9 * VOCAB);
        let last = engine.forward(&exec, &tokens, &mut engine.new_cache(), LogitRows::Last).unwrap();
        assert!(relative_error(&last, &all[8 * VOCAB..]) < ORDER_TOLERANCE);
        let mut cache = engine.new_cache();
        assert!(engine.forward(&exec, &tokens, &mut cache, LogitRows::None).unwrap().is_empty());
        assert_eq!(cache.len(), 9);
        for rows in [LogitRows::All, LogitRows::Last, LogitRows::None] {
            assert!(engine.forward(&exec, &[], &mut cache, rows).unwrap().is_empty());
        }
        assert_eq!(cache.len(), 9);
    }
}

#[test]
fn an_empty_plan_is_the_base_bit_for_bit() {
    for config in configs() {
        let base = base(&config, 1);
        let spec = specs(config.head_dim)[1];
        let hybrid = hybrid(&base, plan(&config, spec, Share::All), 2);
        let empty = recurformer_model::HeadPlan::empty(&config);
        let back = hybrid.with_plan(empty, &mut |_, _| unreachable!("nothing is converted")).unwrap();
        assert_eq!(back.params.len(), base.params.len());
        for (id, param) in base.params.iter() {
            let same = back.params.get(back.params.id(&param.name).unwrap());
            assert!(same.shares_with(base.params.get(id)), "{} was copied", param.name);
        }
        let tokens = tokens(TOKENS, 4);
        let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(full(&back, &tokens)), bits(full(&base, &tokens)));
    }
}

#[test]
fn a_window_over_everything_is_attention() {
    for config in configs() {
        let base = base(&config, 1);
        let mut spec = specs(config.head_dim)[0];
        assert_eq!(spec.recurrent, RecurrentKind::None);
        (spec.window, spec.sinks) = (TOKENS, 0);
        for share in [Share::Some, Share::All] {
            let windowed = hybrid(&base, plan(&config, spec, share), 2);
            let tokens = tokens(TOKENS, 6);
            let error = relative_error(&full(&windowed, &tokens), &full(&base, &tokens));
            assert!(error < ORDER_TOLERANCE, "{error:e}");
        }
    }
}

#[test]
fn forks_are_independent_and_snapshots_restore() {
    let config = &configs()[2];
    for (name, model) in all_models(config) {
        let engine = engine_of(&model);
        let (exec, prompt) = (exec(), tokens(21, 7));
        let mut cache = engine.new_cache();
        engine.forward(&exec, &prompt, &mut cache, LogitRows::None).unwrap();
        let snapshot = cache.clone();
        let expected = engine.forward(&exec, &[1, 2, 3], &mut cache, LogitRows::All).unwrap();
        let mut fork = snapshot.clone();
        engine.forward(&exec, &[9, 9], &mut fork, LogitRows::All).unwrap();
        cache.restore(&snapshot);
        assert_eq!(cache.len(), 21);
        let again = engine.forward(&exec, &[1, 2, 3], &mut cache, LogitRows::All).unwrap();
        assert_eq!(again, expected, "{name}");
        assert_eq!((cache.len(), fork.len(), snapshot.len()), (24, 23, 21));
    }
}

#[test]
fn truncation() {
    let config = &configs()[0];
    let (exec, prompt) = (exec(), tokens(21, 7));
    for (name, model) in all_models(config) {
        let engine = engine_of(&model);
        let mut cache = engine.new_cache();
        assert!(cache.is_empty());
        let first = engine.forward(&exec, &prompt[..8], &mut cache, LogitRows::All).unwrap();
        let short = cache.clone();
        engine.forward(&exec, &prompt[8..], &mut cache, LogitRows::None).unwrap();
        let bytes = cache.bytes();
        cache.truncate(21).unwrap();
        assert!(matches!(cache.truncate(22), Err(ModelError::Cache(_))));
        let result = cache.truncate(8);
        if model.plan.converted() == 0 {
            result.unwrap();
            assert_eq!(cache.bytes(), short.bytes());
            let [found, expected] = [cache.clone(), short]
                .map(|mut c| engine.forward(&exec, &prompt, &mut c, LogitRows::All).unwrap());
            assert_eq!(found, expected);
        } else {
            let message = result.expect_err(&name).to_string();
            assert!(message.contains("hint"), "{message}");
            assert_eq!((cache.len(), cache.bytes()), (21, bytes), "{name}: changed by an error");
        }
        cache.truncate(0).unwrap();
        assert_eq!((cache.len(), cache.bytes()), (0, engine.cache_bytes(0)));
        assert_eq!(engine.forward(&exec, &prompt[..8], &mut cache, LogitRows::All).unwrap(), first, "{name}");
    }
}

#[test]
fn cache_grows_with_kept_groups_only() {
    let config = &configs()[1];
    let base = base(config, 1);
    let pages = |model: &Model, context| engine_of(model).cache_bytes(context);
    let page = pages(&base, 1);
    assert!(page >= 256 * config.kv_bytes_per_token(4), "a page has 256 positions");
    assert_eq!((pages(&base, 0), pages(&base, 256), pages(&base, 257)), (0, page, 2 * page));
    for spec in specs(config.head_dim) {
        let some = hybrid(&base, plan(config, spec, Share::Some), 2);
        let kept = some.plan.total() - some.plan.converted();
        let grown = pages(&some, 1025) - pages(&some, 1024);
        assert_eq!(grown * some.plan.total(), page * kept, "{spec:?}");
        let all = hybrid(&base, plan(config, spec, Share::All), 2);
        assert_eq!(pages(&all, 100_000), pages(&all, 0), "{spec:?}");
        assert!(pages(&all, 0) > 0);
    }
}

#[test]
fn bad_input_changes_nothing() {
    let config = &configs()[0];
    let exec = exec();
    let spec = specs(config.head_dim)[1];
    let base = base(config, 1);
    let mut model = hybrid(&base, plan(config, spec, Share::Some), 2);
    let mut engine = engine_of(&model);
    let mut cache = engine.new_cache();
    engine.forward(&exec, &tokens(190, 1), &mut cache, LogitRows::None).unwrap();
    let before = cache.bytes();

    let error = engine.forward(&exec, &[1, VOCAB as u32], &mut cache, LogitRows::All).unwrap_err();
    assert!(matches!(error, ModelError::Token { token: 37, position: 191, vocab: 37 }), "{error}");
    let error = engine.forward(&exec, &[1; 11], &mut cache, LogitRows::All).unwrap_err();
    assert!(matches!(error, ModelError::Context { requested: 201, limit: 200 }), "{error}");
    let mut foreign = engine_of(&base).new_cache();
    let error = engine.forward(&exec, &[1], &mut foreign, LogitRows::All).unwrap_err();
    assert!(matches!(error, ModelError::Cache(_)), "{error}");
    assert_eq!((cache.len(), cache.bytes(), foreign.len()), (190, before, 0));

    engine.forward(&exec, &[1; 10], &mut cache, LogitRows::None).unwrap();
    model.context_limit = 300;
    engine.context_limit = 300;
    engine.forward(&exec, &[1; 11], &mut cache, LogitRows::None).unwrap();
    assert_eq!(cache.len(), 211);

    let batch = |seq_len: usize, token| TokenBatch::one(&vec![token; seq_len]);
    let run = |batch| model.forward_batch(&exec, &batch, &mut NoObserver, None);
    assert!(matches!(run(batch(301, 0)), Err(ModelError::Context { requested: 301, limit: 300 })));
    assert!(matches!(run(batch(2, 99)), Err(ModelError::Token { token: 99, position: 0, .. })));
    assert!(run(batch(0, 0)).unwrap().is_empty());
}

/// Half a unit in the last place, relative: 11 and 8 binary digits, and a 254th of a row's largest value.
const F16_UNIT: f64 = 1.0 / 4096.0;
const BF16_UNIT: f64 = 1.0 / 512.0;
const Q8_UNIT: f64 = 1.0 / 254.0;
/// How much these random models amplify a rounding of every value: 38 is the most seen (bf16 weights), of any type alike.
const AMPLIFICATION: f64 = 60.0;
/// Types of cache and weights, and the coarsest rounding in them. Prefill multiplies f16 caches in bf16 where the CPU has that.
const ROUNDED: [(KvType, Option<Dtype>, f64); 6] = [
    (KvType::F16, Some(Dtype::F32), BF16_UNIT),
    (KvType::Bf16, Some(Dtype::F32), BF16_UNIT),
    (KvType::Q8, Some(Dtype::F32), Q8_UNIT),
    (KvType::F32, Some(Dtype::F16), F16_UNIT),
    (KvType::F32, Some(Dtype::BF16), BF16_UNIT),
    (KvType::F16, None, BF16_UNIT),
];

#[test]
fn smaller_types_compute_nearly_the_same_in_every_way() {
    for config in configs() {
        for (name, model) in all_models(&config) {
            let (exec, tokens) = (exec(), tokens(TOKENS, 5));
            let exact = full(&model, &tokens);
            for (kv_type, weights, unit) in ROUNDED {
                let options = EngineOptions { weights, kv_type };
                let engine = Engine::from_model(&exec, &model, options).unwrap();
                for chunks in [&[TOKENS][..], &[1], &[7, 1, 13]] {
                    let (found, cache) = chunked(&engine, &tokens, chunks);
                    let error = relative_error(&found, &exact);
                    assert!(error < AMPLIFICATION * unit, "{name} {options:?}, chunks {chunks:?}: {error:e}");
                    assert_eq!(cache.bytes(), engine.cache_bytes(TOKENS), "{name} {options:?}");
                }
            }
        }
    }
}

/// What a pass shows of its layers: inputs and head outputs, layer after layer.
#[derive(Default)]
struct Seen {
    layers: Vec<usize>,
    x: Vec<f32>,
    out: Vec<f32>,
}

impl Seen {
    fn push(&mut self, layer: usize, x: MatRef<'_>, out: MatRef<'_>) {
        if self.layers.last() != Some(&layer) {
            self.layers.push(layer);
        }
        (0..x.rows()).for_each(|t| self.x.extend_from_slice(x.row(t)));
        (0..out.rows()).for_each(|t| self.out.extend_from_slice(out.row(t)));
    }
}

impl LayerObserver for Seen {
    fn attention(&mut self, view: AttnView<'_>) {
        self.push(view.layer, view.x, view.out);
    }
}

#[test]
fn the_engine_shows_what_the_batched_pass_shows() {
    for config in configs() {
        for (name, model) in all_models(&config) {
            let (exec, engine) = (exec(), engine_of(&model));
            let batch = TokenBatch::equal(19, tokens(3 * 19, 8));
            let (mut want, mut got) = (Seen::default(), Seen::default());
            let want_hidden = model.forward_batch(&exec, &batch, &mut want, None).unwrap();
            let hidden = engine.observe(&exec, &batch, &mut |l, x, out| got.push(l, x, out)).unwrap();
            assert_eq!(got.layers, want.layers, "{name}");
            for (what, got, want) in
                [("x", &got.x, &want.x), ("out", &got.out, &want.out), ("hidden", &hidden, &want_hidden)]
            {
                let error = relative_error(got, want);
                assert!(error < ORDER_TOLERANCE, "{name}, {what}: {error:e}");
            }
            let bad = TokenBatch::one(&[0, VOCAB as u32]);
            let refused = engine.observe(&exec, &bad, &mut |_, _, _| panic!("nothing runs"));
            assert!(matches!(refused, Err(ModelError::Token { position: 1, .. })), "{name}");
        }
    }
}
