//! Linear layers of a head and the q, k, v projections that its two branches share.

use super::{BaseGroup, Ctx, HeadDims, QkvTensors};
use kernels::{MatMut, MatRef, Store, Trans, elementwise, gemm};

/// Projected queries `[T, G·D]`, keys and values `[T, D]`, or their gradients.
pub(super) struct Qkv {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Qkv {
    pub fn zeros(seq: usize, dims: HeadDims) -> Self {
        let HeadDims { q_heads, head_dim, .. } = dims;
        let kv = vec![0.0; seq * head_dim];
        Self { q: vec![0.0; seq * q_heads * head_dim], k: kv.clone(), v: kv }
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
    pub fn forward(&self, ctx: &Ctx<'_>, x: MatRef<'_>, n_out: usize) -> Vec<f32> {
        let mut out = vec![0.0; x.rows() * n_out];
        let weight = MatRef::dense(self.weight, n_out, x.cols());
        let store = MatMut::dense(&mut out, x.rows(), n_out);
        gemm(ctx.exec, store, x, Trans::No, weight, Trans::Yes, 1.0, Store::Overwrite);
        if let Some(bias) = self.bias {
            elementwise::add_bias(ctx.exec, bias, &mut out);
        }
        out
    }

    /// Adds the gradients that follow from dense `dy` `[rows, n_out]`.
    pub fn backward(
        &self,
        ctx: &Ctx<'_>,
        x: MatRef<'_>,
        dy: &[f32],
        grads: LinearGrads<'_>,
        dx: Option<MatMut<'_>>,
    ) {
        let n_out = self.weight.len() / x.cols();
        let dy_mat = MatRef::dense(dy, x.rows(), n_out);
        if let Some(dx) = dx {
            let weight = MatRef::dense(self.weight, n_out, x.cols());
            gemm(ctx.exec, dx, dy_mat, Trans::No, weight, Trans::No, 1.0, Store::Accumulate);
        }
        if let Some(dw) = grads.weight {
            let dw = MatMut::dense(dw, n_out, x.cols());
            gemm(ctx.exec, dw, dy_mat, Trans::Yes, x, Trans::No, 1.0, Store::Accumulate);
        }
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
