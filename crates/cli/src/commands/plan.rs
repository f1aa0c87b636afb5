//! `plan`: which KV groups to convert under a budget.

use crate::common::{DroppedArg, MixerArg, check_output, print_json, usage};
use crate::ui::Ui;
use anyhow::{Context, Result};
use eval::report::bytes;
use model::{Dropped, HeadPlan, MixerSpec, ModelConfig};
use serde::Serialize;
use std::path::PathBuf;
use surgery::select::{Baseline, DUO_SINKS, DUO_WINDOW, STREAMING_SINKS};
use surgery::{HeadBank, HeadsReport, criteria, select};

/// Choose the KV groups to convert for a cache budget and write the plan, a JSON file that can be read and edited.
///
/// Examples:
///   recurformer plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json
///   recurformer plan --heads heads.json --criterion kl-fisher --mixer none --window 64 --beta 0.75 --out plan.json
///   recurformer plan --heads heads.json --baseline streaming-llm --beta 0.5 --at 8192 --out streaming.json
///   recurformer plan --heads heads.json --baseline duo-attention --criterion recency --beta 0.5 --out duo.json
///   recurformer plan --list-criteria
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// heads.json from `analyze`.
    #[arg(long, required_unless_present = "list_criteria")]
    heads: Option<PathBuf>,
    /// Head bank from `align`; decides the mixer.
    #[arg(long)]
    bank: Option<PathBuf>,
    /// How groups are chosen (default: mixer-fisher with a bank, kl-fisher without).
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(criteria::NAMES))]
    criterion: Option<String>,
    /// A training-free baseline instead of a mixer. streaming-llm: a window and 4 sinks in every group, the window as large as the cache of
    /// --beta at --at tokens allows, or --window. duo-attention: 64 sinks and a window of 256 in the chosen groups. random: groups drawn with --seed.
    /// skipped-layers: layers that change the residual stream least are left out until the cache at --at tokens is that of --beta.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(Baseline::ALL.map(Baseline::name)))]
    baseline: Option<String>,
    /// Share of the KV groups to convert, 0 to 1 (streaming-llm and skipped-layers: whose cache they get).
    #[arg(long)]
    beta: Option<f64>,
    /// Tokens at which the cache of streaming-llm is as large as that of --beta (with the heads of --bank, else with a window of 64 and 1 sink).
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    at: usize,
    /// Attention groups that every layer keeps at least.
    #[arg(long, default_value_t = 0)]
    keep_at_least_per_layer: usize,
    /// Mixer of a plan without a bank.
    #[arg(long, value_enum, conflicts_with = "bank")]
    mixer: Option<MixerArg>,
    /// Its local window.
    #[arg(long, conflicts_with = "bank")]
    window: Option<usize>,
    /// Its sinks (default: 1 with a window; of a baseline: its own).
    #[arg(long, conflicts_with = "bank")]
    sinks: Option<usize>,
    /// What becomes of tokens behind the window (default: forgotten).
    #[arg(long, value_enum, conflicts_with = "bank")]
    dropped: Option<DroppedArg>,
    /// Seed of `random`.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The plan.json to write.
    #[arg(long, required_unless_present = "list_criteria")]
    out: Option<PathBuf>,
    /// Print the summary, or the list of criteria, as JSON.
    #[arg(long)]
    json: bool,
    /// Print every criterion with what it measures, what that costs and where it comes from; write nothing.
    #[arg(long, conflicts_with_all = ["heads", "bank", "criterion", "beta", "out"])]
    list_criteria: bool,
}

/// A row of `--list-criteria`.
#[derive(Serialize)]
struct Listed {
    name: &'static str,
    measures: &'static str,
    cost: &'static str,
    /// SmolLM2-135M on two cores.
    seconds: Option<f64>,
    seconds_for: Option<&'static str>,
    by_default: bool,
    needs_bank: bool,
    reference: &'static str,
}

fn list_criteria(json: bool) -> Result<()> {
    let rows: Vec<Listed> = criteria::ALL
        .iter()
        .map(|c| Listed {
            name: c.name,
            measures: c.about,
            cost: c.cost.words(),
            seconds: c.measured.map(|m| m.seconds),
            seconds_for: c.measured.map(|m| m.of),
            by_default: c.source.by_default(),
            needs_bank: c.source.needs_bank(),
            reference: c.reference,
        })
        .collect();
    if json {
        return print_json(&rows);
    }
    let mut table =
        vec![["criterion", "cost", "SmolLM2-135M, 2 cores, at most", "reference"].map(String::from)];
    table.extend(rows.iter().map(|row| {
        let measured = match (row.seconds, row.seconds_for) {
            (Some(seconds), Some(of)) => format!("{seconds} s for {of}"),
            _ => "-".into(),
        };
        [row.name.into(), row.cost.into(), measured, row.reference.into()]
    }));
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    for (index, [name, cost, measured, reference]) in table.iter().enumerate() {
        let [a, b, c] = widths;
        println!("{name:a$}  {cost:b$}  {measured:c$}  {reference}");
        if let Some(row) = index.checked_sub(1).map(|i| &rows[i]) {
            println!("  {}", row.measures);
        }
    }
    println!(
        "higher scores are safer to convert; `analyze` measures those by default: {}",
        rows.iter().filter(|row| row.by_default).map(|row| row.name).collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

pub fn run(args: &Args, _: &mut Ui) -> Result<()> {
    if args.list_criteria {
        return list_criteria(args.json);
    }
    if let Some(beta) = args.beta.filter(|beta| !(0.0..=1.0).contains(beta)) {
        return Err(usage(format!("--beta {beta} must be between 0 and 1")));
    }
    let (Some(heads), Some(out)) = (&args.heads, &args.out) else {
        return Err(usage("--heads and --out are needed to make a plan"));
    };
    check_output(out, true)?;
    let heads = HeadsReport::read(heads)?;
    let config = &heads.config;
    let bank = args.bank.as_ref().map(|path| HeadBank::read(path, config)).transpose()?;
    let plan = match args.baseline() {
        Some(Baseline::StreamingLlm) => args.streaming(config, bank.as_ref())?,
        Some(Baseline::SkippedLayers) => args.skipping(&heads, bank.as_ref())?,
        baseline => args.selected(&heads, bank.as_ref(), baseline)?,
    };
    let criterion = plan.criterion.as_ref().map_or("nothing", |c| c.name.as_str());
    weights::files::atomic_write(out, plan.to_json().as_bytes()).with_context(|| "writing the plan")?;
    let summary = select::summary(&plan, config);
    if args.json {
        return print_json(&summary);
    }
    println!(
        "{} of {} KV groups converted by {criterion}; {}",
        summary.converted,
        summary.total,
        plan.mixer.map_or("no mixer".into(), |mixer| mixer.to_string())
    );
    if plan.skipped() > 0 {
        println!("{} of {} layers left out", plan.skipped(), plan.layers.len());
    }
    println!(
        "cache          {} per token (base {}), constant {}",
        bytes(summary.hybrid_bytes_per_token),
        bytes(summary.base_bytes_per_token),
        bytes(summary.constant_bytes)
    );
    for at in &summary.contexts {
        let share = 100.0 * at.hybrid_bytes as f64 / at.base_bytes as f64;
        println!(
            "  {:>6} tokens {:>11} of {:>11}  {share:.1} %",
            at.tokens,
            bytes(at.hybrid_bytes),
            bytes(at.base_bytes)
        );
    }
    if let Some(tokens) = summary.smaller_from_tokens {
        println!("  smaller than the base's from {tokens} tokens on");
    }
    println!("kept attention groups per layer:");
    for (layer, kept) in summary.kept_groups.iter().enumerate() {
        println!("  {layer:>3} {}/{} {kept:?}", kept.len(), plan.layers[layer].groups.len());
    }
    println!("wrote {}", out.display());
    Ok(())
}

impl Args {
    fn baseline(&self) -> Option<Baseline> {
        let name = self.baseline.as_deref()?;
        Baseline::ALL.into_iter().find(|baseline| baseline.name() == name)
    }

    /// Every group behind one window.
    fn streaming(&self, config: &ModelConfig, bank: Option<&HeadBank>) -> Result<HeadPlan> {
        if self.criterion.is_some() || self.mixer.is_some() || self.keep_at_least_per_layer > 0 {
            return Err(usage(
                "streaming-llm chooses no groups and has a mixer of its own: leave out --criterion, --mixer and --keep-at-least-per-layer",
            ));
        }
        let sinks = self.sinks.unwrap_or(STREAMING_SINKS);
        let window = match (self.window, self.beta) {
            (Some(window), None) => window,
            (None, Some(beta)) => select::streaming_window(config, self.budget(config, beta, bank)?, sinks)?,
            _ => return Err(usage("streaming-llm takes its window from either --beta or --window")),
        };
        let mut plan = select::streaming(config, window, sinks)?;
        plan.mixer = plan.mixer.map(|mixer| self.with_dropped(mixer));
        Ok(plan)
    }

    /// Cache bytes at `--at` tokens of a plan for `beta`.
    fn budget(&self, config: &ModelConfig, beta: f64, bank: Option<&HeadBank>) -> Result<usize> {
        let mixer = bank.map_or(select::window_only(64, 1), |bank| bank.info.spec);
        Ok(select::budget_bytes(config, beta, mixer, self.at)?)
    }

    /// Layers left out, the others as they are.
    fn skipping(&self, heads: &HeadsReport, bank: Option<&HeadBank>) -> Result<HeadPlan> {
        if self.criterion.is_some()
            || self.mixer.is_some()
            || self.window.is_some()
            || self.sinks.is_some()
            || self.dropped.is_some()
            || self.keep_at_least_per_layer > 0
        {
            return Err(usage(
                "skipped-layers converts no groups: leave out everything but --heads, --bank, --beta and --at",
            ));
        }
        let beta =
            self.beta.ok_or_else(|| usage("--beta says how much cache the layers may fill: give it"))?;
        let similarity = heads.similarity().ok_or_else(|| {
            anyhow::anyhow!(
                "the head statistics hold no similarities of layers\nhint: run `recurformer analyze` again"
            )
        })?;
        let bytes = self.budget(&heads.config, beta, bank)?;
        Ok(select::skipping(&heads.config, &similarity, heads.tokens, bytes, self.at)?)
    }

    /// Groups chosen by their scores.
    fn selected(
        &self,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
        baseline: Option<Baseline>,
    ) -> Result<HeadPlan> {
        let beta = self.beta.ok_or_else(|| usage("--beta says how many groups to convert: give it"))?;
        let default = match baseline {
            Some(Baseline::Random) => "random",
            None if bank.is_some() => "mixer-fisher",
            _ => "kl-fisher",
        };
        let criterion = self.criterion.as_deref().unwrap_or(default);
        if baseline == Some(Baseline::Random) && criterion != default {
            return Err(usage(format!(
                "baseline random chooses its groups itself: leave out --criterion {criterion}"
            )));
        }
        if bank.is_none() && criteria::find(criterion)?.source.needs_bank() {
            return Err(usage(format!("criterion {criterion} is measured on a head bank: give --bank")));
        }
        // A plan of streaming heads uses a bank for its choice at most.
        let used = |_: &&HeadBank| baseline != Some(Baseline::DuoAttention) || criterion == "mixer-fisher";
        let choice = select::Choice {
            criterion,
            beta,
            keep_at_least_per_layer: self.keep_at_least_per_layer,
            mixer: self.mixer_spec(&heads.config, bank, baseline)?,
            seed: self.seed,
        };
        Ok(select::plan_by(heads, bank.filter(used), &choice)?)
    }

    fn mixer_spec(
        &self,
        config: &ModelConfig,
        bank: Option<&HeadBank>,
        baseline: Option<Baseline>,
    ) -> Result<MixerSpec> {
        if baseline == Some(Baseline::DuoAttention) {
            if self.mixer.is_some_and(|mixer| mixer != MixerArg::None) {
                return Err(usage("duo-attention has windows only: leave out --mixer"));
            }
            let (window, sinks) = (self.window.unwrap_or(DUO_WINDOW), self.sinks.unwrap_or(DUO_SINKS));
            return Ok(self.with_dropped(MixerArg::None.spec(config, window, Some(sinks))?));
        }
        if let Some(bank) = bank {
            return Ok(bank.info.spec);
        }
        let mixer = self.mixer.unwrap_or(MixerArg::None);
        let default_window = if mixer == MixerArg::None { 64 } else { 0 };
        Ok(self.with_dropped(mixer.spec(config, self.window.unwrap_or(default_window), self.sinks)?))
    }

    fn with_dropped(&self, mixer: MixerSpec) -> MixerSpec {
        MixerSpec { dropped: self.dropped.map_or(mixer.dropped, Dropped::from), ..mixer }
    }
}
