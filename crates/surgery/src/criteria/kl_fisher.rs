//! `kl-fisher`: the first-order estimate of the KL divergence that windowing one group causes.

use super::fisher::fisher;
use super::window::{WINDOW, window_delta};
use super::{Cost, Criterion, Measured, Scores, Source};
use crate::error::Result;
use kernels::Exec;
use model::{Model, Progress};

pub const CRITERION: Criterion = Criterion {
    name: "kl-fisher",
    about: "minus the first-order KL per token when the group sees the last 64 tokens and the sink",
    cost: Cost::ForwardBackward,
    measured: Some(Measured { seconds: 16.0, of: "1,024 tokens" }),
    reference: "this project",
    source: Source::Backward(measure),
};

fn measure(
    exec: &Exec,
    model: &Model,
    sequences: &[Vec<u32>],
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Scores> {
    let mut cost = window_fisher(exec, model, WINDOW, sequences, seed, progress)?;
    cost.iter_mut().flatten().for_each(|cost| *cost = -*cost);
    Ok(cost)
}

/// The positive cost of windowing each group.
pub fn window_fisher(
    exec: &Exec,
    model: &Model,
    window: usize,
    sequences: &[Vec<u32>],
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Scores> {
    let mut delta = |view: &model::observe::AttnView<'_>, out: &mut [f32]| {
        window_delta(exec, &model.config, window, view, out);
    };
    fisher(exec, model, sequences, seed, "kl-fisher", &mut delta, progress)
}
