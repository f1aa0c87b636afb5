//! `eval`: perplexity, divergence from a base, choices and last words, long-range tasks.

mod compare;
mod induction;
mod likelihood;
mod pair;
mod tasks;

use crate::common::{DataArgs, EngineArgs, ExecArgs, check_context, documents, run_engine, usage};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::Result;
use clap::Subcommand;
use eval::quality::{Quality, evaluate};
use eval::report::number;
use eval::text::{WindowOptions, windows};
use model::EngineOptions;
use serde_json::{Value, json};
use train::data::Split;

/// Measure a model on held-out text or on long-range tasks, beside its base when one is given, or compare many conversions of one.
///
/// Examples:
///   recurformer eval ppl --model healed --base smollm2-135m --data english-small --context 1024
///   recurformer eval kl --model healed --base smollm2-135m --data book.txt
///   recurformer eval kl --model smollm2-135m --base smollm2-135m --data book.txt --weights q8_0 --chunk 1
///   recurformer eval kl --model elastic --beta 0.5 --base smollm2-135m --data book.txt
///   recurformer eval passkey --model healed --base smollm2-135m --contexts 512,1024,2048
///   recurformer eval hashhop --model healed --base smollm2-135m --hops 1,2 --contexts 512,1024
///   recurformer eval ruler --model healed --base smollm2-135m --tasks niah_single,niah_multikey --contexts 1024
///   recurformer eval compare --model smollm2-135m --heads heads.json --data english-mixed --out compare.jsonl
///   recurformer eval choice --model healed --base smollm2-135m --data arc_easy.jsonl
///   recurformer eval lastword --model healed --base smollm2-135m --data lambada.jsonl
///   recurformer eval induction --model healed --base smollm2-135m --distances 32,128,512
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Perplexity per file and their geometric mean.
    Ppl(TextArgs),
    /// KL(base ‖ model) per token and agreement of the best tokens.
    Kl(TextArgs),
    Passkey(tasks::PasskeyArgs),
    #[command(name = "hashhop")]
    HashHop(tasks::HashHopArgs),
    Ruler(tasks::RulerArgs),
    Compare(compare::CompareArgs),
    Choice(likelihood::ChoiceArgs),
    #[command(name = "lastword")]
    LastWord(likelihood::LastWordArgs),
    Induction(induction::InductionArgs),
}

#[derive(clap::Args)]
struct TextArgs {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// The base model to compare with (required for kl).
    #[arg(long)]
    base: Option<String>,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens per window.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Score only the last S tokens of overlapping windows.
    #[arg(long, value_name = "S")]
    stride: Option<usize>,
    /// Prepend the beginning-of-sequence token to every window.
    #[arg(long)]
    bos: bool,
    /// At most this many tokens of each file.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Tokens that the model reads together; 1 judges the arithmetic of generating, token by token (slow). Default: as prompts are read.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    match &args.what {
        What::Ppl(args) => text(args, false, ui),
        What::Kl(args) => text(args, true, ui),
        What::Passkey(args) => tasks::run_passkey(args, ui),
        What::HashHop(args) => tasks::run_hashhop(args, ui),
        What::Ruler(args) => tasks::run_ruler(args, ui),
        What::Compare(args) => compare::run(args, ui),
        What::Choice(args) => likelihood::run_choice(args, ui),
        What::LastWord(args) => likelihood::run_lastword(args, ui),
        What::Induction(args) => induction::run_induction(args, ui),
    }
}

fn text(args: &TextArgs, divergence: bool, ui: &mut Ui) -> Result<()> {
    if divergence && args.base.is_none() {
        return Err(usage("eval kl needs --base"));
    }
    let exec = args.exec.exec()?;
    let mut model = args.engine.run(&args.model, EngineOptions::EXACT, &exec, ui)?;
    if let Some(chunk) = args.chunk {
        model.engine.chunk = chunk as usize;
    }
    // The reference is exact, whatever types the model runs in.
    let base =
        args.base.as_deref().map(|name| run_engine(name, EngineOptions::EXACT, &exec, ui)).transpose()?;
    let config = &model.engine.config;
    check_context(config, args.context)?;
    let bos = match (args.bos, config.bos_token_id) {
        (false, _) => None,
        (true, Some(id)) => Some(id),
        (true, None) => return Err(usage("--bos: the model names no beginning-of-sequence token")),
    };
    // `self` is text of the base model, and both models are judged on the same.
    let sampled = args.data.data.iter().any(|arg| arg == "self");
    let writer = base.as_ref().filter(|_| sampled).unwrap_or(&model);
    let documents = documents(&args.data, Split::Heldout, &writer.checkpoint, &exec, ui)?;
    let options =
        WindowOptions { context: args.context, stride: args.stride, bos, max_tokens: args.max_tokens };
    let texts = windows(&documents, &options)?;
    let mut models = vec![&model.engine];
    if !divergence {
        models.extend(base.as_ref().map(|b| &b.engine));
    }
    let reference = base.as_ref().map(|b| &b.engine);
    let results = evaluate(&exec, reference, &models, &texts, ui)?;
    if args.json {
        let mut value: Value = serde_json::to_value(&results[0])?;
        if let Some(other) = results.get(1) {
            value["base"] = serde_json::to_value(other)?;
        }
        value["context"] = json!(args.context);
        let models = [Some(&model), base.as_ref()].into_iter().flatten().map(|m| m.about.clone());
        return print_results(&exec, value, models.collect(), &[]);
    }
    table(&results, divergence);
    Ok(())
}

fn table(results: &[Quality], divergence: bool) {
    let own = &results[0];
    let base = results.get(1);
    let columns = |ppl: f64, kl: Option<f64>, agree: Option<f64>| -> String {
        let kl = kl.map_or(String::new(), |kl| format!(" {kl:>9.4}"));
        let agree = agree.map_or(String::new(), |a| format!(" {:>9.1} %", 100.0 * a));
        format!("{:>10}{kl}{agree}", number(ppl))
    };
    let compared = own.overall.kl.is_some();
    println!(
        "{:<28} {:>8} {:>10}{}{}",
        "file",
        "tokens",
        "ppl",
        if compared { "        KL      top-1" } else { "" },
        if base.is_some() { "    base ppl" } else { "" }
    );
    for (i, file) in own.files.iter().enumerate() {
        let beside = base.map_or(String::new(), |b| format!(" {:>11}", number(b.files[i].ppl)));
        println!(
            "{:<28} {:>8} {}{beside}",
            file.name,
            file.tokens,
            columns(file.ppl, file.kl, file.top1_agreement)
        );
    }
    let overall = &own.overall;
    let beside = base.map_or(String::new(), |b| format!(" {:>11}", number(b.overall.ppl)));
    let label = if divergence { "all" } else { "all (geometric mean)" };
    println!(
        "{label:<28} {:>8} {}{beside}",
        overall.tokens,
        columns(overall.ppl, overall.kl, overall.top1_agreement)
    );
}
