//! `bench-train`: speed of training steps.

use crate::common::{MixerArg, MomentsArg, TrainExecArgs, check_context, load, parse_layers, usage};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::Result;
use kernels::Exec;
use model::{MixerSpec, Model, Progress};
use serde_json::json;
use surgery::HeadBank;
use surgery::bank::init_bank;
use surgery::convert::convert_in_memory;
use surgery::criteria;
use surgery::select::{SelectOptions, select};
use surgery::stats::{AnalyzeOptions, analyze};
use train::TrainError;
use train::align::AlignOptions;
use train::bench::{Contestant, StepKind, StepShape, StepSpeed, random_tokens, time_steps};
use train::recipe::DEFAULT;

/// Tokens that the starting values of the timed heads are measured on.
const ANALYZED: usize = 512;

/// Time training steps on random tokens: every weight (`full`), the new heads of a hybrid against its base (`distill`),
/// replacement heads of all groups (`align`). Nothing is written.
///
/// Examples:
///   recurformer bench-train --model smollm2-135m --steps full,align --batch 2 --context 512
///   yes | head -4 | recurformer bench-train --model smollm2-135m --steps align --paced
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name of a base model.
    #[arg(long)]
    model: String,
    /// Kinds of steps, comma-separated.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "full,distill,align")]
    steps: Vec<StepArg>,
    /// Sequences per step.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Steps of each kind, after one that warms up; the median counts.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Share of the groups that are converted for `distill`.
    #[arg(long, default_value_t = 0.75)]
    beta: f64,
    /// Recurrent mixer.
    #[arg(long, value_enum, default_value_t = MixerArg::GatedDelta)]
    mixer: MixerArg,
    /// Tokens of the mixers' window.
    #[arg(long, default_value_t = DEFAULT.mixer.window)]
    window: usize,
    /// For `align`, as there: 0 freezes the copied projections.
    #[arg(long)]
    projection_lr_scale: Option<f32>,
    /// Of this many layers [of all, without a number] keep the input only and run them again in the backward pass: less memory, more time. Not
    /// for `align`, which has no backward pass through layers.
    #[arg(long, value_name = "LAYERS", num_args = 0..=1, default_value = "0", default_missing_value = "all", value_parser = parse_layers, hide_default_value = true)]
    checkpoint_activations: usize,
    /// Update every parameter as soon as its gradient is complete, without clipping, and use that gradient's memory again: less memory.
    /// Not for `align`.
    #[arg(long)]
    optimizer_in_backward: bool,
    /// What the optimiser's moments are kept in; those of `align` are in f32.
    #[arg(long, value_enum, default_value_t = MomentsArg::F32)]
    moments: MomentsArg,
    /// Of one kind, take a step for every line on standard input and answer it with the step's seconds, until the input ends: for taking turns with
    /// another program, so that both meet the same moods of the machine.
    #[arg(long, conflicts_with_all = ["repeats", "json"])]
    paced: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    exec: TrainExecArgs,
}

/// `--steps`.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum StepArg {
    Full,
    Distill,
    Align,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if !(0.0..=1.0).contains(&args.beta) {
        return Err(usage(format!("--beta {} must be between 0 and 1", args.beta)));
    }
    if args.paced && args.steps.len() != 1 {
        return Err(usage("--paced times one kind of step: name it with --steps"));
    }
    let exec = args.exec.exec()?;
    let base = load(&args.model, ui)?.model;
    check_context(&base.config, args.context)?;
    let shape = StepShape {
        sequences: args.batch as usize,
        seq_len: args.context,
        checkpointed_layers: args.checkpoint_activations,
        optimizer_in_backward: args.optimizer_in_backward,
        moments: args.moments.into(),
    };
    let spec = args.mixer.trained_spec(&base.config, args.window, None, None)?;
    let time = |contestant: Contestant<'_>, ui: &mut Ui| -> train::Result<Option<StepSpeed>> {
        let kind = contestant.kind();
        if args.paced {
            return time_steps(&exec, contestant, shape, &mut on_request).map(|_| None);
        }
        let seconds = time_steps(&exec, contestant, shape, &mut counted(kind, args.repeats, ui))?;
        ui.finish();
        StepSpeed::of(kind, shape, seconds).map(Some)
    };
    let projection_lr_scale =
        args.projection_lr_scale.unwrap_or(AlignOptions::projection_lr_scale_beside(spec.window));
    let mut timed = Vec::with_capacity(args.steps.len());
    // Replacements are made when a step asks for them only, and training every weight comes last, in the base's own memory.
    if args.steps.iter().any(|&step| step != StepArg::Full) {
        let (bank, hybrid) = replacements(args, &exec, &base, spec, ui)?;
        for (place, &step) in args.steps.iter().enumerate() {
            let contestant = match step {
                StepArg::Full => continue,
                StepArg::Distill => Contestant::Distill(&hybrid, &base),
                StepArg::Align => Contestant::Align(&bank, &base, projection_lr_scale),
            };
            timed.push((place, time(contestant, ui)?));
        }
    }
    let full: Vec<usize> =
        (0..args.steps.len()).filter(|&place| args.steps[place] == StepArg::Full).collect();
    // The last one gets the base itself.
    let models = std::iter::repeat_n(base, full.len());
    for (place, model) in full.into_iter().zip(models) {
        timed.push((place, time(Contestant::Full(Box::new(model)), ui)?));
    }
    if args.paced {
        return Ok(());
    }
    timed.sort_by_key(|&(place, _)| place);
    let speeds: Vec<_> = timed.into_iter().filter_map(|(_, speed)| speed).collect();
    let precision = format!("{:?}", exec.precision()).to_lowercase();
    if args.json {
        let found = json!({
            "model": args.model, "threads": exec.threads(), "isa": exec.isa().name(), "precision": precision, "beta": args.beta,
            "mixer": spec, "results": speeds,
        });
        return print_results(&exec, found, Vec::new(), &[]);
    }
    println!("{} threads, {}, {precision}", exec.threads(), exec.isa().name());
    println!("{:<8} {:>10} {:>10}", "step", "batch", "tokens/s");
    for speed in &speeds {
        let name = format!("{:?}", speed.step).to_lowercase();
        let batch = format!("{} x {}", speed.sequences, speed.seq_len);
        println!("{name:<8} {batch:>10} {:>10.1}", speed.tokens_per_s);
    }
    Ok(())
}

/// A step for every line of standard input; answers each with its seconds.
fn on_request(seconds: Option<f64>) -> train::Result<bool> {
    if let Some(seconds) = seconds {
        println!("{seconds}");
    }
    let asked = std::io::stdin().read_line(&mut String::new());
    let unreadable =
        |e: std::io::Error| TrainError::File { path: "standard input".into(), reason: e.to_string() };
    Ok(asked.map_err(unreadable)? > 0)
}

/// One step that warms up and `repeats` more, under a progress bar.
fn counted(kind: StepKind, repeats: u32, ui: &mut Ui) -> impl FnMut(Option<f64>) -> train::Result<bool> {
    let mut left = u64::from(repeats) + 1;
    ui.start(&format!("{kind:?} steps").to_lowercase(), left, "steps");
    move |seconds| {
        if ui.cancelled() {
            return Err(TrainError::Interrupted);
        }
        if seconds.is_some() {
            ui.advance(1, "");
            left -= 1;
        }
        Ok(left > 0)
    }
}

/// Fresh heads of all groups, and the hybrid with some of them.
fn replacements(
    args: &Args,
    exec: &Exec,
    base: &Model,
    spec: MixerSpec,
    ui: &mut Ui,
) -> Result<(HeadBank, Model)> {
    let sequence = random_tokens(&base.config, ANALYZED.min(base.config.max_context), 0);
    let heads = analyze(exec, base, &[sequence], &AnalyzeOptions::default(), ui)?;
    let bank = init_bank(base, spec, &heads, 0)?;
    let options = SelectOptions {
        beta: args.beta,
        keep_at_least_per_layer: 0,
        mixer: spec,
        criterion: model::plan::PlanCriterion {
            name: "random".into(),
            tokens: heads.tokens,
            bank_sha256: None,
            data_sha256: None,
            seed: Some(0),
        },
    };
    let plan = select(&base.config, &criteria::scores("random", &heads, None, 0)?, &options)?;
    let hybrid = convert_in_memory(base, &plan, Some(&bank), Some(&heads), 0)?;
    Ok((bank, hybrid))
}
