//! `least-recent`: the opposite of `recency`, a control.

use super::{Cost, Criterion, Scores, Source, recency};
use crate::HeadsReport;

pub const CRITERION: Criterion = Criterion {
    name: "least-recent",
    about: "minus the recency ratio: a control that converts the heads that look farthest",
    cost: Cost::Statistics,
    measured: None,
    reference: "control",
    source: Source::Stats(scores),
};

fn scores(heads: &HeadsReport, seed: u64) -> Scores {
    let mut scores = recency::scores(heads, seed);
    scores.iter_mut().flatten().for_each(|score| *score = -*score);
    scores
}
