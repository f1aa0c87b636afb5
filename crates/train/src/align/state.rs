//! The state of an alignment run on disk: heads, moments and where the run stands.

use super::{AlignOptions, Run};
use crate::data::SequenceStream;
use crate::error::Result;
use crate::optim::Moments;
use crate::state::{SavedState, StateTensor, check_same_settings, load_state, save_state, with_suffix};
use kernels::Exec;
use model::Progress;
use serde::{Deserialize, Serialize};
use std::time::Instant;
use surgery::{BankInfo, HeadBank};
use weights::files::remove_stale;

/// Where a run stands.
#[derive(Debug, Serialize, Deserialize)]
struct AlignState {
    version: u32,
    stage: String,
    /// The bank at the start of the run.
    bank: BankInfo,
    step: u64,
    updates: u64,
    position: u64,
    settings: serde_json::Value,
    lr: String,
}

const VERSION: u32 = 1;
const STAGE: &str = "align";

/// What may not change between an interrupted run and its continuation. Numbers are written as text, which is exact.
pub(super) fn settings(
    exec: &Exec,
    bank: &HeadBank,
    data: &SequenceStream,
    options: &AlignOptions,
) -> serde_json::Value {
    serde_json::json!({
        "mixer": bank.info.spec,
        "bank tokens": bank.info.tokens,
        "bank": bank.sha256(),
        "tokens": options.tokens,
        "tokens per step": options.tokens_per_step,
        "projection lr scale": options.projection_lr_scale.to_string(),
        "warm-up": options.warmup,
        "final lr": options.final_lr.to_string(),
        "clip": options.clip.to_string(),
        "precision": format!("{:?}", exec.precision()),
        "data": data.fingerprint(),
    })
}

impl Run<'_> {
    /// Takes up an interrupted run, or the moments of the run that made the bank.
    pub(super) fn restore(&mut self, data: &mut SequenceStream, progress: &mut dyn Progress) -> Result<()> {
        let path = with_suffix(&self.options.out, ".state");
        for target in
            [Some(&path), Some(&self.options.out), self.options.metrics.as_ref()].into_iter().flatten()
        {
            remove_stale(target)?;
        }
        if self.options.resume {
            match load_state::<AlignState>(&path)? {
                Some(state) => self.resume(&state, data, progress)?,
                None => {
                    progress.note(&format!("{} does not exist: starting at the beginning", path.display()))
                }
            }
        } else if self.info.tokens > 0
            && let Some(state) = load_state::<AlignState>(&path)?
        {
            self.extend(&state, data, progress)?;
            // From here on the state is that of the extension, which may be interrupted and resumed as well.
            self.save(data.position())?;
        }
        Ok(())
    }

    fn resume(
        &mut self,
        state: &SavedState<AlignState>,
        data: &mut SequenceStream,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let info = &state.info;
        let path = with_suffix(&self.options.out, ".state");
        check_same_settings(&path, &info.settings, &self.settings)?;
        if info.lr != self.options.lr.to_string() {
            progress.note(&format!("learning rate changed from {} to {}", info.lr, self.options.lr));
        }
        self.load(state, Part::Everything)?;
        self.info = info.bank.clone();
        (self.step, self.updates) = (info.step, info.updates);
        data.skip_to(info.position);
        Ok(())
    }

    /// A new run on a trained bank: keeps moments and data position when the state holds exactly these heads.
    fn extend(
        &mut self,
        state: &SavedState<AlignState>,
        data: &mut SequenceStream,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let given: Vec<Vec<f32>> = self.tensors().map(|(_, values)| values.to_vec()).collect();
        let same = self.load(state, Part::Weights).is_ok()
            && self.tensors().zip(&given).all(|((_, now), then)| now == then.as_slice());
        if !same {
            let mut given = given.into_iter();
            for group in self.aligner.groups.iter_mut().flatten() {
                group.weights.values.iter_mut().for_each(|t| *t = given.next().unwrap_or_default());
            }
            progress
                .note("the training state beside the bank is of other heads: starting with fresh moments");
            return Ok(());
        }
        self.load(state, Part::EverythingThere)?;
        self.updates = state.info.updates;
        if state.info.settings["data"] == self.settings["data"] {
            data.skip_to(state.info.position);
        }
        Ok(())
    }

    /// Writes the state atomically; `position` is that of the data stream after the last step.
    pub(super) fn save(&mut self, position: u64) -> Result<()> {
        let path = with_suffix(&self.options.out, ".state");
        let info = AlignState {
            version: VERSION,
            stage: STAGE.into(),
            bank: self.info.clone(),
            step: self.step,
            updates: self.updates,
            position,
            settings: self.settings.clone(),
            lr: self.options.lr.to_string(),
        };
        let mut tensors: Vec<StateTensor<'_>> = Vec::new();
        let infos = self.aligner.layout().tensors();
        for (layer, groups) in self.aligner.groups.iter().enumerate() {
            for (g, group) in groups.iter().enumerate() {
                for (i, tensor) in infos.iter().enumerate() {
                    let name = name(layer, g, tensor.name);
                    let Moments { m, v } = &group.moments[i];
                    let kinds = [("weight", &group.weights.values[i]), ("m", m), ("v", v)];
                    for (kind, values) in kinds.into_iter().filter(|(_, values)| !values.is_empty()) {
                        let values = values.as_slice().into();
                        tensors.push((format!("{kind}.{name}"), tensor.shape.clone(), values));
                    }
                }
            }
        }
        save_state(&path, &info, &tensors)?;
        self.saved_at = Instant::now();
        Ok(())
    }

    fn tensors(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.aligner
            .groups
            .iter()
            .flatten()
            .flat_map(|g| g.weights.values.iter().map(Vec::as_slice).enumerate())
    }

    fn load(&mut self, state: &SavedState<AlignState>, part: Part) -> Result<()> {
        let infos = self.aligner.layout().tensors();
        for (layer, groups) in self.aligner.groups.iter_mut().enumerate() {
            for (g, group) in groups.iter_mut().enumerate() {
                for (i, tensor) in infos.iter().enumerate() {
                    let name = name(layer, g, tensor.name);
                    state.copy_into(&format!("weight.{name}"), &mut group.weights.values[i])?;
                    let Moments { m, v } = &mut group.moments[i];
                    for (kind, values) in [("m", m), ("v", v)] {
                        let name = format!("{kind}.{name}");
                        let wanted = match part {
                            Part::Weights => false,
                            Part::Everything => true,
                            Part::EverythingThere => state.has(&name),
                        };
                        if wanted && !values.is_empty() {
                            state.copy_into(&name, values)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Weights,
    Everything,
    /// Moments of what was frozen before stay as they are.
    EverythingThere,
}

fn name(layer: usize, group: usize, tensor: &str) -> String {
    format!("layers.{layer}.groups.{group}.{tensor}")
}
