//! The base model's side of surgery: its groups' projections, straight from a checkpoint, and fresh heads made of them.

use crate::HeadsReport;
use crate::error::{Result, SurgeryError};
use model::ModelConfig;
use model::mixers::{self, BaseGroup, HeadLayout, HeadTensors};
use model::plan::PlanModel;
use weights::{Checkpoint, WeightsError};

/// Mean distance (tokens) assumed for every head when no statistics are given.
pub const DEFAULT_MEAN_DISTANCE: f32 = 16.0;

/// Refuses what was made for another model.
///
/// # Errors
/// [`SurgeryError::Argument`] with both descriptions.
pub fn check_model(what: &str, found: &PlanModel, config: &ModelConfig) -> Result<()> {
    let expected = PlanModel::of(config);
    if *found == expected {
        return Ok(());
    }
    Err(SurgeryError::Argument(format!(
        "{what} is for another model: it has {found}, this model has {expected}\nhint: make it anew for this model"
    )))
}

/// Attention projections and norms of one layer, read from a checkpoint.
pub struct BaseLayer<'a> {
    config: &'a ModelConfig,
    q_proj: Vec<f32>,
    k_proj: Vec<f32>,
    v_proj: Vec<f32>,
    q_bias: Option<Vec<f32>>,
    k_bias: Option<Vec<f32>>,
    v_bias: Option<Vec<f32>>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
}

impl<'a> BaseLayer<'a> {
    /// Reads the projections of `layer`.
    ///
    /// # Errors
    /// [`WeightsError`] when the checkpoint lacks one, it holds NaN or has another shape.
    pub fn read(checkpoint: &'a Checkpoint, layer: usize) -> Result<Self> {
        let config = &checkpoint.config;
        let (d_model, head_dim) = (config.d_model, config.head_dim);
        let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
        let get = |name: &str, shape: &[usize]| {
            read_tensor(checkpoint, &format!("model.layers.{layer}.self_attn.{name}"), shape)
        };
        let bias = |name: &str, rows: usize| config.qkv_bias.then(|| get(name, &[rows])).transpose();
        let norm = |name: &str| config.qk_norm.then(|| get(name, &[head_dim])).transpose();
        Ok(Self {
            config,
            q_proj: get("q_proj.weight", &[q, d_model])?,
            k_proj: get("k_proj.weight", &[kv, d_model])?,
            v_proj: get("v_proj.weight", &[kv, d_model])?,
            q_bias: bias("q_proj.bias", q)?,
            k_bias: bias("k_proj.bias", kv)?,
            v_bias: bias("v_proj.bias", kv)?,
            q_norm: norm("q_norm.weight")?,
            k_norm: norm("k_norm.weight")?,
        })
    }
    /// The rows of KV group `group`.
    pub fn group(&self, group: usize) -> BaseGroup<'_> {
        let config = self.config;
        let (q_dim, kv_dim) = (config.group_size() * config.head_dim, config.head_dim);
        let d_model = config.d_model;
        BaseGroup {
            q_proj: part(&self.q_proj, group, q_dim * d_model),
            k_proj: part(&self.k_proj, group, kv_dim * d_model),
            v_proj: part(&self.v_proj, group, kv_dim * d_model),
            q_bias: self.q_bias.as_deref().map(|b| part(b, group, q_dim)),
            k_bias: self.k_bias.as_deref().map(|b| part(b, group, kv_dim)),
            v_bias: self.v_bias.as_deref().map(|b| part(b, group, kv_dim)),
            q_norm: self.q_norm.as_deref(),
            k_norm: self.k_norm.as_deref(),
            norm_eps: config.rms_eps,
        }
    }
}

/// The `index`-th run of `len` values.
fn part(values: &[f32], index: usize, len: usize) -> &[f32] {
    &values[index * len..(index + 1) * len]
}

fn read_tensor(checkpoint: &Checkpoint, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
    let values = checkpoint.tensors.read_f32(name)?;
    match checkpoint.tensors.info(name) {
        Some(info) if info.shape == expected => Ok(values),
        info => Err(WeightsError::Shape {
            name: name.to_string(),
            expected: expected.to_vec(),
            found: info.map_or_else(Vec::new, |info| info.shape.clone()),
        }
        .into()),
    }
}

/// Fresh tensors of one group: attention-initialised or random as [`mixers::init`] says, with decays from the mean distances that
/// `heads` measured (else [`DEFAULT_MEAN_DISTANCE`]). Every group has its own seed, derived from `seed`.
pub fn fresh_head(
    layout: &HeadLayout,
    base: &BaseGroup<'_>,
    heads: Option<&HeadsReport>,
    (layer, group): (usize, usize),
    seed: u64,
) -> HeadTensors {
    let q_heads = layout.dims.q_heads;
    let distances = match heads {
        Some(heads) => heads.layers[layer].heads[group * q_heads..(group + 1) * q_heads]
            .iter()
            .map(|head| head.mean_distance as f32)
            .collect(),
        None => vec![DEFAULT_MEAN_DISTANCE; q_heads],
    };
    mixers::init(layout, base, &distances, group_seed(seed, layer, group))
}

/// One step of SplitMix64 over the indices: groups draw from unrelated streams.
fn group_seed(seed: u64, layer: usize, group: usize) -> u64 {
    let mut z = seed.wrapping_add(
        (((layer as u64) << 32) | group as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    );
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
