//! Selection criteria: each gives a score per KV group, `[layer][group]`, higher: safer to convert. One module each.
//! `docs/adding-a-criterion.md` says how to add one.

mod catalogue;
mod duo;
mod fisher;
mod kl;
mod kl_fisher;
mod least_recent;
mod mixer_fisher;
mod needle;
mod patching;
mod random;
mod recency;
mod retrieval;
mod state;
#[cfg(test)]
mod tests;
mod window;
mod window_error;

pub use catalogue::{Cost, Measured};
pub use duo::DuoOptions;
pub use mixer_fisher::mixer_fisher;
pub(crate) use needle::prompts_sha256;
pub use needle::{Needle, NeedlePrompt};
pub use state::States;

use crate::error::{Result, SurgeryError};
use crate::{HeadBank, HeadsReport, stats};
use kernels::Exec;
use model::observe::AttnView;
use model::{Model, Progress};

/// Scores `[layer][group]`.
pub type Scores = Vec<Vec<f64>>;

/// All criteria, in the order they are documented.
pub const ALL: [&Criterion; 10] = [
    &mixer_fisher::CRITERION,
    &recency::CRITERION,
    &window_error::CRITERION,
    &kl_fisher::CRITERION,
    &kl::CRITERION,
    &retrieval::CRITERION,
    &patching::CRITERION,
    &duo::CRITERION,
    &random::CRITERION,
    &least_recent::CRITERION,
];

/// Names, in the order they are documented.
pub const NAMES: [&str; ALL.len()] = {
    let mut names = [""; ALL.len()];
    let mut i = 0;
    while i < ALL.len() {
        names[i] = ALL[i].name;
        i += 1;
    }
    names
};

/// One criterion.
pub struct Criterion {
    /// Name in files and on the command line.
    pub name: &'static str,
    /// What it measures, one sentence for people.
    pub about: &'static str,
    /// Passes that it takes.
    pub cost: Cost,
    /// How long that took, where somebody looked.
    pub measured: Option<Measured>,
    /// Paper, or "this project".
    pub reference: &'static str,
    /// Where its scores come from.
    pub source: Source,
}

/// Starts a [`ForwardCriterion`].
pub type StartForward = for<'a> fn(&'a Exec, &'a Model) -> Result<Box<dyn ForwardCriterion + 'a>>;

/// Measures a criterion with its own passes over sequences of token ids; labels and the like are drawn from the seed.
pub type MeasureBackward = fn(&Exec, &Model, &[Vec<u32>], u64, &mut dyn Progress) -> Result<Scores>;

/// What a criterion with many passes of its own is measured on, and how.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Threads.
    pub exec: &'a Exec,
    /// The base model.
    pub model: &'a Model,
    /// Calibration text.
    pub sequences: &'a [Vec<u32>],
    /// Needle prompts, for the criteria about retrieval.
    pub prompts: &'a [NeedlePrompt],
    /// Seed of whatever is drawn.
    pub seed: u64,
    /// How `duo` learns.
    pub duo: &'a DuoOptions,
    /// Where what is measured survives an interruption; `None`: nowhere.
    pub states: Option<&'a States>,
}

/// What such a criterion finds.
pub struct Measurement {
    /// Scores.
    pub groups: Scores,
    /// What they are means of: a number for every query head, `[layer][head]`, where there is one.
    pub heads: Option<Vec<Vec<f64>>>,
}

impl From<Scores> for Measurement {
    fn from(groups: Scores) -> Self {
        Self { groups, heads: None }
    }
}

/// Measures a criterion with many passes of its own.
pub type Measure = fn(&Inputs<'_>, &mut dyn Progress) -> Result<Measurement>;

/// `values` of all groups, layer after layer, as `[layer][group]`.
fn by_layer(values: &[f64], groups: usize, f: impl Fn(f64) -> f64) -> Scores {
    values.chunks_exact(groups).map(|layer| layer.iter().map(|&value| f(value)).collect()).collect()
}

/// Where a criterion's scores come from.
pub enum Source {
    /// The head statistics and a seed; needs no model, so it works on any `heads.json`.
    Stats(fn(&HeadsReport, u64) -> Scores),
    /// The forward pass that also gathers the statistics; stored in `heads.json`.
    Forward(StartForward),
    /// Passes of its own; stored in `heads.json`.
    Backward(MeasureBackward),
    /// Many passes over the calibration text, when asked for; stored in `heads.json`.
    Groups(Measure),
    /// Passes over needle prompts, when asked for; stored in `heads.json`.
    Needles(Measure),
    /// A measurement stored in the head bank.
    Bank(fn(&HeadBank) -> Result<Scores>),
}

impl Source {
    /// Whether the scores need a head bank.
    pub fn needs_bank(&self) -> bool {
        matches!(self, Self::Bank(_))
    }

    /// Whether the scores are measured on needle prompts.
    pub fn needs_prompts(&self) -> bool {
        matches!(self, Self::Needles(_))
    }

    /// Whether an analysis measures it without being asked to.
    pub fn by_default(&self) -> bool {
        matches!(self, Self::Stats(_) | Self::Forward(_) | Self::Backward(_))
    }
}

/// Watches the base model's forward pass.
pub trait ForwardCriterion {
    /// Sees one layer of one sequence, and by head the positions, ascending, that the statistics take for sinks.
    fn attention(&mut self, view: &AttnView<'_>, sinks: &[Vec<usize>]);
    /// The scores after `tokens` tokens.
    fn finish(self: Box<Self>, tokens: usize) -> Scores;
}

/// The criterion called `name`.
///
/// # Errors
/// [`SurgeryError::Argument`] listing the names that exist.
pub fn find(name: &str) -> Result<&'static Criterion> {
    ALL.into_iter().find(|c| c.name == name).ok_or_else(|| {
        SurgeryError::Argument(format!(
            "unknown criterion `{name}`\nhint: choose one of {}",
            NAMES.join(", ")
        ))
    })
}

/// Scores of `criterion` from files: `mixer-fisher` from the bank's measurement, the others from `heads` (`random` is drawn from `seed`).
///
/// # Errors
/// [`SurgeryError::Argument`] for an unknown name, a bank that is missing, unmeasured or for another model, or scores that `heads` does
/// not hold.
pub fn scores(criterion: &str, heads: &HeadsReport, bank: Option<&HeadBank>, seed: u64) -> Result<Scores> {
    let criterion = find(criterion)?;
    match criterion.source {
        Source::Stats(score) => Ok(score(heads, seed)),
        Source::Forward(_) | Source::Backward(_) | Source::Groups(_) | Source::Needles(_) => {
            stored(criterion.name, heads)
        }
        Source::Bank(score) => {
            let bank = bank.ok_or_else(|| {
                SurgeryError::Argument(format!(
                    "criterion `{}` needs a head bank, none was given",
                    criterion.name
                ))
            })?;
            if bank.info.model != heads.model {
                return Err(SurgeryError::Argument(
                    "the head bank and the head statistics are for different models".into(),
                ));
            }
            score(bank)
        }
    }
}

fn stored(name: &str, heads: &HeadsReport) -> Result<Scores> {
    let score = |group: &stats::GroupStats| group.scores.get(name).copied();
    heads
        .layers
        .iter()
        .map(|layer| layer.groups.iter().map(score).collect::<Option<Vec<f64>>>())
        .collect::<Option<Scores>>()
        .ok_or_else(|| {
            SurgeryError::Argument(format!(
                "the head statistics hold no scores of criterion `{name}`\nhint: analyze again with this criterion"
            ))
        })
}
