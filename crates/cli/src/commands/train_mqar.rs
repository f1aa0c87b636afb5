//! `train-mqar`: small models trained from scratch on associative recall.

use crate::common::{TrainExecArgs, usage};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::Result;
use eval::answers::Score;
use serde_json::{Value, json};
use std::path::PathBuf;
use tasks::mqar::Filler;
use train::mqar::{Mixing, MqarCell, MqarOutcome, MqarTraining, train_mqar};

/// Train small models from scratch on MQAR, multi-query associative recall: attention, a recurrence with a small state, and both.
///
/// Sequences are `k1 v1 k2 v2 …` and then the keys again among random tokens; at each the model is to name its value. Two layers; heads of --head-dim
/// values, in a hybrid the first half of each layer's recurrent (mamba2 without a window). Training ends when a check is solved, or after --steps. This is no
/// `eval`: nothing is read, every model is made here, so that it shows what the mixers can do and not what a checkpoint has learnt.
///
/// Every cell saves its state and result in --out; after an interruption the same command with --resume ends with the same numbers.
///
/// Examples:
///   recurformer train-mqar --out mqar
///   recurformer train-mqar --sizes 512:64 --widths 64,128 --models attention,hybrid --out mqar
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Tokens and pairs of a sequence, T:K, comma-separated; the usual sweep is 64:4,128:8,256:16,512:64; by default a size that all
    /// three solve and one with more pairs than the recurrence can hold.
    #[arg(long, value_delimiter = ',', default_value = "64:4,128:32", value_parser = parse_size)]
    sizes: Vec<(usize, usize)>,
    /// Widths of the models, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "64")]
    widths: Vec<usize>,
    /// What mixes tokens, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(Mixing::ALL.map(Mixing::name)),
        default_values = Mixing::ALL.map(Mixing::name)
    )]
    models: Vec<String>,
    /// Values per head; a recurrent head's state has its square.
    #[arg(long, default_value_t = MqarTraining::default().head_dim)]
    head_dim: usize,
    /// Optimiser steps at most.
    #[arg(long, default_value_t = MqarTraining::default().steps)]
    steps: u64,
    /// Tokens of a step.
    #[arg(long, default_value_t = MqarTraining::default().batch_tokens)]
    batch_tokens: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = MqarTraining::default().lr)]
    lr: f32,
    /// Token ids, half of them keys, half values.
    #[arg(long, default_value_t = MqarTraining::default().vocab)]
    vocab: usize,
    /// Put token 0 instead of random tokens between the keys that are asked for.
    #[arg(long)]
    zeros: bool,
    /// Share of a check's queries that ends training early.
    #[arg(long, default_value_t = MqarTraining::default().solved)]
    solved: f64,
    /// Queries of the test, at least.
    #[arg(long, default_value_t = MqarTraining::default().test_queries)]
    test_queries: usize,
    /// Seed of weights and sequences.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder of states and results.
    #[arg(long)]
    out: PathBuf,
    /// Continue an interrupted run; finished cells are kept.
    #[arg(long)]
    resume: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    exec: TrainExecArgs,
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once(':').and_then(|(t, k)| Some((t.parse().ok()?, k.parse().ok()?)));
    parts.ok_or_else(|| "expected TOKENS:PAIRS, such as 64:4".into())
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let training = MqarTraining {
        vocab: args.vocab,
        filler: if args.zeros { Filler::Zeros } else { Filler::Random },
        head_dim: args.head_dim,
        steps: args.steps,
        batch_tokens: args.batch_tokens,
        lr: args.lr,
        solved: args.solved,
        test_queries: args.test_queries,
        seed: args.seed,
        dir: args.out.clone(),
        resume: args.resume,
        ..MqarTraining::default()
    };
    let mut cells = Vec::new();
    for &(length, pairs) in &args.sizes {
        for &width in &args.widths {
            let mixings = Mixing::ALL.into_iter().filter(|m| args.models.iter().any(|name| name == m.name()));
            cells.extend(mixings.map(|mixing| MqarCell { mixing, length, pairs, width }));
        }
    }
    // All of them before the first takes minutes.
    for cell in &cells {
        cell.check(&training).map_err(|error| usage(format!("{}: {error}", cell.name())))?;
    }
    let exec = args.exec.exec()?;
    let mut outcomes = Vec::with_capacity(cells.len());
    for cell in &cells {
        let outcome = train_mqar(&exec, cell, &training, ui)?;
        let score = Score::new(outcome.correct, outcome.asked);
        ui.say(&format!("{}: {score} after {} steps, {:.0} s", cell.name(), outcome.steps, outcome.seconds));
        outcomes.push((outcome, score));
    }
    if args.json {
        let rows = outcomes.iter().map(|(outcome, score)| row_json(outcome, *score));
        let found = json!({
            "results": rows.collect::<Result<Vec<_>>>()?, "seed": args.seed, "vocab": args.vocab, "head_dim": args.head_dim,
        });
        return print_results(&exec, found, Vec::new(), &[args.seed]);
    }
    println!(
        "{:>6} {:>5} {:>6} {:<10} {:>28} {:>6} {:>9} {:>9} {:>8}",
        "tokens", "pairs", "width", "model", "answers (95 %)", "steps", "sequences", "cache KiB", "seconds"
    );
    for (MqarOutcome { cell, cache_bytes, steps, sequences, seconds, .. }, score) in &outcomes {
        let MqarCell { mixing, length, pairs, width } = cell;
        let cache = *cache_bytes as f64 / 1024.0;
        println!(
            "{length:>6} {pairs:>5} {width:>6} {:<10} {score:>28} {steps:>6} {sequences:>9} {cache:>9.1} {seconds:>8.0}",
            mixing.name()
        );
    }
    Ok(())
}

fn row_json(outcome: &MqarOutcome, score: Score) -> Result<Value> {
    let mut row = serde_json::to_value(outcome)?;
    (row["low"], row["high"]) = (json!(score.low), json!(score.high));
    Ok(row)
}
