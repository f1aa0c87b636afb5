//! MQAR models trained from scratch: attention, a recurrence with a small state, or both, on multi-query associative recall (arXiv 2312.04927).

mod state;
#[cfg(test)]
mod tests;

use crate::error::{Result, TrainError};
use crate::optim::Schedule;
use crate::scratch::{LabelReport, LabelTrainer, Optimiser, answered, random_model, with_random_heads};
use kernels::Exec;
use kernels::kv::KvType;
use model::{
    Engine, EngineOptions, Family, MixerSpec, Model, ModelConfig, Progress, RecurrentKind, TokenBatch,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tasks::mqar::{Filler, MqarOptions, MqarPart};
use weights::RopeScaling;

/// Decoder layers, as in the paper's experiments.
const LAYERS: usize = 2;
/// Taps of the recurrent heads' short convolutions.
const CONV: usize = 4;

/// What mixes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixing {
    /// Every head is attention.
    Attention,
    /// Every head is `mamba2` without a window.
    Recurrent,
    /// In every layer the first half of the heads is recurrent, the others attention.
    Hybrid,
}

impl Mixing {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 3] = [Self::Attention, Self::Recurrent, Self::Hybrid];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Recurrent => "recurrent",
            Self::Hybrid => "hybrid",
        }
    }
}

/// One model on one size of the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqarCell {
    /// What mixes tokens.
    pub mixing: Mixing,
    /// Tokens of a sequence (T).
    pub length: usize,
    /// Keys of a sequence (K).
    pub pairs: usize,
    /// Width of the model.
    pub width: usize,
}

/// Settings of the training; the defaults are those of the log.
#[derive(Clone, Debug)]
pub struct MqarTraining {
    /// Token ids.
    pub vocab: usize,
    /// What stands between the keys that are asked for.
    pub filler: Filler,
    /// Values per head; a recurrent head's state has its square. The width's divisor.
    pub head_dim: usize,
    /// Optimiser steps at most.
    pub steps: u64,
    /// Tokens of a step: as many whole sequences as fit, at least one.
    pub batch_tokens: usize,
    /// Peak learning rate, after a linear warm-up of `warmup` steps and before a cosine to a tenth.
    pub lr: f32,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// AdamW's weight decay.
    pub weight_decay: f32,
    /// Size of the embeddings at the start, in `1 / √width`; they are the output projection, too.
    pub embedding_scale: f32,
    /// Training ends early when this share of the check's queries is answered.
    pub solved: f64,
    /// Steps between checks.
    pub check_every: u64,
    /// Queries of a check, at least.
    pub check_queries: usize,
    /// Queries of the test at the end, at least.
    pub test_queries: usize,
    /// Seed of weights and sequences.
    pub seed: u64,
    /// Folder of states and results.
    pub dir: PathBuf,
    /// Seconds between states on disk.
    pub save_every_s: u64,
    /// Go on from states and results in `dir`.
    pub resume: bool,
}

impl Default for MqarTraining {
    fn default() -> Self {
        Self {
            vocab: 8192,
            filler: Filler::Random,
            head_dim: 16,
            steps: 5000,
            batch_tokens: 4096,
            lr: 1e-2,
            warmup: 50,
            weight_decay: 0.1,
            embedding_scale: 3.0,
            solved: 0.99,
            check_every: 50,
            check_queries: 500,
            test_queries: 4000,
            seed: 0,
            dir: PathBuf::new(),
            save_every_s: 60,
            resume: false,
        }
    }
}

/// What became of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MqarOutcome {
    /// Which.
    #[serde(flatten)]
    pub cell: MqarCell,
    /// Values that trained, embeddings (which are the output projection, too) included.
    pub parameters: usize,
    /// Bytes of an f32 cache after a sequence: keys and values of attention, states and conv tails of recurrences.
    pub cache_bytes: usize,
    /// Steps done.
    pub steps: u64,
    /// Sequences trained on.
    pub sequences: u64,
    /// Loss of the last step, nats.
    pub train_loss: f64,
    /// Right answers of the test.
    pub correct: usize,
    /// Queries of the test.
    pub asked: usize,
    /// Seconds of training, those before interruptions included.
    pub seconds: f64,
}

impl MqarCell {
    fn task(&self, training: &MqarTraining) -> MqarOptions {
        MqarOptions {
            vocab: training.vocab,
            length: self.length,
            pairs: self.pairs,
            filler: training.filler,
            ..MqarOptions::default()
        }
    }

    /// What messages and files call it.
    pub fn name(&self) -> String {
        format!("{}-{}-{}-{}", self.mixing.name(), self.length, self.pairs, self.width)
    }

    /// Whether such a model can be trained.
    ///
    /// # Errors
    /// [`TrainError::Argument`] saying what does not fit.
    pub fn check(&self, training: &MqarTraining) -> Result<()> {
        let (width, head_dim) = (self.width, training.head_dim);
        let heads = width.checked_div(head_dim).unwrap_or(0);
        let refuse = |reason: String| Err(TrainError::Argument(reason));
        if heads == 0 || !width.is_multiple_of(head_dim) || !head_dim.is_multiple_of(2) || width > 4096 {
            return refuse(format!(
                "a width of {width} is no whole number of heads of {head_dim} values, an even number, up to a width of 4096\nhint: choose others"
            ));
        }
        if self.mixing == Mixing::Hybrid && heads < 2 {
            return refuse(format!(
                "a hybrid of width {width} has {heads} head and needs two\nhint: choose a larger width or smaller heads"
            ));
        }
        if training.steps == 0 || training.check_every == 0 {
            return refuse("there must be at least one step, and one between checks".into());
        }
        Ok(self.task(training).check()?)
    }

    /// The model before training. Models of one width and task start from the same weights.
    fn model(&self, training: &MqarTraining) -> Result<Model> {
        let Self { mixing, length, width, .. } = *self;
        let head_dim = training.head_dim;
        let heads = width / head_dim;
        let config = ModelConfig {
            family: Family::Llama,
            vocab: training.vocab,
            d_model: width,
            d_ff: 2 * width,
            layers: LAYERS,
            heads,
            kv_heads: heads,
            head_dim,
            rms_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            max_context: length,
            tie_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        let base = random_model(&config, training.embedding_scale, training.seed)?;
        let spec = MixerSpec {
            recurrent: RecurrentKind::Mamba2,
            window: 0,
            sinks: 0,
            d_state: head_dim,
            d_conv: CONV,
            dropped: Default::default(),
        };
        match mixing {
            Mixing::Attention => Ok(base),
            Mixing::Recurrent => with_random_heads(&base, spec, |_, _| true, training.seed),
            Mixing::Hybrid => with_random_heads(&base, spec, |_, group| group < heads / 2, training.seed),
        }
    }
}

/// Trains one cell and tests it; a pure function of its settings, interrupted or not, up to the seconds. With `resume`, goes on from the state of an
/// interrupted run, and gives back the result of a finished one.
///
/// # Errors
/// [`TrainError::Argument`] for a cell that cannot be made or a setting that differs from the resumed run's, [`TrainError::NonFinite`],
/// [`TrainError::Interrupted`] with the state saved; whatever the disk refuses.
pub fn train_mqar(
    exec: &Exec,
    cell: &MqarCell,
    training: &MqarTraining,
    progress: &mut dyn Progress,
) -> Result<MqarOutcome> {
    cell.check(training)?;
    let files = state::Files::new(exec, cell, training)?;
    if let Some(outcome) = files.outcome(training.resume)? {
        return Ok(outcome);
    }
    let mut model = cell.model(training)?;
    let optimiser = Optimiser { betas: (0.9, 0.98), weight_decay: training.weight_decay, clip: 1.0 };
    let mut trainer = LabelTrainer::new(exec, &model, optimiser);
    let before = files.restore(&mut trainer, &mut model, training.resume)?;
    let task = cell.task(training);
    let sequences = (training.batch_tokens / cell.length).max(1) as u64;
    let schedule = Schedule { warmup: training.warmup, total: training.steps, final_share: 0.1 };
    let (began, mut saved) = (Instant::now(), Instant::now());
    let seconds = || before.seconds + began.elapsed().as_secs_f64();
    let (mut solved, mut train_loss) = (before.solved, before.train_loss);
    progress.start(&cell.name(), training.steps, "steps");
    progress.resumed(trainer.steps());
    while trainer.steps() < training.steps && !solved {
        let save = |trainer: &LabelTrainer<'_>, model: &Model, solved, train_loss| {
            files.save(trainer, model, state::Before { seconds: seconds(), solved, train_loss })
        };
        if progress.cancelled() {
            save(&trainer, &model, solved, train_loss)?;
            return Err(TrainError::Interrupted);
        }
        let step = trainer.steps() + 1;
        let (batch, labels) =
            batch(&task, MqarPart::Train, training.seed, (step - 1) * sequences, sequences)?;
        let lr = f64::from(training.lr) * schedule.factor(step);
        let LabelReport { loss, correct, labels, .. } =
            trainer.step(&mut model, &batch, &labels, lr as f32)?;
        train_loss = loss;
        progress.advance(1, &format!("loss {loss:.3}, {correct}/{labels} right"));
        if step.is_multiple_of(training.check_every) {
            let (correct, asked) =
                test(exec, &model, &task, MqarPart::Check, training, training.check_queries)?;
            solved = correct as f64 >= training.solved * asked as f64;
        }
        if saved.elapsed() >= Duration::from_secs(training.save_every_s) {
            save(&trainer, &model, solved, train_loss)?;
            saved = Instant::now();
        }
    }
    let (correct, asked) = test(exec, &model, &task, MqarPart::Test, training, training.test_queries)?;
    progress.finish();
    let options = EngineOptions { kv_type: KvType::F32, ..EngineOptions::EXACT };
    let outcome = MqarOutcome {
        cell: *cell,
        parameters: trainer.parameters(),
        cache_bytes: Engine::from_model(exec, &model, options)?.cache_bytes(cell.length),
        steps: trainer.steps(),
        sequences: trainer.steps() * sequences,
        train_loss,
        correct,
        asked,
        seconds: seconds(),
    };
    files.finish(&outcome)?;
    Ok(outcome)
}

/// Sequences `from..from + count` of a part and their labels.
fn batch(
    task: &MqarOptions,
    part: MqarPart,
    seed: u64,
    from: u64,
    count: u64,
) -> Result<(TokenBatch, Vec<u32>)> {
    let (mut batch, mut labels) = (TokenBatch::default(), Vec::new());
    for index in from..from + count {
        let made = task.sequence(part, (seed, index))?;
        batch.push(&made.tokens);
        labels.extend(made.labels);
    }
    Ok((batch, labels))
}

/// Right answers and queries of as many sequences as hold `queries`.
fn test(
    exec: &Exec,
    model: &Model,
    task: &MqarOptions,
    part: MqarPart,
    training: &MqarTraining,
    queries: usize,
) -> Result<(usize, usize)> {
    let count = queries.div_ceil(task.pairs).max(1) as u64;
    let at_once = (training.batch_tokens / task.length).max(1) as u64;
    let (mut correct, mut asked, mut from) = (0, 0, 0);
    while from < count {
        let size = at_once.min(count - from);
        let (batch, labels) = batch(task, part, training.seed, from, size)?;
        let report = answered(exec, model, &batch, &labels)?;
        (correct, asked, from) = (correct + report.correct, asked + report.labels, from + size);
    }
    Ok((correct, asked))
}
