//! Stage `align`: trains a replacement head for every KV group from the base's own layer inputs and head outputs; no backward
//! pass through the network, hidden states never leave memory.

use crate::data::SequenceStream;
use crate::error::Result;
use kernels::Exec;
use model::{Model, Progress};
use std::path::PathBuf;
use surgery::HeadBank;

/// Settings of [`align`]; the defaults are the measured recipe.
#[derive(Clone, Debug)]
pub struct AlignOptions {
    /// Tokens to train on in this run (added to what a resumed or extended bank has seen).
    pub tokens: u64,
    /// Tokens per step.
    pub tokens_per_step: usize,
    /// Peak learning rate.
    pub lr: f32,
    /// Multiplier for the copied q, k, v projections.
    pub projection_lr_scale: f32,
    /// Linear warm-up steps.
    pub warmup: u64,
    /// Final learning rate as a share of the peak (cosine).
    pub final_lr: f32,
    /// Gradient clip per layer.
    pub clip: f32,
    /// Sequences held out to measure the error.
    pub heldout: Vec<Vec<u32>>,
    /// Sequences for `mixer-fisher`.
    pub fisher: Vec<Vec<u32>>,
    /// Where the bank goes; the training state lies beside it as `<out>.state`.
    pub out: PathBuf,
    /// Seconds between states on disk.
    pub save_every_s: u64,
    /// Continue from `<out>.state`.
    pub resume: bool,
    /// JSONL metrics file.
    pub metrics: Option<PathBuf>,
}

/// Trains `bank` (fresh from [`surgery::bank::init_bank`], or read for extension), measures held-out errors and `mixer-fisher`, writes it, and
/// returns it. Killed at any moment and resumed, it ends with the same bits as an uninterrupted run.
pub fn align(exec: &Exec, base: &Model, bank: HeadBank, data: &mut SequenceStream, options: &AlignOptions, progress: &mut dyn Progress) -> Result<HeadBank> {
    let _ = (exec, base, bank, data, options, progress);
    todo!()
}
