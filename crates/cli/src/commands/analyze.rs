//! `analyze`: head statistics and criteria.

use crate::common::{DataArgs, ExecArgs, check_context, check_output, documents, load, sequences};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::Result;
use eval::report::{Report, number};
use eval::run::RunInfo;
use std::path::PathBuf;
use surgery::criteria;
use surgery::stats::{AnalyzeOptions, analyze};
use train::data::Split;

/// Measure every attention head: where it looks, and what replacing it would cost.
///
/// Examples:
///   recurformer analyze --model smollm2-135m --data english-small --tokens 8192 --out heads.json --html heads.html
///   recurformer analyze --model smollm2-135m --data english-mixed retrieval --tokens 16384 --out heads.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens to measure on.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Most tokens of a sequence; shorter documents are sequences of their own.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Criteria to score, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(without_bank()),
        default_values = without_bank()
    )]
    criteria: Vec<String>,
    /// Seed of the sequence order and of the drawn criteria.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The heads.json to write.
    #[arg(long)]
    out: PathBuf,
    /// Also write a self-contained HTML page.
    #[arg(long)]
    html: Option<PathBuf>,
    #[command(flatten)]
    exec: ExecArgs,
}

/// Names of the criteria that are measured on the base model alone.
fn without_bank() -> Vec<&'static str> {
    criteria::ALL.iter().filter(|c| !c.source.needs_bank()).map(|c| c.name).collect()
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    for path in [Some(&args.out), args.html.as_ref()].into_iter().flatten() {
        check_output(path, true)?;
    }
    let exec = args.exec.exec()?;
    let loaded = load(&args.model, ui)?;
    check_context(&loaded.model.config, args.context)?;
    let documents = documents(&args.data, Split::Train, &loaded.checkpoint, &exec, ui)?;
    let sequences = sequences(&documents, args.context, args.tokens, args.seed)?;
    let options =
        AnalyzeOptions { criteria: args.criteria.clone(), seed: args.seed, ..AnalyzeOptions::default() };
    let heads = analyze(&exec, &loaded.model, &sequences, &options, ui)?;
    heads.write(&args.out)?;
    if let Some(path) = &args.html {
        let mut report = Report::from_files(&[&args.out])?;
        report.title = format!("Heads of {}", args.model);
        for source in &mut report.sources {
            source.run = Some(RunInfo { seeds: vec![args.seed], ..run_info(&exec) });
        }
        report.write_html(path)?;
    }
    let ratios: Vec<f64> =
        heads.layers.iter().flat_map(|l| l.heads.iter().map(|h| h.recency_ratio_64)).collect();
    let above = |t: f64| ratios.iter().filter(|&&r| r > t).count();
    println!(
        "{} heads over {} tokens: mean recency_ratio_64 {}; {} above 0.5, {} above 0.7, {} above 0.9",
        ratios.len(),
        heads.tokens,
        number(ratios.iter().sum::<f64>() / ratios.len() as f64),
        above(0.5),
        above(0.7),
        above(0.9)
    );
    println!("wrote {}", args.out.display());
    Ok(())
}
