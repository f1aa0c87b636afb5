//! Selection criteria: each gives a score per KV group, `[layer][group]`, higher: safer to convert. One module each.

use crate::error::Result;
use crate::{HeadBank, HeadsReport};
use kernels::Exec;
use model::{Model, Progress};

/// Names, in the order they are documented.
pub const NAMES: [&str; 6] = ["mixer-fisher", "recency", "window-error", "kl-fisher", "random", "least-recent"];

/// Scores of `criterion` from files: `mixer-fisher` from the bank's measurement, the others from `heads` (`random` is drawn from `seed`).
pub fn scores(criterion: &str, heads: &HeadsReport, bank: Option<&HeadBank>, seed: u64) -> Result<Vec<Vec<f64>>> {
    let _ = (criterion, heads, bank, seed);
    todo!()
}

/// The `mixer-fisher` cost F_g `[layer][group]` (positive) of a bank: one forward and one backward pass of the base over `sequences`, with labels drawn
/// from the base's softmax (`seed`).
pub fn mixer_fisher(
    exec: &Exec,
    model: &Model,
    bank: &HeadBank,
    sequences: &[Vec<u32>],
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<f64>>> {
    let _ = (exec, model, bank, sequences, seed, progress);
    todo!()
}
