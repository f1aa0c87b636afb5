//! Selection criteria: each gives a score per KV group, `[layer][group]`, higher: safer to convert. One module each.
//! `docs/adding-a-criterion.md` says how to add one.

mod fisher;
mod kl_fisher;
mod least_recent;
mod mixer_fisher;
mod random;
mod recency;
#[cfg(test)]
mod tests;
mod window;
mod window_error;

pub use mixer_fisher::mixer_fisher;

use crate::error::{Result, SurgeryError};
use crate::{HeadBank, HeadsReport, stats};
use kernels::Exec;
use model::observe::AttnView;
use model::{Model, Progress};

/// Scores `[layer][group]`.
pub type Scores = Vec<Vec<f64>>;

/// All criteria, in the order they are documented.
pub const ALL: [&Criterion; 6] = [
    &mixer_fisher::CRITERION,
    &recency::CRITERION,
    &window_error::CRITERION,
    &kl_fisher::CRITERION,
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
    /// One sentence for people.
    pub about: &'static str,
    /// Where its scores come from.
    pub source: Source,
}

/// Starts a [`ForwardCriterion`].
pub type StartForward = for<'a> fn(&'a Exec, &'a Model) -> Result<Box<dyn ForwardCriterion + 'a>>;

/// Measures a criterion with its own passes over sequences of token ids; labels and the like are drawn from the seed.
pub type MeasureBackward = fn(&Exec, &Model, &[Vec<u32>], u64, &mut dyn Progress) -> Result<Scores>;

/// Where a criterion's scores come from.
pub enum Source {
    /// The head statistics and a seed; needs no model, so it works on any `heads.json`.
    Stats(fn(&HeadsReport, u64) -> Scores),
    /// The forward pass that also gathers the statistics; stored in `heads.json`.
    Forward(StartForward),
    /// Passes of its own; stored in `heads.json`.
    Backward(MeasureBackward),
    /// A measurement stored in the head bank.
    Bank(fn(&HeadBank) -> Result<Scores>),
}

impl Source {
    /// Whether the scores need a head bank.
    pub fn needs_bank(&self) -> bool {
        matches!(self, Self::Bank(_))
    }
}

/// Watches the base model's forward pass.
pub trait ForwardCriterion {
    /// Sees one layer of one sequence.
    fn attention(&mut self, view: &AttnView<'_>);
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
        Source::Forward(_) | Source::Backward(_) => stored(criterion.name, heads),
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
