//! Speed of training: how many tokens a second each kind of step takes. Random tokens; weights change, quality is not judged.

use crate::align::Timed;
use crate::error::{Result, TrainError};
use crate::heal::{HealOptions, Stage, Trainable, Trainer};
use crate::optim::MomentType;
use kernels::Exec;
use model::{Model, ModelConfig, TokenBatch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::time::Instant;
use surgery::HeadBank;

/// A learning rate at which nothing diverges in a few steps.
const LR: f32 = 1e-5;

/// A kind of training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepKind {
    /// Every weight of the base on next tokens: forward, backward, AdamW.
    Full,
    /// The new heads of a hybrid against the base, which runs too.
    Distill,
    /// Replacement heads of every group against the base's own, which runs too.
    Align,
}

/// What is trained.
pub enum Contestant<'a> {
    /// A base model, for [`StepKind::Full`]; where nobody else holds its weights, they are trained in place.
    Full(Box<Model>),
    /// A hybrid and the base it was converted from, for [`StepKind::Distill`].
    Distill(&'a Model, &'a Model),
    /// Heads of all groups of a base, for [`StepKind::Align`]; the last as in [`AlignOptions`](crate::align::AlignOptions::projection_lr_scale).
    Align(&'a HeadBank, &'a Model, f32),
}

impl Contestant<'_> {
    /// The kind of step that trains it.
    pub fn kind(&self) -> StepKind {
        match self {
            Self::Full(_) => StepKind::Full,
            Self::Distill(..) => StepKind::Distill,
            Self::Align(..) => StepKind::Align,
        }
    }

    fn config(&self) -> &ModelConfig {
        match self {
            Self::Full(model) => &model.config,
            Self::Distill(model, _) | Self::Align(_, model, _) => &model.config,
        }
    }
}

/// The steps of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Sequences of a batch.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// As in [`HealOptions`]; `align` records nothing.
    pub checkpointed_layers: usize,
    /// As in [`HealOptions`], without clipping; `align` updates after all gradients.
    pub optimizer_in_backward: bool,
    /// As in [`HealOptions`]; those of `align` are in f32.
    pub moments: MomentType,
}

/// A measured speed.
#[derive(Clone, Debug, Serialize)]
pub struct StepSpeed {
    /// What was timed.
    pub step: StepKind,
    /// Sequences of a batch.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Tokens of a step over the median step's seconds.
    pub tokens_per_s: f64,
}

impl StepSpeed {
    /// The speed of steps that took `seconds`; the first one, which warms up, does not count.
    ///
    /// # Errors
    /// [`TrainError::Argument`] without two steps.
    pub fn of(step: StepKind, shape: StepShape, mut seconds: Vec<f64>) -> Result<Self> {
        let Some((_, counted)) = seconds.split_first_mut().filter(|(_, counted)| !counted.is_empty()) else {
            return Err(TrainError::Argument(
                "a speed needs two steps, of which the first one warms up".into(),
            ));
        };
        counted.sort_by(f64::total_cmp);
        let StepShape { sequences, seq_len, .. } = shape;
        let tokens_per_s = (sequences * seq_len) as f64 / counted[counted.len() / 2];
        Ok(Self { step, sequences, seq_len, tokens_per_s })
    }
}

/// `count` random tokens.
pub fn random_tokens(config: &ModelConfig, count: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..config.vocab as u32)).collect()
}

/// Seconds of each step of one kind. `go_on` is asked before every step, with the seconds of the one before, whether it shall follow.
///
/// # Errors
/// [`TrainError::Argument`] for empty batches, and whatever `go_on` or training refuses.
pub fn time_steps(
    exec: &Exec,
    contestant: Contestant<'_>,
    shape: StepShape,
    go_on: &mut dyn FnMut(Option<f64>) -> Result<bool>,
) -> Result<Vec<f64>> {
    let StepShape { sequences, seq_len, checkpointed_layers, optimizer_in_backward, moments } = shape;
    if sequences == 0 || seq_len < 2 {
        return Err(TrainError::Argument("a timed step needs a sequence of at least 2 tokens".into()));
    }
    let config = contestant.config().clone();
    let mut seconds = Vec::new();
    let mut timed = |step: &mut dyn FnMut(&TokenBatch) -> Result<()>| -> Result<()> {
        while go_on(seconds.last().copied())? {
            let seed = seconds.len() as u64;
            let batch = TokenBatch::equal(seq_len, random_tokens(&config, sequences * seq_len, seed));
            let clock = Instant::now();
            step(&batch)?;
            seconds.push(clock.elapsed().as_secs_f64());
        }
        Ok(())
    };
    let options = HealOptions {
        base_lr_scale: 1.0,
        checkpointed_layers,
        optimizer_in_backward,
        clip: HealOptions::default_clip(optimizer_in_backward),
        moments,
        ..HealOptions::default()
    };
    let mut train = |mut trainer: Trainer<'_>, mut trained: Model| {
        timed(&mut |batch| trainer.step(&mut trained, std::slice::from_ref(batch), LR).map(drop))
    };
    match contestant {
        Contestant::Full(model) => {
            let options = HealOptions { stage: Stage::Continue, trainable: Trainable::All, ..options };
            let trainer = Trainer::new(exec, None, &model, &options)?;
            train(trainer, *model)?;
        }
        Contestant::Distill(hybrid, base) => {
            let options = HealOptions { trainable: Trainable::Heads, ..options };
            train(Trainer::new(exec, Some(base), hybrid, &options)?, hybrid.clone())?;
        }
        Contestant::Align(bank, base, projection_lr_scale) => {
            let mut aligner = Timed::new(exec, base, bank, projection_lr_scale)?;
            timed(&mut |batch| aligner.step(exec, batch, LR).map(drop))?;
        }
    }
    Ok(seconds)
}
