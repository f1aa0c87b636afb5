//! `eval passkey`, `eval hashhop`, `eval ruler`: generated tasks, model and base in one run.

use super::pair::{Measured, PairArgs};
use crate::common::check_context;
use crate::ui::Ui;
use anyhow::Result;
use eval::hashhop::{HashHopTest, hashhop};
use eval::passkey::{PasskeyOptions, passkey};
use eval::ruler::{RulerTest, ruler};
use kernels::Exec;
use model::Engine;
use serde::Serialize;
use serde_json::json;
use tasks::hashhop::Answering;
use tasks::ruler::RulerTask;
use weights::Tokenizer;

/// Which models, at which contexts.
#[derive(clap::Args)]
struct ModelArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// Context lengths in tokens, prompt and answer together, comma-separated.
    #[arg(long, visible_alias = "context", value_delimiter = ',', default_value = "512,1024,2048")]
    contexts: Vec<usize>,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A number hidden in noise, asked for at the end.
///
/// Example:
///   recurformer eval passkey --model healed --base smollm2-135m --contexts 512,1024,2048
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct PasskeyArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Prompts per context.
    #[arg(long, default_value_t = 12)]
    samples: usize,
}

/// HashHop: chains of random strings (`k = v`), asked from start to end. Exact match of the greedy answer.
///
/// Examples:
///   recurformer eval hashhop --model healed --base smollm2-135m --hops 1,2 --contexts 512,1024,2048
///   recurformer eval hashhop --model healed --hops 2 --cot true --hash-length 8 --samples 64 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct HashHopArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Pairs between key and value asked for, comma-separated, 1 to 16.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    hops: Vec<usize>,
    /// Letters per string, 1 to 64.
    #[arg(long, default_value_t = 6)]
    hash_length: usize,
    /// Ask for the whole chain instead of its end; the end is what counts.
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = false)]
    cot: bool,
    /// Queries per hops and context.
    #[arg(long, default_value_t = 64)]
    samples: usize,
    /// Queries asked of one prompt, which is read once for them.
    #[arg(long, default_value_t = 8)]
    queries: usize,
}

/// Tasks of RULER: needles in noise, variable tracking, frequent words. Recall of the answers in the greedy text.
///
/// A prompt leaves room for its answer (128 tokens for needles), so contexts below 512 hold little.
///
/// Examples:
///   recurformer eval ruler --model healed --base smollm2-135m --contexts 512,1024,2048
///   recurformer eval ruler --model healed --tasks niah_single,variable_tracking --contexts 4096 --samples 50 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct RulerArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Tasks, comma-separated.
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(RulerTask::ALL.map(RulerTask::name)),
        default_values = RulerTask::ALL.map(RulerTask::name)
    )]
    tasks: Vec<String>,
    /// Prompts per task and context.
    #[arg(long, default_value_t = 20)]
    samples: usize,
}

impl ModelArgs {
    /// Measures the model and then the base, each loaded in its turn.
    fn measure<T>(
        &self,
        ui: &mut Ui,
        mut run: impl FnMut(&Exec, &Engine, &Tokenizer, &mut Ui) -> eval::Result<T>,
    ) -> Result<Measured<T>> {
        self.pair.measure(ui, |exec, running, ui| {
            for &context in &self.contexts {
                check_context(&running.engine.config, context)?;
            }
            Ok(run(exec, &running.engine, &running.tokenizer()?, ui)?)
        })
    }

    /// Prints results as JSON when asked to; says whether it did.
    fn printed<T: Serialize>(&self, measured: &Measured<T>) -> Result<bool> {
        self.pair.printed(measured, json!({"seed": self.seed}), &[self.seed])
    }
}

/// `eval passkey`.
pub fn run_passkey(args: &PasskeyArgs, ui: &mut Ui) -> Result<()> {
    let models = &args.models;
    let options =
        PasskeyOptions { contexts: models.contexts.clone(), samples: args.samples, seed: models.seed };
    let measured =
        models.measure(ui, |exec, model, tokenizer, ui| passkey(exec, model, tokenizer, &options, ui))?;
    if models.printed(&measured)? {
        return Ok(());
    }
    let Measured { results, base, .. } = measured;
    println!("{:>8} {:>10}{}", "context", "correct", if base.is_some() { "       base" } else { "" });
    for (i, r) in results.iter().enumerate() {
        let beside =
            base.as_ref().map_or(String::new(), |b| format!(" {:>7}/{}", b[i].correct, b[i].samples));
        println!("{:>8} {:>7}/{}{beside}", r.context, r.correct, r.samples);
    }
    Ok(())
}

/// `eval hashhop`.
pub fn run_hashhop(args: &HashHopArgs, ui: &mut Ui) -> Result<()> {
    let models = &args.models;
    let test = HashHopTest {
        hops: args.hops.clone(),
        contexts: models.contexts.clone(),
        hash_length: args.hash_length,
        answering: if args.cot { Answering::ChainOfThought } else { Answering::Direct },
        samples: args.samples,
        queries_per_prompt: args.queries,
        seed: models.seed,
    };
    let measured =
        models.measure(ui, |exec, model, tokenizer, ui| hashhop(exec, model, tokenizer, &test, ui))?;
    if models.printed(&measured)? {
        return Ok(());
    }
    let Measured { results, base, .. } = measured;
    header("hops", base.is_some());
    for (i, r) in results.iter().enumerate() {
        row(&r.hops.to_string(), r.context, r.score, base.as_ref().map(|b| b[i].score));
    }
    Ok(())
}

/// `eval ruler`.
pub fn run_ruler(args: &RulerArgs, ui: &mut Ui) -> Result<()> {
    let models = &args.models;
    let tasks = args.tasks.iter().filter_map(|name| RulerTask::ALL.into_iter().find(|t| t.name() == name));
    let test = RulerTest {
        tasks: tasks.collect(),
        contexts: models.contexts.clone(),
        samples: args.samples,
        seed: models.seed,
    };
    let measured =
        models.measure(ui, |exec, model, tokenizer, ui| ruler(exec, model, tokenizer, &test, ui))?;
    if models.printed(&measured)? {
        return Ok(());
    }
    let Measured { results, base, .. } = measured;
    header("task", base.is_some());
    for (i, r) in results.iter().enumerate() {
        row(&r.task, r.context, r.score, base.as_ref().map(|b| b[i].score));
    }
    Ok(())
}

/// The first line of a table of scores.
fn header(task: &str, base: bool) {
    let beside = if base { format!(" {:>27}", "base") } else { String::new() };
    println!("{task:<24} {:>8} {:>27}{beside}", "context", "correct (95 %)");
}

fn row(task: &str, context: usize, score: eval::answers::Score, base: Option<eval::answers::Score>) {
    let beside = base.map_or(String::new(), |score| format!(" {score:>27}"));
    println!("{task:<24} {context:>8} {score:>27}{beside}");
}
