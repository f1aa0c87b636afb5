//! The interventions on one sequence: which runs are made, with which donors, and what share of a sink's strength the donors take over.

use super::find::{Absorbing, Found};
use super::lab::{Lab, Outcome};
use crate::error::{Result, SurgeryError};
use model::{CutPart, Intervention, Progress};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Largest constant added to all position codes; less where the model's context ends before.
const SHIFT: usize = 1000;

/// One swap of an attribute, or one repetition of a token.
#[derive(Clone, Debug)]
pub struct Takeover {
    /// The donor's strength as a share of the sink's, both summed over the heads where the sink absorbs.
    pub tau: f64,
    /// The donor's strength in each of these heads.
    pub strengths: Vec<f64>,
}

/// What was done with one absorbing position.
#[derive(Default)]
pub struct Tests {
    /// By intervention, as in [`INTERVENTIONS`]: the runs that did not break the model.
    pub runs: BTreeMap<&'static str, Vec<Takeover>>,
    /// KL with the value cut off.
    pub kl_value: f64,
    /// KL with the key cut off.
    pub kl_key: f64,
}

/// An absorbing position of one sequence.
pub struct Instance {
    /// Which sequence.
    pub sequence: usize,
    /// Where.
    pub position: usize,
    /// Its token.
    pub token: u32,
    /// The heads where it absorbs: layer, head and what was measured.
    pub places: Vec<(usize, usize, Absorbing)>,
    /// Results, if it was tested.
    pub tests: Option<Tests>,
}

/// Interventions by name: position codes swapped (I1), tokens swapped (I2), the donor sees only itself (I3b), one token repeated (I6), and
/// the swaps between two ordinary positions.
pub const INTERVENTIONS: [&str; 6] = [CODES, TOKENS, ALONE, REPEAT, CONTROL_CODES, CONTROL_TOKENS];
pub const CODES: &str = "codes";
pub const TOKENS: &str = "tokens";
pub const ALONE: &str = "alone";
pub const REPEAT: &str = "repeat";
pub const CONTROL_CODES: &str = "control-codes";
pub const CONTROL_TOKENS: &str = "control-tokens";

/// All runs of one intervention.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Runs made.
    pub runs: usize,
    /// Of these, left out because they broke the model.
    pub discarded: usize,
    /// Mean negative log-likelihood over the second half of the sequences, all runs, in nats per token.
    pub nll: f64,
    /// Mean rise of it over the same sequences unchanged.
    pub nll_rise: f64,
}

/// What adding a constant to all position codes changed: nothing but rounding, in a model with RoPE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Constant {
    /// The constant.
    pub shift: usize,
    /// Largest change of a sink's strength in any head, as a share of it.
    pub strength_change: f64,
    /// Largest change of the negative log-likelihood, in nats per token.
    pub nll_change: f64,
}

/// Results over all sequences so far.
#[derive(Default)]
pub struct Totals {
    /// By intervention.
    pub tallies: BTreeMap<String, Tally>,
    /// Of the constant; `None` when the context left no room for one.
    pub constant: Option<Constant>,
}

impl Totals {
    fn count(&mut self, kind: &str, lab: &Lab<'_>, outcome: &Outcome) -> bool {
        let tally = self.tallies.entry(kind.to_string()).or_default();
        let weight = tally.runs as f64 / (tally.runs + 1) as f64;
        let join = |mean: f64, new: f64| mean * weight + new * (1.0 - weight);
        // A run without a finite likelihood is counted as discarded; it has no share in the mean.
        if outcome.nll.is_finite() {
            tally.nll = join(tally.nll, outcome.nll);
            tally.nll_rise = join(tally.nll_rise, outcome.nll - lab.nll);
        }
        tally.runs += 1;
        // Repeated tokens are another text, whose likelihood says nothing about whether the model works.
        let broken = if kind == REPEAT { !outcome.is_finite() } else { lab.is_broken(outcome) };
        tally.discarded += usize::from(broken);
        !broken
    }
}

/// Positions to test in a sequence: those that absorb in most heads.
pub fn chosen(found: &Found, limit: usize) -> Vec<usize> {
    let mut positions: Vec<(usize, usize)> =
        found.positions().into_iter().map(|position| (found.places(position).len(), position)).collect();
    positions.sort_by_key(|&(heads, position)| (std::cmp::Reverse(heads), position));
    positions.truncate(limit);
    positions.into_iter().map(|(_, position)| position).collect()
}

/// Ordinary positions to swap with, drawn from `[T/8, T/2)`: they absorb in no head, and no sink has their token.
pub fn donors(found: &Found, tokens: &[u32], limit: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let sinks = found.positions();
    let seq = tokens.len();
    let ordinary = |d: &usize| !sinks.contains(d) && !sinks.iter().any(|&sink| tokens[sink] == tokens[*d]);
    let mut positions: Vec<usize> = ((seq / 8).max(1)..seq / 2).filter(ordinary).collect();
    let drawn = limit.min(positions.len());
    for i in 0..drawn {
        let other = rng.random_range(i..positions.len());
        positions.swap(i, other);
    }
    positions.truncate(drawn);
    positions
}

/// Passes that [`test`] makes with `sinks` sinks and `donors` donors.
pub fn passes(sinks: usize, donors: usize) -> u64 {
    match sinks {
        0 => 0,
        _ => (1 + donors + if donors > 1 { 2 } else { 0 } + sinks * (3 * donors + 2)) as u64,
    }
}

/// Makes all runs on the instances of one sequence.
pub fn test(
    lab: &Lab<'_>,
    limit: usize,
    donors: &[usize],
    instances: &mut [&mut Instance],
    totals: &mut Totals,
    progress: &mut dyn Progress,
) -> Result<()> {
    let seq = lab.tokens().len();
    let codes = |a: usize, b: usize| {
        let mut positions: Vec<usize> = (0..seq).collect();
        positions.swap(a, b);
        Intervention { positions: Some(positions), ..Intervention::default() }
    };
    let swapped = |a: usize, b: usize| {
        let mut tokens = lab.tokens().to_vec();
        tokens.swap(a, b);
        tokens
    };
    let nothing = Intervention::default();
    constant(lab, limit, instances, totals, progress)?;

    // Runs that do not depend on the sink: all sinks look at the same pass.
    let mut all: Vec<(usize, usize)> = instances.iter().flat_map(|instance| instance.heads()).collect();
    all.sort_unstable();
    all.dedup();
    let sinks: Vec<usize> = instances.iter().map(|instance| instance.position).collect();
    for &donor in donors {
        step(progress)?;
        let outcome = lab.run(&vec![lab.tokens()[donor]; seq], &nothing, &all, &sinks)?;
        if totals.count(REPEAT, lab, &outcome) {
            for (slot, instance) in instances.iter_mut().enumerate() {
                let strengths = instance.pick(&all, &outcome, |keys| keys[slot]);
                instance.add(REPEAT, strengths);
            }
        }
    }
    if let [a, b, ..] = *donors {
        for (kind, tokens, change) in [
            (CONTROL_CODES, lab.tokens().to_vec(), codes(a, b)),
            (CONTROL_TOKENS, swapped(a, b), nothing.clone()),
        ] {
            step(progress)?;
            let outcome = lab.run(&tokens, &change, &all, &[a, b])?;
            if totals.count(kind, lab, &outcome) {
                for instance in instances.iter_mut() {
                    let strengths = instance.pick(&all, &outcome, |keys| (keys[0] + keys[1]) / 2.0);
                    instance.add(kind, strengths);
                }
            }
        }
    }

    for instance in instances.iter_mut() {
        let (sink, heads) = (instance.position, instance.heads());
        for &donor in donors {
            let alone = Intervention { alone: Some(donor), ..Intervention::default() };
            for (kind, tokens, change) in [
                (CODES, lab.tokens().to_vec(), codes(sink, donor)),
                (TOKENS, swapped(sink, donor), nothing.clone()),
                (ALONE, lab.tokens().to_vec(), alone),
            ] {
                step(progress)?;
                let outcome = lab.run(&tokens, &change, &heads, &[donor])?;
                if totals.count(kind, lab, &outcome) {
                    instance.add(kind, outcome.strengths.iter().map(|keys| keys[0]).collect());
                }
            }
        }
        let tests = instance.tests.get_or_insert_default();
        step(progress)?;
        tests.kl_value = lab.kl_without(sink, CutPart::Value, &heads)?;
        step(progress)?;
        tests.kl_key = lab.kl_without(sink, CutPart::Key, &heads)?;
    }
    Ok(())
}

/// One constant added to all position codes.
fn constant(
    lab: &Lab<'_>,
    limit: usize,
    instances: &[&mut Instance],
    totals: &mut Totals,
    progress: &mut dyn Progress,
) -> Result<()> {
    step(progress)?;
    let seq = lab.tokens().len();
    let shift = SHIFT.min(limit.saturating_sub(seq));
    if shift == 0 {
        return Ok(());
    }
    let change = Intervention { positions: Some((shift..shift + seq).collect()), ..Intervention::default() };
    let mut worst = totals.constant.unwrap_or_default();
    worst.shift = worst.shift.max(shift);
    let mut places: Vec<(usize, usize)> = instances.iter().flat_map(|instance| instance.heads()).collect();
    places.sort_unstable();
    places.dedup();
    let keys: Vec<usize> = instances.iter().map(|instance| instance.position).collect();
    let outcome = lab.run(lab.tokens(), &change, &places, &keys)?;
    for (slot, instance) in instances.iter().enumerate() {
        let after = instance.pick(&places, &outcome, |keys| keys[slot]);
        for ((_, _, before), after) in instance.places.iter().zip(after) {
            let change = (after - before.strength).abs() / before.strength.abs().max(1e-30);
            worst.strength_change = worst.strength_change.max(change);
        }
    }
    worst.nll_change = worst.nll_change.max((outcome.nll - lab.nll).abs());
    totals.constant = Some(worst);
    Ok(())
}

fn step(progress: &mut dyn Progress) -> Result<()> {
    if progress.cancelled() {
        return Err(SurgeryError::Interrupted);
    }
    progress.advance(1, "");
    Ok(())
}

impl Instance {
    /// (layer, head) where it absorbs, sorted.
    pub fn heads(&self) -> Vec<(usize, usize)> {
        self.places.iter().map(|&(layer, head, _)| (layer, head)).collect()
    }

    /// The values of its own heads out of those of `places`.
    fn pick(&self, places: &[(usize, usize)], outcome: &Outcome, f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let own = self.heads();
        let pairs = places.iter().zip(&outcome.strengths).filter(|(place, _)| own.contains(place));
        pairs.map(|(_, keys)| f(keys)).collect()
    }

    /// Records what a donor (or the sink itself, among repeated tokens) reaches in its heads.
    fn add(&mut self, kind: &'static str, strengths: Vec<f64>) {
        let before: f64 = self.places.iter().map(|(_, _, absorbing)| absorbing.strength).sum();
        let tau = strengths.iter().sum::<f64>() / before.max(1e-30);
        self.tests.get_or_insert_default().runs.entry(kind).or_default().push(Takeover { tau, strengths });
    }
}
