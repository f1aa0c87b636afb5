//! What stands in a converted KV group: an optional local softmax window and an optional recurrence, added.
//! One group at a time; knows its own tensors and the base group's projections, nothing of other layers.
//!
//! Dimensions of a group: `G` query heads, `D` head_dim, `M` d_model, `K` d_conv, `N` d_state, `T` tokens. `x` is `[T, M]`, the layer input
//! after the norm; the output `[T, G·D]` goes through the original W_O.
//!
//! `y = local(x) + recurrent(x)`
//!
//! **Local** (window > 0): softmax attention over the last `window` tokens and the first `sinks`, RoPE and q/k norm as in the base,
//! scale `1/sqrt(D)`. For `mamba2` and `gated-delta` it uses the head's own q, k, v (before the conv); for `mamba` and `none` the base group's.
//!
//! **mamba2**: `q, k, v = x W_qᵀ, x W_kᵀ, x W_vᵀ (+ biases)`; short conv on each (no activation); q (per head) and k L2-normalised;
//! `dt = softplus(x W_dtᵀ + b_dt)` `[T, G]`, `log_a = −dt`, `b = dt · exp(x W_inᵀ + b_in)`; SSD per query head with `d_skip`;
//! output `out_gain ⊙ y ⊙ 2σ(x W_zᵀ)`. Tensors, in this order (biases only when the base has them):
//! `q_proj.weight [G·D, M]`, `k_proj.weight [D, M]`, `v_proj.weight [D, M]`, `q_proj.bias [G·D]`, `k_proj.bias [D]`, `v_proj.bias [D]`,
//! `q_conv.weight [G·D, K]`, `k_conv.weight [D, K]`, `v_conv.weight [D, K]`, `dt_proj.weight [G, M]`, `dt_proj.bias [G]`,
//! `in_scale.weight [G, M]`, `in_scale.bias [G]`, `d_skip [G]`, `gate_proj.weight [G·D, M]`, `out_gain [G·D]`.
//!
//! **gated-delta**: the same projections, convs and norms; `log_a = −softplus(x W_dtᵀ + b_dt)` `[T]`, `beta = σ(x W_βᵀ + b_β)` `[T]`; gated delta
//! rule; same gate and gain. Tensors: q/k/v projections (biases) and convs as above, `dt_proj.weight [1, M]`, `dt_proj.bias [1]`,
//! `beta_proj.weight [1, M]`, `beta_proj.bias [1]`, `gate_proj.weight [G·D, M]`, `out_gain [G·D]`.
//!
//! **mamba** (Mamba-1, `d_inner = G·D`, `R = ceil(M/16)`): `u, z = split(x W_inᵀ)`; conv with bias; SiLU; `Δ_r, B, C = split(u W_xᵀ)`;
//! `Δ = softplus(Δ_r W_Δᵀ + b_Δ)`; selective scan with `A = −exp(A_log)`, skip `D`; output `y ⊙ silu(z)`. Tensors: `in_proj.weight [2·G·D, M]`,
//! `conv.weight [G·D, K]`, `conv.bias [G·D]`, `x_proj.weight [R + 2N, G·D]`, `dt_proj.weight [G·D, R]`, `dt_proj.bias [G·D]`, `A_log [G·D, N]`, `D [G·D]`.
//!
//! **none**: no tensors.

use crate::plan::MixerSpec;
use kernels::{Exec, MatMut, MatRef};
use weights::ModelConfig;

/// Epsilon inside the root of the q/k L2 normalisation.
pub const L2_EPS: f32 = 1e-6;

/// Sizes of one KV group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadDims {
    /// Width of the layer input.
    pub d_model: usize,
    /// Query heads of the group.
    pub q_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Whether the base projections have biases (then the copied ones have, too).
    pub qkv_bias: bool,
}

/// How the optimizer should treat a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorClass {
    /// Copied q/k/v projections: reduced learning rate.
    Projection,
    /// Everything new.
    New,
}

/// Name (within the group), shape and class of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadTensorInfo {
    /// As listed in the module documentation.
    pub name: &'static str,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Optimizer class.
    pub class: TensorClass,
}

/// Values of a group's tensors, in the order of [`HeadLayout::tensors`]. Also used for their gradients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadTensors {
    /// One vector per tensor.
    pub values: Vec<Vec<f32>>,
}

/// Borrowed tensors of a group, same order.
#[derive(Clone, Debug)]
pub struct HeadView<'a> {
    /// One slice per tensor.
    pub values: Vec<&'a [f32]>,
}

impl HeadTensors {
    /// Borrows all tensors.
    pub fn view(&self) -> HeadView<'_> {
        HeadView { values: self.values.iter().map(Vec::as_slice).collect() }
    }
}

/// Spec and sizes of a converted group: everything but the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// What the group is made of.
    pub spec: MixerSpec,
    /// Its sizes.
    pub dims: HeadDims,
}

impl HeadLayout {
    /// The layout of any group of a model under `spec`.
    pub fn new(spec: MixerSpec, config: &ModelConfig) -> Self {
        let dims = HeadDims {
            d_model: config.d_model,
            q_heads: config.group_size(),
            head_dim: config.head_dim,
            qkv_bias: config.qkv_bias,
        };
        Self { spec, dims }
    }
    /// The group's tensors in order; empty for [`crate::RecurrentKind::None`].
    pub fn tensors(&self) -> Vec<HeadTensorInfo> {
        todo!()
    }
    /// Zeroed tensors (for gradients and moments).
    pub fn zeros(&self) -> HeadTensors {
        HeadTensors { values: self.tensors().iter().map(|t| vec![0.0; t.shape.iter().product()]).collect() }
    }
    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> HeadCache {
        todo!()
    }
    /// Constant cache bytes of one group.
    pub fn cache_bytes(&self) -> usize {
        todo!()
    }
}

/// The base group's projection rows and norms.
#[derive(Clone, Copy, Debug)]
pub struct BaseGroup<'a> {
    /// `[G·D, M]`.
    pub q_proj: &'a [f32],
    /// `[D, M]`.
    pub k_proj: &'a [f32],
    /// `[D, M]`.
    pub v_proj: &'a [f32],
    /// `[G·D]`.
    pub q_bias: Option<&'a [f32]>,
    /// `[D]`.
    pub k_bias: Option<&'a [f32]>,
    /// `[D]`.
    pub v_bias: Option<&'a [f32]>,
    /// `[D]`, RMS norm of each query head before RoPE (Qwen3).
    pub q_norm: Option<&'a [f32]>,
    /// `[D]`, likewise for keys.
    pub k_norm: Option<&'a [f32]>,
    /// Epsilon of those norms.
    pub norm_eps: f32,
}

/// Gradients of [`BaseGroup`]'s tensors that a head reads; same shapes, added to. `None`: not wanted.
#[derive(Debug, Default)]
pub struct BaseGroupGrads {
    /// Of `q_proj`.
    pub q_proj: Option<Vec<f32>>,
    /// Of `k_proj`.
    pub k_proj: Option<Vec<f32>>,
    /// Of `v_proj`.
    pub v_proj: Option<Vec<f32>>,
    /// Of `q_bias`.
    pub q_bias: Option<Vec<f32>>,
    /// Of `k_bias`.
    pub k_bias: Option<Vec<f32>>,
    /// Of `v_bias`.
    pub v_bias: Option<Vec<f32>>,
    /// Of `q_norm`.
    pub q_norm: Option<Vec<f32>>,
    /// Of `k_norm`.
    pub k_norm: Option<Vec<f32>>,
}

/// Everything a head's passes read besides `x`.
#[derive(Clone, Debug)]
pub struct HeadEnv<'a> {
    /// Spec and sizes.
    pub layout: HeadLayout,
    /// The head's tensors.
    pub weights: HeadView<'a>,
    /// The base group it replaces.
    pub base: BaseGroup<'a>,
    /// `head_dim / 2` RoPE frequencies.
    pub inv_freq: &'a [f64],
}

/// Constant memory of one converted group in one sequence: conv tails, recurrent state (f32), ring of `window + sinks` keys (after RoPE)
/// and values, and the number of tokens seen.
#[derive(Clone, Debug)]
pub struct HeadCache {
    _private: (),
}

/// Activations of a head that its backward pass needs.
pub struct HeadSaved {
    _private: (),
}

/// Inference: `x` continues the sequence that `cache` has seen; overwrites `out` `[T, G·D]`. Any `T ≥ 0`; `T == 1` takes the step form.
pub fn forward(exec: &Exec, env: &HeadEnv<'_>, x: MatRef<'_>, cache: &mut HeadCache, out: MatMut<'_>) {
    let _ = (exec, env, x, cache, out);
    todo!()
}

/// Training: one whole sequence from zero state; overwrites `out` and returns what [`backward`] needs.
pub fn forward_train(exec: &Exec, env: &HeadEnv<'_>, x: MatRef<'_>, out: MatMut<'_>) -> HeadSaved {
    let _ = (exec, env, x, out);
    todo!()
}

/// Gradients from `dout` `[T, G·D]`: added to `grads` (when given), to `dx` `[T, M]` (when given), and to the wanted members of `base_grads`.
pub fn backward(
    exec: &Exec,
    env: &HeadEnv<'_>,
    x: MatRef<'_>,
    saved: &HeadSaved,
    dout: MatRef<'_>,
    grads: Option<&mut HeadTensors>,
    dx: Option<MatMut<'_>>,
    base_grads: Option<&mut BaseGroupGrads>,
) {
    let _ = (exec, env, x, saved, dout, grads, dx, base_grads);
    todo!()
}

/// Starting values: attention-initialised for `mamba2` and `gated-delta` (projections copied from the base, identity convs, decay from
/// `mean_distance` per query head clamped to 2..128, gate 0, gain 1), the usual random Mamba-1 initialisation (seeded) for `mamba`.
pub fn init(layout: &HeadLayout, base: &BaseGroup<'_>, mean_distance: &[f32], seed: u64) -> HeadTensors {
    let _ = (layout, base, mean_distance, seed);
    todo!()
}

/// Sets `out_gain` per query head by least squares so that the recurrent branch best explains `target − local(x)`; no-op for mixers without
/// a gain. `target` is `[T, G·D]`.
pub fn fit_gain(exec: &Exec, env: &HeadEnv<'_>, x: MatRef<'_>, target: MatRef<'_>) -> Option<Vec<f32>> {
    let _ = (exec, env, x, target);
    todo!()
}
