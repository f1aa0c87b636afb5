//! `quickstart`: the whole pipeline in one command, ending with a table and a report.

mod setup;

use crate::common::{Loaded, MixerArg, TrainExecArgs, load, sequences, usage};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::Result;
use eval::bench::{BenchOptions, BenchResult, bench};
use eval::quality::evaluate;
use eval::report::{Generation, QuickstartResults, Report, VariantRow};
use eval::run::{RunInfo, RunModel};
use eval::text::{WindowOptions, windows};
use kernels::Exec;
use kernels::kv::KvType;
use kernels::quant::Dtype;
use model::generate::{GenerateLimits, generate};
use model::plan::PlanCriterion;
use model::{Engine, EngineOptions, HeadPlan, MixerSpec, Model, Sampler, SamplerOptions};
use setup::Settings;
use std::path::PathBuf;
use std::time::Instant;
use surgery::convert::{convert, convert_in_memory, save_model};
use surgery::stats::{AnalyzeOptions, analyze};
use surgery::{HeadBank, HeadsReport, bank::init_bank, criteria, select};
use train::align::{AlignOptions, align};
use train::data::{Document, SequenceStream};
use train::heal::{HealOptions, heal};

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
    #[arg(long, default_value_t = 64)]
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

/// What every stage needs.
struct Stage<'a> {
    args: &'a Args,
    exec: Exec,
    base: Loaded,
    train: Vec<Document>,
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
    let context = 1024.min(base.model.config.max_context);
    let stage = Stage {
        args,
        exec,
        base,
        train,
        heldout,
        context,
        text: settings.text_name(),
        continued: settings.continued,
    };

    let heads = stage.heads(ui)?;
    let bank = stage.bank(&heads, ui)?;
    let plan = stage.plan(&heads, &bank, ui)?;
    let healed = stage.heal(&plan, &bank, ui)?;
    let mut results = stage.compare(&heads, &bank, &plan, &healed, ui)?;
    stage.generations(&healed, &mut results, ui)?;
    stage.finish(results, &plan, clock.elapsed().as_secs_f64(), ui)
}

impl Stage<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.args.out.join(name)
    }

    fn heads(&self, ui: &mut Ui) -> Result<HeadsReport> {
        let path = self.path("heads.json");
        if path.exists() {
            ui.say("[2/8] analyze: found heads.json");
            return Ok(HeadsReport::read(&path)?);
        }
        ui.say("[2/8] analyze: where does each head look?");
        let sequences = sequences(&self.train, self.context, self.args.analyze_tokens, self.args.seed)?;
        let options = AnalyzeOptions { seed: self.args.seed, ..AnalyzeOptions::default() };
        let heads = analyze(&self.exec, &self.base.model, &sequences, &options, ui)?;
        heads.write(&path)?;
        Ok(heads)
    }

    fn bank(&self, heads: &HeadsReport, ui: &mut Ui) -> Result<HeadBank> {
        let path = self.path("bank.safetensors");
        let config = &self.base.model.config;
        if path.exists() {
            ui.say("[3/8] align: found bank.safetensors");
            return Ok(HeadBank::read(&path, config)?);
        }
        ui.say("[3/8] align: training a replacement for every KV group");
        let spec = MixerArg::Mamba2.spec(config, self.args.window, None)?;
        let bank = init_bank(&self.base.model, spec, heads, self.args.seed)?;
        let options = AlignOptions {
            tokens: self.args.align_tokens,
            heldout: sequences(&self.heldout, self.context, 2 * self.context, self.args.seed)?,
            fisher: sequences(&self.train, self.context, 4 * self.context, self.args.seed ^ 1)?,
            out: path.clone(),
            resume: path.with_extension("safetensors.state").exists(),
            metrics: Some(self.path("align-metrics.jsonl")),
            ..AlignOptions::default()
        };
        let mut stream = SequenceStream::new(&self.train, 512.min(self.context), self.args.seed)?;
        Ok(align(&self.exec, &self.base.model, bank, &mut stream, &options, ui)?)
    }

    fn plan_by(
        &self,
        criterion: &str,
        mixer: MixerSpec,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
    ) -> Result<HeadPlan> {
        let scores = criteria::scores(criterion, heads, bank, self.args.seed)?;
        let options = select::SelectOptions {
            beta: self.args.beta,
            keep_at_least_per_layer: 0,
            mixer,
            criterion: PlanCriterion {
                name: criterion.into(),
                tokens: bank
                    .filter(|_| criterion == "mixer-fisher")
                    .map_or(heads.tokens, |b| b.info.fisher_tokens),
                bank_sha256: bank.map(HeadBank::sha256),
                data_sha256: Some(heads.data_sha256.clone()),
                seed: (criterion == "random").then_some(self.args.seed),
            },
        };
        Ok(select::select(&self.base.model.config, &scores, &options)?)
    }

    fn plan(&self, heads: &HeadsReport, bank: &HeadBank, ui: &mut Ui) -> Result<HeadPlan> {
        let plan = self.plan_by("mixer-fisher", bank.info.spec, heads, Some(bank))?;
        ui.say(&format!(
            "[4/8] plan: {} of {} KV groups, by the replacement's own error",
            plan.converted(),
            plan.total()
        ));
        weights::files::atomic_write(&self.path("plan.json"), plan.to_json().as_bytes())?;
        Ok(plan)
    }

    fn heal(&self, plan: &HeadPlan, bank: &HeadBank, ui: &mut Ui) -> Result<Model> {
        let (hybrid, healed) = (self.path("hybrid"), self.path("healed"));
        if hybrid.exists() {
            ui.say("[5/8] convert: found hybrid/");
        } else {
            ui.say("[5/8] convert");
            convert(&self.base.checkpoint, plan, Some(bank), None, self.args.seed, &hybrid, ui)?;
        }
        if healed.exists() {
            ui.say("[6/8] heal: found healed/");
            return Ok(load(&healed.to_string_lossy(), ui)?.model);
        }
        ui.say("[6/8] heal: distilling the base into the hybrid");
        let mut model = convert_in_memory(&self.base.model, plan, Some(bank), None, self.args.seed)?;
        let state_dir = self.path("healed.train");
        let options = HealOptions {
            tokens: self.args.heal_tokens,
            // Few tokens: many small steps with a low peak (docs/log).
            batch: 1,
            lr: 2e-4,
            warmup: 4,
            seed: self.args.seed,
            resume: state_dir.join("state.safetensors").exists(),
            state_dir,
            ..HealOptions::default()
        };
        let mut stream = SequenceStream::new(&self.train, 512.min(self.context), self.args.seed ^ 2)?;
        heal(&self.exec, &self.base.model, &mut model, &mut stream, &options, ui)?;
        let source = weights::Checkpoint::open(&hybrid)?;
        save_model(&source, &model, &healed, ui)?;
        Ok(model)
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
        let window = self.plan_by("kl-fisher", MixerArg::None.spec(config, 64, None)?, heads, None)?;
        let random = self.plan_by("random", bank.info.spec, heads, Some(bank))?;
        let models: Vec<(&str, &str, Model)> = vec![
            ("base", "the original model", base.clone()),
            (
                "paper, unhealed",
                "groups by recency ratio, fresh Mamba blocks, no training",
                convert(&paper, None)?,
            ),
            (
                "window only",
                "window 64 + sink on the groups best for it; training-free",
                convert(&window, None)?,
            ),
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
