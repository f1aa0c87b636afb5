//! `align`: trains the head bank.

use crate::common::{
    DataArgs, DroppedArg, MixerArg, TrainExecArgs, check_context, check_output, documents, load, usage,
};
use crate::ui::Ui;
use anyhow::Result;
use eval::report::number;
use std::path::PathBuf;
use surgery::{HeadBank, HeadsReport, bank::init_bank};
use train::align::{AlignOptions, align};
use train::data::{self, SequenceStream, Split, sequences};
use train::recipe::DEFAULT;

/// Train a replacement head for every KV group, layer by layer, from the model's own inputs and outputs.
///
/// The bank does not depend on a budget: plans of any beta are made from it. An existing bank is extended with --extend; an
/// interrupted run goes on with --resume.
///
/// Examples:
///   recurformer align --model smollm2-135m --heads heads.json --data english-small --tokens 65536 --out bank.safetensors
///   recurformer align --model smollm2-135m --heads heads.json --data english-small --mixer mamba2 --window 64 --out bank.safetensors
///   recurformer align --model smollm2-135m --heads heads.json --data english-mixed retrieval:context=512 hashhop:context=512 \
///     --tokens 262144 --context 512 --out bank.safetensors
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// heads.json of the same model: mean distances set the starting decays.
    #[arg(long)]
    heads: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens to train on in this run.
    #[arg(long, default_value_t = 65_536)]
    tokens: u64,
    /// Tokens of a training item: a window of a long document, or several short ones, each a sequence of its own.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Recurrent part of the replacement.
    #[arg(long, value_enum, default_value_t = MixerArg::GatedDelta)]
    mixer: MixerArg,
    /// Tokens of the local attention window beside it; 0: none.
    #[arg(long, default_value_t = DEFAULT.mixer.window)]
    window: usize,
    /// First tokens the window always sees (default: 1 with a window).
    #[arg(long)]
    sinks: Option<usize>,
    /// What becomes of tokens behind the window (default: weighed where the mixer can, else forgotten).
    #[arg(long, value_enum)]
    dropped: Option<DroppedArg>,
    /// Tokens per optimiser step.
    #[arg(long, default_value_t = 1024)]
    tokens_per_step: usize,
    /// Peak learning rate.
    #[arg(long)]
    lr: Option<f32>,
    /// Learning rate of the copied q, k and v projections as a multiple of --lr (default: 0.05 beside a window, which reads them too; 0.5 without one; 0 freezes
    /// them, which takes less time and memory).
    #[arg(long)]
    projection_lr_scale: Option<f32>,
    /// Held-out tokens for the error, and again as many for mixer-fisher.
    #[arg(long, default_value_t = 4096)]
    measure_tokens: usize,
    /// Seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The bank to write.
    #[arg(long)]
    out: PathBuf,
    /// Continue an interrupted run.
    #[arg(long)]
    resume: bool,
    /// Seconds between training states on disk.
    #[arg(long, default_value_t = 120)]
    save_every: u64,
    /// Train the existing bank at --out on more tokens; with --resume, continue such a run.
    #[arg(long)]
    extend: bool,
    /// JSONL file for the metrics.
    #[arg(long)]
    metrics: Option<PathBuf>,
    #[command(flatten)]
    exec: TrainExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if args.mixer == MixerArg::None {
        return Err(usage("mixer `none` has nothing to train; use `plan` without a bank"));
    }
    check_output(&args.out, args.resume || args.extend)?;
    let exec = args.exec.exec()?;
    let loaded = load(&args.model, ui)?;
    let config = &loaded.model.config;
    check_context(config, args.context)?;
    let spec = args.mixer.trained_spec(config, args.window, args.sinks, args.dropped)?;
    let heads = HeadsReport::read(&args.heads)?;
    let (train, heldout) =
        data::split_pair(documents(&args.data, Split::Train, &loaded.checkpoint, &exec, ui)?);
    let measure_context = args.context.max(512).min(config.max_context);
    let bank = if args.extend {
        HeadBank::read(&args.out, config)?
    } else {
        init_bank(&loaded.model, spec, &heads, args.seed)?
    };
    let spec = bank.info.spec;
    if spec.is_exact_over(args.context) {
        return Err(usage(format!(
            "window and sinks ({} + {} tokens) show all of --context {}: there is nothing to learn\nhint: take a longer context or a smaller --window",
            spec.window, spec.sinks, args.context
        )));
    }
    let options = AlignOptions {
        tokens: args.tokens,
        tokens_per_step: args.tokens_per_step,
        lr: args.lr.unwrap_or(AlignOptions::default().lr),
        projection_lr_scale: args
            .projection_lr_scale
            .unwrap_or(AlignOptions::projection_lr_scale_beside(spec.window)),
        heldout: sequences(&heldout, measure_context, args.measure_tokens, args.seed)?,
        fisher: sequences(&train, measure_context, args.measure_tokens, args.seed ^ 1)?,
        out: args.out.clone(),
        resume: args.resume,
        save_every_s: args.save_every,
        metrics: args.metrics.clone(),
        ..AlignOptions::default()
    };
    let mut stream = SequenceStream::new(&train, args.context, args.seed)?;
    let bank = align(&exec, &loaded.model, bank, &mut stream, &options, ui)?;
    println!("layer  held-out relative error per group   mixer-fisher cost per group");
    for (layer, (errors, costs)) in bank.info.heldout_error.iter().zip(&bank.info.mixer_fisher).enumerate() {
        let join = |v: &[f64]| v.iter().map(|&x| number(x)).collect::<Vec<_>>().join("  ");
        println!(
            "{layer:>5}  {:<34}  {}",
            join(errors),
            costs.iter().map(|c| format!("{c:.2e}")).collect::<Vec<_>>().join("  ")
        );
    }
    let all: Vec<f64> = bank.info.heldout_error.iter().flatten().copied().collect();
    println!(
        "mean held-out relative error {} after {} tokens",
        number(all.iter().sum::<f64>() / all.len() as f64),
        bank.info.tokens
    );
    println!("wrote {}", args.out.display());
    Ok(())
}
