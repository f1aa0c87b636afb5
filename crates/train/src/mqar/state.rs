//! States and results of MQAR runs on disk: one safetensors file per cell in training, one JSON file per finished cell.

use super::{MqarCell, MqarOutcome, MqarTraining};
use crate::error::{Result, TrainError};
use crate::scratch::{LabelTrainer, Trained};
use crate::state::{StateTensor, check_same_settings, load_state, save_state};
use kernels::Exec;
use model::Model;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use weights::files::{atomic_write, remove_stale};

/// Where a cell's files are, and what they must have been made with.
pub(super) struct Files {
    state: PathBuf,
    result: PathBuf,
    settings: Value,
}

/// What a run has behind it besides its steps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Before {
    pub seconds: f64,
    pub solved: bool,
    pub train_loss: f64,
}

#[derive(Serialize, Deserialize)]
struct State {
    step: u64,
    settings: Value,
    before: Before,
}

#[derive(Serialize, Deserialize)]
struct Finished {
    settings: Value,
    outcome: MqarOutcome,
}

impl Files {
    pub fn new(exec: &Exec, cell: &MqarCell, training: &MqarTraining) -> Result<Self> {
        let dir = &training.dir;
        std::fs::create_dir_all(dir)
            .map_err(|e| TrainError::File { path: dir.clone(), reason: e.to_string() })?;
        let at = |suffix: &str| dir.join(format!("{}.{suffix}", cell.name()));
        let files = Self { state: at("state"), result: at("json"), settings: settings(exec, training) };
        remove_stale(&files.state)?;
        remove_stale(&files.result)?;
        Ok(files)
    }

    /// The result of a finished run, when it may be used.
    pub fn outcome(&self, resume: bool) -> Result<Option<MqarOutcome>> {
        if !resume || !self.result.exists() {
            return Ok(None);
        }
        let fail = |reason: String| TrainError::File {
            path: self.result.clone(),
            reason: format!("{reason}\nhint: remove it to train this cell again"),
        };
        let text = std::fs::read(&self.result).map_err(|e| fail(e.to_string()))?;
        let Finished { settings, outcome } =
            serde_json::from_slice(&text).map_err(|e| fail(format!("is no result: {e}")))?;
        check_same_settings(&self.result, &settings, &self.settings)?;
        Ok(Some(outcome))
    }

    /// Takes up an interrupted run when there is one and it may be.
    pub fn restore(&self, trainer: &mut LabelTrainer<'_>, model: &mut Model, resume: bool) -> Result<Before> {
        let state = if resume { load_state::<State>(&self.state)? } else { None };
        let Some(state) = state else {
            return Ok(Before { seconds: 0.0, solved: false, train_loss: 0.0 });
        };
        check_same_settings(&self.state, &state.info.settings, &self.settings)?;
        for Trained { id, moments } in &mut trainer.trained {
            let name = model.params.get(*id).name.clone();
            state.copy_into(&format!("param.{name}"), model.params.data_mut(*id))?;
            state.copy_into(&format!("m.{name}"), &mut moments.m)?;
            state.copy_into(&format!("v.{name}"), &mut moments.v)?;
        }
        trainer.steps = state.info.step;
        Ok(state.info.before)
    }

    pub fn save(&self, trainer: &LabelTrainer<'_>, model: &Model, before: Before) -> Result<()> {
        let info = State { step: trainer.steps(), settings: self.settings.clone(), before };
        let mut tensors: Vec<StateTensor<'_>> = Vec::new();
        for Trained { id, moments } in &trainer.trained {
            let param = model.params.get(*id);
            for (prefix, values) in [("param", param.data()), ("m", &moments.m), ("v", &moments.v)] {
                tensors.push((format!("{prefix}.{}", param.name), param.shape.clone(), values.into()));
            }
        }
        save_state(&self.state, &info, &tensors)
    }

    /// Writes the result and removes the state.
    pub fn finish(&self, outcome: &MqarOutcome) -> Result<()> {
        let finished = Finished { settings: self.settings.clone(), outcome: outcome.clone() };
        let text = serde_json::to_string_pretty(&finished)
            .map_err(|e| TrainError::File { path: self.result.clone(), reason: e.to_string() })?;
        atomic_write(&self.result, format!("{text}\n").as_bytes())?;
        match std::fs::remove_file(&self.state) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(TrainError::File { path: self.state.clone(), reason: e.to_string() })
            }
            _ => Ok(()),
        }
    }
}

/// What may not change between an interrupted run and its continuation. Numbers are written as text, which is exact.
fn settings(exec: &Exec, training: &MqarTraining) -> Value {
    json!({
        "vocabulary": training.vocab,
        "filler": format!("{:?}", training.filler),
        "head size": training.head_dim,
        "steps": training.steps,
        "tokens of a step": training.batch_tokens,
        "lr": training.lr.to_string(),
        "warm-up": training.warmup,
        "weight decay": training.weight_decay.to_string(),
        "embedding scale": training.embedding_scale.to_string(),
        "solved": training.solved.to_string(),
        "steps between checks": training.check_every,
        "check queries": training.check_queries,
        "test queries": training.test_queries,
        "seed": training.seed,
        "precision": format!("{:?}", exec.precision()),
    })
}
