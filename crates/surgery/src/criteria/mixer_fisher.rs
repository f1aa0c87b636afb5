//! `mixer-fisher`: the first-order estimate of the KL divergence that each group's trained replacement causes.

use super::fisher::fisher;
use super::{Cost, Criterion, Scores, Source};
use crate::HeadBank;
use crate::base::check_model;
use crate::error::{Result, SurgeryError};
use kernels::{Exec, MatMut};
use model::mixers::{self, HeadEnv};
use model::observe::AttnView;
use model::{Model, Progress};

pub const CRITERION: Criterion = Criterion {
    name: "mixer-fisher",
    about: "minus the first-order KL per token of the trained replacement's own error; needs a head bank",
    cost: Cost::Bank,
    measured: None,
    reference: "this project",
    source: Source::Bank(scores),
};

fn scores(bank: &HeadBank) -> Result<Scores> {
    let costs = &bank.info.mixer_fisher;
    if costs.is_empty() {
        return Err(SurgeryError::Argument(
            "the head bank holds no `mixer-fisher` measurement\nhint: let its training finish".into(),
        ));
    }
    Ok(costs.iter().map(|layer| layer.iter().map(|cost| -cost).collect()).collect())
}

/// The `mixer-fisher` cost F_g `[layer][group]` (positive) of a bank: one forward and one backward pass of the base over `sequences`,
/// with labels drawn from the base's softmax (`seed`).
///
/// # Errors
/// [`SurgeryError::Argument`] for a hybrid model, a bank of another model, or no sequences; [`SurgeryError::Model`];
/// [`SurgeryError::Interrupted`].
pub fn mixer_fisher(
    exec: &Exec,
    model: &Model,
    bank: &HeadBank,
    sequences: &[Vec<u32>],
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Scores> {
    let config = &model.config;
    check_model("the head bank", &bank.info.model, config)?;
    bank.check(config)?;
    let layout = bank.layout(config);
    let (width, group_width) = (config.heads * config.head_dim, config.group_size() * config.head_dim);
    let mut delta = |view: &AttnView<'_>, out: &mut [f32]| {
        let seq = view.x.rows();
        for group in 0..config.kv_heads {
            let env = HeadEnv {
                layout,
                weights: bank.groups[view.layer][group].view(),
                base: model.base_group(view.layer, group),
                inv_freq: model.inv_freq(),
            };
            let columns = MatMut::new(&mut out[group * group_width..], seq, group_width, width);
            mixers::forward(exec, &env, view.x, &mut layout.new_cache(), columns);
        }
        for (t, row) in out.chunks_exact_mut(width).enumerate() {
            row.iter_mut().zip(view.out.row(t)).for_each(|(d, full)| *d -= full);
        }
    };
    fisher(exec, model, sequences, seed, "mixer-fisher", &mut delta, progress)
}
