//! The model: configuration, plan and parameters put together, with its forward and backward passes.
//! Knows arithmetic order; knows nothing of files' bytes, datasets or optimizers.

mod backward;
mod batch;
mod gates;
mod intervene;
mod layout;
mod load;
mod parts;
mod suffix;
mod tokens;

pub use backward::BackwardPass;
pub use batch::Tape;
pub use gates::Gates;
pub use intervene::{Cut, CutPart, Intervention};
pub(crate) use layout::head_layout;
pub use layout::head_tensor_name;
pub(crate) use load::check_checkpoint;
pub use load::narrow;
pub use suffix::Trace;
pub use tokens::{RoundedSequences, TokenBatch};

use crate::error::{ModelError, Result};
use crate::mixers::{BaseGroup, HeadEnv, HeadLayout, HeadTensors, HeadView};
use crate::params::{ParamId, ParamStore};
use crate::plan::HeadPlan;
use layout::Layout;
use std::sync::Arc;
use weights::ModelConfig;

/// A base or hybrid model.
///
/// `config` and `plan` are for reading: names and shapes are resolved when the model is made. Another plan is another
/// model, [`with_plan`](Self::with_plan). Parameter values may be written.
#[derive(Clone)]
pub struct Model {
    /// Normalised configuration.
    pub config: ModelConfig,
    /// Which group is what.
    pub plan: HeadPlan,
    /// All parameters by name: Hugging Face names, plus `model.layers.{l}.self_attn.recurrent.{g}.{tensor}` for the new tensors of
    /// converted groups. Projections of converted groups stay inside the original `q_proj`… tensors as well.
    pub params: ParamStore,
    /// Most tokens of one sequence, the configuration's `max_context` unless raised by the caller.
    pub context_limit: usize,
    layout: Arc<Layout>,
}

/// Another plan over a model's parameters, with everything that follows from it; see [`Model::resolve`].
#[derive(Clone)]
pub struct ResolvedPlan {
    plan: HeadPlan,
    layout: Arc<Layout>,
    /// Parameters in the store that it was resolved for.
    params: usize,
}

impl ResolvedPlan {
    /// The plan.
    pub fn plan(&self) -> &HeadPlan {
        &self.plan
    }
}

impl Model {
    /// Puts a model together. `params` may hold more than the model needs.
    ///
    /// # Errors
    /// [`ModelError::Weights`] or [`ModelError::Plan`] for a configuration or plan that is not valid;
    /// [`ModelError::Param`] for a missing parameter or a wrong shape.
    pub fn from_parts(config: ModelConfig, plan: HeadPlan, params: ParamStore) -> Result<Self> {
        config.validate()?;
        plan.validate(&config)?;
        let layout = Arc::new(Layout::resolve(&config, &plan, &params)?);
        let context_limit = config.max_context;
        Ok(Self { config, plan, params, context_limit, layout })
    }

    /// The same weights under another plan. `heads(layer, group)` gives the tensors of each converted group (empty list for
    /// training-free local mixers). Untouched parameters are shared.
    ///
    /// # Errors
    /// [`ModelError::Plan`] when the plan does not fit; [`ModelError::Param`] when a given tensor does not; whatever
    /// `heads` returns.
    pub fn with_plan(
        &self,
        plan: HeadPlan,
        heads: &mut dyn FnMut(usize, usize) -> Result<HeadTensors>,
    ) -> Result<Self> {
        plan.validate(&self.config)?;
        let mut params = ParamStore::default();
        for (_, param) in self.params.iter().filter(|(_, p)| !layout::is_head_tensor(&p.name)) {
            params.share(param);
        }
        if let Some(head) = head_layout(&self.config, &plan) {
            let infos = head.tensors();
            for layer in 0..self.config.layers {
                for group in (0..self.config.kv_heads).filter(|&g| plan.is_converted(layer, g)) {
                    let HeadTensors { values } = heads(layer, group)?;
                    for (i, info) in infos.iter().enumerate() {
                        let name = head_tensor_name(layer, group, info.name);
                        check_values(&name, &info.shape, values.get(i))?;
                    }
                    if values.len() > infos.len() {
                        return Err(ModelError::Plan(format!(
                            "layer {layer} group {group} got {} tensors, its mixer has {}",
                            values.len(),
                            infos.len()
                        )));
                    }
                    for (info, data) in infos.iter().zip(values) {
                        params.insert(head_tensor_name(layer, group, info.name), info.shape.clone(), data);
                    }
                }
            }
        }
        let mut model = Self::from_parts(self.config.clone(), plan, params)?;
        model.context_limit = self.context_limit;
        Ok(model)
    }

    /// Prepares another plan over the same parameters, for [`swap_plan`](Self::swap_plan). They must hold the heads of all groups that it
    /// converts.
    ///
    /// # Errors
    /// As [`from_parts`](Self::from_parts).
    pub fn resolve(&self, plan: HeadPlan) -> Result<ResolvedPlan> {
        plan.validate(&self.config)?;
        let layout = Arc::new(Layout::resolve(&self.config, &plan, &self.params)?);
        Ok(ResolvedPlan { plan, layout, params: self.params.len() })
    }

    /// Exchanges this model's plan for `other`, in constant time and without touching a parameter. Heads of groups that the new plan keeps
    /// stay among the parameters; nothing reads them until the plans are exchanged again.
    ///
    /// # Panics
    /// When `other` was resolved for a model with another number of parameters.
    pub fn swap_plan(&mut self, other: &mut ResolvedPlan) {
        assert_eq!(other.params, self.params.len(), "a plan resolved for another model");
        std::mem::swap(&mut self.plan, &mut other.plan);
        std::mem::swap(&mut self.layout, &mut other.layout);
    }

    /// Sizes of converted groups; `None` when no group is converted.
    pub fn head_layout(&self) -> Option<HeadLayout> {
        self.layout.head
    }

    /// The tensors of a converted group, cloned; `None` for a kept group.
    pub fn head_tensors(&self, layer: usize, group: usize) -> Option<HeadTensors> {
        self.plan.is_converted(layer, group).then(|| {
            let ids = self.head_param_ids(layer, group);
            HeadTensors { values: ids.iter().map(|&id| self.params.data(id).to_vec()).collect() }
        })
    }

    /// Parameters of a converted group in [`HeadLayout::tensors`] order; empty for a kept group.
    pub fn head_param_ids(&self, layer: usize, group: usize) -> &[ParamId] {
        &self.layout.layers[layer].heads[group]
    }

    /// `head_dim / 2` RoPE frequencies, in radians per position.
    pub fn inv_freq(&self) -> &[f64] {
        &self.layout.inv_freq
    }

    /// The pretrained projections and norms of a group, kept or converted.
    pub fn base_group(&self, layer: usize, group: usize) -> BaseGroup<'_> {
        let ModelConfig { d_model, head_dim, rms_eps, .. } = self.config;
        let q_rows = self.config.group_size() * head_dim;
        let ids = &self.layout.layers[layer];
        let rows = |id, rows: usize, width: usize| {
            &self.params.data(id)[group * rows * width..(group + 1) * rows * width]
        };
        BaseGroup {
            q_proj: rows(ids.q, q_rows, d_model),
            k_proj: rows(ids.k, head_dim, d_model),
            v_proj: rows(ids.v, head_dim, d_model),
            q_bias: ids.q_bias.map(|id| rows(id, q_rows, 1)),
            k_bias: ids.k_bias.map(|id| rows(id, head_dim, 1)),
            v_bias: ids.v_bias.map(|id| rows(id, head_dim, 1)),
            q_norm: ids.q_norm.map(|id| self.params.data(id)),
            k_norm: ids.k_norm.map(|id| self.params.data(id)),
            norm_eps: rms_eps,
        }
    }

    /// What the passes of a converted group read; `None` for a kept group.
    pub fn head_env(&self, layer: usize, group: usize) -> Option<HeadEnv<'_>> {
        let layout = self.layout.head.filter(|_| self.plan.is_converted(layer, group))?;
        let values = self.head_param_ids(layer, group).iter().map(|&id| self.params.data(id)).collect();
        Some(HeadEnv {
            layout,
            weights: HeadView { values },
            base: self.base_group(layer, group),
            inv_freq: &self.layout.inv_freq,
        })
    }

    /// Ids within the vocabulary, and `end` positions within the limit.
    fn check_tokens(&self, tokens: &[u32], pos0: usize, end: usize) -> Result<()> {
        let vocab = self.config.vocab;
        if end > self.context_limit {
            return Err(ModelError::Context { requested: end, limit: self.context_limit });
        }
        match tokens.iter().position(|&t| t as usize >= vocab) {
            Some(i) => Err(ModelError::Token { token: tokens[i], position: pos0 + i, vocab }),
            None => Ok(()),
        }
    }
}

fn check_values(name: &str, shape: &[usize], values: Option<&Vec<f32>>) -> Result<()> {
    let wrong = |found| Err(ModelError::Param { name: name.into(), expected: shape.to_vec(), found });
    match values {
        None => wrong("nothing".into()),
        Some(v) if v.len() != shape.iter().product::<usize>() => wrong(format!("{} values", v.len())),
        Some(v) => match v.iter().position(|x| !x.is_finite()) {
            Some(i) => wrong(format!("a non-finite value at index {i}")),
            None => Ok(()),
        },
    }
}
