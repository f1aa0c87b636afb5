//! `heal`: end-to-end training of a hybrid, or all stages from a base model to a healed hybrid.

mod recipe;

use crate::common::{
    DataArgs, Loaded, MomentsArg, TrainExecArgs, check_context, check_output, documents, load, load_weights,
    open, parse_layers, usage,
};
use crate::ui::Ui;
use anyhow::{Result, bail};
use std::path::PathBuf;
use surgery::convert::save_model;
use train::data::{SequenceStream, Split};
use train::heal::{HealOptions, Stage, Trainable, check_base, heal};

/// Train a hybrid end to end, so that it matches its base again.
///
/// `distill` minimises kl-weight × KL(base ‖ hybrid) + ce-weight × next-token loss; `continue` is next-token training only. State is
/// saved every few minutes in `<out>.train`; after an interruption the same command with --resume ends with the same weights.
///
/// With --recipe it starts from the base model alone and runs all stages: analyze, align, plan, convert, heal. What lies between is in
/// `<out>.work`, with a report; --resume continues there. The result's `recipe.json` tells every setting, tokens and minutes.
///
/// Examples:
///   recurformer heal --recipe default --base smollm2-135m --beta 0.75 --out healed
///   recurformer heal --recipe default --base smollm2-135m --elastic 0.5,0.75,0.9 --out elastic
///   recurformer heal --recipe default --base my-model --beta 0.5 --data notes.txt retrieval:context=512 --tokens 400000 --out healed
///   recurformer heal --recipe paper --base smollm2-135m --beta 0.5 --out paper
///   recurformer heal --model hybrid --base smollm2-135m --data english-small --stage distill --tokens 32768 --out healed
///   recurformer heal --model hybrid --base smollm2-135m --data english-small --elastic 0.5,0.75,0.9 --out elastic
///   recurformer heal --model hybrid --base smollm2-135m --data english-mixed retrieval:context=512 --context 512 --out healed
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder of the hybrid, from `convert`.
    #[arg(long, required_unless_present = "recipe")]
    model: Option<String>,
    /// Run all stages from the base model on, with the settings of this recipe; needs --beta or --elastic.
    #[arg(long, value_enum, conflicts_with_all = SET_BY_A_RECIPE)]
    recipe: Option<RecipeArg>,
    /// The base model it was made from.
    #[arg(long)]
    base: String,
    /// Text to train on, as for `align`. With --recipe [default: english-mixed, and retrieval of 256, 512 and 1,024 tokens].
    #[arg(long, num_args = 1.., required_unless_present = "recipe", value_name = "FILE")]
    data: Vec<String>,
    /// Loss.
    #[arg(long, value_enum, default_value_t = StageArg::Distill)]
    stage: StageArg,
    /// Tokens to train on [default: 32768]. With --recipe: tokens of align and heal together, shared out as the recipe does [default:
    /// 1294336].
    #[arg(long)]
    tokens: Option<u64>,
    /// Tokens of a training item: a window of a long document, or several short ones, each a sequence of its own.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Sequences per micro-batch.
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Micro-batches per optimiser step.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// What trains besides the new heads: heads, norms, lora:RANK or all.
    #[arg(long, default_value = "heads", value_parser = parse_trainable)]
    train: Trainable,
    /// With --recipe: share of the KV groups to convert.
    #[arg(long, value_name = "SHARE", conflicts_with = "elastic")]
    beta: Option<f64>,
    /// Train for several budgets at once: betas, comma-separated, the plan's own the largest (a recipe plans for the largest). Each step takes
    /// one of them; the result runs at any lower --beta.
    #[arg(long, value_delimiter = ',', value_name = "BETAS")]
    elastic: Vec<f64>,
    /// Peak learning rate of the new heads.
    #[arg(long)]
    lr: Option<f32>,
    /// Learning rate of the heads' copied q, k and v projections as a multiple of --lr (default: 0.03 beside a window, which reads them too; 0.3
    /// without one).
    #[arg(long)]
    projection_lr_scale: Option<f32>,
    /// Weight of the divergence (distill).
    #[arg(long, default_value_t = 1.0)]
    kl_weight: f32,
    /// Weight of the next-token loss (distill).
    #[arg(long, default_value_t = 0.0)]
    ce_weight: f32,
    /// Of this many layers [of all, without a number] keep the input only and run them again in the backward pass: the same result in less
    /// memory and more time.
    #[arg(long, value_name = "LAYERS", num_args = 0..=1, default_value = "0", default_missing_value = "all", value_parser = parse_layers, hide_default_value = true)]
    checkpoint_activations: usize,
    /// Update every parameter as soon as its gradient is complete and use that gradient's memory again: the same result in less memory, but
    /// without clipping, and a gradient that is not finite ends the run at the state last saved.
    #[arg(long, conflicts_with = "accumulate")]
    optimizer_in_backward: bool,
    /// Largest norm of a step's gradient, beyond which it is scaled down; 0: any [default: 1, and 0 with --optimizer-in-backward].
    #[arg(long)]
    clip: Option<f32>,
    /// What the optimiser's moments are kept in: bf16 (rounded stochastically) saves 4 bytes for each value that trains.
    #[arg(long, value_enum, default_value_t = MomentsArg::F32)]
    moments: MomentsArg,
    /// Seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Continue an interrupted run.
    #[arg(long)]
    resume: bool,
    /// Seconds between training states on disk.
    #[arg(long, default_value_t = 120)]
    save_every: u64,
    /// With --recipe: print what the stages did as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    exec: TrainExecArgs,
}

/// Options of single runs.
const SET_BY_A_RECIPE: [&str; 14] = [
    "model",
    "stage",
    "context",
    "batch",
    "accumulate",
    "train",
    "lr",
    "projection_lr_scale",
    "kl_weight",
    "ce_weight",
    "checkpoint_activations",
    "optimizer_in_backward",
    "clip",
    "moments",
];
const TOKENS: u64 = 32_768;

/// `--recipe`.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum RecipeArg {
    /// Heads of the gated delta rule beside a window of 192 and one sink, aligned, chosen by their own error, then distilled: 1,048,576 + 245,760 tokens.
    Default,
    /// The paper's: fresh Mamba blocks by recency, then all weights trained on next tokens: 1,294,336 tokens.
    Paper,
}

/// `--stage`.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum StageArg {
    /// Match the base's predictions.
    Distill,
    /// Predict the next token (the paper's continual training).
    Continue,
}

fn parse_trainable(text: &str) -> Result<Trainable, String> {
    match text {
        "heads" => Ok(Trainable::Heads),
        "norms" => Ok(Trainable::HeadsAndNorms),
        "all" => Ok(Trainable::All),
        _ => match text.strip_prefix("lora:").map(str::parse) {
            Some(Ok(rank)) if rank > 0 => Ok(Trainable::Lora(rank)),
            _ => Err("expected heads, norms, lora:RANK or all".into()),
        },
    }
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let Some(model) = &args.model else { return recipe::run(args, ui) };
    // clap drops a requirement that conflicts with what is given.
    if args.beta.is_some() || args.json {
        return Err(usage("--beta and --json need --recipe; a hybrid's budget is its plan's"));
    }
    check_output(&args.out, false)?;
    if args.batch == 0 || args.accumulate == 0 {
        return Err(usage("--batch and --accumulate must be at least 1"));
    }
    if let Some(clip) = args.clip.filter(|clip| !(0.0..f32::INFINITY).contains(clip)) {
        return Err(usage(format!("--clip {clip} must be 0 or more")));
    }
    let exec = args.exec.exec()?;
    let mut hybrid = load(model, ui)?;
    let base = open(&args.base, ui)?;
    check_base(&base.config, &hybrid.model.config)?;
    if hybrid.model.plan.converted() == 0 && args.train == Trainable::Heads {
        bail!(
            "{model} has no converted group, so there is no head to train\nhint: run convert first, or choose --train all"
        );
    }
    if hybrid.model.plan.elastic.is_some() && args.elastic.is_empty() {
        ui.say("note: the hybrid is elastic, and trained for its plan's own beta only it will not be any more; --elastic keeps it so");
    }
    check_context(&base.config, args.context)?;
    let documents = documents(&DataArgs { data: args.data.clone() }, Split::Train, &base, &exec, ui)?;
    let mut stream = SequenceStream::new(&documents, args.context, args.seed)?;
    let defaults = HealOptions::default();
    let mut state_dir = args.out.clone().into_os_string();
    state_dir.push(".train");
    let window = hybrid.model.plan.mixer.map_or(0, |mixer| mixer.window);
    let options = HealOptions {
        stage: match args.stage {
            StageArg::Distill => Stage::Distill { kl: args.kl_weight, ce: args.ce_weight },
            StageArg::Continue => Stage::Continue,
        },
        trainable: args.train,
        tokens: args.tokens.unwrap_or(TOKENS),
        batch: args.batch,
        accumulate: args.accumulate,
        lr: args.lr.unwrap_or(defaults.lr),
        projection_lr_scale: args
            .projection_lr_scale
            .unwrap_or(HealOptions::projection_lr_scale_beside(window)),
        elastic: args.elastic.clone(),
        seed: args.seed,
        checkpointed_layers: args.checkpoint_activations,
        optimizer_in_backward: args.optimizer_in_backward,
        clip: args.clip.unwrap_or(HealOptions::default_clip(args.optimizer_in_backward)),
        moments: args.moments.into(),
        state_dir: state_dir.into(),
        resume: args.resume,
        save_every_s: args.save_every,
        ..defaults
    };
    let teacher = match args.stage {
        StageArg::Distill => Some(load_weights(&base, &args.base)?),
        StageArg::Continue => None,
    };
    // What does not train is the base's.
    teacher.iter().for_each(|base| hybrid.model.params.share_equal(&base.params));
    let Loaded { checkpoint, model: mut trained } = hybrid;
    let metrics = heal(&exec, teacher.as_ref(), &mut trained, &mut stream, &options, ui)?;
    save_model(&checkpoint, &trained, &args.out, ui)?;
    if let (Some(first), Some(last)) = (metrics.first(), metrics.last())
        && args.elastic.is_empty()
    {
        println!(
            "loss {:.4} → {:.4} over {} tokens in {} steps",
            first.loss, last.loss, last.tokens, last.step
        );
    }
    // Losses at different budgets do not compare.
    for &beta in trained.plan.elastic.iter().flat_map(|elastic| &elastic.betas) {
        let of: Vec<_> = metrics.iter().filter(|m| m.beta == Some(beta)).collect();
        if let (Some(first), Some(last)) = (of.first(), of.last()) {
            println!("beta {beta}: loss {:.4} → {:.4} in {} steps", first.loss, last.loss, of.len());
        }
    }
    println!(
        "wrote {}; metrics and training state are in {}",
        args.out.display(),
        options.state_dir.display()
    );
    Ok(())
}
