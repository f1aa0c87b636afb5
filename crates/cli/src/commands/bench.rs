//! `bench`: speed and memory against depth.

use crate::common::{EngineArgs, ExecArgs, Running, run_engine};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::Result;
use eval::bench::{BenchOptions, BenchResult, bench};
use eval::report::bytes;
use model::EngineOptions;
use serde_json::json;

/// Time prefill and decoding at several depths, and report the cache size there. With --base, both models side by side.
///
/// Example:
///   recurformer bench --model healed --base smollm2-135m --depths 512,2048,7900 --threads 2
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// A model to compare with.
    #[arg(long)]
    base: Option<String>,
    /// Tokens in the cache when decoding is timed, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "512,2048")]
    depths: Vec<usize>,
    /// Decode steps per depth; the median counts.
    #[arg(long, default_value_t = 16)]
    decode_steps: usize,
    /// Allow depths beyond the model's context (for speed only).
    #[arg(long)]
    beyond_context: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let exec = args.exec.exec()?;
    let options = BenchOptions {
        depths: args.depths.clone(),
        decode_steps: args.decode_steps,
        ..BenchOptions::default()
    };
    let mut models = Vec::new();
    let mut measure = |running: Running, ui: &mut Ui| -> Result<Vec<BenchResult>> {
        models.push(running.about);
        let mut model = running.engine;
        if args.beyond_context {
            model.context_limit = usize::MAX;
        }
        Ok(bench(&exec, &model, &options, ui)?)
    };
    let defaults = EngineOptions::default();
    let results = measure(args.engine.run(&args.model, defaults, &exec, ui)?, ui)?;
    let base = match &args.base {
        Some(name) => Some(measure(run_engine(name, args.engine.options(defaults), &exec, ui)?, ui)?),
        None => None,
    };
    if args.json {
        let mut value = json!({"model": args.model, "threads": exec.threads(), "isa": exec.isa().name(), "results": results});
        if let (Some(results), Some(name)) = (&base, &args.base) {
            value["base"] = json!({"model": name, "results": results});
        }
        return print_results(&exec, value, models, &[options.seed]);
    }
    println!("{} threads, {}", exec.threads(), exec.isa().name());
    println!(
        "{:>7} {:>14} {:>14} {:>12}{}",
        "depth",
        "prefill tok/s",
        "decode tok/s",
        "cache",
        if base.is_some() { "   base: prefill, decode, cache" } else { "" }
    );
    for (i, r) in results.iter().enumerate() {
        print!(
            "{:>7} {:>14.1} {:>14.1} {:>12}",
            r.depth,
            r.prefill_tok_s,
            r.decode_tok_s,
            bytes(r.cache_bytes)
        );
        if let Some(b) = base.as_ref().map(|b| &b[i]) {
            print!("   {:.1}, {:.1}, {}", b.prefill_tok_s, b.decode_tok_s, bytes(b.cache_bytes));
        }
        println!();
    }
    Ok(())
}
