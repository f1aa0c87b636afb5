//! Many conversions of one model judged on the same text and prompts: every criterion at every budget, baselines and finished hybrids beside them.
//! Converts in memory; results go to a file one configuration at a time, so that an interrupted comparison goes on.

mod chart;
mod file;
mod hybrid;
mod judge;
mod method;
mod rank;
mod table;
#[cfg(test)]
mod tests;

pub use chart::svg;
pub(crate) use file::Found;
pub use file::{ResultsFile, Settings};
pub use hybrid::Hybrid;
pub use judge::{Distance, Estimate, Reference};
pub use method::{Configuration, Method};
pub use rank::{RankCorrelation, spearman};
pub use table::markdown;

use crate::answers::Score;
use crate::error::{EvalError, Result};
use crate::passkey::{PasskeyOptions, passkey};
use crate::text::EvalText;
use kernels::Exec;
use method::Planner;
use model::{Engine, EngineOptions, Model, Progress};
use serde::{Deserialize, Serialize};
use std::time::Instant;
use surgery::convert::convert_in_memory;
use surgery::select::cache_bytes_at;
use surgery::{HeadBank, HeadsReport, criteria};
use weights::Tokenizer;

/// The depth of the cache sizes that stand beside every configuration, in tokens.
pub const DEEP: usize = 8192;

/// What is compared, on what.
pub struct Inputs<'a> {
    /// The base model.
    pub model: &'a Model,
    /// Its tokenizer; needed for passkeys only.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Text to judge on.
    pub texts: &'a [EvalText],
    /// Statistics and scores of its heads.
    pub heads: &'a HeadsReport,
    /// Trained heads, for the method `bank` and criteria measured on them.
    pub bank: Option<&'a HeadBank>,
    /// Finished hybrids to judge beside the conversions; names differ.
    pub hybrids: &'a [Hybrid],
    /// Types that base and conversions run in, the same for all.
    pub engine: EngineOptions,
}

/// Which configurations there are.
#[derive(Clone, Debug)]
pub struct CompareOptions {
    /// What replaces the chosen groups, and baselines.
    pub methods: Vec<Method>,
    /// How groups are chosen.
    pub criteria: Vec<String>,
    /// Budgets.
    pub betas: Vec<f64>,
    /// How often `random` is drawn, from the settings' seed on.
    pub random_draws: u64,
}

/// The base on the same text and prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseRow {
    /// Perplexity over all windows.
    pub ppl: f64,
    /// Cache bytes (f16) after the settings' context.
    pub cache_bytes: usize,
    /// Cache bytes (f16) after [`DEEP`] tokens.
    pub cache_bytes_8k: usize,
    /// Right answers by context.
    pub passkey: Vec<PasskeyScore>,
}

/// One configuration's results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Which one.
    #[serde(flatten)]
    pub configuration: Configuration,
    /// What converted groups became, in words.
    pub mixer: String,
    /// Groups converted.
    pub converted: usize,
    /// Groups in all layers.
    pub total: usize,
    /// Cache bytes (f16) after the settings' context.
    pub cache_bytes: usize,
    /// Cache bytes (f16) after [`DEEP`] tokens.
    pub cache_bytes_8k: usize,
    /// How far it is from the base.
    #[serde(flatten)]
    pub distance: Distance,
    /// Right answers by context.
    pub passkey: Vec<PasskeyScore>,
}

/// Right answers at one context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PasskeyScore {
    /// Tokens, prompt and answer.
    pub context: usize,
    /// With Wilson's interval.
    #[serde(flatten)]
    pub score: Score,
}

/// Everything that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What all of it was measured with.
    pub settings: Settings,
    /// The base.
    pub base: BaseRow,
    /// The configurations, in the order of the methods, criteria, draws and betas asked for.
    pub rows: Vec<Row>,
    /// How alike the criteria order the groups; empty where only a results file is known.
    #[serde(default)]
    pub rank_correlation: RankCorrelation,
}

/// Judges every configuration of `options` that `file` does not hold yet. `progress` shows one phase over all of them, in tokens.
///
/// # Errors
/// [`EvalError::Argument`] for options that cannot be met and for a `file` of another base; [`EvalError::Surgery`] for scores that are missing or
/// plans that do not fit; [`EvalError::Interrupted`], with everything finished in `file`.
pub fn compare(
    exec: &Exec,
    inputs: &Inputs<'_>,
    options: &CompareOptions,
    file: &mut ResultsFile,
    progress: &mut dyn Progress,
) -> Result<Comparison> {
    let settings = file.settings().clone();
    let planner = Planner::new(inputs, options, &settings)?;
    let wanted = planner.configurations();
    let left: Vec<&Configuration> = wanted.iter().filter(|c| file.row(c).is_none()).collect();
    let samples = settings.passkey_samples;
    let text: usize = inputs.texts.iter().flat_map(|t| &t.windows).map(|w| w.tokens.len()).sum();
    let prompts = settings.passkey_contexts.iter().sum::<usize>() * samples;
    if !left.is_empty() || file.base().is_none() {
        let runs = left.len() + usize::from(file.base().is_none());
        let again = if file.base().is_none() { 0 } else { text };
        progress.start("compare", (runs * (text + prompts) + again) as u64, "tok");
        let base = Engine::from_model(exec, inputs.model, inputs.engine)?;
        let reference = Reference::new(exec, &base, inputs.texts, settings.seed, progress)?;
        let ppl = reference.perplexity();
        match file.base() {
            Some(known) if (known.ppl / ppl - 1.0).abs() > SAME_PPL => {
                return Err(EvalError::Argument(format!(
                    "the base has perplexity {ppl} now and had {} when the results file was begun\n\
                     hint: begin another results file with --out",
                    known.ppl
                )));
            }
            Some(_) => {}
            None => {
                let bytes = |tokens| tokens * inputs.model.config.kv_bytes_per_token(2);
                let passkey = passkeys(exec, inputs, &base, &settings, "base", progress)?;
                let (cache_bytes, cache_bytes_8k) = (bytes(settings.context), bytes(DEEP));
                file.set_base(BaseRow { ppl, cache_bytes, cache_bytes_8k, passkey })?;
            }
        }
        for configuration in left {
            let plan = planner.plan(configuration)?;
            let engine = match planner.hybrid(configuration) {
                Some(hybrid) => hybrid.engine(exec, configuration.beta, inputs.engine)?,
                None => {
                    let bank = inputs.bank.filter(|_| configuration.method == Method::Bank);
                    let heads = Some(inputs.heads);
                    let hybrid = convert_in_memory(inputs.model, &plan, bank, heads, settings.seed)?;
                    Engine::from_model(exec, &hybrid, inputs.engine)?
                }
            };
            let name = configuration.to_string();
            let clock = Instant::now();
            let distance = reference.judge(&engine, &name, progress)?;
            let passkey = passkeys(exec, inputs, &engine, &settings, &name, progress)?;
            let bytes = |tokens| cache_bytes_at(&plan, &inputs.model.config, tokens);
            file.push(Row {
                configuration: configuration.clone(),
                mixer: match plan.skipped() {
                    0 => plan.mixer.map_or_else(|| "attention".into(), |mixer| mixer.to_string()),
                    skipped => format!("{skipped} of {} layers skipped", plan.layers.len()),
                },
                converted: plan.converted(),
                total: plan.total(),
                cache_bytes: bytes(settings.context),
                cache_bytes_8k: bytes(DEEP),
                distance,
                passkey,
            })?;
            progress.note(&format!(
                "{name}: KL {:.4}, top-1 {:.1} %, {:.0} s",
                distance.kl.value,
                100.0 * distance.top1_agreement.value,
                clock.elapsed().as_secs_f64()
            ));
        }
        progress.finish();
    }
    let scores = planner.flat_scores();
    Ok(Comparison {
        base: file.base().cloned().ok_or_else(|| EvalError::Argument("the base was not judged".into()))?,
        rows: wanted.iter().filter_map(|c| file.row(c).cloned()).collect(),
        rank_correlation: RankCorrelation::of(&scores),
        settings,
    })
}

/// Relative difference of the base's perplexity between runs on one machine's different numbers of threads or instruction sets.
const SAME_PPL: f64 = 1e-3;

/// Names of the criteria whose scores `heads` and `bank` hold, in documented order.
pub fn available_criteria(heads: &HeadsReport, bank: Option<&HeadBank>) -> Vec<String> {
    let held = |name: &&str| criteria::scores(name, heads, bank, 0).is_ok();
    criteria::NAMES.into_iter().filter(held).map(str::to_string).collect()
}

fn passkeys(
    exec: &Exec,
    inputs: &Inputs<'_>,
    engine: &Engine,
    settings: &Settings,
    name: &str,
    progress: &mut dyn Progress,
) -> Result<Vec<PasskeyScore>> {
    if settings.passkey_samples == 0 {
        return Ok(Vec::new());
    }
    let tokenizer = inputs
        .tokenizer
        .ok_or_else(|| EvalError::Argument("passkeys need a tokenizer\nhint: ask for no samples".into()))?;
    let mut scores = Vec::new();
    for &context in &settings.passkey_contexts {
        let options = PasskeyOptions {
            contexts: vec![context],
            samples: settings.passkey_samples,
            seed: settings.seed,
        };
        let mut part = Part { whole: &mut *progress, context, name };
        for result in passkey(exec, engine, tokenizer, &options, &mut part)? {
            scores.push(PasskeyScore { context, score: Score::new(result.correct, result.samples) });
        }
    }
    Ok(scores)
}

/// The prompts of one context as a part of the whole comparison.
struct Part<'a> {
    whole: &'a mut dyn Progress,
    context: usize,
    name: &'a str,
}

impl Progress for Part<'_> {
    fn advance(&mut self, n: u64, _: &str) {
        self.whole.advance(n * self.context as u64, self.name);
    }

    fn cancelled(&self) -> bool {
        self.whole.cancelled()
    }
}
