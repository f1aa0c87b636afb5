//! The stages analyze → align → plan → convert → heal, each with its file in the work folder, each resumable.

use super::record::{Losses, Record, StageReport, StageResult};
use super::{Budget, Recipe};
use crate::align::{AlignOptions, align};
use crate::data::{Document, SequenceStream, sequences};
use crate::error::{Result, TrainError};
use crate::heal::{HealMetric, HealOptions, Stage, Trainable, heal};
use crate::state::with_suffix;
use kernels::Exec;
use model::{HeadPlan, Model, Progress};
use std::path::{Path, PathBuf};
use std::time::Instant;
use surgery::convert::{convert, convert_in_memory, save_model};
use surgery::select::{Choice, plan_by};
use surgery::stats::{AnalyzeOptions, analyze};
use surgery::{HeadBank, HeadsReport, SurgeryError, bank::init_bank};
use weights::Checkpoint;
use weights::files::{atomic_write, move_dir, remove_stale};

/// What [`run`] works on.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Threads and precision.
    pub exec: &'a Exec,
    /// The base model as stored.
    pub checkpoint: &'a Checkpoint,
    /// The same in memory.
    pub base: &'a Model,
    /// Text to measure and train on.
    pub train: &'a [Document],
    /// Text to measure the error of aligned heads on.
    pub heldout: &'a [Document],
    /// Settings.
    pub recipe: &'a Recipe,
    /// Groups to convert.
    pub budget: &'a Budget,
    /// Folder of all [`Files`].
    pub work: &'a Path,
    /// Seconds between training states on disk.
    pub save_every_s: u64,
    /// How stages are counted where progress is reported.
    pub numbering: Numbering,
}

/// Steps around the stages that the caller counts with them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbering {
    /// Before.
    pub before: usize,
    /// After.
    pub after: usize,
}

/// The files of a work folder.
#[derive(Clone, Debug)]
pub struct Files {
    /// `heads.json`.
    pub heads: PathBuf,
    /// The head bank; the training state lies beside it.
    pub bank: PathBuf,
    /// One line per step of `align`.
    pub align_metrics: PathBuf,
    /// `plan.json`.
    pub plan: PathBuf,
    /// The hybrid before healing.
    pub hybrid: PathBuf,
    /// The healed hybrid.
    pub healed: PathBuf,
    /// Folder of the training state of `heal`.
    pub heal_state: PathBuf,
    /// One line per step of `heal`.
    pub heal_metrics: PathBuf,
    /// What the folder was made with and how far it is ([`Record`]).
    pub record: PathBuf,
}

impl Files {
    /// The files of the folder `work`.
    pub fn of(work: &Path) -> Self {
        Self {
            heads: work.join("heads.json"),
            bank: work.join("bank.safetensors"),
            align_metrics: work.join("align-metrics.jsonl"),
            plan: work.join("plan.json"),
            hybrid: work.join("hybrid"),
            healed: work.join("healed"),
            heal_state: work.join("healed.train"),
            heal_metrics: work.join("healed.train/metrics.jsonl"),
            record: work.join("recipe.json"),
        }
    }
}

/// What the stages made.
pub struct Outcome {
    /// Head statistics.
    pub heads: HeadsReport,
    /// Aligned heads, when the recipe aligns.
    pub bank: Option<HeadBank>,
    /// The plan.
    pub plan: HeadPlan,
    /// The healed hybrid.
    pub healed: Model,
}

/// Runs all stages in the folder `run.work`, which must exist. A stage whose result is there already is not run again and one that was interrupted goes on, so that the
/// folder must be one of the same settings: [`Record::open`] checks that. Killed at any moment and run again, it ends with the same bits as an uninterrupted run.
/// With a record, every stage is entered there as it ends.
///
/// # Errors
/// [`TrainError::Argument`] and [`TrainError::Model`] for a recipe or a budget that does not fit the model, before anything is written; those of the stages;
/// [`TrainError::Interrupted`] with everything saved.
pub fn run(run: &Run<'_>, mut record: Option<&mut Record>, progress: &mut dyn Progress) -> Result<Outcome> {
    run.check()?;
    let heads = timed(&mut record, "analyze", || run.heads(progress))?;
    let bank = match run.recipe.align {
        Some(_) => Some(timed(&mut record, "align", || run.bank(&heads, progress))?),
        None => None,
    };
    let plan = timed(&mut record, "plan", || run.plan(&heads, bank.as_ref(), progress))?;
    timed(&mut record, "convert", || run.convert(&heads, bank.as_ref(), &plan, progress))?;
    let healed = timed(&mut record, "heal", || run.heal(&heads, bank.as_ref(), &plan, progress))?;
    Ok(Outcome { heads, bank, plan, healed })
}

/// Gives the healed checkpoint of a finished work folder its record, as `recipe.json`, and moves it to `out`.
///
/// # Errors
/// [`TrainError::Weights`] when the disk refuses, or `out` exists and is not an empty folder.
pub fn publish(work: &Path, record: &Record, out: &Path) -> Result<()> {
    let healed = Files::of(work).healed;
    record.write(&healed.join("recipe.json"))?;
    Ok(move_dir(&healed, out)?)
}

/// A stage's end.
struct Done<T> {
    value: T,
    result: StageResult,
    /// Tokens it measured or trained on.
    tokens: u64,
    origin: Origin,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// By this process.
    Made,
    /// By an earlier one.
    Found,
}

fn timed<T>(
    record: &mut Option<&mut Record>,
    stage: &str,
    make: impl FnOnce() -> Result<Done<T>>,
) -> Result<T> {
    let began = Instant::now();
    let done = make();
    let seconds = began.elapsed().as_secs_f64();
    match (done, record) {
        (done, None) => Ok(done?.value),
        (Ok(Done { value, result, tokens, origin }), Some(record)) => {
            let seconds = if origin == Origin::Made { seconds } else { 0.0 };
            record.enter(StageReport { stage: stage.into(), tokens, seconds, result: Some(result) })?;
            Ok(value)
        }
        (Err(error), Some(record)) => {
            // What stopped the stage says more than a disk that may refuse this, too.
            let _ = record.enter(StageReport { stage: stage.into(), tokens: 0, seconds, result: None });
            Err(error)
        }
    }
}

/// Interrupted stages go on when they are run again.
fn resumable(error: SurgeryError) -> TrainError {
    match error {
        SurgeryError::Interrupted => TrainError::Interrupted,
        other => other.into(),
    }
}

impl Run<'_> {
    /// Checks what can be checked before anything is written.
    ///
    /// # Errors
    /// Those of [`Recipe::check`] and [`Budget::check`]; [`TrainError::Argument`] for a base that is a hybrid.
    pub fn check(&self) -> Result<()> {
        let plan = &self.base.plan;
        if plan.converted() > 0 {
            return Err(TrainError::Argument(format!(
                "the base is a hybrid already: {} of {} groups are converted\nhint: a recipe starts from the model it was made of",
                plan.converted(),
                plan.total()
            )));
        }
        self.recipe.check(&self.base.config)?;
        self.budget.check(&self.base.config)
    }

    fn files(&self) -> Files {
        Files::of(self.work)
    }

    fn announce(&self, stage: &str, text: &str, progress: &mut dyn Progress) {
        let stages = ["analyze", "align", "plan", "convert", "heal"];
        let stages: Vec<&str> =
            stages.into_iter().filter(|s| *s != "align" || self.recipe.align.is_some()).collect();
        let number = 1 + stages.iter().position(|s| *s == stage).unwrap_or(0);
        let Numbering { before, after } = self.numbering;
        let total = before + stages.len() + after;
        progress.note(&format!("[{}/{total}] {stage}{text}", before + number));
    }

    fn heads(&self, progress: &mut dyn Progress) -> Result<Done<HeadsReport>> {
        let path = self.files().heads;
        remove_stale(&path)?;
        let origin = origin(&path);
        let heads = if origin == Origin::Found {
            self.announce("analyze", ": found heads.json", progress);
            HeadsReport::read(&path)?
        } else {
            self.announce("analyze", ": where does each head look?", progress);
            let (settings, seed) = (self.recipe.analyze, self.recipe.seeds.main);
            let texts = sequences(self.train, settings.context, settings.tokens, seed)?;
            let options = AnalyzeOptions { seed, ..AnalyzeOptions::default() };
            let heads = analyze(self.exec, self.base, &texts, &options, progress).map_err(resumable)?;
            heads.write(&path)?;
            heads
        };
        let ratios: Vec<f64> =
            heads.layers.iter().flat_map(|layer| layer.heads.iter().map(|h| h.recency_ratio_64)).collect();
        let result = StageResult::Analyze { mean_recency_ratio_64: mean(&ratios) };
        Ok(Done { result, tokens: heads.tokens as u64, origin, value: heads })
    }

    fn bank(&self, heads: &HeadsReport, progress: &mut dyn Progress) -> Result<Done<HeadBank>> {
        let files = self.files();
        let (recipe, seeds) = (self.recipe, self.recipe.seeds);
        let Some(settings) = recipe.align else {
            return Err(TrainError::Argument(format!("recipe {} does not align", recipe.name)));
        };
        let origin = origin(&files.bank);
        let bank = if origin == Origin::Found {
            self.announce("align", ": found bank.safetensors", progress);
            HeadBank::read(&files.bank, &self.base.config)?
        } else {
            self.announce("align", ": training a replacement for every KV group", progress);
            let bank = init_bank(self.base, recipe.mixer.spec(&self.base.config), heads, seeds.main)?;
            let context = settings.measure_context;
            let options = AlignOptions {
                heldout: sequences(self.heldout, context, settings.heldout_items * context, seeds.main)?,
                fisher: sequences(self.train, context, settings.fisher_items * context, seeds.fisher)?,
                out: files.bank.clone(),
                resume: with_suffix(&files.bank, ".state").exists(),
                save_every_s: self.save_every_s,
                metrics: Some(files.align_metrics),
                ..settings.options()
            };
            let mut stream = SequenceStream::new(self.train, settings.context, seeds.main)?;
            align(self.exec, self.base, bank, &mut stream, &options, progress)?
        };
        let errors: Vec<f64> = bank.info.heldout_error.iter().flatten().copied().collect();
        let result = StageResult::Align { mean_heldout_error: mean(&errors) };
        Ok(Done { result, tokens: bank.info.tokens, origin, value: bank })
    }

    /// Always made anew: it follows from heads and bank in no time.
    fn plan(
        &self,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
        progress: &mut dyn Progress,
    ) -> Result<Done<HeadPlan>> {
        let criterion = self.recipe.criterion;
        let choice = Choice {
            criterion,
            beta: self.budget.beta(),
            keep_at_least_per_layer: 0,
            mixer: self.recipe.mixer.spec(&self.base.config),
            seed: self.recipe.seeds.main,
        };
        let plan = plan_by(heads, bank, &choice)?;
        let by = if criterion == "mixer-fisher" { "the replacement's own error" } else { criterion };
        let (converted, total) = (plan.converted(), plan.total());
        self.announce("plan", &format!(": {converted} of {total} KV groups, by {by}"), progress);
        let path = self.files().plan;
        remove_stale(&path)?;
        atomic_write(&path, plan.to_json().as_bytes())?;
        let result = StageResult::Plan { criterion: criterion.into(), converted, total };
        Ok(Done { result, tokens: 0, origin: Origin::Made, value: plan })
    }

    fn convert(
        &self,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
        plan: &HeadPlan,
        progress: &mut dyn Progress,
    ) -> Result<Done<()>> {
        let path = self.files().hybrid;
        let origin = origin(&path);
        if origin == Origin::Found {
            self.announce("convert", ": found hybrid/", progress);
        } else {
            self.announce("convert", "", progress);
            let fresh = bank.is_none().then_some(heads);
            convert(self.checkpoint, plan, bank, fresh, self.recipe.seeds.main, &path, progress)
                .map_err(resumable)?;
        }
        Ok(Done { result: StageResult::Convert {}, tokens: 0, origin, value: () })
    }

    fn heal(
        &self,
        heads: &HeadsReport,
        bank: Option<&HeadBank>,
        plan: &HeadPlan,
        progress: &mut dyn Progress,
    ) -> Result<Done<Model>> {
        let files = self.files();
        let (settings, seeds) = (self.recipe.heal, self.recipe.seeds);
        let origin = origin(&files.healed);
        let (model, metrics) = if origin == Origin::Found {
            self.announce("heal", ": found healed/", progress);
            let checkpoint = Checkpoint::open(&files.healed)?;
            (Model::load(&checkpoint)?, read_metrics(&files.heal_metrics)?)
        } else {
            self.announce("heal", &format!(": {}", goal(settings.stage, settings.trainable)), progress);
            let fresh = bank.is_none().then_some(heads);
            let mut model = convert_in_memory(self.base, plan, bank, fresh, seeds.main)?;
            let options = HealOptions {
                elastic: self.budget.elastic().to_vec(),
                seed: seeds.main,
                resume: files.heal_state.join("state.safetensors").exists(),
                state_dir: files.heal_state,
                save_every_s: self.save_every_s,
                ..settings.options()
            };
            let mut stream = SequenceStream::new(self.train, settings.context, seeds.heal)?;
            let metrics = heal(self.exec, Some(self.base), &mut model, &mut stream, &options, progress)?;
            let source = Checkpoint::open(&files.hybrid)?;
            save_model(&source, &model, &files.healed, progress).map_err(resumable)?;
            (model, metrics)
        };
        let tokens = metrics.last().map_or(0, |last| last.tokens);
        Ok(Done { result: StageResult::Heal { losses: Losses::of(&metrics) }, tokens, origin, value: model })
    }
}

fn origin(path: &Path) -> Origin {
    if path.exists() { Origin::Found } else { Origin::Made }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// What a healing run does, for people.
fn goal(stage: Stage, trainable: Trainable) -> String {
    let what = match trainable {
        Trainable::Heads => "the new heads",
        Trainable::HeadsAndNorms => "the new heads and the norms",
        Trainable::Lora(_) => "the new heads and low-rank updates",
        Trainable::All => "all weights",
    };
    match (stage, trainable) {
        (Stage::Distill { .. }, Trainable::Heads) => "distilling the base into the hybrid".into(),
        (Stage::Distill { .. }, _) => format!("distilling the base into {what}"),
        (Stage::Continue, _) => format!("training {what} on next tokens"),
    }
}

/// The metrics of a finished `heal`.
///
/// # Errors
/// [`TrainError::File`] when they are missing or damaged.
fn read_metrics(path: &Path) -> Result<Vec<HealMetric>> {
    let bad = |reason: String| TrainError::File {
        path: path.to_path_buf(),
        reason: format!("{reason}\nhint: remove the healed model beside it to train that again"),
    };
    let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    text.lines().map(|line| serde_json::from_str(line).map_err(|e| bad(e.to_string()))).collect()
}
