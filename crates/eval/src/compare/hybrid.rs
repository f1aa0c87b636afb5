//! Hybrids that exist already, healed ones above all, judged beside the comparison's own conversions.

use crate::error::{EvalError, Result};
use kernels::Exec;
use model::plan::PlanModel;
use model::{Engine, EngineOptions, HeadPlan, Model, narrow};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use weights::Checkpoint;

/// A hybrid on disk. Its weights are read when it is its turn.
#[derive(Clone, Debug)]
pub struct Hybrid {
    /// Its name in the results.
    pub name: String,
    path: PathBuf,
    plan: HeadPlan,
    sha256: String,
}

impl Hybrid {
    /// Opens the folder or GGUF file of a hybrid and checks that it was made of `base`.
    ///
    /// # Errors
    /// [`EvalError::Weights`] for files that cannot be read, [`EvalError::Model`] for a plan that does not fit, [`EvalError::Argument`] for a base model and a
    /// hybrid of another base, [`EvalError::Mismatch`] for another vocabulary.
    pub fn open(name: &str, path: &Path, base: &Model) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let bad = |reason: String| Err(EvalError::Argument(format!("{name}: {reason}")));
        let (expected, found) = (PlanModel::of(&base.config), PlanModel::of(&checkpoint.config));
        if expected != found {
            return bad(format!(
                "made of another base: expected {expected}, found {found}\nhint: give the model it was converted from"
            ));
        }
        let (expected, found) = (base.config.vocab, checkpoint.config.vocab);
        if expected != found {
            return Err(EvalError::Mismatch { expected, found });
        }
        let Some(json) = &checkpoint.plan_json else {
            return bad("a base model, not a hybrid\nhint: give what `convert` or `heal` wrote".into());
        };
        let plan = HeadPlan::from_json(&json.to_string(), &checkpoint.config)?;
        let mut digest = Sha256::new();
        digest.update(plan.to_json());
        for info in checkpoint.tensors.infos() {
            digest.update(&info.name);
            digest.update(checkpoint.tensors.stored(&info.name)?.bytes);
        }
        checkpoint.tensors.release();
        let sha256 = format!("{:x}", digest.finalize());
        Ok(Self { name: name.into(), path: path.to_path_buf(), plan, sha256 })
    }

    /// SHA-256 of its plan and tensors.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The budgets to judge it at: those of `wanted` that it was trained for, or its own when it was not trained for several.
    pub fn betas(&self, wanted: &[f64]) -> Vec<f64> {
        match &self.plan.elastic {
            Some(elastic) => wanted.iter().copied().filter(|beta| elastic.betas.contains(beta)).collect(),
            None => vec![self.plan.beta],
        }
    }

    /// Which group is what at a budget of [`betas`](Self::betas).
    pub(super) fn plan(&self, beta: f64) -> Result<HeadPlan> {
        Ok(if self.plan.elastic.is_some() { self.plan.at_beta(beta)? } else { self.plan.clone() })
    }

    /// The model at such a budget, ready to run.
    pub(super) fn engine(&self, exec: &Exec, beta: f64, options: EngineOptions) -> Result<Engine> {
        let mut checkpoint = Checkpoint::open(&self.path)?;
        if self.plan.elastic.is_some() {
            checkpoint = narrow(checkpoint, beta)?;
        }
        Ok(Engine::load(exec, &checkpoint, options)?)
    }
}
