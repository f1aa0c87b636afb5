//! `recency`: the share of live attention within the last 64 tokens, the paper's criterion.

use super::{Cost, Criterion, Measured, Scores, Source};
use crate::HeadsReport;

pub const CRITERION: Criterion = Criterion {
    name: "recency",
    about: "recency ratio of the last 64 tokens, mean over the group's heads (the paper's criterion)",
    cost: Cost::Statistics,
    measured: Some(Measured { seconds: 2.0, of: "1,024 tokens" }),
    reference: "RecurFormer, arXiv 2410.12850",
    source: Source::Stats(scores),
};

pub fn scores(heads: &HeadsReport, _seed: u64) -> Scores {
    heads.layers.iter().map(|layer| layer.groups.iter().map(|g| g.stats.recency_ratio_64).collect()).collect()
}
