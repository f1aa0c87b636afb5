//! `random`: uniform draws, a control.

use super::{Cost, Criterion, Scores, Source};
use crate::HeadsReport;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const CRITERION: Criterion = Criterion {
    name: "random",
    about: "seeded uniform draws: a control",
    cost: Cost::Statistics,
    measured: None,
    reference: "control",
    source: Source::Stats(scores),
};

fn scores(heads: &HeadsReport, seed: u64) -> Scores {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    heads.layers.iter().map(|layer| layer.groups.iter().map(|_| rng.random()).collect()).collect()
}
