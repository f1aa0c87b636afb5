//! `quickstart`: the whole pipeline in one command, ending with a table and a report.

mod setup;

use crate::common::{Loaded, MixerArg, TrainExecArgs, load, usage};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::{Context, Result, anyhow};
use eval::bench::{BenchOptions, BenchResult, bench};
use eval::quality::evaluate;
use eval::report::{Generation, QuickstartResults, Report, VariantRow};
use eval::run::{RunInfo, RunModel};
use eval::text::{WindowOptions, windows};
use kernels::Exec;
use kernels::kv::KvType;
use kernels::quant::Dtype;
use model::generate::{GenerateLimits, generate};
use model::mixers::HeadLayout;
use model::{Engine, EngineOptions, HeadPlan, MixerSpec, Model, Sampler, SamplerOptions};
use setup::Settings;
use std::path::PathBuf;
use std::time::Instant;
use surgery::convert::convert_in_memory;
use surgery::{HeadBank, HeadsReport, select};
use train::TrainError;
use train::data::Document;
use train::recipe::{self, ALIGN, Align, Analyze, Budget, DEFAULT, Heal, Numbering, Recipe, Run, Seeds};

/// What models are compared in: close enough to f32 that the differences between models stand far above the rounding.
const JUDGED: EngineOptions = EngineOptions { weights: Some(Dtype::BF16), kv_type: KvType::F32 };
/// What models are timed and generate in: as users run them.
const TIMED: EngineOptions = EngineOptions { weights: Some(Dtype::Q8_0), kv_type: KvType::F16 };

/// [`TIMED`]'s weights by name.
const TIMED_WEIGHTS: &str = "q8_0";

/// Run the whole pipeline on a real model: fetch, analyze, align, plan, convert, heal, evaluate, generate.
///
/// Everything is written to --out: heads.json, bank.safetensors, plan.json, the hybrid and the healed checkpoint, results.json and
/// report.html. Run it again with the same options to continue where it stopped.
///
/// Examples:
///   recurformer quickstart
///   recurformer quickstart --model ./my-model --data notes.txt --beta 0.75 --out my-hybrid
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long, default_value = "smollm2-135m")]
    model: String,
    /// Text files, `english-small`, or `self` (text sampled from the model).
    #[arg(long, num_args = 1.., default_value = "english-small", value_name = "FILE")]
    data: Vec<String>,
    /// Share of the KV groups to convert.
    #[arg(long, default_value_t = 0.5)]
    beta: f64,
    /// Tokens of the local attention window beside each recurrence.
    #[arg(long, default_value_t = DEFAULT.mixer.window)]
    window: usize,
    /// Folder for everything that is made.
    #[arg(long, default_value = "recurformer-quickstart")]
    out: PathBuf,
    /// Tokens the replacement heads are trained on.
    #[arg(long, default_value_t = 81_920)]
    align_tokens: u64,
    /// Tokens the hybrid is healed on.
    #[arg(long, default_value_t = 16_384)]
    heal_tokens: u64,
    /// Tokens of each held-out file used for the comparison.
    #[arg(long, default_value_t = 4096)]
    eval_tokens: usize,
    /// Tokens the heads are measured on.
    #[arg(long, default_value_t = 6144)]
    analyze_tokens: usize,
    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    exec: TrainExecArgs,
}

/// The row of our hybrid before healing.
const UNHEALED: &str = "ours, unhealed";

/// What the comparison needs.
struct Quickstart<'a> {
    args: &'a Args,
    exec: Exec,
    base: Loaded,
    heldout: Vec<Document>,
    context: usize,
    /// What the text is, for the report.
    text: String,
    /// Whether some files are an earlier run's, so that the time is not the whole time.
    continued: bool,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if !(0.0..=1.0).contains(&args.beta) {
        return Err(usage(format!("--beta {} must be between 0 and 1", args.beta)));
    }
    let clock = Instant::now();
    let mut settings = Settings::prepare(args)?;
    let exec = args.exec.exec()?;
    ui.say(&format!("[1/8] fetch: {}", args.model));
    let base = load(&args.model, ui)?;
    let (train, heldout) = settings.text(args, &base, &exec, ui)?;
    let recipe = recipe(args).fitted(base.model.config.max_context);
    let stages = Run {
        exec: &exec,
        checkpoint: &base.checkpoint,
        base: &base.model,
        train: &train,
        heldout: &heldout,
        recipe: &recipe,
        budget: &Budget::Beta(args.beta),
        work: &args.out,
        save_every_s: 120,
        numbering: Numbering { before: 1, after: 2 },
    };
    let made = recipe::run(&stages, None, ui).map_err(|error| match error {
        TrainError::Interrupted => anyhow!("interrupted; the same command continues where it stopped"),
        other => other.into(),
    })?;
    let bank = made.bank.context("the recipe of quickstart aligns")?;
    let quickstart = Quickstart {
        args,
        exec,
        base,
        heldout,
        context: recipe.analyze.context,
        text: settings.text_name(),
        continued: settings.continued,
    };
    let mut results = quickstart.compare(&made.heads, &bank, &made.plan, &made.healed, ui)?;
    quickstart.generations(&made.healed, &mut results, ui)?;
    quickstart.finish(results, &made.plan, clock.elapsed().as_secs_f64(), ui)
}

/// The default recipe with budgets of a few minutes.
fn recipe(args: &Args) -> Recipe {
    let align = Align { tokens: args.align_tokens, heldout_items: 2, ..ALIGN };
    Recipe {
        name: "quickstart",
        seeds: Seeds::new(args.seed),
        analyze: Analyze { tokens: args.analyze_tokens, ..DEFAULT.analyze },
        mixer: DEFAULT.mixer.beside(args.window),
        align: Some(align),
        // Few tokens: more, smaller steps with a lower peak.
        heal: Heal { tokens: args.heal_tokens, lr: 2e-4, warmup: 4, ..DEFAULT.heal },
        ..DEFAULT
    }
}

impl Quickstart<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.args.out.join(name)
    }

    fn plan_by(
        &self,
        criterion: &str,
        mixer: MixerSpec,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
    ) -> Result<HeadPlan> {
        let (beta, seed) = (self.args.beta, self.args.seed);
        let choice = select::Choice { criterion, beta, keep_at_least_per_layer: 0, mixer, seed };
        Ok(select::plan_by(heads, bank, &choice)?)
    }

    /// Every model of the table, judged on the same held-out text and timed at the same depths.
    fn compare(
        &self,
        heads: &HeadsReport,
        bank: &HeadBank,
        plan: &HeadPlan,
        healed: &Model,
        ui: &mut Ui,
    ) -> Result<QuickstartResults> {
        ui.say("[7/8] evaluate: held-out text, cache, speed");
        let base = &self.base.model;
        let config = &base.config;
        let seed = self.args.seed;
        let convert =
            |plan: &HeadPlan, bank: Option<&HeadBank>| convert_in_memory(base, plan, bank, Some(heads), seed);
        let paper = self.plan_by("recency", MixerArg::Mamba.spec(config, 0, None)?, heads, None)?;
        // As many tokens as the heads' cache would hold.
        let bytes = |spec| HeadLayout::new(spec, config).cache_bytes(KvType::F16);
        let per_token = bytes(MixerArg::None.spec(config, 1, Some(0))?);
        let tokens = (bytes(bank.info.spec) / per_token).saturating_sub(1).max(1);
        let window = self.plan_by("kl-fisher", MixerArg::None.spec(config, tokens, None)?, heads, None)?;
        let window_only =
            format!("window {tokens} + sink on the groups best for it, the same cache; training-free");
        let random = self.plan_by("random", bank.info.spec, heads, Some(bank))?;
        let models: Vec<(&str, &str, Model)> = vec![
            ("base", "the original model", base.clone()),
            (
                "paper, unhealed",
                "groups by recency ratio, fresh Mamba blocks, no training",
                convert(&paper, None)?,
            ),
            ("window only", &window_only, convert(&window, None)?),
            ("random groups", "aligned heads on random groups", convert(&random, Some(bank))?),
            (UNHEALED, "aligned heads on the groups they cost least", convert(plan, Some(bank))?),
            ("ours, healed", "the same after distillation", healed.clone()),
        ];
        let options = WindowOptions {
            context: self.context,
            stride: None,
            bos: None,
            max_tokens: Some(self.args.eval_tokens),
        };
        let texts = windows(&self.heldout, &options)?;
        let judged = models
            .iter()
            .map(|(.., model)| Engine::from_model(&self.exec, model, JUDGED))
            .collect::<Result<Vec<_>, _>>()?;
        let refs: Vec<&Engine> = judged.iter().collect();
        let qualities = evaluate(&self.exec, Some(refs[0]), &refs, &texts, ui)?;
        drop(judged);
        let mut results = QuickstartResults::default();
        for ((name, description, model), quality) in models.into_iter().zip(qualities) {
            // Healing changes values, not structure: the unhealed twin would only be timed twice.
            let mut engine = Engine::from_model(&self.exec, &model, TIMED)?;
            let speeds = if name == UNHEALED { Vec::new() } else { self.speed(&mut engine, ui)? };
            results.run.models.push(RunModel::of(name, TIMED_WEIGHTS, &engine));
            results.models.push(VariantRow {
                name: name.into(),
                description: description.into(),
                converted: model.plan.converted(),
                total: model.plan.total(),
                ppl: Some(quality.overall.ppl),
                kl: quality.overall.kl,
                top1_agreement: quality.overall.top1_agreement,
                cache_bytes_8k: Some(engine.cache_bytes(8192)),
                decode_tok_s: speeds.iter().map(|s| (s.depth, s.decode_tok_s)).collect(),
                files: quality.files,
                ..VariantRow::default()
            });
        }
        Ok(results)
    }

    /// Decode speed at 2k and 8k tokens, also beyond the trained length: only speed is asked for.
    fn speed(&self, engine: &mut Engine, ui: &mut Ui) -> Result<Vec<BenchResult>> {
        engine.context_limit = usize::MAX;
        let options = BenchOptions { depths: vec![2048, 8192], decode_steps: 8, ..BenchOptions::default() };
        Ok(bench(&self.exec, engine, &options, ui)?)
    }

    fn generations(&self, healed: &Model, results: &mut QuickstartResults, ui: &mut Ui) -> Result<()> {
        ui.say("[8/8] generate");
        let tokenizer = self.base.tokenizer()?;
        let engine = |model| Engine::from_model(&self.exec, model, TIMED);
        let (base, healed) = (engine(&self.base.model)?, engine(healed)?);
        for prompt in ["The ship left the harbour at dawn, and", "A cache is useful because"] {
            let mut texts = Vec::new();
            for (name, model) in [("base", &base), ("ours, healed", &healed)] {
                let ids = tokenizer.encode(prompt, true)?;
                let mut produced = Vec::new();
                let limits = GenerateLimits { max_new: 40, stop_ids: &model.config.eos_token_ids };
                let mut sampler = Sampler::new(SamplerOptions::default())?;
                generate(
                    &self.exec,
                    model,
                    &mut model.new_cache(),
                    &mut Vec::new(),
                    &ids,
                    &mut sampler,
                    limits,
                    |id| {
                        produced.push(id);
                        true
                    },
                )?;
                texts.push((name.to_string(), tokenizer.decode(&produced, true)?));
            }
            ui.say(&format!("  {prompt}"));
            texts
                .iter()
                .for_each(|(name, text)| ui.say(&format!("    {name:>13}: {}", text.replace('\n', " "))));
            results.generations.push(Generation { prompt: prompt.into(), texts });
        }
        Ok(())
    }

    fn finish(
        &self,
        mut results: QuickstartResults,
        plan: &HeadPlan,
        seconds: f64,
        ui: &mut Ui,
    ) -> Result<()> {
        let args = self.args;
        results.title = format!("RecurFormer on {}", args.model);
        results.summary = format!(
            "{} of {} KV groups of {} became recurrent. Replacement heads were trained on {} tokens, the hybrid healed on {}; all figures are from \
             held-out parts of {} (at most {} tokens a file) and from this machine, {}.",
            plan.converted(),
            plan.total(),
            args.model,
            args.align_tokens,
            args.heal_tokens,
            self.text,
            args.eval_tokens,
            if self.continued {
                "partly in an earlier run".to_string()
            } else {
                format!("in {:.1} minutes", seconds / 60.0)
            }
        );
        results.text.clone_from(&self.text);
        let models = std::mem::take(&mut results.run.models);
        results.run = RunInfo { seeds: vec![args.seed], models, ..run_info(&self.exec) };
        weights::files::atomic_write(&self.path("results.json"), &serde_json::to_vec_pretty(&results)?)?;
        let report = Report::from_files(&[&args.out])?;
        report.write_html(&self.path("report.html"))?;
        for comparison in &report.comparisons {
            println!("{}", comparison.table().to_markdown());
        }
        println!("text: {}", self.text);
        ui.say(&format!(
            "done in {:.1} minutes; open {}",
            seconds / 60.0,
            self.path("report.html").display()
        ));
        ui.say(&format!(
            "try: recurformer generate --model {} --prompt \"Once upon a time\"",
            self.path("healed").display()
        ));
        Ok(())
    }
}
