//! `plan`: which KV groups to convert under a budget.

use crate::common::{MixerArg, check_output, print_json, usage};
use crate::ui::Ui;
use anyhow::{Context, Result};
use eval::report::bytes;
use model::plan::PlanCriterion;
use serde::Serialize;
use std::path::PathBuf;
use surgery::{HeadBank, HeadsReport, criteria, select};

/// Choose the KV groups to convert for a cache budget and write the plan, a JSON file that can be read and edited.
///
/// Examples:
///   recurformer plan --heads heads.json --bank bank.safetensors --beta 0.5 --out plan.json
///   recurformer plan --heads heads.json --criterion kl-fisher --mixer none --window 64 --beta 0.75 --out plan.json
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
    /// Share of the KV groups to convert, 0 to 1.
    #[arg(long, required_unless_present = "list_criteria")]
    beta: Option<f64>,
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
    let mut table = vec![["criterion", "cost", "SmolLM2-135M, 2 cores", "reference"].map(String::from)];
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
    let (Some(heads), Some(beta), Some(out)) = (&args.heads, args.beta, &args.out) else {
        return Err(usage("--heads, --beta and --out are needed to make a plan"));
    };
    if !(0.0..=1.0).contains(&beta) {
        return Err(usage(format!("--beta {beta} must be between 0 and 1")));
    }
    check_output(out, true)?;
    let heads = HeadsReport::read(heads)?;
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
    let scores = criteria::scores(&criterion, &heads, bank.as_ref(), args.seed)?;
    let on_prompts = criteria::find(&criterion)?.source.needs_prompts();
    let prompts = heads.needle_prompts.as_ref().filter(|_| on_prompts);
    let options = select::SelectOptions {
        beta,
        keep_at_least_per_layer: args.keep_at_least_per_layer,
        mixer,
        criterion: PlanCriterion {
            name: criterion.clone(),
            tokens: match (&bank, prompts) {
                (Some(bank), _) if criterion == "mixer-fisher" => bank.info.fisher_tokens,
                (_, Some(prompts)) => prompts.tokens,
                _ => heads.tokens,
            },
            bank_sha256: bank.as_ref().map(HeadBank::sha256),
            data_sha256: Some(prompts.map_or(&heads.data_sha256, |prompts| &prompts.sha256).clone()),
            seed: (criterion == "random").then_some(args.seed),
        },
    };
    let plan = select::select(config, &scores, &options)?;
    weights::files::atomic_write(out, plan.to_json().as_bytes()).with_context(|| "writing the plan")?;
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
    println!("wrote {}", out.display());
    Ok(())
}
