mod parts;
pub mod planted;

use super::*;
use crate::testing::exec;
use model::{Progress, Silent};
use planted::Planted;

/// f32 scores of about 20 against closed forms.
const TOLERANCE: f64 = 1e-3;

fn examine(model: &Model, sequences: &[Vec<u32>]) -> SinksReport {
    sinks(&exec(), model, sequences, &SinkOptions::default(), &mut Silent).unwrap()
}

fn only(report: &SinksReport) -> (&Sink, &SinkTests) {
    assert_eq!(report.sinks.len(), 1, "{:?}", report.sinks);
    (&report.sinks[0], report.sinks[0].tests.as_ref().unwrap())
}

fn at(report: &SinksReport, position: usize) -> (&Sink, &SinkTests) {
    let sink = report.sinks.iter().find(|sink| sink.position == position).unwrap();
    (sink, sink.tests.as_ref().unwrap())
}

fn mean(estimate: &Option<Estimate>) -> f64 {
    estimate.as_ref().unwrap().mean
}

fn controls_are_quiet(report: &SinksReport, tests: &SinkTests) {
    assert!(mean(&tests.control_codes) < 0.3 && mean(&tests.control_tokens) < 0.3, "{tests:?}");
    let constant = report.constant.unwrap();
    assert!(
        constant.shift > 0 && constant.strength_change < 1e-4 && constant.nll_change < 1e-4,
        "{constant:?}"
    );
    assert!(report.runs.values().all(|tally| tally.runs > 0 && tally.discarded == 0), "{:?}", report.runs);
}

/// Key biases and queries that undo their own rotation: the position code 0 absorbs, whatever stands there.
#[test]
fn a_position_code_that_absorbs() {
    let report = examine(&planted::by_position().model(), &planted::by_position_text(3));
    let (sink, tests) = only(&report);
    assert_eq!((sink.position, sink.sequences.as_slice()), (0, &[0, 1, 2][..]));
    assert_eq!((tests.cause, tests.clear, tests.sequences), (Cause::PositionalEncoding, true, 3));
    assert!((mean(&tests.codes) - 1.0).abs() < 0.1, "{tests:?}");
    assert!(mean(&tests.tokens) < 0.3 && mean(&tests.alone) < 0.3, "{tests:?}");
    // Its value is like any other: no waiver.
    assert!(sink.value_ratio > 0.6 && !tests.waiver);
    assert!(sink.heads.iter().all(|head| head.cause == Some(Cause::PositionalEncoding)));
    assert_eq!((sink.share, sink.heads.len()), (0.5, 1));
    controls_are_quiet(&report, tests);
}

/// A token whose key every query likes absorbs wherever it stands, first or later.
#[test]
fn a_token_that_absorbs() {
    for position in [0, 20, 40] {
        let report = examine(&planted::by_token(0.0).model(), &planted::by_token_text(3, position));
        let (sink, tests) = only(&report);
        assert_eq!((sink.position, sink.tokens.as_slice()), (position, &[0, 0, 0][..]));
        assert_eq!((tests.cause, tests.clear), (Cause::Lexical, true), "{tests:?}");
        // Every other key scores 0, the sink's 12 more.
        assert!((sink.strength - planted::TOKEN_STRENGTH).abs() < TOLERANCE, "{}", sink.strength);
        assert!((mean(&tests.tokens) - 1.0).abs() < TOLERANCE, "{tests:?}");
        assert!(mean(&tests.codes).abs() < TOLERANCE && mean(&tests.alone).abs() < TOLERANCE, "{tests:?}");
        assert!(mean(&tests.repeat).abs() < TOLERANCE);
        // It has no value: cutting that costs nothing, cutting the key does.
        assert!(tests.waiver && sink.value_ratio == 0.0 && tests.kl_value < 1e-6 && tests.kl_key > 1e-4);
        assert!(sink.heads.iter().all(|head| head.waiver == Some(true)));
        assert_eq!(report.no_op_heads.len(), usize::from(position < 30), "{:?}", report.no_op_heads);
        controls_are_quiet(&report, tests);
    }
}

/// The same token with a value: what it gives is information.
#[test]
fn a_value_makes_it_no_waiver() {
    let report = examine(&planted::by_token(1.0).model(), &planted::by_token_text(2, 20));
    let (sink, tests) = only(&report);
    assert!(!tests.waiver && sink.value_ratio > 0.6 && tests.kl_value > 1e-4, "{tests:?}");
    assert_eq!(tests.cause, Cause::Lexical);
}

/// Layer 0 lets a token recognise that it saw nothing but itself; layer 1 attends to such tokens.
#[test]
fn the_mask_makes_the_first_absorb() {
    let report = examine(&planted::by_mask().model(), &planted::by_mask_text(3));
    let (sink, tests) = only(&report);
    assert_eq!((sink.position, tests.cause, tests.clear), (0, Cause::MaskInduced, true), "{tests:?}");
    assert!(sink.heads.iter().all(|head| head.layer == 1 && head.cause == Some(Cause::MaskInduced)));
    // The donor is as strong as the first, although the two then share the attention.
    assert!((mean(&tests.alone) - 1.0).abs() < 0.01, "{tests:?}");
    assert!(mean(&tests.codes) < 0.3 && mean(&tests.tokens) < 0.3, "{tests:?}");
    controls_are_quiet(&report, tests);
}

/// With a token that absorbs too, each attribute hands over more than half of it.
#[test]
fn two_causes_are_mixed() {
    let mut planted = planted::by_mask();
    planted.add_token_key(1, 0, 15.6);
    let text: Vec<Vec<u32>> = planted::by_mask_text(2)
        .into_iter()
        .map(|mut tokens| {
            let zero = tokens.iter().position(|&t| t == 0).unwrap();
            tokens.swap(0, zero);
            tokens
        })
        .collect();
    let report = examine(&planted.model(), &text);
    let (_, tests) = at(&report, 0);
    assert_eq!(tests.cause, Cause::Mixed, "{tests:?}");
}

#[test]
fn where_nothing_absorbs_nothing_is_found() {
    let report = examine(&Planted::new(16, 2, 1e6, 1.0).model(), &planted::by_mask_text(2));
    assert!(report.sinks.is_empty() && report.no_op_heads.is_empty() && report.runs.is_empty());
    assert_eq!((report.constant, report.sequences, report.tokens), (None, 2, 2 * planted::DISTINCT));
}

/// A later sink is not mask-induced even where isolated donors absorb: it does not see only itself.
#[test]
fn only_the_first_position_can_be_mask_induced() {
    let mut planted = planted::by_mask();
    planted.add_token_key(1, 0, 34.0);
    let text: Vec<Vec<u32>> = planted::by_mask_text(2)
        .into_iter()
        .map(|mut tokens| {
            let zero = tokens.iter().position(|&t| t == 0).unwrap();
            tokens.swap(15, zero);
            tokens
        })
        .collect();
    let report = examine(&planted.model(), &text);
    let (_, tests) = at(&report, 15);
    assert_eq!(tests.cause, Cause::Lexical, "{tests:?}");
    assert!(mean(&tests.alone) > 0.5);
}

#[test]
fn a_report_follows_from_its_seed_and_survives_the_disk() {
    let (model, text) = (planted::by_mask().model(), planted::by_mask_text(2));
    let report = examine(&model, &text);
    assert_eq!(report, examine(&model, &text));
    let seeded = SinkOptions { seed: 1, ..SinkOptions::default() };
    assert_ne!(report.sinks, sinks(&exec(), &model, &text, &seeded, &mut Silent).unwrap().sinks);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sinks.json");
    report.write(&path).unwrap();
    assert_eq!(SinksReport::read(&path).unwrap(), report);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["sinks"][0]["tests"]["cause"], "mask-induced");
    let tampered = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        edit(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        SinksReport::read(&path).unwrap_err().to_string()
    };
    assert!(tampered(&|json| json["version"] = 2.into()).contains("version 2, expected 1"));
    assert!(tampered(&|json| json["sinks"] = 1.into()).contains("malformed"));
    assert!(tampered(&|json| json["sinks"][0]["heads"][0]["layer"] = 9.into()).contains("layer 9"));
    assert!(tampered(&|json| json["sinks"][0]["position"] = 999.into()).contains("position 999"));
}

/// Counts what was announced and what was done; stops after some steps.
#[derive(Default)]
struct Counting {
    phases: Vec<(String, u64, u64)>,
    stop_after: Option<u64>,
}

impl Progress for Counting {
    fn start(&mut self, label: &str, total: u64, _: &str) {
        self.phases.push((label.to_string(), total, 0));
    }
    fn advance(&mut self, n: u64, _: &str) {
        self.phases.last_mut().unwrap().2 += n;
    }
    fn cancelled(&self) -> bool {
        let done = self.phases.last().map_or(0, |phase| phase.2);
        self.stop_after.is_some_and(|after| self.phases.len() == 2 && done >= after)
    }
}

#[test]
fn progress_ends_where_it_was_announced_and_can_be_interrupted() {
    let (model, text) = (planted::by_mask().model(), planted::by_mask_text(2));
    for donors in [1, 3] {
        let options = SinkOptions { donors, ..SinkOptions::default() };
        let mut progress = Counting::default();
        sinks(&exec(), &model, &text, &options, &mut progress).unwrap();
        assert_eq!(progress.phases.len(), 2);
        assert!(progress.phases.iter().all(|(_, total, done)| total == done), "{:?}", progress.phases);
    }
    let mut progress = Counting { stop_after: Some(5), ..Counting::default() };
    let stopped = sinks(&exec(), &model, &text, &SinkOptions::default(), &mut progress);
    assert!(matches!(stopped, Err(SurgeryError::Interrupted)));
}

#[test]
fn what_cannot_be_examined_is_an_error() {
    let model = planted::by_mask().model();
    let message = |text: &[Vec<u32>], donors| {
        let options = SinkOptions { donors, ..SinkOptions::default() };
        sinks(&exec(), &model, text, &options, &mut Silent).unwrap_err().to_string()
    };
    assert!(message(&[], 3).contains("no calibration text"));
    assert!(message(&[vec![1; 40], vec![1; 31]], 3).contains("sequence 1 has 31 tokens"));
    assert!(message(&planted::by_mask_text(1), 0).contains("at least one ordinary position"));
}

/// Without an ordinary position nothing is compared, and nothing is claimed.
#[test]
fn without_donors_the_cause_is_unknown() {
    // Nothing but the absorbing token in the first half.
    let mut text = planted::by_token_text(1, 20);
    text[0][..32].fill(0);
    text[0][..4].fill(5);
    let mut planted = planted::by_token(0.0);
    planted.scale_token_key(0.35);
    let report = examine(&planted.model(), &text);
    assert!(report.sinks.iter().all(|s| s.tests.as_ref().is_none_or(|t| t.cause == Cause::Unknown)));
}
