//! Answers read once and forked against a naive twin that reads every prompt from its beginning, one token at a time.
#![allow(clippy::unwrap_used)]

use kernels::Exec;
use model::{
    Engine, EngineOptions, GroupMixer, HeadPlan, LogitRows, MixerSpec, Model, RecurrentKind, Silent,
};
use recurformer_eval::answers::greedy_answers;
use recurformer_eval::hashhop::{HashHopTest, hashhop};
use recurformer_eval::ruler::{RulerTest, ruler};
use serde_json::json;
use std::path::Path;
use tasks::hashhop::Answering;
use tasks::ruler::RulerTask;
use weights::{Checkpoint, Tokenizer};

/// One token per lower-case letter, digit or mark: the 64 of the tiny models.
fn tokenizer() -> Tokenizer {
    let characters =
        "abcdefghijklmnopqrstuvwxyz0123456789 \n.,'?-!:;=_()[]{}<>/+*#@%$&".chars().map(String::from);
    let vocab: serde_json::Map<String, serde_json::Value> =
        characters.zip(0..).map(|(text, id): (_, u32)| (text, id.into())).collect();
    assert_eq!(vocab.len(), 64);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []
    });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"}, "model": model
    });
    Tokenizer::from_parts(json.to_string().into_bytes(), json!({})).unwrap()
}

/// The tiny model, and itself with windows in half of its groups.
fn engines() -> Vec<Engine> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
    let base = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    let mut plan = HeadPlan::empty(&base.config);
    plan.beta = 0.5;
    plan.mixer = Some(MixerSpec {
        recurrent: RecurrentKind::None,
        window: 8,
        sinks: 1,
        d_state: 0,
        d_conv: 0,
        dropped: Default::default(),
    });
    plan.layers.iter_mut().for_each(|l| l.groups[0].mixer = GroupMixer::Recurrent);
    let hybrid = base.with_plan(plan, &mut |_, _| Ok(Default::default())).unwrap();
    [base, hybrid]
        .map(|model| Engine::from_model(&Exec::new(1).unwrap(), &model, EngineOptions::EXACT).unwrap())
        .into()
}

fn naive(
    model: &Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    max: usize,
    done: impl Fn(&str) -> bool,
) -> String {
    let exec = Exec::new(1).unwrap();
    let mut ids = prompt.to_vec();
    let mut text = String::new();
    while ids.len() < prompt.len() + max {
        let logits = model.forward(&exec, &ids, &mut model.new_cache(), LogitRows::Last).unwrap();
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
        if model.config.eos_token_ids.contains(&best) {
            break;
        }
        ids.push(best);
        text = tokenizer.decode(&ids[prompt.len()..], true).unwrap();
        if done(&text) {
            break;
        }
    }
    text
}

#[test]
fn forked_answers_are_those_of_the_naive_twin() {
    let tokenizer = tokenizer();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap();
    let beginning = "a whale saw the harbour, and the captain turned to the storm. ".repeat(2);
    let together: Vec<Vec<u32>> = ["why? ", "when? ", "w", "who was it, then? "]
        .iter()
        .map(|q| encode(&[&beginning, *q].concat()))
        .collect();
    let apart = vec![encode("one."), encode("another one"), encode("x")];
    let nested = vec![encode("one two"), encode("one"), encode("one two three")];
    for model in engines() {
        let exec = Exec::new(2).unwrap();
        for prompts in [&together, &apart, &nested, &together[..1].to_vec()] {
            for (max, stop) in [(12, ""), (12, "e"), (1, ""), (0, "")] {
                let done = |text: &str| !stop.is_empty() && text.contains(stop);
                let found =
                    greedy_answers(&exec, &model, &tokenizer, prompts, max, |_, text| done(text)).unwrap();
                let expected: Vec<String> =
                    prompts.iter().map(|p| naive(&model, &tokenizer, p, max, done)).collect();
                assert_eq!(found, expected, "{max} {stop:?}");
            }
        }
        assert!(greedy_answers(&exec, &model, &tokenizer, &[], 3, |_, _| false).unwrap().is_empty());
    }
}

#[test]
fn answers_end_on_their_own() {
    let tokenizer = tokenizer();
    let prompts: Vec<Vec<u32>> =
        ["the whale", "the sailor"].iter().map(|p| tokenizer.encode(p, false).unwrap()).collect();
    let mut model = engines().remove(0);
    let exec = Exec::new(1).unwrap();
    let found = greedy_answers(&exec, &model, &tokenizer, &prompts, 9, |_, _| false).unwrap();
    assert!(found.iter().any(|text| text.chars().count() < 9), "an end token ends an answer: {found:?}");
    model.config.eos_token_ids.clear();
    let lengths = |stop_at: [usize; 2]| -> Vec<usize> {
        let done = |at: usize, text: &str| text.chars().count() >= stop_at[at];
        let found = greedy_answers(&exec, &model, &tokenizer, &prompts, 9, done).unwrap();
        found.iter().map(|text| text.chars().count()).collect()
    };
    assert_eq!(lengths([2, 7]), [2, 7]);
    assert_eq!(lengths([30, 1]), [9, 1]);
}

#[test]
fn hashhop_asks_as_often_as_it_is_told() {
    let tokenizer = tokenizer();
    let test = HashHopTest {
        hops: vec![1, 2],
        contexts: vec![150, 240],
        hash_length: 3,
        answering: Answering::Direct,
        samples: 7,
        queries_per_prompt: 3,
        seed: 1,
    };
    for model in engines() {
        let exec = Exec::new(1).unwrap();
        let results = hashhop(&exec, &model, &tokenizer, &test, &mut Silent).unwrap();
        assert_eq!(results, hashhop(&exec, &model, &tokenizer, &test, &mut Silent).unwrap());
        let cells: Vec<(usize, usize)> = results.iter().map(|r| (r.hops, r.context)).collect();
        assert_eq!(cells, [(1, 150), (1, 240), (2, 150), (2, 240)]);
        assert!(results.iter().all(|r| r.score.asked == 7 && r.prompts == 3));
        let tell = |test: HashHopTest| {
            hashhop(&exec, &model, &tokenizer, &test, &mut Silent).unwrap_err().to_string()
        };
        assert!(tell(HashHopTest { contexts: vec![20], ..test.clone() }).contains("20 tokens"));
        assert!(tell(HashHopTest { samples: 0, ..test.clone() }).contains("at least one"));
        assert!(tell(HashHopTest { hops: vec![0], ..test.clone() }).contains("between 1 and 16"));
    }
}

#[test]
fn ruler_counts_every_wanted_answer() {
    let tokenizer = tokenizer();
    let exec = Exec::new(2).unwrap();
    let mut model = engines().remove(1);
    model.context_limit = 1200;
    let test = RulerTest {
        tasks: vec![RulerTask::NiahSingle, RulerTask::VariableTracking],
        contexts: vec![800, 1000],
        samples: 2,
        seed: 1,
    };
    let results = ruler(&exec, &model, &tokenizer, &test, &mut Silent).unwrap();
    let cells: Vec<(&str, usize, usize)> =
        results.iter().map(|r| (r.task.as_str(), r.context, r.score.asked)).collect();
    let [single, tracking] = ["niah_single", "variable_tracking"];
    assert_eq!(cells, [(single, 800, 2), (single, 1000, 2), (tracking, 800, 10), (tracking, 1000, 10)]);
    let tell =
        |test: RulerTest| ruler(&exec, &model, &tokenizer, &test, &mut Silent).unwrap_err().to_string();
    assert!(tell(RulerTest { contexts: vec![300], ..test.clone() }).contains("300 tokens"));
    assert!(tell(RulerTest { samples: 0, ..test.clone() }).contains("at least one"));
}
