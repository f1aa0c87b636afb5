//! A model and its base, measured one after the other in one run.

use crate::common::{EngineArgs, ExecArgs, Running, run_engine};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::Result;
use eval::run::RunModel;
use kernels::Exec;
use model::EngineOptions;
use serde::Serialize;
use serde_json::{Value, json};

/// Which models, and how they run.
#[derive(clap::Args)]
pub struct PairArgs {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// A model to compare with.
    #[arg(long)]
    base: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

/// What was found of a model and its base.
pub struct Measured<T> {
    exec: Exec,
    models: Vec<RunModel>,
    pub results: T,
    pub base: Option<T>,
}

impl PairArgs {
    /// Measures the model and then the base, each loaded in its turn.
    pub fn measure<T>(
        &self,
        ui: &mut Ui,
        mut run: impl FnMut(&Exec, &Running, &mut Ui) -> Result<T>,
    ) -> Result<Measured<T>> {
        let (exec, defaults) = (self.exec.exec()?, EngineOptions::EXACT);
        let mut models = Vec::new();
        let mut measured = |running: Running, ui: &mut Ui| {
            models.push(running.about.clone());
            run(&exec, &running, ui)
        };
        let results = measured(self.engine.run(&self.model, defaults, &exec, ui)?, ui)?;
        let base = match &self.base {
            Some(name) => Some(measured(run_engine(name, self.engine.options(defaults), &exec, ui)?, ui)?),
            None => None,
        };
        Ok(Measured { exec, models, results, base })
    }

    /// Prints results as JSON when asked to, with `facts` about the test beside them; says whether it did.
    pub fn printed<T: Serialize>(&self, measured: &Measured<T>, facts: Value, seeds: &[u64]) -> Result<bool> {
        if self.json {
            let mut value = facts;
            value["results"] = serde_json::to_value(&measured.results)?;
            if let Some(base) = &measured.base {
                value["base"] = json!({"results": base});
            }
            print_results(&measured.exec, value, measured.models.clone(), seeds)?;
        }
        Ok(self.json)
    }
}
