//! A model and its base, measured one after the other in one run.

use crate::common::{EngineArgs, ExecArgs, Running, print_json, run_engine};
use crate::ui::Ui;
use anyhow::Result;
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

impl PairArgs {
    /// Measures the model and then the base, each loaded in its turn.
    pub fn measure<T>(
        &self,
        ui: &mut Ui,
        mut run: impl FnMut(&Exec, &Running, &mut Ui) -> Result<T>,
    ) -> Result<(T, Option<T>)> {
        let (exec, defaults) = (self.exec.exec()?, EngineOptions::EXACT);
        let result = run(&exec, &self.engine.run(&self.model, defaults, &exec, ui)?, ui)?;
        let base = match &self.base {
            Some(name) => Some(run(&exec, &run_engine(name, self.engine.options(defaults), &exec, ui)?, ui)?),
            None => None,
        };
        Ok((result, base))
    }

    /// Prints results as JSON when asked to, with `facts` about the test beside them; says whether it did.
    pub fn printed(
        &self,
        results: &impl Serialize,
        base: Option<&impl Serialize>,
        facts: Value,
    ) -> Result<bool> {
        if self.json {
            let mut value = facts;
            value["results"] = serde_json::to_value(results)?;
            if let Some(base) = base {
                value["base"] = json!({"results": base});
            }
            print_json(&value)?;
        }
        Ok(self.json)
    }
}
