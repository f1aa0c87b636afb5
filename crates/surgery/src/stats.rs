//! Head statistics in one streaming pass, and `heads.json`.
//! Knows queries, keys and positions; knows nothing of text.

mod accumulate;
mod report;
#[cfg(test)]
mod tests;

use crate::criteria::{self, Criterion, DuoOptions, ForwardCriterion, Inputs, NeedlePrompt, Source, States};
use crate::error::{Result, SurgeryError};
use crate::sinks::{self, MAX_VALUE_RATIO};
use accumulate::HeadAccumulator;
use kernels::Exec;
use kernels::elementwise::dot;
use model::observe::AttnView;
use model::plan::PlanModel;
use model::{LayerObserver, Model, ModelConfig, Progress, Tape, TokenBatch};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Statistics without a window of their own use queries from this position on (from the middle of shorter sequences on).
pub const FIRST_QUERY: usize = 64;

/// Live attention below which a head does next to nothing.
pub const NO_OP_LIVE_MASS: f64 = 0.1;

/// Means over query positions of one head (or, for a group, over its query heads).
///
/// A query of position `i` counts for the recency ratio of window `w` when `i ≥ w` and the window `i−w+1..=i` holds no sink. Where no
/// query counts (the window is as long as the sequences) the ratio is 1: all of the live attention lies within it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadStats {
    /// Live attention within the last 16 tokens.
    pub recency_ratio_16: f64,
    /// Live attention within the last 64 tokens.
    pub recency_ratio_64: f64,
    /// Live attention within the last 128 tokens.
    pub recency_ratio_128: f64,
    /// Attention on the sinks.
    pub sink_mass: f64,
    /// Mean distance in tokens, sinks left out.
    pub mean_distance: f64,
    /// Entropy in nats, sinks included.
    pub entropy: f64,
    /// Attention on the previous token.
    pub prev_token_mass: f64,
    /// Less than a tenth of the attention is live: the head does next to nothing and its ratios describe little.
    pub no_op: bool,
    /// Live attention by distance, summing to 1; bucket 0 is distance 0, bucket b distances `2^(b−1)..2^b`.
    pub mass_by_distance: Vec<f64>,
}

/// A KV group: mean statistics of its query heads and the criteria's scores (higher: safer to convert).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupStats {
    /// Means over the group's query heads.
    #[serde(flatten)]
    pub stats: HeadStats,
    /// Score by criterion name.
    pub scores: BTreeMap<String, f64>,
}

/// One layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerHeads {
    /// Per query head.
    pub heads: Vec<HeadStats>,
    /// Per KV group.
    pub groups: Vec<GroupStats>,
    /// Mean cosine over tokens between the residual stream that comes into the layer and the one that leaves it; absent in older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub similarity: Option<f64>,
    /// By criterion, a number per query head (not negated: as its source defines it), where the scores are means of such.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub head_scores: BTreeMap<String, Vec<f64>>,
}

/// The needle prompts that some criteria were measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptsInfo {
    /// How many.
    pub prompts: usize,
    /// Tokens of all of them.
    pub tokens: usize,
    /// SHA-256 of tokens and positions.
    pub sha256: String,
}

/// The content of `heads.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadsReport {
    /// Format version, 1.
    pub version: u32,
    /// The model analysed.
    pub model: PlanModel,
    /// Its whole configuration, so that plans and banks can be checked without the model.
    pub config: ModelConfig,
    /// Tokens analysed.
    pub tokens: usize,
    /// Tokens per sequence (of the longest).
    pub context: usize,
    /// Sink positions left out of the live statistics of every head and sequence.
    pub sinks: Vec<usize>,
    /// Sinks left out of single heads and sequences, when they were looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub found_sinks: Vec<FoundSink>,
    /// SHA-256 of the token ids (little-endian u32).
    pub data_sha256: String,
    /// Seed of the seeded criteria.
    pub seed: u64,
    /// Needle prompts, when criteria were measured on some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needle_prompts: Option<PromptsInfo>,
    /// One entry per layer.
    pub layers: Vec<LayerHeads>,
    /// The run that made this; nothing that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<serde_json::Value>,
}

/// A sink that was found in one head of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundSink {
    /// Layer.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Sequence.
    pub sequence: usize,
    /// Position in it.
    pub position: usize,
}

/// Which positions are left out of the live statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkChoice {
    /// These, in every head and sequence.
    At(Vec<usize>),
    /// In each head and sequence those that absorb there ([`sinks::find`]) with a value of at most [`MAX_VALUE_RATIO`] of the median norm; in
    /// sequences too short to look for sinks ([`sinks::MIN_TOKENS`]) the first.
    Found,
}

/// What [`analyze`] computes.
#[derive(Clone, Debug)]
pub struct AnalyzeOptions {
    /// Criteria to score (names as in [`crate::criteria::NAMES`]); those that need a bank are not allowed here.
    pub criteria: Vec<String>,
    /// Seed of `random`, of label sampling in `kl-fisher`, and of the prompts' order in `duo`.
    pub seed: u64,
    /// What the criteria about retrieval are measured on.
    pub prompts: Vec<NeedlePrompt>,
    /// How `duo` learns.
    pub duo: DuoOptions,
    /// Where criteria of many passes keep what they have; the caller removes it when the report is written. `None`: nowhere.
    pub states: Option<States>,
    /// Sinks, left out of the live statistics; the windows of `window-error` show them, besides the first tokens that every window shows.
    pub sinks: SinkChoice,
}

impl Default for AnalyzeOptions {
    /// Every criterion that takes one forward and one backward pass at most and no bank, seed 0, the first token as sink, no prompts, no states.
    fn default() -> Self {
        let criteria = criteria::ALL.iter().filter(|c| c.source.by_default()).map(|c| c.name.to_string());
        Self {
            criteria: criteria.collect(),
            seed: 0,
            sinks: SinkChoice::At(vec![0]),
            prompts: Vec::new(),
            duo: DuoOptions::default(),
            states: None,
        }
    }
}

/// Statistics and scores of every head and group over `sequences` of token ids (each processed on its own). Memory grows with the longest
/// sequence, never with its square.
///
/// # Errors
/// [`SurgeryError::Argument`] for a hybrid model, no sequences, a sequence shorter than two tokens, sinks
/// in every window, a criterion that is unknown or needs a bank, missing or contradictory prompts; [`SurgeryError::Model`] from the passes; [`SurgeryError::Interrupted`].
pub fn analyze(
    exec: &Exec,
    model: &Model,
    sequences: &[Vec<u32>],
    options: &AnalyzeOptions,
    progress: &mut dyn Progress,
) -> Result<HeadsReport> {
    let requested = requested_criteria(options)?;
    check_sequences(model, sequences)?;
    let config = &model.config;
    let sinks = match &options.sinks {
        SinkChoice::At(positions) => {
            let mut positions = positions.clone();
            positions.sort_unstable();
            positions.dedup();
            positions
        }
        SinkChoice::Found => Vec::new(),
    };
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let context = sequences.iter().map(Vec::len).max().unwrap_or(0);

    let mut forward: Vec<(&'static str, Box<dyn ForwardCriterion + '_>)> = Vec::new();
    for criterion in &requested {
        if let Source::Forward(start) = criterion.source {
            forward.push((criterion.name, start(exec, model)?));
        }
    }
    let mut observer = Analysis {
        exec,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
        group_size: config.group_size(),
        head_dim: config.head_dim,
        sinks: vec![vec![sinks.clone(); config.heads]; config.layers],
        heads: vec![vec![HeadAccumulator::new(context); config.heads]; config.layers],
        forward,
    };
    let (mut tape, mut similarity) = (Tape::checkpointed(config.layers), vec![0.0; config.layers]);
    progress.start("analyze", tokens as u64, "tokens");
    let mut found_sinks = Vec::new();
    for (index, sequence) in sequences.iter().enumerate() {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        if options.sinks == SinkChoice::Found {
            let found = find_sinks(exec, model, sequence, index)?;
            for heads in &mut observer.sinks {
                heads.iter_mut().for_each(Vec::clear);
            }
            for sink in &found {
                observer.sinks[sink.layer][sink.head].push(sink.position);
            }
            found_sinks.extend(found);
        }
        model.forward_batch(exec, &TokenBatch::one(sequence), &mut observer, Some(&mut tape))?;
        for (layer, sum) in similarity.iter_mut().enumerate() {
            *sum += cosines(tape.residual(layer), tape.residual(layer + 1), config.d_model);
        }
        progress.advance(sequence.len() as u64, "");
    }
    progress.finish();
    for head in observer.heads.iter().flatten() {
        check_windows(head, sequences)?;
    }

    let mut report = HeadsReport {
        version: report::VERSION,
        model: PlanModel::of(config),
        config: config.clone(),
        tokens,
        context,
        sinks,
        found_sinks,
        data_sha256: tokens_sha256(sequences),
        seed: options.seed,
        needle_prompts: requested.iter().any(|c| c.source.needs_prompts()).then(|| PromptsInfo {
            prompts: options.prompts.len(),
            tokens: options.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            sha256: criteria::prompts_sha256(&options.prompts),
        }),
        layers: observer.heads.iter().map(|heads| layer_report(heads, config.group_size())).collect(),
        run: None,
    };
    for (layer, sum) in report.layers.iter_mut().zip(similarity) {
        layer.similarity = Some(sum / tokens as f64);
    }
    for (name, criterion) in observer.forward {
        report.set_scores(name, &criterion.finish(tokens));
    }
    let inputs = Inputs {
        exec,
        model,
        sequences,
        prompts: &options.prompts,
        seed: options.seed,
        duo: &options.duo,
        states: options.states.as_ref(),
    };
    for criterion in requested {
        let scores = match criterion.source {
            Source::Stats(score) => score(&report, options.seed),
            Source::Backward(measure) => measure(exec, model, sequences, options.seed, progress)?,
            Source::Groups(measure) | Source::Needles(measure) => {
                let found = measure(&inputs, progress)?;
                if let Some(heads) = &found.heads {
                    report.set_head_scores(criterion.name, heads);
                }
                found.groups
            }
            Source::Forward(_) | Source::Bank(_) => continue,
        };
        report.set_scores(criterion.name, &scores);
    }
    Ok(report)
}

fn requested_criteria(options: &AnalyzeOptions) -> Result<Vec<&'static Criterion>> {
    let mut requested: Vec<&'static Criterion> = Vec::new();
    for name in &options.criteria {
        let criterion = criteria::find(name)?;
        if criterion.source.needs_bank() {
            return Err(SurgeryError::Argument(format!(
                "criterion `{name}` needs a head bank; it is measured when the bank is trained\n\
                 hint: leave it out here and give the bank when planning"
            )));
        }
        if criterion.source.needs_prompts() && options.prompts.is_empty() {
            return Err(SurgeryError::Argument(format!(
                "criterion `{name}` is measured on needle prompts, none was given\nhint: give at least one"
            )));
        }
        if !requested.iter().any(|c| c.name == criterion.name) {
            requested.push(criterion);
        }
    }
    Ok(requested)
}

/// The sinks of every head in sequence `index`, positions ascending in each head.
fn find_sinks(exec: &Exec, model: &Model, sequence: &[u32], index: usize) -> Result<Vec<FoundSink>> {
    let config = &model.config;
    let place = |layer, head, position| FoundSink { layer, head, sequence: index, position };
    if sequence.len() < sinks::MIN_TOKENS {
        let heads = (0..config.layers).flat_map(|layer| (0..config.heads).map(move |head| (layer, head)));
        return Ok(heads.map(|(layer, head)| place(layer, head, 0)).collect());
    }
    let mut places = Vec::new();
    for (layer, heads) in sinks::find(exec, model, sequence, None)?.heads.iter().enumerate() {
        for (head, found) in heads.iter().enumerate() {
            let sinks = found.iter().filter(|absorbing| absorbing.value_ratio <= MAX_VALUE_RATIO);
            places.extend(sinks.map(|absorbing| place(layer, head, absorbing.position)));
        }
    }
    Ok(places)
}

/// Refuses sinks so dense that a window shorter than the text has no query to count in this head.
fn check_windows(head: &HeadAccumulator, sequences: &[Vec<u32>]) -> Result<()> {
    for (window, queries) in accumulate::WINDOWS.into_iter().zip(head.ratio_queries()) {
        if queries == 0 && sequences.iter().any(|s| s.len() > window) {
            return Err(SurgeryError::Argument(format!(
                "the sink positions leave no query whose last {window} tokens are free of sinks\nhint: name fewer sinks, or use longer sequences"
            )));
        }
    }
    Ok(())
}

/// Refuses hybrids.
pub(crate) fn check_base(model: &Model) -> Result<()> {
    if !model.plan.is_base() {
        return Err(SurgeryError::Argument(format!(
            "this model is a hybrid already ({} groups converted, {} layers skipped); heads are measured on the base model",
            model.plan.converted(),
            model.plan.skipped()
        )));
    }
    Ok(())
}

/// Refuses hybrids and sequences without a query to look at.
pub(crate) fn check_sequences(model: &Model, sequences: &[Vec<u32>]) -> Result<()> {
    check_base(model)?;
    if sequences.is_empty() {
        return Err(SurgeryError::Argument("no calibration text: no sequence of tokens was given".into()));
    }
    if let Some(short) = sequences.iter().position(|s| s.len() < 2) {
        return Err(SurgeryError::Argument(format!(
            "calibration sequence {short} has {} tokens, expected at least 2",
            sequences[short].len()
        )));
    }
    Ok(())
}

/// Sum of the cosines between the rows of two matrices of `width` columns; of a row of zeros it is 0.
fn cosines(a: &[f32], b: &[f32], width: usize) -> f64 {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(|(a, b)| {
        let scale = (dot(a, a) * dot(b, b)).sqrt();
        if scale > 0.0 { dot(a, b) / scale } else { 0.0 }
    })
    .sum()
}

pub(crate) fn tokens_sha256(sequences: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for token in sequences.iter().flatten() {
        hash.update(token.to_le_bytes());
    }
    format!("{:x}", hash.finalize())
}

struct Analysis<'a> {
    exec: &'a Exec,
    scale: f32,
    group_size: usize,
    head_dim: usize,
    /// By layer and head, sorted.
    sinks: Vec<Vec<Vec<usize>>>,
    heads: Vec<Vec<HeadAccumulator>>,
    forward: Vec<(&'static str, Box<dyn ForwardCriterion + 'a>)>,
}

impl LayerObserver for Analysis<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let (d, group_size, scale) = (self.head_dim, self.group_size, self.scale);
        let sinks = &self.sinks[view.layer];
        let single = self.exec.single();
        let heads: Vec<&mut HeadAccumulator> = self.heads[view.layer].iter_mut().collect();
        self.exec.parallel_items(heads, |head, accumulator| {
            let (q, k) = (view.q.columns(head * d, d), view.k.columns(head / group_size * d, d));
            accumulator.add(&single, q, k, scale, &sinks[head]);
        });
        for (_, criterion) in &mut self.forward {
            criterion.attention(&view, sinks);
        }
    }
}

fn layer_report(heads: &[HeadAccumulator], group_size: usize) -> LayerHeads {
    let heads: Vec<HeadStats> = heads.iter().map(HeadAccumulator::stats).collect();
    let groups = heads
        .chunks_exact(group_size)
        .map(|heads| GroupStats { stats: HeadStats::mean(heads), scores: BTreeMap::new() })
        .collect();
    LayerHeads { heads, groups, similarity: None, head_scores: BTreeMap::new() }
}

impl HeadStats {
    /// Mean over heads, each weighing the same; `no_op` follows from the mean sink mass.
    fn mean(heads: &[HeadStats]) -> Self {
        let mean = |f: fn(&HeadStats) -> f64| heads.iter().map(f).sum::<f64>() / heads.len() as f64;
        let buckets = heads.iter().map(|h| h.mass_by_distance.len()).max().unwrap_or(0);
        let sink_mass = mean(|h| h.sink_mass);
        Self {
            recency_ratio_16: mean(|h| h.recency_ratio_16),
            recency_ratio_64: mean(|h| h.recency_ratio_64),
            recency_ratio_128: mean(|h| h.recency_ratio_128),
            sink_mass,
            mean_distance: mean(|h| h.mean_distance),
            entropy: mean(|h| h.entropy),
            prev_token_mass: mean(|h| h.prev_token_mass),
            no_op: 1.0 - sink_mass < NO_OP_LIVE_MASS,
            mass_by_distance: (0..buckets)
                .map(|b| heads.iter().map(|h| h.mass_by_distance[b]).sum::<f64>() / heads.len() as f64)
                .collect(),
        }
    }
}
