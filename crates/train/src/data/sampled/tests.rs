//! Sampling on tiny models, against a naive twin that decodes one token of one document at a time from scratch.

use super::*;
use crate::testing::{StopAfter, fresh_bank, mixer_specs, tiny_config, tiny_model};
use model::{HeadPlan, LogitRows, ModelConfig, Silent};
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
use rand::Rng;
use std::fs;
use std::path::Path;

fn options(documents: usize, tokens: usize, seed: u64) -> SelfOptions {
    SelfOptions { documents, tokens, seed }
}

fn exec() -> Exec {
    Exec::new(2).unwrap()
}

/// Ends and starts that occur: every other token is an end, and there is a start token or none.
fn configs() -> Vec<ModelConfig> {
    let ends: Vec<u32> = (0..61).step_by(2).collect();
    [Some(1), None]
        .into_iter()
        .flat_map(|bos| [vec![], vec![2], ends.clone(), vec![2, 4_000_000]].map(|ends| (bos, ends)))
        .map(|(bos_token_id, eos_token_ids)| ModelConfig { bos_token_id, eos_token_ids, ..tiny_config() })
        .collect()
}

fn engine(model: &Model) -> Engine {
    Engine::from_model(&exec(), model, EngineOptions::EXACT).unwrap()
}

/// The document's definition, with no cache that could be stale.
fn naive(model: &Model, tokens: usize, seed: u64, index: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let options = SamplerOptions { temperature: 1.0, seed: rng.random(), ..Default::default() };
    let mut sampler = Sampler::new(options).unwrap();
    let mut start =
        || model.config.bos_token_id.unwrap_or_else(|| rng.random_range(0..model.config.vocab as u32));
    let mut prefix = vec![start()];
    let engine = engine(model);
    let mut document = Vec::new();
    while document.len() < tokens {
        let mut logits = engine.forward(&exec(), &prefix, &mut engine.new_cache(), LogitRows::Last).unwrap();
        let ends = &model.config.eos_token_ids;
        if prefix.len() == 1 {
            for (id, logit) in logits.iter_mut().enumerate() {
                *logit = if ends.contains(&(id as u32)) { f32::NEG_INFINITY } else { *logit };
            }
        }
        let token = sampler.sample(&logits, &[]).unwrap();
        if ends.contains(&token) {
            prefix = vec![start()];
        } else {
            prefix.push(token);
            document.push(token);
        }
    }
    document
}

#[test]
fn documents_are_those_of_the_naive_twin_whatever_the_batch() {
    for config in configs() {
        let model = tiny_model(&config, 3);
        let expected: Vec<Vec<u32>> = (0..11).map(|i| naive(&model, 9, 5, i)).collect();
        assert!(expected.iter().flatten().all(|t| !config.eos_token_ids.contains(t)));
        for (documents, batch) in [(11, 1), (11, 2), (11, 3), (11, 10), (11, 64), (4, 2)] {
            let found =
                sample(&exec(), &engine(&model), &options(documents, 9, 5), batch, &mut Silent).unwrap();
            assert_eq!(found, expected[..documents], "{:?}, batch {batch}", config.eos_token_ids);
        }
    }
}

#[test]
fn hybrids_are_sampled_as_well() {
    let base = tiny_model(&tiny_config(), 3);
    for spec in mixer_specs(base.config.head_dim) {
        let bank = fresh_bank(&base, spec, 1);
        let mut plan = HeadPlan::empty(&base.config);
        plan.mixer = Some(spec);
        plan.layers[0].groups[1].mixer = model::GroupMixer::Recurrent;
        plan.beta = 0.25;
        let model = base.with_plan(plan, &mut |layer, group| Ok(bank.groups[layer][group].clone())).unwrap();
        let found = sample(&exec(), &engine(&model), &options(5, 9, 5), 3, &mut Silent).unwrap();
        assert_eq!(found, (0..5).map(|i| naive(&model, 9, 5, i)).collect::<Vec<_>>(), "{spec:?}");
    }
}

#[test]
fn only_ends_left_or_none() {
    let all_but = |id: u32| (0..61).filter(|&t| t != id).collect();
    let model = tiny_model(&ModelConfig { eos_token_ids: all_but(7), ..tiny_config() }, 3);
    assert_eq!(
        sample(&exec(), &engine(&model), &options(3, 5, 1), 2, &mut Silent).unwrap(),
        vec![vec![7; 5]; 3]
    );
    let model = tiny_model(&ModelConfig { eos_token_ids: all_but(61), ..tiny_config() }, 3);
    let error = sample(&exec(), &engine(&model), &options(3, 5, 1), 2, &mut Silent).unwrap_err();
    assert!(matches!(error, TrainError::Model(ModelError::Sampler(_))), "{error}");
}

/// Adds up what is reported.
#[derive(Default)]
struct Count {
    total: u64,
    done: u64,
    finished: bool,
}

impl Progress for Count {
    fn start(&mut self, _: &str, total: u64, unit: &str) {
        assert_eq!(unit, "tokens");
        self.total = total;
    }
    fn advance(&mut self, n: u64, _: &str) {
        self.done += n;
    }
    fn finish(&mut self) {
        self.finished = true;
    }
}

#[test]
fn progress_counts_tokens_of_documents() {
    for config in configs() {
        let mut count = Count::default();
        sample(&exec(), &engine(&tiny_model(&config, 3)), &options(5, 8, 1), 3, &mut count).unwrap();
        assert_eq!((count.total, count.done, count.finished), (40, 40, true));
    }
}

#[test]
fn sampled_text_is_reproducible_and_cached() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(&tiny_config(), 3);
    let options = SelfOptions { documents: 5, tokens: 7, seed: 1 };
    let sample = |threads, options: &SelfOptions, dir: &Path| {
        self_sampled_in(&Exec::new(threads).unwrap(), &model, options, dir, &mut Silent).unwrap()
    };
    let first = sample(2, &options, dir.path());
    assert_eq!(first.len(), 5);
    assert!(first.iter().all(|d| d.tokens.len() == 7 && d.source == "self"));
    assert_ne!(first[0], first[1]);
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(sample(1, &options, elsewhere.path()), first);
    assert_ne!(sample(1, &SelfOptions { seed: 2, ..options.clone() }, dir.path()), first);
    // The cached copy is used when it fits, and replaced when it does not.
    let cached = fs::read_dir(elsewhere.path()).unwrap().next().unwrap().unwrap().path();
    let text = fs::read_to_string(&cached).unwrap();
    fs::write(&cached, text.replace(&format!("[[{}", first[0].tokens[0]), "[[0")).unwrap();
    assert_eq!(sample(1, &options, elsewhere.path())[0].tokens[0], 0);
    fs::write(&cached, &text[..text.len() / 2]).unwrap();
    assert_eq!(sample(1, &options, elsewhere.path()), first);
}

#[test]
fn what_cannot_be_sampled_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(&tiny_config(), 3);
    let sample = |options| self_sampled_in(&exec(), &model, &options, dir.path(), &mut Silent).unwrap_err();
    assert!(matches!(sample(options(0, 5, 0)), TrainError::Argument(_)));
    assert!(matches!(sample(options(5, 1, 0)), TrainError::Argument(_)));
    let error = sample(options(1, 257, 0));
    assert!(
        matches!(error, TrainError::Model(ModelError::Context { requested: 257, limit: 256 })),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn batches_fit_the_memory() {
    for (bytes, expected) in
        [(0, 64), (1 << 20, 64), (CACHE_BYTES / 20, 20), (CACHE_BYTES / 15, 8), (usize::MAX, 8)]
    {
        assert_eq!(batch_size(bytes), expected, "{bytes}");
    }
}

#[test]
fn a_document_may_fill_the_context() {
    let model = tiny_model(&ModelConfig { max_context: 12, eos_token_ids: vec![], ..tiny_config() }, 3);
    let found = sample(&exec(), &engine(&model), &options(2, 12, 0), 2, &mut Silent).unwrap();
    assert!(found.iter().all(|d| d.len() == 12));
}

#[test]
fn other_models_and_ways_to_end_have_their_own_files() {
    let dir = tempfile::tempdir().unwrap();
    let with_ends = |ends: &[u32]| ModelConfig { eos_token_ids: ends.to_vec(), ..tiny_config() };
    let models =
        [(&[2][..], 3), (&[2], 4), (&[2, 3], 3)].map(|(ends, seed)| tiny_model(&with_ends(ends), seed));
    for (i, model) in models.iter().enumerate() {
        self_sampled_in(&exec(), model, &options(2, 4, 0), dir.path(), &mut Silent).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), i + 1);
    }
}

proptest! {
    /// Cancelled after any number of steps: nothing is left, and a second run gives what an undisturbed one does.
    #[test]
    fn an_interrupted_run_leaves_nothing(
        documents in 1..6_usize,
        tokens in 2..9_usize,
        after in 0..14_u64,
        seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_model(&tiny_config(), 3);
        let options = options(documents, tokens, seed);
        let undisturbed = sample(&exec(), &engine(&model), &options, 4, &mut Silent).unwrap();
        let undisturbed: Vec<Document> = undisturbed.into_iter().map(document).collect();
        let files = || fs::read_dir(dir.path()).unwrap().count();
        let mut stop = StopAfter::new(after);
        match self_sampled_in(&exec(), &model, &options, dir.path(), &mut stop) {
            Ok(found) => {
                prop_assert!(after >= tokens as u64);
                prop_assert_eq!((files(), &found), (1, &undisturbed));
            }
            Err(error) => {
                prop_assert!(matches!(error, TrainError::Interrupted), "{}", error);
                prop_assert_eq!(files(), 0);
            }
        }
        let found = self_sampled_in(&exec(), &model, &options, dir.path(), &mut Silent).unwrap();
        prop_assert_eq!((files(), found), (1, undisturbed));
    }
}
