//! From the instances of all sequences to sinks by position, and no-op heads.

use super::cause::{Cause, Estimate};
use super::find::{Absorbing, Found, MAX_VALUE_RATIO};
use super::interventions::{
    ALONE, CODES, CONTROL_CODES, CONTROL_TOKENS, Instance, REPEAT, TOKENS, Takeover, Tests,
};
use super::report::{HeadSink, NoOpHead, Sink, SinkTests};
use crate::stats::NO_OP_LIVE_MASS;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Largest KL without the value of a waiver, as a share of the KL without its key.
pub const MAX_KL_RATIO: f64 = 0.5;

/// Sinks by position, the one that absorbs most first; `heads`: number of all (layer, head) pairs.
pub fn summarise(instances: &[Instance], heads: usize, seed: u64) -> Vec<Sink> {
    let mut by_position: BTreeMap<usize, Vec<&Instance>> = BTreeMap::new();
    for instance in instances {
        by_position.entry(instance.position).or_default().push(instance);
    }
    let mut sinks: Vec<Sink> = by_position
        .into_iter()
        .map(|(position, instances)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(position as u64);
            sink(position, &instances, heads, &mut rng)
        })
        .collect();
    let weight = |sink: &Sink| sink.share * sink.sequences.len() as f64;
    sinks.sort_by(|a, b| weight(b).total_cmp(&weight(a)).then(a.position.cmp(&b.position)));
    sinks
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), value| (sum + value, n + 1));
    sum / n.max(1) as f64
}

fn sink(position: usize, instances: &[&Instance], heads: usize, rng: &mut ChaCha8Rng) -> Sink {
    let places = || instances.iter().flat_map(|instance| instance.places.iter().map(|(_, _, a)| a));
    let mut ratios: Vec<f32> = places().map(|a| a.value_ratio as f32).collect();
    let value_ratio = super::measure::median(&mut ratios);
    let tested: Vec<(&Instance, &Tests)> =
        instances.iter().filter_map(|i| i.tests.as_ref().map(|tests| (*i, tests))).collect();
    let kl_value = mean(tested.iter().map(|(_, tests)| tests.kl_value));
    let kl_key = mean(tested.iter().map(|(_, tests)| tests.kl_key));
    let gives_nothing = kl_key > 0.0 && kl_value <= MAX_KL_RATIO * kl_key;
    let by_head = by_head(position, instances, (!tested.is_empty()).then_some(gives_nothing));
    let tests = (!tested.is_empty()).then(|| {
        let mut estimate = |kind: &str| {
            let taus = |(_, tests): &(&Instance, &Tests)| -> Vec<f64> {
                tests.runs.get(kind).map_or_else(Vec::new, |runs| runs.iter().map(|run| run.tau).collect())
            };
            Estimate::of(&tested.iter().map(taus).collect::<Vec<_>>(), rng)
        };
        let (codes, tokens, alone) = (estimate(CODES), estimate(TOKENS), estimate(ALONE));
        let mean = |estimate: &Option<Estimate>| estimate.map(|e| e.mean);
        let deciding = if position == 0 { vec![codes, tokens, alone] } else { vec![codes, tokens] };
        SinkTests {
            sequences: tested.len(),
            kl_value,
            kl_key,
            waiver: value_ratio <= MAX_VALUE_RATIO && gives_nothing,
            repeat: estimate(REPEAT),
            control_codes: estimate(CONTROL_CODES),
            control_tokens: estimate(CONTROL_TOKENS),
            cause: Cause::of(position, mean(&codes), mean(&tokens), mean(&alone)),
            clear: deciding.iter().all(|e| e.is_some_and(|e| e.is_clear())),
            codes,
            tokens,
            alone,
        }
    });
    Sink {
        position,
        sequences: instances.iter().map(|instance| instance.sequence).collect(),
        tokens: instances.iter().map(|instance| instance.token).collect(),
        share: mean(instances.iter().map(|instance| instance.places.len() as f64 / heads as f64)),
        mass: mean(places().map(|a| a.mass)),
        strength: mean(places().map(|a| a.strength)),
        value_ratio,
        tests,
        heads: by_head,
    }
}

/// An instance, which of its heads, and what was measured there.
type Place<'a> = (&'a Instance, usize, &'a Absorbing);

/// The heads of a sink; `gives_nothing`: what the cuts said, if they were made.
fn by_head(position: usize, instances: &[&Instance], gives_nothing: Option<bool>) -> Vec<HeadSink> {
    let mut places: BTreeMap<(usize, usize), Vec<Place<'_>>> = BTreeMap::new();
    for instance in instances {
        for (slot, (layer, head, absorbing)) in instance.places.iter().enumerate() {
            places.entry((*layer, *head)).or_default().push((instance, slot, absorbing));
        }
    }
    places
        .into_iter()
        .map(|((layer, head), found)| {
            // Strength of the donors over that of the sink, in this head alone.
            let tau = |kind: &str| {
                let runs = |(instance, slot, absorbing): &Place<'_>| {
                    let (slot, before) = (*slot, absorbing.strength);
                    let runs = instance.tests.as_ref().and_then(|tests| tests.runs.get(kind));
                    let ratio = move |run: &Takeover| run.strengths[slot] / before.max(1e-30);
                    runs.map_or_else(Vec::new, |runs| runs.iter().map(ratio).collect::<Vec<f64>>())
                };
                let values: Vec<f64> = found.iter().flat_map(runs).collect();
                (!values.is_empty()).then(|| mean(values.into_iter()))
            };
            let (codes, tokens, alone) = (tau(CODES), tau(TOKENS), tau(ALONE));
            let value_ratio = mean(found.iter().map(|(_, _, a)| a.value_ratio));
            HeadSink {
                layer,
                head,
                sequences: found.len(),
                mass: mean(found.iter().map(|(_, _, a)| a.mass)),
                strength: mean(found.iter().map(|(_, _, a)| a.strength)),
                value_ratio,
                waiver: gives_nothing.map(|gives_nothing| gives_nothing && value_ratio <= MAX_VALUE_RATIO),
                cause: gives_nothing.map(|_| Cause::of(position, codes, tokens, alone)),
                codes,
                tokens,
                alone,
            }
        })
        .collect()
}

/// Heads whose attention outside the absorbing positions is below a tenth, mean over the sequences.
pub fn no_op_heads(found: &[Found]) -> Vec<NoOpHead> {
    let mut no_op = Vec::new();
    let Some(first) = found.first() else { return no_op };
    for layer in 0..first.heads.len() {
        for head in 0..first.heads[layer].len() {
            let sunk = |found: &Found| found.heads[layer][head].iter().map(|a| a.mass).sum::<f64>();
            let live_mass = 1.0 - mean(found.iter().map(sunk));
            if live_mass < NO_OP_LIVE_MASS {
                no_op.push(NoOpHead { layer, head, live_mass });
            }
        }
    }
    no_op
}
