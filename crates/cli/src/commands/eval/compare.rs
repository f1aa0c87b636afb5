//! `eval compare`: criteria, budgets and baselines judged on the same text and prompts.

use crate::common::{DataArgs, ExecArgs, TypeArgs, check_context, check_output, documents, load, usage};
use crate::run::{print_results, run_info};
use crate::ui::Ui;
use anyhow::{Context, Result};
use eval::compare::{
    CompareOptions, Hybrid, Inputs, Method, ResultsFile, Settings, available_criteria, compare, markdown, svg,
};
use eval::report::Report;
use eval::run::RunInfo;
use eval::text::{WindowOptions, windows};
use model::plan::PlanModel;
use model::{EngineOptions, Model};
use std::path::{Path, PathBuf};
use surgery::{HeadBank, HeadsReport, criteria};
use train::data::Split;

/// Criteria, budgets and training-free baselines on the same held-out text and prompts: perplexity ratio, KL and agreement with the base (with
/// 95 % intervals of a bootstrap over windows), passkeys (with Wilson's), and cache bytes.
///
/// Everything is converted in memory. Each finished configuration is a line of --out, and the same command goes on after an interruption; with more criteria, methods or
/// budgets it measures what is missing.
///
/// Example:
///   recurformer eval compare --model smollm2-135m --heads heads.json --bank bank.safetensors --data english-mixed \
///     --betas 0.25,0.5,0.75 --max-tokens 2048 --out compare.jsonl --html compare.html
///   recurformer eval compare --model smollm2-135m --heads heads.json --bank bank.safetensors --criteria mixer-fisher,kl-fisher \
///     --hybrids healed=elastic --betas 0.5,0.75,0.9 --data english-mixed --weights bf16 --out compare.jsonl
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct CompareArgs {
    /// Folder, GGUF file, hub id or built-in name of the base.
    #[arg(long)]
    model: String,
    /// heads.json from `analyze`.
    #[arg(long)]
    heads: PathBuf,
    /// Head bank from `align` for the method bank and the criterion mixer-fisher; baselines without a choice then get its cache bytes.
    #[arg(long)]
    bank: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// What stands in the chosen groups, comma-separated: window (training-free), window-averaged (the same, what it drops averaged to one
    /// token), bank (trained heads), duo-attention (64 sinks, the last 256 tokens); and within the cache of the
    /// budget at --context: streaming-llm (a window in every group), skipped-layers (layers that change the residual stream least are left out). Default: all that --bank and heads.json allow.
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(Method::ALL.map(Method::name)))]
    methods: Vec<String>,
    /// Finished hybrids to judge beside them, NAME=FOLDER or a folder: at each of --betas one from `heal --elastic` was healed for, others at
    /// their own.
    #[arg(long, num_args = 1.., value_name = "NAME=FOLDER")]
    hybrids: Vec<String>,
    /// How groups are chosen, comma-separated (default: everything that heads.json and the bank hold scores of).
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(criteria::NAMES))]
    criteria: Vec<String>,
    /// Shares of KV groups to convert, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "0.25,0.5,0.75")]
    betas: Vec<f64>,
    /// Window of the method window.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Its sinks.
    #[arg(long, default_value_t = 1)]
    sinks: usize,
    /// How often `random` is drawn.
    #[arg(long, default_value_t = 1)]
    draws: u64,
    /// Tokens per window of text.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// At most this many tokens of each file.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Contexts of the passkey test, comma-separated (default: --context).
    #[arg(long, value_delimiter = ',')]
    passkey_contexts: Vec<usize>,
    /// Passkeys per context; 0 leaves the test out.
    #[arg(long, default_value_t = 12)]
    samples: usize,
    /// Seed of passkeys, of the first `random`, and of the bootstrap.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The results, JSON lines; begun, or gone on with.
    #[arg(long)]
    out: PathBuf,
    /// Also write a page with charts and tables; `report` makes one of --out and of other results.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Also write the chart, KL against cache bytes.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    types: TypeArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

/// `eval compare`.
pub fn run(args: &CompareArgs, ui: &mut Ui) -> Result<()> {
    let outputs = [Some(&args.out), args.html.as_ref(), args.svg.as_ref()];
    outputs.into_iter().flatten().try_for_each(|path| check_output(path, true))?;
    let exec = args.exec.exec()?;
    let heads = HeadsReport::read(&args.heads)?;
    let base = load(&args.model, ui)?;
    let config = &base.model.config;
    check_context(config, args.context)?;
    if PlanModel::of(config) != heads.model {
        return Err(usage(format!("{} describes another model than {}", args.heads.display(), args.model)));
    }
    let bank = args.bank.as_ref().map(|path| HeadBank::read(path, config)).transpose()?;
    let passkey_contexts = match &*args.passkey_contexts {
        [] => vec![args.context],
        contexts => contexts.to_vec(),
    };
    if args.samples > 0 {
        passkey_contexts.iter().try_for_each(|&context| check_context(config, context))?;
    }
    let hybrids = args.hybrids(&base.model)?;
    let documents = documents(&args.data, Split::Heldout, &base.checkpoint, &exec, ui)?;
    let cut = WindowOptions { context: args.context, stride: None, bos: None, max_tokens: args.max_tokens };
    let texts = windows(&documents, &cut)?;
    let tokenizer = if args.samples > 0 { Some(base.tokenizer()?) } else { None };
    let engine = args.types.options(EngineOptions::EXACT);
    let settings = Settings {
        model: heads.model.clone(),
        weights: format!(
            "{}, cache {}",
            engine.weights.map_or("stored", |dtype| dtype.name()),
            engine.kv_type.name()
        ),
        text_sha256: Settings::text_sha256(&texts),
        heads_sha256: Settings::heads_sha256(&heads),
        bank_sha256: Settings::bank_sha256(bank.as_ref()),
        context: args.context,
        window: args.window,
        sinks: args.sinks,
        passkey_contexts,
        passkey_samples: args.samples,
        seed: args.seed,
    };
    let inputs = Inputs {
        model: &base.model,
        tokenizer: tokenizer.as_ref(),
        texts: &texts,
        heads: &heads,
        bank: bank.as_ref(),
        hybrids: &hybrids,
        engine,
    };
    let options = CompareOptions {
        methods: args.methods(&heads),
        criteria: match &*args.criteria {
            [] => available_criteria(&heads, bank.as_ref()),
            criteria => criteria.to_vec(),
        },
        betas: args.betas.clone(),
        random_draws: args.draws,
    };
    let mut file = ResultsFile::open(&args.out, settings)?;
    let comparison = compare(&exec, &inputs, &options, &mut file, ui)?;
    let run = RunInfo { seeds: vec![args.seed], ..run_info(&exec) };
    if let Some(path) = &args.html {
        Report::of_conversions(&comparison, args.out.display().to_string(), run).write_html(path)?;
    }
    if let Some(path) = &args.svg {
        weights::files::atomic_write(path, svg(&comparison).as_bytes())?;
    }
    if args.json {
        return print_results(&exec, serde_json::to_value(&comparison)?, Vec::new(), &[args.seed]);
    }
    print!("{}", markdown(&comparison));
    Ok(())
}

impl CompareArgs {
    fn hybrids(&self, base: &Model) -> Result<Vec<Hybrid>> {
        let open = |arg: &String| {
            let (name, path) = match arg.split_once('=') {
                Some((name, path)) if !name.is_empty() => (name, Path::new(path)),
                _ => (arg.as_str(), Path::new(arg)),
            };
            Hybrid::open(name, path, base).with_context(|| format!("opening {}", path.display()))
        };
        self.hybrids.iter().map(open).collect()
    }

    fn methods(&self, heads: &HeadsReport) -> Vec<Method> {
        let wanted = |method: &Method| match &*self.methods {
            [] => match method {
                Method::Bank => self.bank.is_some(),
                Method::SkippedLayers => heads.similarity().is_some(),
                _ => true,
            },
            names => names.iter().any(|name| name == method.name()),
        };
        Method::ALL.into_iter().filter(wanted).collect()
    }
}
