//! Recipes: every setting of every stage from a base model to a healed hybrid, as data, and the one function that runs the stages.
//! Knows stages and the files between them; knows nothing of command lines, comparisons or reports.

mod record;
mod run;
#[cfg(test)]
mod tests;

pub use record::{Losses, Record, StageReport, StageResult};
pub use run::{Files, Numbering, Outcome, Run, publish, run};

use crate::align::AlignOptions;
use crate::error::{Result, TrainError};
use crate::heal::{HealOptions, Stage, Trainable};
use model::plan::groups_at;
use model::{Dropped, MixerSpec, ModelConfig, ModelError, RecurrentKind};
use serde::{Deserialize, Serialize};
use surgery::criteria;

/// Every setting of the way from a base model to a healed hybrid. Not in it: the models and the [`Budget`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Its name.
    pub name: &'static str,
    /// The text it is meant for, names that [`crate::data::DataSource::parse`] reads; other text may be given.
    pub text: &'static [&'static str],
    /// Seeds of everything that is drawn.
    pub seeds: Seeds,
    /// How heads are measured.
    pub analyze: Analyze,
    /// What converted groups become.
    pub mixer: Mixer,
    /// How replacements are trained before any is chosen; none: the hybrid starts with fresh heads.
    pub align: Option<Align>,
    /// How groups are chosen, a name of [`criteria::NAMES`].
    pub criterion: &'static str,
    /// How the hybrid is trained.
    pub heal: Heal,
}

/// Seeds of the stages, all from one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seeds {
    /// Text and labels of `analyze`, starting values of heads, text of `align` and its held-out part, criterion `random`, budgets of an elastic
    /// `heal`.
    pub main: u64,
    /// Text of `mixer-fisher`.
    pub fisher: u64,
    /// Text of `heal`.
    pub heal: u64,
}

/// Settings of `analyze`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Analyze {
    /// Tokens to measure on.
    pub tokens: usize,
    /// Most tokens of a sequence.
    pub context: usize,
}

/// A mixer, for heads of any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Mixer {
    /// Recurrent part.
    pub recurrent: RecurrentKind,
    /// Tokens of the local window; 0: none.
    pub window: usize,
    /// First tokens the window always sees.
    pub sinks: usize,
    /// What becomes of tokens behind the window.
    pub dropped: Dropped,
}

/// Settings of `align`, beside those of the optimiser that [`AlignOptions`] explains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "fields named as in AlignOptions mean the same")]
pub struct Align {
    pub tokens: u64,
    /// Tokens of a training item.
    pub context: usize,
    pub tokens_per_step: usize,
    pub lr: f32,
    pub projection_lr_scale: f32,
    pub warmup: u64,
    pub final_lr: f32,
    pub clip: f32,
    /// Most tokens of a sequence that something is measured on.
    pub measure_context: usize,
    /// Items of that length to measure the error on.
    pub heldout_items: usize,
    /// Items of that length for `mixer-fisher`.
    pub fisher_items: usize,
}

/// Settings of `heal`, beside those of the optimiser that [`HealOptions`] explains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "fields named as in HealOptions mean the same")]
pub struct Heal {
    pub stage: Stage,
    pub trainable: Trainable,
    pub tokens: u64,
    /// Tokens of a training item.
    pub context: usize,
    pub batch: usize,
    pub accumulate: usize,
    pub lr: f32,
    pub projection_lr_scale: f32,
    pub base_lr_scale: f32,
    pub betas: (f32, f32),
    pub weight_decay: f32,
    pub warmup: u64,
    pub final_lr: f32,
    pub clip: f32,
}

/// This project's recipe: aligned heads beside a window, chosen by what they cost, then distilled.
///
/// | Setting | Why |
/// |---|---|
/// | `english-mixed` and retrieval texts of 256, 512 and 1,024 tokens | without text that retrieves, passkeys are lost at contexts whose length training never showed (`docs/log`) |
/// | analyze 6,144 tokens | gives the starting decays only; what `docs/results.md` used |
/// | gated-delta beside a window of 192 and one sink | the state takes the cache of 64 tokens, so the window can be three times as large as beside mamba2 at the same bytes: a third of the KL after the same tokens (`docs/log`); without the sink it fails |
/// | dropped tokens weighed | the recurrence speaks with the share of the softmax that the window lacks: a third less KL than added to it (`docs/log`) |
/// | align 1,048,576 tokens in items of 1,024 | `docs/results.md` |
/// | 1,024 tokens a step, peak 8e-3, 10 steps of warm-up, cosine to 5 %, clip 1 | defaults of `align`, whose rates were searched: half of it is worse, 2e-3 is far too low |
/// | copied projections at a twentieth of that | the window reads them too; at half the rate they undo more of the window than the recurrence gains (three times the KL at β 0.5) |
/// | measured on 4 items of 1,024 each | `align`'s default of 4,096 tokens |
/// | mixer-fisher, over all layers | ranks trained heads by what their own error costs: the best choice measured at every β; to keep a group in every layer doubles the KL (`docs/log`) |
/// | distil, KL only, new heads only | a share of next-token loss lowers perplexity by adapting to the text, and moves away from the base; so does training all weights; norms and low-rank terms change nothing (`docs/log`) |
/// | 245,760 tokens in items of 1,024, batch 1, peak 5e-4 | 240 steps, 80 for each of three budgets; with fewer tokens a lower peak is better, and 2e-3 undoes part of what `align` reached (`docs/log`) |
/// | 10 steps of warm-up, cosine to 10 %, AdamW (0.9, 0.95), no decay, clip 1, copied projections at 0.03 | defaults of `heal` |
pub const DEFAULT: Recipe = Recipe {
    name: "default",
    text: &["english-mixed", "retrieval:context=256", "retrieval:context=512", "retrieval:context=1024"],
    seeds: Seeds::new(0),
    analyze: Analyze { tokens: 6_144, context: 1024 },
    mixer: Mixer { recurrent: RecurrentKind::GatedDelta, window: 192, sinks: 1, dropped: Dropped::Weighed },
    align: Some(ALIGN),
    criterion: "mixer-fisher",
    heal: Heal {
        stage: Stage::Distill { kl: 1.0, ce: 0.0 },
        trainable: Trainable::Heads,
        tokens: 245_760,
        context: 1024,
        batch: 1,
        accumulate: 1,
        lr: 5e-4,
        projection_lr_scale: 0.03,
        base_lr_scale: 0.05,
        betas: (0.9, 0.95),
        weight_decay: 0.0,
        warmup: 10,
        final_lr: 0.1,
        clip: 1.0,
    },
};

/// The alignment of [`DEFAULT`].
pub const ALIGN: Align = Align {
    tokens: 1_048_576,
    context: 1024,
    tokens_per_step: 1024,
    lr: 8e-3,
    projection_lr_scale: 0.05,
    warmup: 10,
    final_lr: 0.05,
    clip: 1.0,
    measure_context: 1024,
    heldout_items: 4,
    fisher_items: 4,
};

/// The recipe of the paper (arXiv 2410.12850), with the number of tokens of [`DEFAULT`], to compare with it: heads chosen by how recent their attention is
/// become fresh Mamba blocks, and the whole model is trained on next tokens.
///
/// | Setting | Why |
/// |---|---|
/// | recency | the paper's criterion, here by budget instead of a threshold, since groups are converted whole |
/// | mamba without a window | the paper's block, drawn anew; no align, so heads start fresh |
/// | `continue`, all weights | the paper's continual training |
/// | 1,294,336 tokens | what [`DEFAULT`] spends on align and heal together |
/// | batches of 2 items of 512, peak 2e-3 for the new blocks and 1e-4 for reused weights | not the paper's: defaults of `heal`; fresh blocks need the higher rate, pretrained weights do not bear it |
/// | text, analyze, other settings | as in [`DEFAULT`] |
pub const PAPER: Recipe = Recipe {
    name: "paper",
    mixer: Mixer { recurrent: RecurrentKind::Mamba, window: 0, sinks: 0, dropped: Dropped::Forgotten },
    align: None,
    criterion: "recency",
    heal: Heal {
        stage: Stage::Continue,
        trainable: Trainable::All,
        tokens: 1_294_336,
        context: 512,
        batch: 2,
        lr: 2e-3,
        ..DEFAULT.heal
    },
    ..DEFAULT
};

impl Seeds {
    /// The seeds that follow from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { main: seed, fisher: seed ^ 1, heal: seed ^ 2 }
    }
}

impl Mixer {
    /// Its specification for a model.
    pub fn spec(self, config: &ModelConfig) -> MixerSpec {
        let spec = MixerSpec::of(self.recurrent, self.window, self.sinks, config.head_dim);
        MixerSpec { dropped: self.dropped, ..spec }
    }

    /// The same beside another window; without one (0) there are neither sinks nor dropped tokens.
    pub fn beside(self, window: usize) -> Self {
        match window {
            0 => Self { window, sinks: 0, dropped: Dropped::Forgotten, ..self },
            _ => Self { window, ..self },
        }
    }
}

impl Recipe {
    /// Tokens of `align` and `heal` together.
    pub fn tokens(&self) -> u64 {
        self.align.map_or(0, |align| align.tokens) + self.heal.tokens
    }

    /// The recipe with `tokens` in all, shared out between `align` and `heal` as before.
    ///
    /// # Errors
    /// [`TrainError::Argument`] when a stage would get less than a step.
    pub fn scaled(mut self, tokens: u64) -> Result<Self> {
        let before = self.tokens().max(1);
        let mut rest = tokens;
        if let Some(align) = &mut self.align {
            align.tokens = (u128::from(align.tokens) * u128::from(tokens) / u128::from(before)) as u64;
            rest -= align.tokens;
        }
        self.heal.tokens = rest;
        let align = self.align.map(|a| ("align", a.tokens, a.tokens_per_step.max(a.context)));
        let heal = ("heal", rest, self.heal.context * self.heal.batch * self.heal.accumulate);
        match align.into_iter().chain([heal]).find(|&(_, tokens, step)| tokens < step as u64) {
            None => Ok(self),
            Some((stage, of_stage, step)) => Err(TrainError::Argument(format!(
                "{tokens} tokens leave {of_stage} to {stage}, less than a step of {step}\nhint: give more tokens; recipe {} is meant for {before}",
                self.name
            ))),
        }
    }

    /// The recipe with every context cut to `max_context`, the longest that the model can read.
    pub fn fitted(mut self, max_context: usize) -> Self {
        let contexts = [&mut self.analyze.context, &mut self.heal.context]
            .into_iter()
            .chain(self.align.iter_mut().flat_map(|a| [&mut a.context, &mut a.measure_context]));
        contexts.for_each(|context| *context = max_context.min(*context));
        self
    }

    /// Checks that the recipe can be carried out on a model.
    ///
    /// # Errors
    /// [`TrainError::Argument`] naming the setting, [`TrainError::Model`] for the mixer.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let bad = |reason: String| Err(TrainError::Argument(format!("recipe {}: {reason}", self.name)));
        self.mixer.spec(config).validate(config.head_dim)?;
        if criteria::find(self.criterion)?.source.needs_bank() && self.align.is_none() {
            return bad(format!(
                "criterion {} is measured on aligned heads, and nothing is aligned",
                self.criterion
            ));
        }
        let align =
            self.align.iter().flat_map(|a| [("align", a.context), ("align, measuring", a.measure_context)]);
        let contexts =
            [("analyze", self.analyze.context), ("heal", self.heal.context)].into_iter().chain(align);
        let spec = self.mixer.spec(config);
        if let Some(align) = self.align.filter(|align| spec.is_exact_over(align.context)) {
            return bad(format!(
                "the context of align is {}, and window and sinks ({} + {} tokens) show all of it: there is nothing to learn",
                align.context, spec.window, spec.sinks
            ));
        }
        for (stage, context) in contexts {
            if context < 2 || context > config.max_context {
                return bad(format!(
                    "the context of {stage} is {context}, expected 2 to the model's {}",
                    config.max_context
                ));
            }
        }
        Ok(())
    }
}

impl Align {
    /// The settings as options; text and files are left open.
    pub fn options(&self) -> AlignOptions {
        let Self { tokens, tokens_per_step, lr, projection_lr_scale, warmup, final_lr, clip, .. } = *self;
        AlignOptions {
            tokens,
            tokens_per_step,
            lr,
            projection_lr_scale,
            warmup,
            final_lr,
            clip,
            ..AlignOptions::default()
        }
    }
}

impl Heal {
    /// The settings as options; budgets, seed and files are left open.
    pub fn options(&self) -> HealOptions {
        HealOptions {
            stage: self.stage,
            trainable: self.trainable,
            tokens: self.tokens,
            batch: self.batch,
            accumulate: self.accumulate,
            lr: self.lr,
            projection_lr_scale: self.projection_lr_scale,
            base_lr_scale: self.base_lr_scale,
            betas: self.betas,
            weight_decay: self.weight_decay,
            warmup: self.warmup,
            final_lr: self.final_lr,
            clip: self.clip,
            ..HealOptions::default()
        }
    }
}

/// Share of the KV groups to convert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Budget {
    /// One.
    Beta(f64),
    /// Several, which one checkpoint is trained for together; the largest is the plan's.
    Elastic(Vec<f64>),
}

impl Budget {
    /// The plan's share.
    pub fn beta(&self) -> f64 {
        match self {
            Self::Beta(beta) => *beta,
            Self::Elastic(betas) => betas.iter().copied().fold(f64::NAN, f64::max),
        }
    }

    /// The shares of an elastic run; none for a single one.
    pub fn elastic(&self) -> &[f64] {
        match self {
            Self::Beta(_) => &[],
            Self::Elastic(betas) => betas,
        }
    }

    /// Checks the shares before anything is trained for them.
    ///
    /// # Errors
    /// [`ModelError::Budget`] for one outside 0..=1, one that converts nothing, and two that convert the same groups;
    /// [`TrainError::Argument`] when there is none.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let mut betas = match self {
            Self::Beta(beta) => vec![*beta],
            Self::Elastic(betas) => betas.clone(),
        };
        betas.sort_by(f64::total_cmp);
        if betas.is_empty() {
            return Err(TrainError::Argument("an elastic run needs at least one beta".into()));
        }
        let bad = |beta, reason: &str| Err(ModelError::Budget { beta, reason: reason.into() }.into());
        let mut before = 0;
        for beta in betas {
            if !(0.0..=1.0).contains(&beta) {
                return bad(beta, "expected a share between 0 and 1");
            }
            match groups_at(beta, config.layers * config.kv_heads) {
                0 => {
                    return bad(
                        beta,
                        "no group is converted, so there is nothing to heal\nhint: choose a larger one",
                    );
                }
                same if same == before => {
                    return bad(
                        beta,
                        "it converts the same groups as a smaller one\nhint: name each budget once",
                    );
                }
                groups => before = groups,
            }
        }
        Ok(())
    }
}
