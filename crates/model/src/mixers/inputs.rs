//! Every projection of the layer input that a converted group reads, in one order, whoever computes them.
//! Knows names and shapes; the arithmetic of the recurrences is elsewhere.

use super::{Ctx, HeadDims, HeadLayout, Linear, NamedTensors, Qkv, QkvRef};
use crate::plan::RecurrentKind;
use kernels::{MatRef, Reused};

/// Where the rows of a projection come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProjectionSource {
    /// The group's rows of the layer's `q_proj`.
    BaseQuery,
    /// The group's rows of the layer's `k_proj`.
    BaseKey,
    /// The group's rows of the layer's `v_proj`.
    BaseValue,
    /// Rows of one of the group's own tensors, with its bias when it has one.
    Own {
        /// Name of the weight within the group.
        weight: &'static str,
        /// Name of the bias within the group.
        bias: Option<&'static str>,
        /// First row of the tensor.
        first_row: usize,
    },
}

/// One projection of the layer input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectionInfo {
    /// Whose rows these are.
    pub source: ProjectionSource,
    /// How many rows, the width of the projection's output.
    pub rows: usize,
}

/// All projections of a chunk of `T` tokens, biases included.
#[derive(Clone, Copy)]
pub struct HeadInputs<'a> {
    /// What the local branch and a q/k/v recurrence read.
    pub(super) qkv: Option<QkvRef<'a>>,
    pub(super) recurrent: RecurrentInputs<MatRef<'a>>,
}

/// What only the recurrence reads.
#[derive(Clone, Copy)]
pub(super) enum RecurrentInputs<T> {
    None,
    Mamba {
        /// `[T, G·D]`.
        u: T,
        /// `[T, G·D]`.
        z: T,
    },
    Qkv {
        /// Gate logits `[T, G·D]`.
        gate: T,
        /// `[T, decays]`.
        dt: T,
        /// `in_scale` or `beta` logits, `[T, decays]`.
        input: T,
        /// Estimated log weight of dropped tokens but for their number, `[T, G]`, where they are weighed.
        far: Option<T>,
    },
}

/// [`HeadInputs`] of its own.
pub(super) struct Projected {
    pub qkv: Option<Qkv>,
    pub recurrent: RecurrentInputs<Reused>,
}

impl RecurrentInputs<Reused> {
    /// The same values, `seq` rows each.
    pub fn view(&self, seq: usize) -> RecurrentInputs<MatRef<'_>> {
        match self {
            Self::None => RecurrentInputs::None,
            Self::Mamba { u, z } => RecurrentInputs::Mamba { u: rows(u, seq), z: rows(z, seq) },
            Self::Qkv { gate, dt, input, far } => RecurrentInputs::Qkv {
                gate: rows(gate, seq),
                dt: rows(dt, seq),
                input: rows(input, seq),
                far: far.as_ref().map(|far| rows(far, seq)),
            },
        }
    }
}

fn rows(x: &[f32], seq: usize) -> MatRef<'_> {
    MatRef::dense(x, seq, x.len().checked_div(seq).unwrap_or(0))
}

impl HeadLayout {
    /// The projections a converted group needs, in the order that [`HeadInputs::from_projections`] takes them.
    pub fn projections(&self) -> Vec<ProjectionInfo> {
        let HeadDims { q_heads, head_dim, qkv_bias, .. } = self.dims;
        let (d_inner, decays) = (q_heads * head_dim, self.decays());
        let own = |weight, bias, first_row, rows| ProjectionInfo {
            source: ProjectionSource::Own { weight, bias, first_row },
            rows,
        };
        let base = |source, rows| ProjectionInfo { source, rows };
        let mut list = match self.spec.recurrent {
            RecurrentKind::None => Vec::new(),
            RecurrentKind::Mamba => {
                vec![own("in_proj.weight", None, 0, d_inner), own("in_proj.weight", None, d_inner, d_inner)]
            }
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {
                let bias = |name| qkv_bias.then_some(name);
                let (input, input_bias) = match self.spec.recurrent {
                    RecurrentKind::Mamba2 => ("in_scale.weight", "in_scale.bias"),
                    _ => ("beta_proj.weight", "beta_proj.bias"),
                };
                let far = self.weighs().then(|| own("far_proj.weight", Some("far_proj.bias"), 0, q_heads));
                let first = [
                    own("gate_proj.weight", None, 0, d_inner),
                    own("dt_proj.weight", Some("dt_proj.bias"), 0, decays),
                    own(input, Some(input_bias), 0, decays),
                ];
                let last = [
                    own("q_proj.weight", bias("q_proj.bias"), 0, d_inner),
                    own("k_proj.weight", bias("k_proj.bias"), 0, head_dim),
                    own("v_proj.weight", bias("v_proj.bias"), 0, head_dim),
                ];
                return first.into_iter().chain(far).chain(last).collect();
            }
        };
        if self.has_local() {
            list.push(base(ProjectionSource::BaseQuery, d_inner));
            list.push(base(ProjectionSource::BaseKey, head_dim));
            list.push(base(ProjectionSource::BaseValue, head_dim));
        }
        list
    }
}

impl<'a> HeadInputs<'a> {
    /// Inputs from finished projections: `projection(i)` gives the `i`-th of [`HeadLayout::projections`], `[T, rows]`.
    pub fn from_projections(layout: &HeadLayout, mut projection: impl FnMut(usize) -> MatRef<'a>) -> Self {
        let mut count = 0..layout.projections().len();
        let mut next = || projection(count.next().expect("as many projections as the layout lists"));
        let recurrent = match layout.spec.recurrent {
            RecurrentKind::None => RecurrentInputs::None,
            RecurrentKind::Mamba => RecurrentInputs::Mamba { u: next(), z: next() },
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {
                let (gate, dt, input) = (next(), next(), next());
                RecurrentInputs::Qkv { gate, dt, input, far: layout.weighs().then(&mut next) }
            }
        };
        let has_qkv = layout.has_local() || matches!(recurrent, RecurrentInputs::Qkv { .. });
        let qkv = has_qkv.then(|| QkvRef { q: next(), k: next(), v: next() });
        Self { qkv, recurrent }
    }
}

impl Projected {
    /// Projects `ctx.x` with the group's own f32 tensors.
    pub fn new<'a>(ctx: &Ctx<'a>, weights: &NamedTensors<&'a [f32]>) -> Self {
        let (x, d_inner, decays) = (ctx.x, ctx.env.layout.d_inner(), ctx.env.layout.decays());
        let recurrent = match weights {
            NamedTensors::None => RecurrentInputs::None,
            NamedTensors::Mamba(w) => {
                let (in_u, in_z) = w.in_proj.split_at(w.in_proj.len() / 2);
                RecurrentInputs::Mamba {
                    u: Linear::new(in_u, None).forward(ctx, x, d_inner),
                    z: Linear::new(in_z, None).forward(ctx, x, d_inner),
                }
            }
            NamedTensors::Qkv(w) => RecurrentInputs::Qkv {
                gate: Linear::new(w.gate, None).forward(ctx, x, d_inner),
                dt: Linear::new(w.dt, Some(w.dt_bias)).forward(ctx, x, decays),
                input: Linear::new(w.input, Some(w.input_bias)).forward(ctx, x, decays),
                far: w.far.as_ref().map(|far| {
                    Linear::new(far.proj, Some(far.bias)).forward(ctx, x, ctx.env.layout.dims.q_heads)
                }),
            },
        };
        Self { qkv: ctx.shared_projections(weights).map(|p| p.forward(ctx)), recurrent }
    }
}
