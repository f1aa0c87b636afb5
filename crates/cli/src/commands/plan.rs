//! `plan`: which KV groups to convert under a budget.

use crate::common::{MixerArg, check_output, print_json, usage};
use crate::ui::Ui;
use anyhow::{Context, Result};
use eval::report::bytes;
use std::path::PathBuf;
use surgery::{HeadBank, HeadsReport, criteria, select};

/// Choose the KV groups to convert for a cache budget and write the plan, a JSON file that can be read and edited.
///
/// Examples:
///   recurformer plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json
///   recurformer plan --heads heads.json --criterion kl-fisher --mixer none --window 64 --beta 0.75 --out plan.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// heads.json from `analyze`.
    #[arg(long)]
    heads: PathBuf,
    /// Head bank from `align`; decides the mixer.
    #[arg(long)]
    bank: Option<PathBuf>,
    /// How groups are chosen (default: mixer-fisher with a bank, kl-fisher without).
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(criteria::NAMES))]
    criterion: Option<String>,
    /// Share of the KV groups to convert, 0 to 1.
    #[arg(long)]
    beta: f64,
    /// Attention groups that every layer keeps at least.
    #[arg(long, default_value_t = 0)]
    keep_at_least_per_layer: usize,
    /// Mixer of a plan without a bank.
    #[arg(long, value_enum, conflicts_with = "bank")]
    mixer: Option<MixerArg>,
    /// Its local window.
    #[arg(long, conflicts_with = "bank")]
    window: Option<usize>,
    /// Its sinks (default: 1 with a window).
    #[arg(long, conflicts_with = "bank")]
    sinks: Option<usize>,
    /// Seed of `random`.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The plan.json to write.
    #[arg(long)]
    out: PathBuf,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, _: &mut Ui) -> Result<()> {
    if !(0.0..=1.0).contains(&args.beta) {
        return Err(usage(format!("--beta {} must be between 0 and 1", args.beta)));
    }
    check_output(&args.out, true)?;
    let heads = HeadsReport::read(&args.heads)?;
    let config = &heads.config;
    let bank = args.bank.as_ref().map(|path| HeadBank::read(path, config)).transpose()?;
    let criterion = args
        .criterion
        .clone()
        .unwrap_or_else(|| if bank.is_some() { "mixer-fisher" } else { "kl-fisher" }.to_string());
    if criterion == "mixer-fisher" && bank.is_none() {
        return Err(usage("criterion mixer-fisher is measured on a head bank: give --bank"));
    }
    let mixer = match &bank {
        Some(bank) => bank.info.spec,
        None => {
            let mixer = args.mixer.unwrap_or(MixerArg::None);
            let default_window = if mixer == MixerArg::None { 64 } else { 0 };
            mixer.spec(config, args.window.unwrap_or(default_window), args.sinks)?
        }
    };
    let choice = select::Choice {
        criterion: &criterion,
        beta: args.beta,
        keep_at_least_per_layer: args.keep_at_least_per_layer,
        mixer,
        seed: args.seed,
    };
    let plan = select::plan_by(&heads, bank.as_ref(), &choice)?;
    weights::files::atomic_write(&args.out, plan.to_json().as_bytes()).with_context(|| "writing the plan")?;
    let summary = select::summary(&plan, config);
    if args.json {
        return print_json(&summary);
    }
    println!(
        "{} of {} KV groups converted by {criterion}; mixer {:?}, window {}, sinks {}",
        summary.converted, summary.total, mixer.recurrent, mixer.window, mixer.sinks
    );
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
    println!("wrote {}", args.out.display());
    Ok(())
}
