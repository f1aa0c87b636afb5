//! Which parameter is what: names, shapes and ids of everything a model needs, resolved once.
//! Knows configuration and plan; does no arithmetic.

use crate::error::{ModelError, Result};
use crate::mixers::HeadLayout;
use crate::params::{ParamId, ParamStore};
use crate::plan::HeadPlan;
use weights::ModelConfig;

/// Full name of a converted group's tensor, e.g. `model.layers.3.self_attn.recurrent.0.d_skip`.
pub fn head_tensor_name(layer: usize, group: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.self_attn.recurrent.{group}.{tensor}")
}

/// Whether `name` is a converted group's tensor.
pub(super) fn is_head_tensor(name: &str) -> bool {
    name.contains(".self_attn.recurrent.")
}

/// Consecutive kept groups: one GEMM each for q, k and v.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// First group.
    pub group: usize,
    /// Number of groups.
    pub groups: usize,
    /// Index of the first group among the layer's kept ones.
    pub packed: usize,
}

/// Parameters and group lists of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub input_norm: ParamId,
    pub q: ParamId,
    pub k: ParamId,
    pub v: ParamId,
    pub o: ParamId,
    pub q_bias: Option<ParamId>,
    pub k_bias: Option<ParamId>,
    pub v_bias: Option<ParamId>,
    pub q_norm: Option<ParamId>,
    pub k_norm: Option<ParamId>,
    pub post_norm: ParamId,
    pub gate: ParamId,
    pub up: ParamId,
    pub down: ParamId,
    /// Tensors per group; empty for kept groups and mixers without tensors.
    pub heads: Vec<Vec<ParamId>>,
    /// Kept groups.
    pub runs: Vec<Run>,
    /// Number of kept groups.
    pub kept: usize,
    /// Converted groups, ascending.
    pub converted: Vec<usize>,
}

/// Everything derived from configuration and plan.
#[derive(Debug)]
pub(super) struct Layout {
    pub embed: ParamId,
    pub layers: Vec<Layer>,
    pub norm: ParamId,
    /// The output projection; the embedding when tied.
    pub output: ParamId,
    pub inv_freq: Vec<f64>,
    /// Of converted groups, when there are any.
    pub head: Option<HeadLayout>,
}

/// The layout of converted groups, when there are any.
pub(crate) fn head_layout(config: &ModelConfig, plan: &HeadPlan) -> Option<HeadLayout> {
    let spec = plan.mixer?;
    (plan.converted() > 0).then(|| HeadLayout::new(spec, config))
}

/// Names and shapes of the tensors of all converted groups.
pub(super) fn head_tensor_shapes(config: &ModelConfig, plan: &HeadPlan) -> Vec<(String, Vec<usize>)> {
    let Some(layout) = head_layout(config, plan) else { return Vec::new() };
    let tensors = layout.tensors();
    let mut shapes = Vec::new();
    for layer in 0..config.layers {
        for group in (0..config.kv_heads).filter(|&g| plan.is_converted(layer, g)) {
            let named = tensors.iter().map(|t| (head_tensor_name(layer, group, t.name), t.shape.clone()));
            shapes.extend(named);
        }
    }
    shapes
}

/// Names and shapes of everything a model of this configuration and plan needs.
pub(super) fn tensor_shapes(config: &ModelConfig, plan: &HeadPlan) -> Vec<(String, Vec<usize>)> {
    let mut shapes = config.tensor_shapes();
    shapes.extend(head_tensor_shapes(config, plan));
    shapes
}

fn runs(converted: &[bool]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let kept = converted.iter().enumerate().filter(|(_, converted)| !**converted);
    for (packed, (group, _)) in kept.enumerate() {
        match runs.last_mut() {
            Some(run) if run.group + run.groups == group => run.groups += 1,
            _ => runs.push(Run { group, groups: 1, packed }),
        }
    }
    runs
}

impl Layout {
    /// Resolves names; checks that every parameter is there with its shape.
    pub fn resolve(config: &ModelConfig, plan: &HeadPlan, params: &ParamStore) -> Result<Self> {
        for (name, expected) in tensor_shapes(config, plan) {
            let found = params.id(&name).map(|id| &params.get(id).shape);
            if found != Some(&expected) {
                let found = found.map_or("nothing".into(), |shape| format!("{shape:?}"));
                return Err(ModelError::Param { name, expected, found });
            }
        }
        let id = |name: &str| params.id(name).expect("checked above");
        let head = head_layout(config, plan);
        let head_names: Vec<&str> = head.iter().flat_map(HeadLayout::tensors).map(|t| t.name).collect();
        let mut layers = Vec::with_capacity(config.layers);
        for l in 0..config.layers {
            let flags: Vec<bool> = (0..config.kv_heads).map(|g| plan.is_converted(l, g)).collect();
            let at = |name: &str| id(&format!("model.layers.{l}.{name}"));
            let bias = |name: &str| config.qkv_bias.then(|| at(name));
            let qk_norm = |name: &str| config.qk_norm.then(|| at(name));
            let head_ids = |g: usize| head_names.iter().map(|n| id(&head_tensor_name(l, g, n))).collect();
            let runs = runs(&flags);
            layers.push(Layer {
                input_norm: at("input_layernorm.weight"),
                q: at("self_attn.q_proj.weight"),
                k: at("self_attn.k_proj.weight"),
                v: at("self_attn.v_proj.weight"),
                o: at("self_attn.o_proj.weight"),
                q_bias: bias("self_attn.q_proj.bias"),
                k_bias: bias("self_attn.k_proj.bias"),
                v_bias: bias("self_attn.v_proj.bias"),
                q_norm: qk_norm("self_attn.q_norm.weight"),
                k_norm: qk_norm("self_attn.k_norm.weight"),
                post_norm: at("post_attention_layernorm.weight"),
                gate: at("mlp.gate_proj.weight"),
                up: at("mlp.up_proj.weight"),
                down: at("mlp.down_proj.weight"),
                heads: (0..flags.len()).map(|g| if flags[g] { head_ids(g) } else { Vec::new() }).collect(),
                kept: runs.iter().map(|r| r.groups).sum(),
                runs,
                converted: (0..flags.len()).filter(|&g| flags[g]).collect(),
            });
        }
        let embed = id("model.embed_tokens.weight");
        let output = if config.tie_embeddings { embed } else { id("lm_head.weight") };
        let norm = id("model.norm.weight");
        Ok(Self { embed, layers, norm, output, inv_freq: config.rope_inv_freq(), head })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_kept_groups() {
        let run = |group, groups, packed| Run { group, groups, packed };
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[true, true]), []);
        assert_eq!(runs(&[false, false, false]), [run(0, 3, 0)]);
        assert_eq!(runs(&[true, false, false, true, false]), [run(1, 2, 0), run(4, 1, 2)]);
    }
}
