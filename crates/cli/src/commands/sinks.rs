//! `sinks`: which positions absorb attention without giving information, and why.

use crate::common::{DataArgs, ExecArgs, check_context, check_output, documents, load, print_json};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::{Result, bail};
use eval::report::number;
use eval::run::RunInfo;
use std::path::PathBuf;
use surgery::sinks::{Estimate, MIN_TOKENS, Sink, SinkOptions, SinksReport, sinks};
use train::data::{Split, sequences};

/// Rows of the tables.
const ROWS: usize = 12;

/// Find attention sinks: positions that absorb attention without giving information, and why they do.
///
/// A position absorbs in a head when it gets at least 0.2 of the attention, and ten times its even share, from the second half of the
/// text. It is a waiver when its value is small and cutting that changes the output less than cutting its key. The cause is found by giving an
/// ordinary position what the sink has: its position code, its token, or that it sees only itself. Where the strength follows, that
/// is the cause (shares tau, 1: all of it, with bootstrap intervals of 95 %).
///
/// Examples:
///   recurformer sinks --model smollm2-135m --data english-small
///   recurformer sinks --model smollm2-135m --data english-mixed --tokens 8192 --donors 5 --out sinks.json
///   recurformer sinks --model smollm2-135m --data english-small --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens to look at.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Most tokens of a sequence; shorter documents are sequences of their own, below 32 tokens they are left out.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Ordinary positions that each sink is compared with, per sequence.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    donors: u16,
    /// Positions tested per sequence, those that absorb in most heads; the others are listed untested.
    #[arg(long, default_value_t = 4)]
    tested: usize,
    /// Seed of the sequence order, the compared positions and the intervals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Also write everything, head by head, to this sinks.json.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON: the content of sinks.json.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if let Some(path) = &args.out {
        check_output(path, true)?;
    }
    let exec = args.exec.exec()?;
    let loaded = load(&args.model, ui)?;
    check_context(&loaded.model.config, args.context)?;
    let documents = documents(&args.data, Split::Train, &loaded.checkpoint, &exec, ui)?;
    let mut sequences = sequences(&documents, args.context, args.tokens, args.seed)?;
    let drawn = sequences.len();
    sequences.retain(|sequence| sequence.len() >= MIN_TOKENS);
    if sequences.is_empty() {
        bail!(
            "none of {drawn} sequences has {MIN_TOKENS} tokens\nhint: give longer documents, more --tokens or a longer --context"
        );
    }
    if sequences.len() < drawn {
        ui.say(&format!(
            "{} of {drawn} sequences are shorter than {MIN_TOKENS} tokens and left out",
            drawn - sequences.len()
        ));
    }
    let options = SinkOptions { donors: args.donors.into(), tested: args.tested, seed: args.seed };
    let mut report = sinks(&exec, &loaded.model, &sequences, &options, ui)?;
    if let Ok(tokenizer) = loaded.tokenizer() {
        let ids = report.sinks.iter().flat_map(|sink| sink.tokens.iter().copied());
        report.texts = ids.filter_map(|id| Some((id, tokenizer.token_text(id)?))).collect();
    }
    let run = RunInfo { seeds: vec![args.seed], ..run_info(&exec) };
    report.run = Some(serde_json::to_value(run)?);
    if let Some(path) = &args.out {
        report.write(path)?;
    }
    if args.json {
        return print_json(&report);
    }
    print_sinks(&report);
    print_controls(&report);
    print_activations(&report);
    if let Some(path) = &args.out {
        println!("wrote {}", path.display());
    }
    Ok(())
}

fn print_sinks(report: &SinksReport) {
    let per_sequence =
        report.sinks.iter().map(|sink| sink.sequences.len()).sum::<usize>() as f64 / report.sequences as f64;
    println!(
        "{} sequences of up to {} tokens: {:.1} absorbing positions per sequence",
        report.sequences, report.context, per_sequence
    );
    if report.sinks.is_empty() {
        return;
    }
    println!(
        "{:>8} {:<14} {:>9} {:>7} {:>5} {:>6} {:>6} {:>8} {:>8}  {:<19} {:<19} {:<19}  cause",
        "position",
        "token",
        "sequences",
        "heads",
        "mass",
        "nats",
        "|v|",
        "KL value",
        "KL key",
        "tau code",
        "tau token",
        "tau alone"
    );
    for sink in report.sinks.iter().take(ROWS) {
        println!("{}", row(report, sink));
    }
    if report.sinks.len() > ROWS {
        let rest = &report.sinks[ROWS..];
        let largest = rest.iter().map(|sink| sink.share).fold(0.0, f64::max);
        println!("{:>8} more, each in at most {:.1} % of the heads", rest.len(), 100.0 * largest);
    }
    println!(
        "heads: share of all {} heads where it absorbs; nats above the median key; |v|: norm of its value over the median;\n\
         KL of the output without its value (key) in these heads. A later position cannot be mask-induced: it does not see only itself.",
        report.model.layers * report.model.heads
    );
}

fn row(report: &SinksReport, sink: &Sink) -> String {
    let token: String = report.token_name(sink).chars().take(14).collect();
    let facts = format!(
        "{:>8} {:<14} {:>9} {:>5.1} % {:>5.2} {:>6.1} {:>6.2}",
        sink.position,
        token,
        format!("{}/{}", sink.sequences.len(), report.sequences),
        100.0 * sink.share,
        sink.mass,
        sink.strength,
        sink.value_ratio
    );
    let Some(tests) = &sink.tests else { return format!("{facts} {:>17}  not tested", "") };
    let tau = |estimate: &Option<Estimate>| {
        estimate.map_or("-".into(), |e| format!("{:.2} [{:.2}, {:.2}]", e.mean, e.low, e.high))
    };
    format!(
        "{facts} {:>8} {:>8}  {:<19} {:<19} {:<19}  {}{}; {}",
        number(tests.kl_value),
        number(tests.kl_key),
        tau(&tests.codes),
        tau(&tests.tokens),
        tau(&tests.alone),
        tests.cause.describe(),
        if tests.clear { "" } else { " (intervals reach 0.5)" },
        if tests.waiver { "waiver" } else { "no waiver" }
    )
}

/// What the interventions cost, and that those that should do nothing do nothing.
fn print_controls(report: &SinksReport) {
    if report.runs.is_empty() {
        return;
    }
    println!("\nnegative log-likelihood of the second halves {:.3} nats per token, and under:", report.nll);
    for (name, tally) in &report.runs {
        println!(
            "  {name:<15} {:>7.3}  ({:+.3}; {} runs, {} discarded)",
            tally.nll, tally.nll_rise, tally.runs, tally.discarded
        );
    }
    if let Some(constant) = report.constant {
        println!(
            "  all position codes + {}: strengths change by at most {:.1e} of themselves, the likelihood by {:.1e} nats",
            constant.shift, constant.strength_change, constant.nll_change
        );
    }
    let tested = report.sinks.iter().filter_map(|sink| sink.tests.as_ref());
    let controls = tested.flat_map(|tests| [&tests.control_codes, &tests.control_tokens]);
    if let Some(worst) = controls.flatten().map(|e| e.mean).max_by(f64::total_cmp) {
        println!("  two ordinary positions swapped: at most {worst:.2} of a sink's strength");
    }
}

fn print_activations(report: &SinksReport) {
    let massive: Vec<_> = report
        .activations
        .iter()
        .flat_map(|layer| layer.dimensions.iter().filter(|d| d.massive).map(|d| (layer.layer, d)))
        .collect();
    let mut layers: Vec<usize> = massive.iter().map(|(layer, _)| *layer).collect();
    layers.dedup();
    println!("\nmassive activations (in {} of {} layers):", layers.len(), report.activations.len());
    for (layer, dimension) in &massive {
        let positions = dimension.positions();
        let more = if positions.len() > 8 { ", …" } else { "" };
        let positions: Vec<String> = positions.iter().take(8).map(ToString::to_string).collect();
        println!(
            "  layer {layer:>3}, dimension {:>5}: {:>8.0}, {:>7.0} times the median; at positions {}{more}",
            dimension.dimension,
            dimension.max,
            dimension.ratio,
            positions.join(", ")
        );
    }
    let heads = report.no_op_names();
    println!(
        "no-op heads (layer.head; less than a tenth of the attention outside of sinks): {}{}",
        heads.len(),
        if heads.is_empty() { String::new() } else { format!(": {}", heads.join(" ")) }
    );
}
