//! Attention sinks: positions that absorb attention without giving information, whether they do, and why.
//! Knows token ids and models; knows nothing of text. Cause by intervention: an attribute of the sink is handed to an ordinary position; if
//! the strength goes with it, it is the cause. Strengths are logarithmic, since shares of attention mislead where two sinks compete.

mod cause;
mod find;
mod interventions;
mod lab;
mod massive;
mod measure;
mod report;
mod summary;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::planted;

pub use cause::{Cause, Estimate, TAKES_OVER};
pub use find::{Absorbing, Found, MAX_VALUE_RATIO, MIN_MASS, MIN_OVER_UNIFORM, find};
pub use interventions::{Constant, INTERVENTIONS, Tally};
pub use lab::MAX_NLL_RISE;
pub use massive::{Dimension, LayerActivations};
pub use report::{HeadSink, NoOpHead, Sink, SinkTests, SinksReport};

use crate::error::{Result, SurgeryError};
use crate::stats::{check_sequences, tokens_sha256};
use interventions::{Instance, Totals, chosen, donors, passes, test};
use kernels::Exec;
use lab::Lab;
use massive::MassiveSums;
use model::plan::PlanModel;
use model::{Model, Progress};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Least length of a sequence, in tokens: below it a key of a few queries passes for a sink.
pub const MIN_TOKENS: usize = 32;

/// What [`sinks`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SinkOptions {
    /// Ordinary positions that each sink's attributes are handed to, per sequence; at least 1.
    pub donors: usize,
    /// Positions tested per sequence, those that absorb in most heads; the others are listed untested.
    pub tested: usize,
    /// Seed of the donors and of the intervals.
    pub seed: u64,
}

impl Default for SinkOptions {
    fn default() -> Self {
        Self { donors: 3, tested: 4, seed: 0 }
    }
}

/// Finds the absorbing positions of every layer and head, tests whether they are waivers, and names their causes. Sequences are processed
/// one by one; memory grows with the longest, never with its square.
///
/// # Errors
/// [`SurgeryError::Argument`] for a hybrid model, no sequences, a sequence of fewer than [`MIN_TOKENS`] tokens, or no donors;
/// [`SurgeryError::Model`] from the passes; [`SurgeryError::Interrupted`].
pub fn sinks(
    exec: &Exec,
    model: &Model,
    sequences: &[Vec<u32>],
    options: &SinkOptions,
    progress: &mut dyn Progress,
) -> Result<SinksReport> {
    check(model, sequences, options)?;
    let config = &model.config;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let mut massive = MassiveSums::new(config.layers);
    let mut found = Vec::with_capacity(sequences.len());
    progress.start("find sinks", tokens as u64, "tokens");
    for sequence in sequences {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        found.push(find(exec, model, sequence, Some(&mut massive))?);
        progress.advance(sequence.len() as u64, "");
    }
    progress.finish();

    // What is tested in each sequence, and the ordinary positions it is compared with.
    let plans: Vec<(Vec<usize>, Vec<usize>)> = sequences
        .iter()
        .zip(&found)
        .enumerate()
        .map(|(index, (sequence, found))| {
            let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
            rng.set_stream(index as u64);
            (chosen(found, options.tested), donors(found, sequence, options.donors, &mut rng))
        })
        .collect();
    let total = plans.iter().map(|(tested, donors)| passes(tested.len(), donors.len())).sum();
    let (mut instances, mut totals, mut nll) = (Vec::new(), Totals::default(), 0.0);
    progress.start("test sinks", total, "passes");
    for (index, ((sequence, found), (tested, donors))) in sequences.iter().zip(&found).zip(&plans).enumerate()
    {
        let lab = Lab::new(exec, model, sequence, &found.hidden);
        nll += lab.nll / sequences.len() as f64;
        let mut own: Vec<Instance> = found
            .positions()
            .into_iter()
            .map(|position| Instance {
                sequence: index,
                position,
                token: sequence[position],
                places: found.places(position),
                tests: None,
            })
            .collect();
        let mut tested: Vec<&mut Instance> =
            own.iter_mut().filter(|instance| tested.contains(&instance.position)).collect();
        if !tested.is_empty() {
            test(&lab, model.context_limit, donors, &mut tested, &mut totals, progress)?;
        }
        instances.extend(own);
    }
    progress.finish();
    Ok(SinksReport {
        version: report::VERSION,
        model: PlanModel::of(config),
        sequences: sequences.len(),
        tokens,
        context: sequences.iter().map(Vec::len).max().unwrap_or(0),
        data_sha256: tokens_sha256(sequences),
        seed: options.seed,
        donors: options.donors,
        nll,
        no_op_heads: summary::no_op_heads(&found),
        sinks: summary::summarise(&instances, config.layers * config.heads, options.seed),
        runs: totals.tallies,
        constant: totals.constant,
        activations: massive.finish(),
        texts: BTreeMap::new(),
        run: None,
    })
}

fn check(model: &Model, sequences: &[Vec<u32>], options: &SinkOptions) -> Result<()> {
    check_sequences(model, sequences)?;
    if let Some(short) = sequences.iter().position(|s| s.len() < MIN_TOKENS) {
        return Err(SurgeryError::Argument(format!(
            "sequence {short} has {} tokens, sinks are looked for in at least {MIN_TOKENS}",
            sequences[short].len()
        )));
    }
    if options.donors == 0 {
        return Err(SurgeryError::Argument(
            "sinks need at least one ordinary position to compare with".into(),
        ));
    }
    Ok(())
}
