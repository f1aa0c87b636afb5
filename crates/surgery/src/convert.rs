//! Writing the hybrid checkpoint in Hugging Face layout.

use crate::HeadBank;
use crate::error::Result;
use model::{HeadPlan, Model, Progress};
use std::path::Path;
use weights::Checkpoint;

/// Writes `checkpoint` converted by `plan` to the folder `out` (built under a temporary name, renamed at the end): `config.json`,
/// `head_plan.json`, tokenizer files, tensors. Untouched tensors are copied byte for byte where the source stores F32, F16 or BF16, else (quantised
/// sources) written as their exact f32 values. New heads come from `bank`, or from [`model::mixers::init`] with distance `default`s when `None`
/// (seeded by `seed`; decays from `heads` when given).
pub fn convert(
    checkpoint: &Checkpoint,
    plan: &HeadPlan,
    bank: Option<&HeadBank>,
    heads: Option<&crate::HeadsReport>,
    seed: u64,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let _ = (checkpoint, plan, bank, heads, seed, out, progress);
    todo!()
}

/// The same in memory, for evaluation without writing: shares the base's tensors.
pub fn convert_in_memory(model: &Model, plan: &HeadPlan, bank: Option<&HeadBank>, heads: Option<&crate::HeadsReport>, seed: u64) -> Result<Model> {
    let _ = (model, plan, bank, heads, seed);
    todo!()
}

/// Writes a trained hybrid: like [`convert`], but with the values of `trained` for every parameter that differs from `source`.
pub fn save_model(source: &Checkpoint, trained: &Model, out: &Path, progress: &mut dyn Progress) -> Result<()> {
    let _ = (source, trained, out, progress);
    todo!()
}
