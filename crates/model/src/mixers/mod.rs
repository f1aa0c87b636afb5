//! What stands in a converted KV group: an optional local softmax window and an optional recurrence, added.
//! One group at a time; knows its own tensors and the base group's projections, nothing of other layers.
//!
//! Dimensions of a group: `G` query heads, `D` head_dim, `M` d_model, `K` d_conv, `N` d_state, `T` tokens. `x` is `[T, M]`, the layer input
//! after the norm; the output `[T, G·D]` goes through the original W_O. Query head `h` owns rows/columns `h·D..(h+1)·D`.
//!
//! `y = local(x) + recurrent(x)`, or `keep ⊙ local(x) + (1 − keep) ⊙ recurrent(x)` where dropped tokens are weighed (`MixerSpec::dropped`): per
//! token and query head `keep = σ(lse − x W_farᵀ − b_far − far_count · ln N)`, with `lse` the log of the window's softmax denominator and `N` the
//! number of positions that the window drops; 1 while it drops none. Their tensors follow the others: `far_proj.weight [G, M]`,
//! `far_proj.bias [G]`, `far_count [G]`.
//!
//! **Local** (window > 0): softmax attention over the last `window` tokens and the first `sinks`, RoPE and q/k norm as in the base,
//! scale `1/sqrt(D)`. For `mamba2` and `gated-delta` it uses the head's own q, k, v (before the conv); for `mamba` and `none` the base group's.
//! The query at position `p` sees position `r ≤ p` when `p − r < window` or `r < sinks`. The base's q/k norm touches this branch only.
//! Where dropped tokens are averaged (`MixerSpec::dropped`), the other `N` positions before `p` take part as one key `k̂` and value `v̂`, the means
//! of theirs (keys after norm and RoPE), with weight `N · exp(q·k̂ / sqrt(D))`.
//!
//! **mamba2**: `q, k, v = x W_qᵀ, x W_kᵀ, x W_vᵀ (+ biases)`; short conv on each (no activation); q (per head) and k L2-normalised,
//! `x / sqrt(Σx² + 1e-6)`; `dt = softplus(x W_dtᵀ + b_dt)` `[T, G]`, `log_a = −dt`, `b = dt · exp(min(x W_inᵀ + b_in, 30))` (the bound only
//! keeps f32 finite; no gradient beyond it); SSD per query head with `d_skip`, state from zero;
//! output `out_gain ⊙ y ⊙ 2σ(x W_zᵀ)`. Tensors, in this order (biases only when the base has them):
//! `q_proj.weight [G·D, M]`, `k_proj.weight [D, M]`, `v_proj.weight [D, M]`, `q_proj.bias [G·D]`, `k_proj.bias [D]`, `v_proj.bias [D]`,
//! `q_conv.weight [G·D, K]`, `k_conv.weight [D, K]`, `v_conv.weight [D, K]`, `dt_proj.weight [G, M]`, `dt_proj.bias [G]`,
//! `in_scale.weight [G, M]`, `in_scale.bias [G]`, `d_skip [G]`, `gate_proj.weight [G·D, M]`, `out_gain [G·D]`.
//!
//! **gated-delta**: the same projections, convs and norms; `log_a = −softplus(x W_dtᵀ + b_dt)` `[T]`, `beta = σ(x W_βᵀ + b_β)` `[T]`; gated delta
//! rule; same gate and gain. Tensors: q/k/v projections (biases) and convs as above, `dt_proj.weight [1, M]`, `dt_proj.bias [1]`,
//! `beta_proj.weight [1, M]`, `beta_proj.bias [1]`, `gate_proj.weight [G·D, M]`, `out_gain [G·D]`.
//!
//! **mamba** (Mamba-1, `d_inner = G·D`, `R = ceil(M/16)`): `u, z = split(x W_inᵀ)`; conv with bias on u; SiLU; `Δ_r, B, C = split(u W_xᵀ)`;
//! `Δ = softplus(Δ_r W_Δᵀ + b_Δ)`; selective scan with `A = −exp(A_log)`, skip `D`; output `y ⊙ silu(z)`. Tensors: `in_proj.weight [2·G·D, M]`,
//! `conv.weight [G·D, K]`, `conv.bias [G·D]`, `x_proj.weight [R + 2N, G·D]`, `dt_proj.weight [G·D, R]`, `dt_proj.bias [G·D]`, `A_log [G·D, N]`, `D [G·D]`.
//!
//! **none**: no tensors.

mod gated_delta;
mod init;
mod inputs;
mod layout;
mod local;
mod mamba;
mod mamba2;
mod memory;
mod merged;
mod projection;
mod qkv;
mod step;
#[cfg(test)]
mod tests;
mod weighed;

pub use init::{fit, init};
pub use inputs::{HeadInputs, ProjectionInfo, ProjectionSource};
pub use memory::HeadCache;
pub use step::{StepInputs, StepScratch, StepWeights};

use crate::plan::{MixerSpec, RecurrentKind};
use inputs::{Projected, RecurrentInputs};
pub use kernels::linear::LayerInput;
use kernels::{Exec, MatMut, MatRef};
use layout::{MambaTensors, QkvTensors};
use local::LocalSaved;
use mamba::{MambaSaved, Scanned};
#[cfg(test)]
use memory::Ring;
pub use projection::{BaseGroup, BaseGroupGrads};
use projection::{Linear, LinearGrads, ProjectionGrads, Projections, Qkv, QkvRef, reborrow};
use qkv::{Form, QkvSaved, Rates, Recurred, WindowGrads};

/// Epsilon inside the root of the q/k L2 normalisation.
pub const L2_EPS: f32 = 1e-6;

/// Upper bound of `in_scale`'s logits before the exponential.
pub const INPUT_SCALE_MAX: f32 = 30.0;

/// Rows per task of parallel element-wise loops.
const ROWS_PER_TASK: usize = 64;

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

/// Values of a group's tensors, in the order of [`HeadLayout::tensors`]. Also used for their gradients, see [`backward`].
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

/// Activations of a head that its backward pass needs.
pub struct HeadSaved {
    /// Projections that the local branch or a q/k/v recurrence reads.
    raw: Option<Qkv>,
    local: Option<LocalSaved>,
    recurrent: RecurrentSaved,
}

enum RecurrentSaved {
    None,
    Mamba(MambaSaved),
    Qkv(QkvSaved),
}

/// A head's tensors by name.
enum NamedTensors<T> {
    None,
    Mamba(MambaTensors<T>),
    Qkv(QkvTensors<T>),
}

impl<T> NamedTensors<T> {
    fn new(layout: &HeadLayout, tensors: impl IntoIterator<Item = T>) -> Self {
        match layout.spec.recurrent {
            RecurrentKind::None => Self::None,
            RecurrentKind::Mamba => Self::Mamba(MambaTensors::new(tensors)),
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => Self::Qkv(QkvTensors::new(layout, tensors)),
        }
    }
}

/// What every step of a pass over one chunk reads.
struct Ctx<'a> {
    exec: &'a Exec,
    env: &'a HeadEnv<'a>,
    /// `[T, M]`; of no columns where every projection of it was given.
    x: LayerInput<'a>,
    /// `T`.
    seq: usize,
}

impl<'a> Ctx<'a> {
    fn new(exec: &'a Exec, env: &'a HeadEnv<'a>, x: impl Into<LayerInput<'a>>) -> Self {
        let x = x.into();
        assert_eq!(x.values.cols(), env.layout.dims.d_model, "width of a head's input");
        Self { exec, env, x, seq: x.values.rows() }
    }

    /// For passes that read projections instead of `x`.
    fn projected(exec: &'a Exec, env: &'a HeadEnv<'a>, seq: usize) -> Self {
        Self { exec, env, x: MatRef::dense(&[], seq, 0).into(), seq }
    }

    fn weights(&self) -> NamedTensors<&'a [f32]> {
        NamedTensors::new(&self.env.layout, self.env.weights.values.iter().copied())
    }

    /// The projections that the branches share, if any branch needs them: the head's own or the base's.
    fn shared_projections(&self, weights: &NamedTensors<&'a [f32]>) -> Option<Projections<'a>> {
        match weights {
            NamedTensors::Qkv(w) => Some(Projections::of_head(w)),
            _ => self.env.layout.has_local().then(|| Projections::of_base(&self.env.base)),
        }
    }

    /// Dense `[T, G]`.
    fn per_head<'b>(&self, values: &'b [f32]) -> MatRef<'b> {
        MatRef::dense(values, self.seq, self.env.layout.dims.q_heads)
    }

    fn check_output(&self, rows: usize, cols: usize) {
        assert_eq!((rows, cols), (self.seq, self.env.layout.d_inner()), "shape of a head's output");
    }
}

/// Inference: `x` continues the sequence that `cache` has seen; overwrites `out` `[T, G·D]`. Any `T ≥ 0`; `T == 1` takes the step form.
pub fn forward(exec: &Exec, env: &HeadEnv<'_>, x: MatRef<'_>, cache: &mut HeadCache, mut out: MatMut<'_>) {
    let ctx = Ctx::new(exec, env, x);
    ctx.check_output(out.rows(), out.cols());
    if ctx.seq == 0 {
        return;
    }
    let weights = ctx.weights();
    let Projected { qkv, recurrent } = Projected::new(&ctx, &weights);
    let lse = match &qkv {
        Some(raw) if env.layout.has_local() => {
            let [q, k] = local::rotated(&ctx, raw, cache.seen);
            local::forward(&ctx, [&q, &k], &raw.v, cache, out.reborrow())
        }
        _ => {
            fill_zero(&mut out);
            None
        }
    };
    let qkv = qkv.as_ref().map(|raw| raw.view(ctx.seq, env.layout.dims));
    let inputs = HeadInputs { qkv, recurrent: recurrent.view(ctx.seq) };
    let lse = lse.as_ref().map(|lse| ctx.per_head(lse));
    recur(&ctx, &weights, inputs, lse, cache, Form::of(ctx.seq), &mut out);
    cache.seen += ctx.seq;
}

/// Overwrites `out` with the local branch of [`forward`], from queries and keys after norm and RoPE and from values; the window keeps what it
/// needs, the length of `cache` stays.
pub fn attend_projected(
    exec: &Exec,
    env: &HeadEnv<'_>,
    [q, k, v]: [MatRef<'_>; 3],
    cache: &mut HeadCache,
    out: MatMut<'_>,
) {
    let ctx = Ctx::projected(exec, env, out.rows());
    ctx.check_output(out.rows(), out.cols());
    local::forward(&ctx, [&q.to_dense(), &k.to_dense()], &v.to_dense(), cache, out);
}

/// Brings the recurrent branch of [`forward`] into `out`, where the local one is, from finished projections, and advances everything in `cache`
/// but the window, which the caller [has updated](HeadCache::remember). `lse` are the window's log denominators `[T, G]`, read where dropped tokens
/// are [weighed](crate::plan::Dropped::Weighed). Of `env`'s tensors only those are read that are no projection of `x`; the others may be empty.
pub fn recur_projected(
    exec: &Exec,
    env: &HeadEnv<'_>,
    inputs: HeadInputs<'_>,
    lse: Option<MatRef<'_>>,
    cache: &mut HeadCache,
    mut out: MatMut<'_>,
) {
    let ctx = Ctx::projected(exec, env, out.rows());
    ctx.check_output(out.rows(), out.cols());
    if ctx.seq > 0 {
        recur(&ctx, &ctx.weights(), inputs, lse, cache, Form::of(ctx.seq), &mut out);
        cache.seen += ctx.seq;
    }
}

/// Training: one whole sequence from zero state; overwrites `out` and returns what [`backward`] needs.
pub fn forward_train<'a>(
    exec: &'a Exec,
    env: &'a HeadEnv<'a>,
    x: impl Into<LayerInput<'a>>,
    mut out: MatMut<'_>,
) -> HeadSaved {
    let ctx = Ctx::new(exec, env, x);
    ctx.check_output(out.rows(), out.cols());
    if ctx.seq == 0 {
        return HeadSaved { raw: None, local: None, recurrent: RecurrentSaved::None };
    }
    let weights = ctx.weights();
    let Projected { qkv: raw, recurrent } = Projected::new(&ctx, &weights);
    let local = match &raw {
        Some(raw) if env.layout.has_local() => Some(local::forward_train(&ctx, raw, out.reborrow())),
        _ => {
            fill_zero(&mut out);
            None
        }
    };
    let mut cache = env.layout.new_cache();
    let qkv = raw.as_ref().map(|raw| raw.view(ctx.seq, env.layout.dims));
    let inputs = HeadInputs { qkv, recurrent: recurrent.view(ctx.seq) };
    let lse = local.as_ref().map(|local| ctx.per_head(local.attended().1));
    let made = recur(&ctx, &weights, inputs, lse, &mut cache, Form::Training, &mut out);
    let recurrent = match (made, recurrent) {
        (Made::None, _) => RecurrentSaved::None,
        (Made::Mamba(scanned), RecurrentInputs::Mamba { u, z }) => {
            RecurrentSaved::Mamba(MambaSaved { u, z, scanned })
        }
        (Made::Qkv(recurred), RecurrentInputs::Qkv { gate, .. }) => {
            RecurrentSaved::Qkv(QkvSaved { gate, recurred })
        }
        _ => panic!("projections of another kind of head"),
    };
    HeadSaved { raw, local, recurrent }
}

/// What the recurrent branch computes on its way.
enum Made {
    None,
    Mamba(Scanned),
    Qkv(Recurred),
}

/// Brings the recurrent branch into `out`; advances all of `cache` but ring and length.
fn recur(
    ctx: &Ctx<'_>,
    weights: &NamedTensors<&[f32]>,
    inputs: HeadInputs<'_>,
    lse: Option<MatRef<'_>>,
    cache: &mut HeadCache,
    form: Form,
    out: &mut MatMut<'_>,
) -> Made {
    match (weights, inputs.recurrent, inputs.qkv) {
        (NamedTensors::None, RecurrentInputs::None, _) => Made::None,
        (NamedTensors::Mamba(w), RecurrentInputs::Mamba { u, z }, _) => {
            Made::Mamba(mamba::forward(ctx, w, [u, z], cache, form, out))
        }
        (NamedTensors::Qkv(w), RecurrentInputs::Qkv { gate, dt, input, far }, Some(raw)) => {
            let far = far.map(|far| {
                [far, lse.expect("the log denominators of a window whose dropped tokens are weighed")]
            });
            let logits = qkv::Logits { gate, dt, input, far };
            Made::Qkv(qkv::forward(ctx, w, raw, logits, cache, form, out))
        }
        _ => panic!("projections of another kind of head"),
    }
}

/// Gradients from `dout` `[T, G·D]`: added to `grads` (when given), to `dx` `[T, M]` (when given), and to the wanted members of `base_grads`.
/// In `grads`, an empty vector says that a [`TensorClass::Projection`] is frozen: where all of them are and nothing else asks for it, the window's
/// backward pass is left out. Base projections get gradients only from `mamba` and `none`, whose local branch uses them; base norms from any local branch.
pub fn backward<'a>(
    exec: &'a Exec,
    env: &'a HeadEnv<'a>,
    x: impl Into<LayerInput<'a>>,
    saved: &HeadSaved,
    dout: MatRef<'_>,
    grads: Option<&mut HeadTensors>,
    mut dx: Option<MatMut<'_>>,
    mut base_grads: Option<&mut BaseGroupGrads>,
) {
    let ctx = Ctx::new(exec, env, x);
    ctx.check_output(dout.rows(), dout.cols());
    if ctx.seq == 0 {
        return;
    }
    let dout = dout.dense_values();
    let weights = ctx.weights();
    let mut grads = grads.map(|g| NamedTensors::new(&env.layout, g.values.iter_mut().map(Vec::as_mut_slice)));
    let mut d_raw = Qkv::zeros(ctx.seq, env.layout.dims);
    let mut window_grads = None;
    match (&weights, &saved.recurrent) {
        (NamedTensors::Mamba(w), RecurrentSaved::Mamba(saved)) => {
            let grads = grads.as_mut().and_then(NamedTensors::as_mamba);
            mamba::backward(&ctx, w, saved, &dout, grads, reborrow(&mut dx));
        }
        (NamedTensors::Qkv(w), RecurrentSaved::Qkv(recurrent)) => {
            let raw = saved.raw.as_ref().expect("a q/k/v recurrence has projections");
            let grads = grads.as_mut().and_then(NamedTensors::as_qkv);
            let window = saved.local.as_ref().map(|local| local.attended().0);
            let dout = (&dout[..], window);
            window_grads = qkv::backward(&ctx, w, raw, recurrent, dout, &mut d_raw, grads, reborrow(&mut dx));
        }
        (NamedTensors::None, RecurrentSaved::None) => {}
        _ => panic!("activations of another kind of head"),
    }
    let projection_grads = grads.and_then(NamedTensors::into_projections);
    let local_wanted = dx.is_some() || base_grads.is_some() || projection_grads.is_some();
    if let (Some(raw), Some(local), true) = (&saved.raw, &saved.local, local_wanted) {
        let d_local = match &window_grads {
            Some(WindowGrads { out, lse }) => (&out[..], Some(&lse[..])),
            None => (&dout[..], None),
        };
        local::backward(&ctx, raw, local, d_local, &mut d_raw, base_grads.as_deref_mut());
    }
    if let Some(projections) = ctx.shared_projections(&weights) {
        let grads = match weights {
            NamedTensors::Qkv(_) => projection_grads,
            _ => base_grads.map(BaseGroupGrads::projections),
        };
        if grads.is_some() || dx.is_some() {
            projections.backward(&ctx, &d_raw, grads.unwrap_or_default(), dx);
        }
    }
}

impl<'a> NamedTensors<&'a mut [f32]> {
    fn as_mamba(&mut self) -> Option<&mut MambaTensors<&'a mut [f32]>> {
        match self {
            Self::Mamba(grads) => Some(grads),
            _ => None,
        }
    }

    fn as_qkv(&mut self) -> Option<&mut QkvTensors<&'a mut [f32]>> {
        match self {
            Self::Qkv(grads) => Some(grads),
            _ => None,
        }
    }

    /// Those of the head's own q, k and v; `None` where there are none or all are frozen.
    fn into_projections(self) -> Option<ProjectionGrads<'a>> {
        let Self::Qkv(g) = self else { return None };
        let tensors = [Some(g.q), Some(g.k), Some(g.v), g.q_bias, g.k_bias, g.v_bias];
        let wanted = tensors.map(|tensor| tensor.filter(|values| !values.is_empty()));
        let any = wanted.iter().any(Option::is_some);
        let [q, k, v, q_bias, k_bias, v_bias] = wanted;
        any.then_some(ProjectionGrads {
            q: LinearGrads { weight: q, bias: q_bias },
            k: LinearGrads { weight: k, bias: k_bias },
            v: LinearGrads { weight: v, bias: v_bias },
        })
    }
}

fn fill_zero(out: &mut MatMut<'_>) {
    for t in 0..out.rows() {
        out.row_mut(t).fill(0.0);
    }
}
