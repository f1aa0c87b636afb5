//! Which configurations a comparison has, and the plan of each. Knows scores and budgets; runs nothing.

use super::{CompareOptions, Hybrid, Inputs, Settings};
use crate::error::{EvalError, Result};
use model::plan::PlanCriterion;
use model::{Dropped, HeadPlan, MixerSpec};
use serde::{Deserialize, Serialize};
use std::fmt;
use surgery::criteria::{self, Scores};
use surgery::select::{self, DUO_SINKS, DUO_WINDOW, SelectOptions};

/// What stands in the chosen groups, or a baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// A window and sinks, training-free.
    Window,
    /// The same, with the tokens behind the window averaged to one (RazorAttention's compensation token).
    WindowAveraged,
    /// The trained heads of the bank.
    Bank,
    /// Streaming heads of DuoAttention: 64 sinks and a window of 256.
    DuoAttention,
    /// Every group behind one window, as large as the cache of the budget allows; chooses no groups.
    StreamingLlm,
    /// Layers whose output is most like their input are left out until the cache fits the budget; chooses no groups.
    SkippedLayers,
    /// A finished hybrid that was given.
    Hybrid,
}

impl Method {
    /// All that a comparison makes itself, in the order of results.
    pub const ALL: [Self; 6] = [
        Self::Window,
        Self::WindowAveraged,
        Self::Bank,
        Self::DuoAttention,
        Self::StreamingLlm,
        Self::SkippedLayers,
    ];

    /// The name used in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::WindowAveraged => "window-averaged",
            Self::Bank => "bank",
            Self::DuoAttention => "duo-attention",
            Self::StreamingLlm => "streaming-llm",
            Self::SkippedLayers => "skipped-layers",
            Self::Hybrid => "hybrid",
        }
    }

    /// Whether a criterion chooses its groups.
    pub fn chooses(self) -> bool {
        !matches!(self, Self::StreamingLlm | Self::SkippedLayers | Self::Hybrid)
    }
}

/// One model of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Configuration {
    /// What stands in the chosen groups.
    pub method: Method,
    /// What chose them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criterion: Option<String>,
    /// Seed of `random`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Name of a finished hybrid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hybrid: Option<String>,
    /// SHA-256 of its plan and tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Budget: the share of groups converted, or the share whose cache a baseline without a choice gets.
    pub beta: f64,
}

impl Configuration {
    /// Method, criterion and draw, or the name of a hybrid: what is one line over the budgets.
    pub fn series(&self) -> String {
        if let Some(name) = &self.hybrid {
            return name.clone();
        }
        let mut name = self.method.name().to_string();
        if let Some(criterion) = &self.criterion {
            name = format!("{name}, {criterion}");
        }
        match self.seed {
            Some(seed) => format!("{name} {seed}"),
            None => name,
        }
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, β {}", self.series(), self.beta)
    }
}

/// Makes plans.
pub(super) struct Planner<'a> {
    inputs: &'a Inputs<'a>,
    options: &'a CompareOptions,
    settings: &'a Settings,
    /// By criterion; of `random`, its first draw.
    scores: Vec<(String, Scores)>,
}

impl<'a> Planner<'a> {
    /// Reads the scores and checks what can be checked before anything runs.
    pub fn new(inputs: &'a Inputs<'a>, options: &'a CompareOptions, settings: &'a Settings) -> Result<Self> {
        let bad = |reason: String| Err(EvalError::Argument(reason));
        if let Some(beta) = options.betas.iter().find(|beta| !(0.0..=1.0).contains(*beta)) {
            return bad(format!("beta {beta} must be between 0 and 1"));
        }
        if options.methods.contains(&Method::Bank) && inputs.bank.is_none() {
            return bad(
                "the method bank needs a head bank\nhint: give --bank, or leave the method out".into()
            );
        }
        if !inputs.model.plan.is_base() {
            return bad("the model is a hybrid already\nhint: compare conversions of its base".into());
        }
        let scores = options
            .criteria
            .iter()
            .map(|name| Ok((name.clone(), criteria::scores(name, inputs.heads, inputs.bank, settings.seed)?)))
            .collect::<Result<_>>()?;
        let names: Vec<&str> = inputs.hybrids.iter().map(|hybrid| hybrid.name.as_str()).collect();
        if let Some(name) = names.iter().enumerate().find_map(|(i, n)| names[..i].contains(n).then_some(n)) {
            return bad(format!("two hybrids are named {name}\nhint: give each a name of its own"));
        }
        if let Some(hybrid) = inputs.hybrids.iter().find(|hybrid| hybrid.betas(&options.betas).is_empty()) {
            return bad(format!(
                "{} was trained for none of the budgets asked for\nhint: ask for one of its own, which `inspect` shows",
                hybrid.name
            ));
        }
        let planner = Self { inputs, options, settings, scores };
        // A budget that no plan can meet should say so now.
        for configuration in planner.configurations() {
            planner.plan(&configuration)?;
        }
        Ok(planner)
    }

    /// All of them; no two are equal.
    pub fn configurations(&self) -> Vec<Configuration> {
        let mut list: Vec<Configuration> = Vec::new();
        for &method in &self.options.methods {
            let mut chosen: Vec<(Option<String>, Option<u64>)> = Vec::new();
            if !method.chooses() {
                chosen.push((None, None));
            } else {
                for name in &self.options.criteria {
                    if name == "random" {
                        let draws = (0..self.options.random_draws).map(|i| self.settings.seed + i);
                        chosen.extend(draws.map(|seed| (Some(name.clone()), Some(seed))));
                    } else {
                        chosen.push((Some(name.clone()), None));
                    }
                }
            }
            for (criterion, seed) in chosen {
                for &beta in &self.options.betas {
                    let criterion = criterion.clone();
                    let configuration =
                        Configuration { method, criterion, seed, hybrid: None, sha256: None, beta };
                    if !list.contains(&configuration) {
                        list.push(configuration);
                    }
                }
            }
        }
        for hybrid in self.inputs.hybrids {
            list.extend(hybrid.betas(&self.options.betas).into_iter().map(|beta| Configuration {
                method: Method::Hybrid,
                criterion: None,
                seed: None,
                hybrid: Some(hybrid.name.clone()),
                sha256: Some(hybrid.sha256().into()),
                beta,
            }));
        }
        list
    }

    /// The finished hybrid that a configuration names.
    pub fn hybrid(&self, configuration: &Configuration) -> Option<&'a Hybrid> {
        let name = configuration.hybrid.as_ref()?;
        self.inputs.hybrids.iter().find(|hybrid| hybrid.name == *name)
    }

    /// Which group is what in a configuration.
    pub fn plan(&self, configuration: &Configuration) -> Result<HeadPlan> {
        let Configuration { method, criterion, seed, beta, .. } = configuration;
        if let Some(hybrid) = self.hybrid(configuration) {
            return hybrid.plan(*beta);
        }
        let config = &self.inputs.model.config;
        let Some(name) = criterion else {
            let tokens = self.settings.context;
            let bytes = select::budget_bytes(config, *beta, self.budget_mixer(), tokens)?;
            if *method == Method::SkippedLayers {
                let heads = self.inputs.heads;
                let similarity = heads.similarity().ok_or_else(|| {
                    EvalError::Argument(
                        "the head statistics hold no similarities of layers\nhint: analyze again, or leave the method skipped-layers out".into(),
                    )
                })?;
                return Ok(select::skipping(config, &similarity, heads.tokens, bytes, tokens)?);
            }
            let sinks = select::STREAMING_SINKS;
            let window = select::streaming_window(config, bytes, sinks)?;
            return Ok(select::streaming(config, window, sinks)?);
        };
        let drawn;
        let scores = match seed {
            Some(seed) => {
                drawn = criteria::scores(name, self.inputs.heads, self.inputs.bank, *seed)?;
                &drawn
            }
            None => &self.scores.iter().find(|(n, _)| n == name).expect("scores of every criterion").1,
        };
        let heads = self.inputs.heads;
        let criterion = PlanCriterion {
            name: name.clone(),
            tokens: heads.tokens,
            bank_sha256: None,
            data_sha256: Some(heads.data_sha256.clone()),
            seed: *seed,
        };
        let mixer = self.mixer(*method);
        let options = SelectOptions { beta: *beta, keep_at_least_per_layer: 0, mixer, criterion };
        Ok(select::select(config, scores, &options)?)
    }

    fn mixer(&self, method: Method) -> MixerSpec {
        let own = select::window_only(self.settings.window, self.settings.sinks);
        match method {
            Method::Window | Method::StreamingLlm | Method::SkippedLayers | Method::Hybrid => own,
            Method::WindowAveraged => MixerSpec { dropped: Dropped::Averaged, ..own },
            Method::Bank => self.inputs.bank.map_or(own, |bank| bank.info.spec),
            Method::DuoAttention => select::window_only(DUO_WINDOW, DUO_SINKS),
        }
    }

    /// Of the hybrid whose cache a baseline without a choice gets: the bank's heads, else the windows.
    fn budget_mixer(&self) -> MixerSpec {
        self.mixer(if self.inputs.bank.is_some() { Method::Bank } else { Method::Window })
    }

    /// Every criterion's scores over all groups.
    pub fn flat_scores(&self) -> Vec<(String, Vec<f64>)> {
        self.scores.iter().map(|(name, scores)| (name.clone(), scores.concat())).collect()
    }
}
