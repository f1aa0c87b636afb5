//! `analyze`: head statistics and criteria.

use crate::common::{DataArgs, ExecArgs, Loaded, check_context, check_output, documents, load, usage};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::Result;
use eval::report::{Report, number};
use eval::run::RunInfo;
use std::path::PathBuf;
use surgery::criteria::{self, DuoOptions, Needle, NeedlePrompt, States};
use surgery::stats::{AnalyzeOptions, SinkChoice, analyze};
use tasks::probe::{ProbeNeedle, probe};
use train::data::{Split, sequences};

/// Measure every attention head: where it looks, and what replacing it would cost.
///
/// Criteria of many passes are measured when --criteria names them (`plan --list-criteria` says what each costs): `kl` on the calibration
/// text, `retrieval`, `patching` and `duo` on generated needle prompts. What they have measured lies in `<out>.<criterion>.state` until
/// the end; after an interruption the same command with --resume goes on from there.
///
/// Examples:
///   recurformer analyze --model smollm2-135m --data english-small --tokens 8192 --out heads.json --html heads.html
///   recurformer analyze --model smollm2-135m --data english-mixed retrieval --tokens 16384 --out heads.json
///   recurformer analyze --model smollm2-135m --data english-mixed --tokens 2048 --criteria kl,retrieval --out heads.json
///   recurformer analyze --model smollm2-135m --data english-small --sinks found --out heads.json
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
    /// Criteria to score, comma-separated; without it, those of one forward and one backward pass at most.
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(without_bank()),
        default_values = by_default()
    )]
    criteria: Vec<String>,
    /// Needle prompts for retrieval, patching and duo.
    #[arg(long, default_value_t = 16)]
    needle_prompts: usize,
    /// Numbers hidden in each of them.
    #[arg(long, default_value_t = 4)]
    needles: usize,
    /// Tokens of each of them (default: --context).
    #[arg(long)]
    needle_context: Option<usize>,
    /// Training steps of duo, each on one prompt.
    #[arg(long, default_value_t = DuoOptions::default().steps)]
    duo_steps: usize,
    /// Last tokens that streaming attention sees in duo.
    #[arg(long, default_value_t = DuoOptions::default().window)]
    duo_window: usize,
    /// First tokens that it sees.
    #[arg(long, default_value_t = DuoOptions::default().sinks)]
    duo_sinks: usize,
    /// Go on from the states that an interrupted run left beside --out; where there is none, begin.
    #[arg(long)]
    resume: bool,
    /// Positions left out of the live statistics (recency ratios, distances): the first one, or in each head and sequence those found to
    /// absorb attention with a small value. The windows of `window-error` show these as well; those of other criteria and of plans keep the
    /// first positions only.
    #[arg(long, value_enum, default_value_t = SinksArg::First)]
    sinks: SinksArg,
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

/// `--sinks`.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum SinksArg {
    /// The first position.
    First,
    /// What `sinks` finds, in each head and sequence.
    Found,
}

/// Names of the criteria that are measured on the base model alone.
fn without_bank() -> Vec<&'static str> {
    criteria::ALL.iter().filter(|c| !c.source.needs_bank()).map(|c| c.name).collect()
}

/// Names of those that are measured unless others are named.
fn by_default() -> Vec<&'static str> {
    criteria::ALL.iter().filter(|c| c.source.by_default()).map(|c| c.name).collect()
}

/// Generated needle prompts, where a criterion needs them.
fn needle_prompts(args: &Args, loaded: &Loaded) -> Result<Vec<NeedlePrompt>> {
    let needed = |name: &String| criteria::find(name).is_ok_and(|c| c.source.needs_prompts());
    if !args.criteria.iter().any(needed) {
        return Ok(Vec::new());
    }
    if args.needle_prompts == 0 {
        return Err(usage("--needle-prompts 0: retrieval, patching and duo need at least one prompt"));
    }
    let config = &loaded.model.config;
    let context = args.needle_context.unwrap_or(args.context);
    if context > config.max_context {
        return Err(usage(format!(
            "--needle-context {context} is longer than the model's {}",
            config.max_context
        )));
    }
    let tokenizer = loaded.tokenizer()?;
    (0..args.needle_prompts as u64)
        .map(|index| {
            let made = probe(&tokenizer, config.bos_token_id, context, args.needles, (args.seed, index))?;
            let needles = made.needles.into_iter();
            let needles = needles
                .map(|ProbeNeedle { said, asked, distractor }| Needle { said, asked, distractor })
                .collect();
            Ok(NeedlePrompt { tokens: made.tokens, needles })
        })
        .collect()
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
    let sinks = match args.sinks {
        SinksArg::First => SinkChoice::At(vec![0]),
        SinksArg::Found => SinkChoice::Found,
    };
    let states = States { heads: args.out.clone(), resume: args.resume };
    let duo = DuoOptions {
        steps: args.duo_steps,
        window: args.duo_window,
        sinks: args.duo_sinks,
        ..DuoOptions::default()
    };
    let options = AnalyzeOptions {
        criteria: args.criteria.clone(),
        seed: args.seed,
        prompts: needle_prompts(args, &loaded)?,
        duo,
        states: Some(states.clone()),
        sinks,
    };
    let mut heads = analyze(&exec, &loaded.model, &sequences, &options, ui)?;
    let run = RunInfo { seeds: vec![args.seed], ..run_info(&exec) };
    heads.run = Some(serde_json::to_value(run)?);
    heads.write(&args.out)?;
    states.remove()?;
    if let Some(path) = &args.html {
        let mut report = Report::from_files(&[&args.out])?;
        report.title = format!("Heads of {}", args.model);
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
    if matches!(args.sinks, SinksArg::Found) {
        let sinks = &heads.found_sinks;
        let later = sinks.iter().filter(|sink| sink.position > 0).count();
        println!(
            "sinks left out: {} over all heads and sequences, {later} of them not at the first position",
            sinks.len()
        );
    }
    println!("wrote {}", args.out.display());
    Ok(())
}
