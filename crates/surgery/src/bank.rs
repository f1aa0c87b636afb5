//! The head bank: one trained replacement per KV group of every layer, independent of any budget. One safetensors file.

#[cfg(test)]
mod tests;

use crate::base::{check_model, fresh_head};
use crate::error::{Result, SurgeryError};
use model::mixers::{HeadLayout, HeadTensors};
use model::{MixerSpec, ModelConfig, plan::PlanModel};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use weights::TensorSource;
use weights::safetensors::{Metadata, SafetensorsSource, write_f32};

/// The format version written and accepted.
const VERSION: u32 = 1;
/// The metadata entry that holds [`BankInfo`].
const INFO_KEY: &str = "recurformer_bank";

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
    ///
    /// # Errors
    /// [`SurgeryError::Weights`] when the file cannot be read or is malformed, [`SurgeryError::File`] when it is no bank, of another
    /// version or for another model, or when a tensor is missing, left over or of another shape.
    pub fn read(path: &Path, config: &ModelConfig) -> Result<Self> {
        let bad = |reason: String| SurgeryError::File { path: path.to_path_buf(), reason };
        let at = |error: SurgeryError| match error {
            SurgeryError::Argument(reason) => bad(reason),
            other => other,
        };
        let source = SafetensorsSource::open_file(path)?;
        let json = source.metadata().get(INFO_KEY).ok_or_else(|| {
            bad("this safetensors file is not a head bank (no bank description in it)".into())
        })?;
        let info = parse_info(json).map_err(bad)?;
        check_model("the head bank", &info.model, config).map_err(at)?;
        info.spec.validate(config.head_dim)?;
        let tensors = HeadLayout::new(info.spec, config).tensors();
        let expected = config.layers * config.kv_heads * tensors.len();
        if source.infos().len() != expected {
            return Err(bad(format!("{} tensors, expected {expected}", source.infos().len())));
        }
        let group = |layer: usize, group: usize| {
            let values = tensors.iter().map(|tensor| {
                let name = tensor_name(layer, group, tensor.name);
                let values = source.read_f32(&name)?;
                match source.info(&name) {
                    Some(found) if found.shape == tensor.shape => Ok(values),
                    found => Err(bad(format!(
                        "tensor `{name}` has shape {:?}, expected {:?}",
                        found.map(|f| f.shape.as_slice()).unwrap_or_default(),
                        tensor.shape
                    ))),
                }
            });
            Ok(HeadTensors { values: values.collect::<Result<_>>()? })
        };
        let groups = (0..config.layers)
            .map(|layer| (0..config.kv_heads).map(|g| group(layer, g)).collect::<Result<_>>())
            .collect::<Result<_>>()?;
        let bank = Self { info, groups };
        bank.check(config).map_err(at)?;
        Ok(bank)
    }

    /// Writes it to a temporary name and renames. Tensor names: `layers.{l}.groups.{g}.{tensor}`.
    ///
    /// # Errors
    /// [`SurgeryError::Argument`] when the bank does not fit `config`, [`SurgeryError::Weights`] when it cannot be written or holds NaN.
    pub fn write(&self, path: &Path, config: &ModelConfig) -> Result<()> {
        self.check(config)?;
        let infos = self.layout(config).tensors();
        let mut names = Vec::new();
        for layer in 0..config.layers {
            for group in 0..config.kv_heads {
                names.extend(infos.iter().map(|info| tensor_name(layer, group, info.name)));
            }
        }
        let shapes = infos.iter().map(|info| info.shape.as_slice()).cycle();
        let tensors: Vec<(&str, &[usize], &[f32])> = names
            .iter()
            .zip(shapes)
            .zip(self.tensors())
            .map(|((name, shape), values)| (name.as_str(), shape, values))
            .collect();
        let json = serde_json::to_string(&self.info)
            .map_err(|e| SurgeryError::File { path: path.to_path_buf(), reason: e.to_string() })?;
        Ok(write_f32(path, &tensors, &Metadata::from([(INFO_KEY.to_string(), json)]))?)
    }

    /// SHA-256 of the tensor values (little-endian f32; layers, groups and tensors in order), in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for values in self.tensors() {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            hash.update(&bytes);
        }
        format!("{:x}", hash.finalize())
    }

    /// Checks the bank's model, counts, shapes and measurements against `config`.
    ///
    /// # Errors
    /// [`SurgeryError::Argument`] with what was expected and found; [`SurgeryError::Model`] for a mixer that does not fit.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let bad = |reason: String| Err(SurgeryError::Argument(reason));
        check_model("the head bank", &self.info.model, config)?;
        self.info.spec.validate(config.head_dim)?;
        let (layers, groups) = (config.layers, config.kv_heads);
        if self.groups.len() != layers || self.groups.iter().any(|layer| layer.len() != groups) {
            return bad(format!("the head bank does not hold {groups} groups in each of {layers} layers"));
        }
        let infos = self.layout(config).tensors();
        for (layer, heads) in self.groups.iter().enumerate() {
            for (group, head) in heads.iter().enumerate() {
                if head.values.len() != infos.len() {
                    return bad(format!(
                        "layer {layer} group {group} of the head bank holds {} tensors, expected {}",
                        head.values.len(),
                        infos.len()
                    ));
                }
                for (values, info) in head.values.iter().zip(&infos) {
                    let expected: usize = info.shape.iter().product();
                    if values.len() != expected {
                        return bad(format!(
                            "`{}` of the head bank holds {} values, expected {expected} of shape {:?}",
                            tensor_name(layer, group, info.name),
                            values.len(),
                            info.shape
                        ));
                    }
                }
            }
        }
        for (what, values) in
            [("held-out error", &self.info.heldout_error), ("mixer-fisher", &self.info.mixer_fisher)]
        {
            if values.is_empty() {
                continue;
            }
            if values.len() != layers || values.iter().any(|layer| layer.len() != groups) {
                return bad(format!(
                    "the bank's {what} is not listed for {groups} groups in each of {layers} layers"
                ));
            }
            if let Some(value) = values.iter().flatten().find(|v| !v.is_finite()) {
                return bad(format!("the bank's {what} holds {value}, expected finite numbers"));
            }
        }
        Ok(())
    }

    fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        self.groups.iter().flatten().flat_map(|head| head.values.iter().map(Vec::as_slice))
    }
}

fn tensor_name(layer: usize, group: usize, tensor: &str) -> String {
    format!("layers.{layer}.groups.{group}.{tensor}")
}

fn parse_info(json: &str) -> std::result::Result<BankInfo, String> {
    let json: serde_json::Value =
        serde_json::from_str(json).map_err(|e| format!("malformed bank description: {e}"))?;
    let version = json.get("version").and_then(serde_json::Value::as_u64);
    if version != Some(u64::from(VERSION)) {
        let found = version.map_or("none".to_string(), |v| v.to_string());
        return Err(format!("the head bank has version {found}, expected {VERSION}"));
    }
    serde_json::from_value(json).map_err(|e| format!("malformed bank description: {e}"))
}

/// Fresh heads for every group, as [`model::mixers::init`] makes them, with decays from `heads`' mean distances.
///
/// # Errors
/// [`SurgeryError::Argument`] when `heads` is for another model, [`SurgeryError::Model`] when the mixer does not fit.
pub fn init_bank(
    model: &model::Model,
    spec: MixerSpec,
    heads: &crate::HeadsReport,
    seed: u64,
) -> Result<HeadBank> {
    let config = &model.config;
    check_model("the head statistics file", &heads.model, config)?;
    spec.validate(config.head_dim)?;
    let layout = HeadLayout::new(spec, config);
    let group = |layer, group| {
        fresh_head(&layout, &model.base_group(layer, group), Some(heads), (layer, group), seed)
    };
    let info = BankInfo {
        version: VERSION,
        model: PlanModel::of(config),
        spec,
        tokens: 0,
        seed,
        heldout_error: Vec::new(),
        mixer_fisher: Vec::new(),
        fisher_tokens: 0,
    };
    let groups =
        (0..config.layers).map(|layer| (0..config.kv_heads).map(|g| group(layer, g)).collect()).collect();
    Ok(HeadBank { info, groups })
}
