//! The head bank: one trained replacement per KV group of every layer, independent of any budget. One safetensors file.

use crate::error::Result;
use model::mixers::{HeadLayout, HeadTensors};
use model::{MixerSpec, ModelConfig, plan::PlanModel};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What the bank knows about its making; stored as JSON in the file's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BankInfo {
    /// Format version, 1.
    pub version: u32,
    /// The model it fits.
    pub model: PlanModel,
    /// What the heads are.
    pub spec: MixerSpec,
    /// Training tokens seen so far.
    pub tokens: u64,
    /// Seed.
    pub seed: u64,
    /// Held-out relative error ‖W_O(ô−o)‖²/‖W_O o‖² by `[layer][group]`; empty before it is measured.
    pub heldout_error: Vec<Vec<f64>>,
    /// `mixer-fisher` cost (positive; the score is its negative) by `[layer][group]`; empty before it is measured.
    pub mixer_fisher: Vec<Vec<f64>>,
    /// Calibration tokens behind `mixer_fisher`.
    pub fisher_tokens: usize,
}

/// All replacement heads of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadBank {
    /// Making and measurements.
    pub info: BankInfo,
    /// Tensors by `[layer][group]`.
    pub groups: Vec<Vec<HeadTensors>>,
}

impl HeadBank {
    /// Layout of every head in the bank.
    pub fn layout(&self, config: &ModelConfig) -> HeadLayout {
        HeadLayout::new(self.info.spec, config)
    }
    /// Reads a bank and checks every shape against `config`.
    pub fn read(path: &Path, config: &ModelConfig) -> Result<Self> {
        let _ = (path, config);
        todo!()
    }
    /// Writes it to a temporary name and renames. Tensor names: `layers.{l}.groups.{g}.{tensor}`.
    pub fn write(&self, path: &Path, config: &ModelConfig) -> Result<()> {
        let _ = (path, config);
        todo!()
    }
    /// SHA-256 of the tensor values, in hexadecimal.
    pub fn sha256(&self) -> String {
        todo!()
    }
}

/// Fresh heads for every group, as [`model::mixers::init`] makes them, with decays from `heads`' mean distances.
pub fn init_bank(model: &model::Model, spec: MixerSpec, heads: &crate::HeadsReport, seed: u64) -> Result<HeadBank> {
    let _ = (model, spec, heads, seed);
    todo!()
}
