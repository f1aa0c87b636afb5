//! The quickstart's folder and text: what the files in it were made with, and what to read.

use super::Args;
use crate::common::{DataArgs, Loaded, documents};
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use kernels::Exec;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use train::TrainError;
use train::data::{self, Document, Split};

const BUILT_IN: &str = "english-small";
const OWN: &str = "self";

/// Options that decide what the files in `--out` hold, as `quickstart.json`; a folder made with others is refused.
#[derive(Serialize, Deserialize, PartialEq, Clone)]
pub struct Settings {
    version: String,
    model: String,
    data: Vec<String>,
    beta: f64,
    window: usize,
    align_tokens: u64,
    heal_tokens: u64,
    analyze_tokens: usize,
    seed: u64,
    /// The text that was really used, once it is known: a continued run keeps to it.
    text_used: Option<Vec<String>>,
    #[serde(skip)]
    path: PathBuf,
    /// Whether an earlier run with the same options left files here.
    #[serde(skip)]
    pub continued: bool,
}

impl Settings {
    /// Makes the folder, or checks that it was made with the same options.
    pub fn prepare(args: &Args) -> Result<Self> {
        let path = args.out.join("quickstart.json");
        let wanted = Self {
            version: env!("CARGO_PKG_VERSION").into(),
            model: args.model.clone(),
            data: args.data.clone(),
            beta: args.beta,
            window: args.window,
            align_tokens: args.align_tokens,
            heal_tokens: args.heal_tokens,
            analyze_tokens: args.analyze_tokens,
            seed: args.seed,
            text_used: None,
            path: path.clone(),
            continued: false,
        };
        let out = args.out.display();
        if args.out.exists() && args.out.read_dir().with_context(|| out.to_string())?.next().is_some() {
            let found = std::fs::read(&path).ok().and_then(|b| serde_json::from_slice::<Self>(&b).ok());
            if let Some(found) = found {
                let text_used = found.text_used.clone();
                if (Self { text_used: None, path: path.clone(), ..found }) == wanted {
                    return Ok(Self { text_used, continued: true, ..wanted });
                }
            }
            bail!(
                "{out} holds something else, or was made with other options\nhint: choose another --out, or remove it"
            );
        }
        std::fs::create_dir_all(&args.out).with_context(|| format!("creating {out}"))?;
        wanted.write()?;
        Ok(wanted)
    }

    fn write(&self) -> Result<()> {
        Ok(weights::files::atomic_write(&self.path, &serde_json::to_vec_pretty(self)?)?)
    }

    /// Training and held-out documents. Where the built-in text cannot be had, text sampled from the model itself; that is said, remembered and reported.
    pub fn text(
        &mut self,
        args: &Args,
        base: &Loaded,
        exec: &Exec,
        ui: &mut Ui,
    ) -> Result<(Vec<Document>, Vec<Document>)> {
        let chosen = self.text_used.clone().unwrap_or_else(|| args.data.clone());
        let fixed = self.text_used.is_some();
        let pair = match read(&chosen, base, exec, ui) {
            Err(error) if !fixed && chosen == [BUILT_IN] && cannot_be_had(&error) => {
                ui.say(&format!(
                    "no built-in text: {error:#}\nusing `self` instead: text sampled from {}",
                    args.model
                ));
                let own = vec![OWN.to_string()];
                let pair = read(&own, base, exec, ui)?;
                self.text_used = Some(own);
                pair
            }
            other => {
                let pair = other?;
                self.text_used = Some(chosen);
                pair
            }
        };
        self.write()?;
        Ok(pair)
    }

    /// What the text is, for people.
    pub fn text_name(&self) -> String {
        let used = self.text_used.as_ref().unwrap_or(&self.data);
        if *used == [OWN] { format!("text sampled from {} itself", self.model) } else { used.join(", ") }
    }
}

fn read(names: &[String], base: &Loaded, exec: &Exec, ui: &mut Ui) -> Result<(Vec<Document>, Vec<Document>)> {
    let args = DataArgs { data: names.to_vec() };
    let train = documents(&args, Split::Train, &base.checkpoint, exec, ui)?;
    if names == [BUILT_IN] {
        return Ok((train, documents(&args, Split::Heldout, &base.checkpoint, exec, ui)?));
    }
    Ok(data::split_pair(train))
}

/// Whether the text is out of reach (no npm, no network), as opposed to an interruption or a model without tokenizer.
fn cannot_be_had(error: &anyhow::Error) -> bool {
    let of_weights = |e: &weights::WeightsError| matches!(e, weights::WeightsError::Source { .. });
    error.chain().any(|cause| {
        cause.downcast_ref().is_some_and(of_weights)
            || matches!(cause.downcast_ref(), Some(TrainError::Weights(e)) if of_weights(e))
    })
}
