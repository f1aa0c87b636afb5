//! Arguments and loading shared by the commands.

use crate::allocator::keep_freed_pages;
use crate::ui::Ui;
use anyhow::{Context, Result, bail};
use eval::run::RunModel;
use kernels::kv::KvType;
use kernels::quant::Dtype;
use kernels::{Exec, Precision};
use model::{Dropped, Engine, EngineOptions, HeadPlan, MixerSpec, Model, ModelConfig, RecurrentKind, narrow};
use std::path::{Path, PathBuf};
use train::MomentType;
use train::data::{self, DataSource, Document, SelfOptions, Split};
use weights::{Checkpoint, ModelSource, Tokenizer};

/// A wrong command line that clap could not see; exits with code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A [`Usage`] error as `anyhow::Error`.
pub fn usage(text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(text.into()))
}

/// Whether the command line is to blame: it asks for what the model or the measurement cannot do.
pub fn is_usage(error: &anyhow::Error) -> bool {
    use eval::EvalError;
    use model::ModelError;
    use train::TrainError;
    error.is::<Usage>()
        || matches!(error.downcast_ref(), Some(ModelError::Context { .. } | ModelError::Budget { .. }))
        || matches!(error.downcast_ref(), Some(TrainError::Model(ModelError::Budget { .. })))
        || matches!(
            error.downcast_ref(),
            Some(EvalError::Argument(_) | EvalError::Model(ModelError::Context { .. }))
        )
}

/// `--threads`.
#[derive(clap::Args, Clone, Debug)]
pub struct ExecArgs {
    /// Compute threads (default: all cores).
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
}

impl ExecArgs {
    /// The execution context.
    pub fn exec(&self) -> Result<Exec> {
        Ok(Exec::new(self.threads)?)
    }
}

/// `--threads` and `--precision` of the commands that train.
#[derive(clap::Args, Clone, Debug)]
pub struct TrainExecArgs {
    #[command(flatten)]
    exec: ExecArgs,
    /// Products of the training passes: bf16 (factors rounded, sums and master weights f32) or f32. Default: bf16 where the CPU
    /// multiplies it.
    #[arg(long, value_enum)]
    precision: Option<PrecisionArg>,
}

/// `--precision`.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum PrecisionArg {
    /// Everything in f32.
    F32,
    /// Factors of large products in bfloat16.
    Bf16,
}

impl TrainExecArgs {
    /// The execution context of training; the process keeps its memory from now on.
    pub fn exec(&self) -> Result<Exec> {
        keep_freed_pages();
        let exec = self.exec.exec()?;
        let precision = match self.precision {
            None => exec.fastest_precision(),
            Some(PrecisionArg::F32) => Precision::F32,
            Some(PrecisionArg::Bf16) => Precision::Bf16,
        };
        Ok(exec.with_precision(precision)?)
    }
}

/// `--data` of the training and evaluation commands.
#[derive(clap::Args, Clone, Debug)]
pub struct DataArgs {
    /// Text files (plain, JSONL with `text`; .gz and .zst of both), parquet files with a string column `text`, .npy files of int32 token ids,
    /// `english-small`, `english-mixed`, `self`, or generated tasks with their answers: `retrieval` (facts hidden in text, lists with lookups, spans that return) and `hashhop`. Several may be
    /// given; each is read in proportion to the square root of its size.
    ///
    /// Generated tasks take parameters: `retrieval:context=1024,tokens=262144,seed=0`,
    /// `hashhop:hops=1+2,length=6,cot=false,context=1024,tokens=262144,seed=0` (these are the defaults). Every document has `context` tokens, best
    /// the same as --context; what is held out comes from other random numbers, an eighth as much.
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    pub data: Vec<String>,
}

/// `--beta` of the commands that run, export or show a model.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct BudgetArgs {
    /// Run a hybrid at a lower budget than its plan's: convert this share of the KV groups, those of highest score, and let the
    /// others be attention again. Hybrids from `heal --elastic` are trained for several budgets.
    #[arg(long, value_name = "SHARE")]
    beta: Option<f64>,
}

impl BudgetArgs {
    /// Opens a model argument at this budget without reading its weights.
    pub fn open(self, arg: &str, ui: &Ui) -> Result<Checkpoint> {
        let checkpoint = open(arg, ui)?;
        let Some(beta) = self.beta else { return Ok(checkpoint) };
        let plan = plan_of(&checkpoint)?;
        let checkpoint = narrow(checkpoint, beta)?;
        if plan.elastic.is_none() && plan_of(&checkpoint)?.converted() < plan.converted() {
            ui.say(&format!(
                "note: {arg} is not marked elastic: if its heads were healed, then for beta {}, all of them together; `heal --elastic` heals for several budgets",
                plan.beta
            ));
        }
        Ok(checkpoint)
    }
}

/// The plan of a checkpoint; a base model's is empty.
pub fn plan_of(checkpoint: &Checkpoint) -> Result<HeadPlan> {
    Ok(match &checkpoint.plan_json {
        Some(value) => HeadPlan::from_json(&value.to_string(), &checkpoint.config)?,
        None => HeadPlan::empty(&checkpoint.config),
    })
}

/// `--weights` and `--kv-type`.
#[derive(clap::Args, Clone, Debug)]
pub struct TypeArgs {
    /// Weights in memory: stored (each as in the checkpoint), f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k or q6_k.
    /// Default: stored; f32 where models are judged.
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub weights: Option<WeightType>,
    /// Attention cache: f32, f16, bf16 or q8. Default: f16; f32 where models are judged.
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv_type: Option<KvType>,
}

/// `--weights`, `--kv-type` and `--beta` of the commands that run a model.
#[derive(clap::Args, Clone, Debug)]
pub struct EngineArgs {
    #[command(flatten)]
    types: TypeArgs,
    #[command(flatten)]
    budget: BudgetArgs,
}

/// `--weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// As in the checkpoint.
    Stored,
    /// Converted when loaded.
    Converted(Dtype),
}

fn weight_type(name: &str) -> Result<WeightType, String> {
    if name == "stored" {
        return Ok(WeightType::Stored);
    }
    dtype(name).map(WeightType::Converted)
}

/// An element type by its name in lower case.
pub fn dtype(name: &str) -> Result<Dtype, String> {
    Dtype::parse(name).ok_or_else(|| {
        let names: Vec<String> = Dtype::ALL.iter().map(|d| d.name().to_ascii_lowercase()).collect();
        format!("unknown element type; there are {}", names.join(", "))
    })
}

fn kv_type(name: &str) -> Result<KvType, String> {
    KvType::parse(&name.to_ascii_lowercase())
        .ok_or_else(|| "unknown cache type; there are f32, f16, bf16 and q8".to_string())
}

impl TypeArgs {
    /// Options of the engine: `defaults` where the command line says nothing.
    pub fn options(&self, defaults: EngineOptions) -> EngineOptions {
        let weights = match self.weights {
            None => defaults.weights,
            Some(WeightType::Stored) => None,
            Some(WeightType::Converted(dtype)) => Some(dtype),
        };
        EngineOptions { weights, kv_type: self.kv_type.unwrap_or(defaults.kv_type) }
    }
}

impl EngineArgs {
    /// Options of the engine: `defaults` where the command line says nothing.
    pub fn options(&self, defaults: EngineOptions) -> EngineOptions {
        self.types.options(defaults)
    }

    /// Opens the model that these options are for, and packs its weights. (A model that it is compared with runs as it is: [`run_engine`].)
    pub fn run(&self, arg: &str, defaults: EngineOptions, exec: &Exec, ui: &Ui) -> Result<Running> {
        let mut running = pack(self.budget.open(arg, ui)?, arg, self.options(defaults), exec)?;
        if let Some(beta) = self.budget.beta {
            running.about.name = format!("{arg} at beta {beta}");
        }
        Ok(running)
    }
}

/// A checkpoint and the engine made of it.
pub struct Running {
    /// As opened.
    pub checkpoint: Checkpoint,
    /// With its weights packed in memory.
    pub engine: Engine,
    /// What it is, for results.
    pub about: RunModel,
}

impl Running {
    /// The checkpoint's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer()?)
    }
}

/// Opens a model argument and packs its weights.
pub fn run_engine(arg: &str, options: EngineOptions, exec: &Exec, ui: &Ui) -> Result<Running> {
    pack(open(arg, ui)?, arg, options, exec)
}

fn pack(checkpoint: Checkpoint, arg: &str, options: EngineOptions, exec: &Exec) -> Result<Running> {
    let engine = Engine::load(exec, &checkpoint, options).with_context(|| format!("loading {arg}"))?;
    let weights = options.weights.map_or("stored".to_string(), |dtype| dtype.name().to_ascii_lowercase());
    let about = RunModel::of(arg, &weights, &engine);
    Ok(Running { checkpoint, engine, about })
}

/// A checkpoint and the model in it.
pub struct Loaded {
    /// As opened.
    pub checkpoint: Checkpoint,
    /// With its weights in memory.
    pub model: Model,
}

impl Loaded {
    /// The checkpoint's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer()?)
    }
}

/// Opens a model argument without reading its weights.
pub fn open(arg: &str, ui: &Ui) -> Result<Checkpoint> {
    Ok(ModelSource::parse(arg)?.open(&mut |line| ui.say(line))?)
}

/// Opens and loads a model argument.
pub fn load(arg: &str, ui: &Ui) -> Result<Loaded> {
    let checkpoint = open(arg, ui)?;
    let model = load_weights(&checkpoint, arg)?;
    Ok(Loaded { checkpoint, model })
}

/// The weights of a model argument that is open.
pub fn load_weights(checkpoint: &Checkpoint, arg: &str) -> Result<Model> {
    Model::load(checkpoint).with_context(|| format!("loading {arg}"))
}

/// All documents of the data arguments. Token ids from `.npy` files are checked against the vocabulary.
pub fn documents(
    args: &DataArgs,
    split: Split,
    checkpoint: &Checkpoint,
    exec: &Exec,
    ui: &mut Ui,
) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    let mut tokenizer = None;
    for arg in &args.data {
        let source = DataSource::parse(arg)?;
        if tokenizer.is_none() && needs_tokenizer(&source) {
            tokenizer = Some(checkpoint.tokenizer()?);
        }
        documents.extend(match (source, &tokenizer) {
            (DataSource::File(path), tokenizer) => data::read_file(exec, &path, tokenizer.as_ref(), ui)?,
            (DataSource::BuiltIn(text), Some(tokenizer)) => data::built_in(text, split, tokenizer, ui)?,
            (DataSource::Generated(tasks), Some(tokenizer)) => {
                data::generated(exec, &tasks, arg, split, tokenizer, ui)?
            }
            (DataSource::SelfSampled, _) => {
                let defaults = SelfOptions::default();
                let tokens = defaults.tokens.min(checkpoint.config.max_context);
                // Nothing that is evaluated on was trained on.
                let (documents, seed) = match split {
                    Split::Train => (defaults.documents, 0),
                    Split::Heldout => (defaults.documents / Split::HELDOUT_EVERY, 1),
                };
                let options = SelfOptions { documents, tokens, seed };
                let model = Model::load(checkpoint)?;
                data::self_sampled(exec, &model, &options, ui)?
            }
            (DataSource::BuiltIn(_) | DataSource::Generated(_), None) => bail!("{arg} needs a tokenizer"),
        });
    }
    data::check_vocab(&documents, checkpoint.config.vocab)?;
    Ok(documents)
}

/// Everything but token ids and the model's own text.
fn needs_tokenizer(source: &DataSource) -> bool {
    match source {
        DataSource::File(path) => {
            let name = path.to_string_lossy().to_ascii_lowercase();
            let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
            !name.ends_with(".npy")
        }
        DataSource::BuiltIn(_) | DataSource::Generated(_) => true,
        DataSource::SelfSampled => false,
    }
}

/// Fails early when a context is longer than the model's.
pub fn check_context(config: &ModelConfig, context: usize) -> Result<()> {
    if context < 2 || context > config.max_context {
        return Err(usage(format!(
            "context {context} must be between 2 and the model's {}\nhint: choose it with --context",
            config.max_context
        )));
    }
    Ok(())
}

/// Fails early when an output exists or its folder does not.
pub fn check_output(path: &Path, overwrite: bool) -> Result<()> {
    if path.exists() && !overwrite {
        bail!("{} exists already\nhint: choose another --out or remove it", path.display());
    }
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    if !parent.is_dir() {
        bail!("folder {} does not exist\nhint: create it first", parent.display());
    }
    Ok(())
}

/// `--checkpoint-activations`: a number of layers, or `all`, which is more than any model has.
pub fn parse_layers(text: &str) -> Result<usize, String> {
    match text {
        "all" => Ok(usize::MAX),
        _ => text.parse().map_err(|_| "expected a number of layers, or all".into()),
    }
}

/// `--moments`.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum MomentsArg {
    F32,
    Bf16,
}

impl From<MomentsArg> for MomentType {
    fn from(moments: MomentsArg) -> Self {
        match moments {
            MomentsArg::F32 => Self::F32,
            MomentsArg::Bf16 => Self::Bf16,
        }
    }
}

/// Recurrent part of a converted group.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixerArg {
    /// The paper's Mamba-1 block, randomly initialised.
    Mamba,
    /// Mamba-2 (SSD), initialised from the attention head.
    Mamba2,
    /// Gated delta rule, initialised from the attention head.
    GatedDelta,
    /// Local window and sinks only; nothing to train.
    None,
}

impl MixerArg {
    /// The full specification for a model. A window without explicit `sinks` keeps one sink.
    pub fn spec(self, config: &ModelConfig, window: usize, sinks: Option<usize>) -> Result<MixerSpec> {
        let sinks = sinks.unwrap_or(usize::from(window > 0));
        if window == 0 && (sinks > 0 || self == Self::None) {
            return Err(usage("without a window there can be no sinks, and mixer `none` needs a window"));
        }
        let recurrent = match self {
            Self::Mamba => RecurrentKind::Mamba,
            Self::Mamba2 => RecurrentKind::Mamba2,
            Self::GatedDelta => RecurrentKind::GatedDelta,
            Self::None => RecurrentKind::None,
        };
        Ok(MixerSpec::of(recurrent, window, sinks, config.head_dim))
    }

    /// [`spec`](Self::spec) of heads that are trained: where `dropped` does not say otherwise, what the window drops is weighed if the mixer can.
    pub fn trained_spec(
        self,
        config: &ModelConfig,
        window: usize,
        sinks: Option<usize>,
        dropped: Option<DroppedArg>,
    ) -> Result<MixerSpec> {
        let spec = self.spec(config, window, sinks)?;
        let dropped = match dropped {
            Some(dropped) => dropped.into(),
            None if spec.can_weigh() => Dropped::Weighed,
            None => Dropped::Forgotten,
        };
        let spec = MixerSpec { dropped, ..spec };
        spec.validate(config.head_dim)?;
        Ok(spec)
    }
}

/// What becomes of tokens that a window no longer shows.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DroppedArg {
    /// Nothing; a recurrence is added to the window.
    Forgotten,
    /// They are averaged to one key and value of their weight (RazorAttention's compensation token).
    Averaged,
    /// The recurrence answers for them, with the share of the softmax that they are estimated to have (mamba2 and gated-delta).
    Weighed,
}

impl From<DroppedArg> for Dropped {
    fn from(arg: DroppedArg) -> Self {
        match arg {
            DroppedArg::Forgotten => Self::Forgotten,
            DroppedArg::Averaged => Self::Averaged,
            DroppedArg::Weighed => Self::Weighed,
        }
    }
}

/// Prints pretty JSON to stdout.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
