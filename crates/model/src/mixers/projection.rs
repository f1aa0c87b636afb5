//! Linear layers of a head, what they read, the base group's, and the q, k, v projections that a head's two branches share.

use super::{Ctx, HeadDims, QkvTensors};
use kernels::linear::{LayerInput, linear, linear_backward};
use kernels::{MatMut, MatRef, Reused, Store, elementwise};

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

impl BaseGroupGrads {
    /// Those of its projections.
    pub(super) fn projections(&mut self) -> ProjectionGrads<'_> {
        ProjectionGrads {
            q: LinearGrads { weight: self.q_proj.as_deref_mut(), bias: self.q_bias.as_deref_mut() },
            k: LinearGrads { weight: self.k_proj.as_deref_mut(), bias: self.k_bias.as_deref_mut() },
            v: LinearGrads { weight: self.v_proj.as_deref_mut(), bias: self.v_bias.as_deref_mut() },
        }
    }
}

/// Projected queries `[T, G·D]`, keys and values `[T, D]`, or their gradients.
pub(super) struct Qkv {
    pub q: Reused,
    pub k: Reused,
    pub v: Reused,
}

/// [`Qkv`] of somebody else, perhaps columns of a larger matrix.
#[derive(Clone, Copy)]
pub(super) struct QkvRef<'a> {
    pub q: MatRef<'a>,
    pub k: MatRef<'a>,
    pub v: MatRef<'a>,
}

impl Qkv {
    pub fn view(&self, seq: usize, dims: HeadDims) -> QkvRef<'_> {
        let HeadDims { q_heads, head_dim, .. } = dims;
        QkvRef {
            q: MatRef::dense(&self.q, seq, q_heads * head_dim),
            k: MatRef::dense(&self.k, seq, head_dim),
            v: MatRef::dense(&self.v, seq, head_dim),
        }
    }

    /// Of open contents.
    pub fn new(seq: usize, dims: HeadDims) -> Self {
        let HeadDims { q_heads, head_dim, .. } = dims;
        let width = |heads| Reused::new(seq * heads * head_dim);
        Self { q: width(q_heads), k: width(1), v: width(1) }
    }

    pub fn zeros(seq: usize, dims: HeadDims) -> Self {
        let mut zeros = Self::new(seq, dims);
        [&mut zeros.q, &mut zeros.k, &mut zeros.v].into_iter().for_each(|x| x.fill(0.0));
        zeros
    }
}

/// A weight `[out, in]` with its optional bias `[out]`.
#[derive(Clone, Copy)]
pub(super) struct Linear<'a> {
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
}

/// Gradients of a [`Linear`]; absent ones are not wanted.
#[derive(Default)]
pub(super) struct LinearGrads<'a> {
    pub weight: Option<&'a mut [f32]>,
    pub bias: Option<&'a mut [f32]>,
}

impl<'a> Linear<'a> {
    pub fn new(weight: &'a [f32], bias: Option<&'a [f32]>) -> Self {
        Self { weight, bias }
    }

    /// `x Wᵀ + b`, dense `[rows, n_out]`.
    pub fn forward<'x>(&self, ctx: &Ctx<'_>, x: impl Into<LayerInput<'x>>, n_out: usize) -> Reused {
        let x = x.into();
        let (rows, cols) = (x.values.rows(), x.values.cols());
        let mut out = Reused::new(rows * n_out);
        let weight = MatRef::dense(self.weight, n_out, cols);
        linear(ctx.exec, x, weight, MatMut::dense(&mut out, rows, n_out), Store::Overwrite);
        if let Some(bias) = self.bias {
            elementwise::add_bias(ctx.exec, bias, &mut out);
        }
        out
    }

    /// Adds the gradients that follow from dense `dy` `[rows, n_out]`.
    pub fn backward<'x>(
        &self,
        ctx: &Ctx<'_>,
        x: impl Into<LayerInput<'x>>,
        dy: &[f32],
        grads: LinearGrads<'_>,
        dx: Option<MatMut<'_>>,
    ) {
        let x = x.into();
        let (rows, cols) = (x.values.rows(), x.values.cols());
        let n_out = self.weight.len() / cols;
        let dw = grads.weight.map(|dw| (x, MatMut::dense(dw, n_out, cols), Store::Accumulate));
        let dx = dx.map(|dx| (dx, Store::Accumulate));
        let (weight, dy_mat) = (MatRef::dense(self.weight, n_out, cols), MatRef::dense(dy, rows, n_out));
        linear_backward(ctx.exec, weight, dy_mat, dw, dx);
        if let Some(db) = grads.bias {
            elementwise::add_column_sums(ctx.exec, dy, db);
        }
    }
}

/// The three projections of a group, the head's own or the base's.
#[derive(Clone, Copy)]
pub(super) struct Projections<'a> {
    q: Linear<'a>,
    k: Linear<'a>,
    v: Linear<'a>,
}

/// Gradients of [`Projections`].
#[derive(Default)]
pub(super) struct ProjectionGrads<'a> {
    pub q: LinearGrads<'a>,
    pub k: LinearGrads<'a>,
    pub v: LinearGrads<'a>,
}

impl<'a> Projections<'a> {
    pub fn of_base(base: &BaseGroup<'a>) -> Self {
        Self {
            q: Linear::new(base.q_proj, base.q_bias),
            k: Linear::new(base.k_proj, base.k_bias),
            v: Linear::new(base.v_proj, base.v_bias),
        }
    }

    pub fn of_head(w: &QkvTensors<&'a [f32]>) -> Self {
        Self { q: Linear::new(w.q, w.q_bias), k: Linear::new(w.k, w.k_bias), v: Linear::new(w.v, w.v_bias) }
    }

    pub fn forward(&self, ctx: &Ctx<'_>) -> Qkv {
        let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
        Qkv {
            q: self.q.forward(ctx, ctx.x, q_heads * head_dim),
            k: self.k.forward(ctx, ctx.x, head_dim),
            v: self.v.forward(ctx, ctx.x, head_dim),
        }
    }

    pub fn backward(&self, ctx: &Ctx<'_>, d: &Qkv, grads: ProjectionGrads<'_>, mut dx: Option<MatMut<'_>>) {
        self.q.backward(ctx, ctx.x, &d.q, grads.q, reborrow(&mut dx));
        self.k.backward(ctx, ctx.x, &d.k, grads.k, reborrow(&mut dx));
        self.v.backward(ctx, ctx.x, &d.v, grads.v, dx);
    }
}

/// A shorter-lived view of an optional output.
pub(super) fn reborrow<'b>(out: &'b mut Option<MatMut<'_>>) -> Option<MatMut<'b>> {
    out.as_mut().map(MatMut::reborrow)
}
