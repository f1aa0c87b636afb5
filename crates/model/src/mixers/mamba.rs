//! The `mamba` mixer: one Mamba-1 block as wide as the group's heads together; W_O is its output projection.

use super::{Ctx, Form, HeadCache, Linear, LinearGrads, MambaTensors, ROWS_PER_TASK, reborrow};
use kernels::conv::{short_conv, short_conv_backward};
use kernels::scan::{
    ScanGrads, ScanInputs, ScanShape, selective_scan, selective_scan_backward, selective_scan_step,
};
use kernels::{MatMut, MatRef, Reused, elementwise};

/// What the backward pass reads; everything else is recomputed.
pub(super) struct MambaSaved {
    /// Before the conv, `[T, G·D]`.
    pub u: Reused,
    /// Gate logits, `[T, G·D]`.
    pub z: Reused,
    pub scanned: Scanned,
}

/// What the forward pass computes on its way.
pub(super) struct Scanned {
    selection: Selection,
    y: Reused,
}

/// What depends on the token in the scan.
struct Selection {
    /// `Δ_r`, B and C, `[T, R + 2N]`.
    projected: Reused,
    /// After softplus, `[T, G·D]`.
    delta: Reused,
    /// `[T, N]`.
    b: Vec<f32>,
    /// `[T, N]`.
    c: Vec<f32>,
}

/// Adds the Mamba block's output for a chunk, projected to `u` and `z`, to `out`; advances conv tail and state.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    w: &MambaTensors<&[f32]>,
    [u, z]: [MatRef<'_>; 2],
    cache: &mut HeadCache,
    form: Form,
    out: &mut MatMut<'_>,
) -> Scanned {
    let d_inner = ctx.env.layout.d_inner();
    let [tail] = &mut cache.tails[..] else { panic!("one conv tail, found {}", cache.tails.len()) };
    let mut active = convolve(ctx, w, u, tail);
    activate(ctx, &mut active);
    let selection = select(ctx, w, &active);
    let a = decay(w);
    let mut y = Reused::new(ctx.seq * d_inner);
    let inputs = inputs(w, &active, &selection, &a);
    match form {
        Form::Chunked | Form::Training => {
            selective_scan(ctx.exec, shape(ctx), inputs, &mut cache.state, &mut y)
        }
        Form::Step => selective_scan_step(ctx.exec, shape(ctx), inputs, &mut cache.state, &mut y),
    }
    let mut gated = Reused::new(y.len());
    elementwise::swiglu(ctx.exec, &z.to_dense(), &y, &mut gated);
    for (t, row) in gated.chunks_exact(d_inner).enumerate() {
        out.row_mut(t).iter_mut().zip(row).for_each(|(o, g)| *o += g);
    }
    Scanned { selection, y }
}

/// From dense `dout` `[T, G·D]`: adds to `grads` and `dx`.
pub(super) fn backward(
    ctx: &Ctx<'_>,
    w: &MambaTensors<&[f32]>,
    saved: &MambaSaved,
    dout: &[f32],
    mut grads: Option<&mut MambaTensors<&mut [f32]>>,
    mut dx: Option<MatMut<'_>>,
) {
    let (exec, layout) = (ctx.exec, &ctx.env.layout);
    let (seq, d_inner, d_state, rank) = (ctx.seq, layout.d_inner(), layout.spec.d_state, layout.dt_rank());
    let width = rank + 2 * d_state;
    let (mut dy, mut dz) = (vec![0.0; dout.len()], vec![0.0; dout.len()]);
    let Scanned { selection, y } = &saved.scanned;
    elementwise::swiglu_backward(exec, &saved.z, y, dout, &mut dz, &mut dy);

    let mut tail = vec![0.0; layout.tail_lens()[0]];
    let convolved = convolve(ctx, w, MatRef::dense(&saved.u, seq, d_inner), &mut tail);
    let mut active = convolved.clone();
    activate(ctx, &mut active);
    let a = decay(w);
    let (mut d_active, mut d_delta) = (vec![0.0; dout.len()], vec![0.0; dout.len()]);
    let (mut da, mut db, mut dc) = (vec![0.0; a.len()], vec![0.0; seq * d_state], vec![0.0; seq * d_state]);
    let mut dd = vec![0.0; d_inner];
    let scan_grads = ScanGrads {
        du: &mut d_active,
        ddelta: &mut d_delta,
        da: &mut da,
        db: &mut db,
        dc: &mut dc,
        dd: &mut dd,
    };
    let inputs = inputs(w, &active, selection, &a);
    selective_scan_backward(exec, shape(ctx), inputs, None, &dy, None, scan_grads, None);

    // dΔ/dlogit = σ(logit) = 1 − exp(−Δ).
    exec.parallel_chunks(&mut d_delta, ROWS_PER_TASK * d_inner, |task, d_delta| {
        let delta = &selection.delta[task * ROWS_PER_TASK * d_inner..];
        d_delta.iter_mut().zip(delta).for_each(|(d, delta)| *d *= -(-delta).exp_m1());
    });
    let mut d_projected = vec![0.0; seq * width];
    for (t, row) in d_projected.chunks_exact_mut(width).enumerate() {
        row[rank..rank + d_state].copy_from_slice(&db[t * d_state..(t + 1) * d_state]);
        row[rank + d_state..].copy_from_slice(&dc[t * d_state..(t + 1) * d_state]);
    }
    let projected = MatRef::dense(&selection.projected, seq, width);
    let dt_grads = match grads.as_mut() {
        Some(g) => LinearGrads { weight: Some(&mut *g.dt), bias: Some(&mut *g.dt_bias) },
        None => LinearGrads::default(),
    };
    let d_low_rank = MatMut::new(&mut d_projected, seq, rank, width);
    Linear::new(w.dt, None).backward(ctx, projected.columns(0, rank), &d_delta, dt_grads, Some(d_low_rank));

    let x_grads = LinearGrads { weight: grads.as_mut().map(|g| &mut *g.x_proj), bias: None };
    let active = MatRef::dense(&active, seq, d_inner);
    let d_active_mat = MatMut::dense(&mut d_active, seq, d_inner);
    Linear::new(w.x_proj, None).backward(ctx, active, &d_projected, x_grads, Some(d_active_mat));

    let mut d_conv = d_active;
    exec.parallel_chunks(&mut d_conv, ROWS_PER_TASK * d_inner, |task, d_conv| {
        let convolved = &convolved[task * ROWS_PER_TASK * d_inner..];
        for (d, &x) in d_conv.iter_mut().zip(convolved) {
            let s = elementwise::sigmoid(x);
            *d *= s * (1.0 + x * (1.0 - s));
        }
    });
    let mut du = vec![0.0; d_conv.len()];
    let mut unwanted = Vec::new();
    let (dw, dbias) = match grads.as_mut() {
        Some(g) => (&mut *g.conv, Some(&mut *g.conv_bias)),
        None => {
            unwanted.resize(w.conv.len(), 0.0);
            (&mut unwanted[..], None)
        }
    };
    short_conv_backward(exec, &saved.u, w.conv, d_inner, &d_conv, &mut du, dw, dbias);

    let (in_u, in_z) = w.in_proj.split_at(w.in_proj.len() / 2);
    let (u_grad, z_grad) = match grads.as_mut() {
        Some(g) => {
            let (u, z) = g.in_proj.split_at_mut(in_u.len());
            (Some(u), Some(z))
        }
        None => (None, None),
    };
    let u_grads = LinearGrads { weight: u_grad, bias: None };
    Linear::new(in_u, None).backward(ctx, ctx.x, &du, u_grads, reborrow(&mut dx));
    let z_grads = LinearGrads { weight: z_grad, bias: None };
    Linear::new(in_z, None).backward(ctx, ctx.x, &dz, z_grads, dx);

    if let Some(g) = grads {
        // A = −exp(A_log), so dA/dA_log = A.
        g.a_log.iter_mut().zip(&da).zip(&a).for_each(|((g, da), a)| *g += da * a);
        g.d.iter_mut().zip(&dd).for_each(|(g, dd)| *g += dd);
    }
}

fn convolve(ctx: &Ctx<'_>, w: &MambaTensors<&[f32]>, u: MatRef<'_>, tail: &mut [f32]) -> Vec<f32> {
    let mut out = vec![0.0; u.rows() * u.cols()];
    short_conv(ctx.exec, u, w.conv, Some(w.conv_bias), tail, &mut out);
    out
}

/// SiLU in place.
fn activate(ctx: &Ctx<'_>, x: &mut [f32]) {
    let mut gate = x.to_vec();
    elementwise::sigmoid_in_place(ctx.exec, &mut gate);
    x.iter_mut().zip(&gate).for_each(|(x, gate)| *x *= gate);
}

fn select(ctx: &Ctx<'_>, w: &MambaTensors<&[f32]>, active: &[f32]) -> Selection {
    let layout = &ctx.env.layout;
    let (seq, d_inner, d_state, rank) = (ctx.seq, layout.d_inner(), layout.spec.d_state, layout.dt_rank());
    let width = rank + 2 * d_state;
    let active = MatRef::dense(active, seq, d_inner);
    let projected = Linear::new(w.x_proj, None).forward(ctx, active, width);
    let low_rank = MatRef::dense(&projected, seq, width).columns(0, rank);
    let mut delta = Linear::new(w.dt, Some(w.dt_bias)).forward(ctx, low_rank, d_inner);
    ctx.exec.parallel_chunks(&mut delta, ROWS_PER_TASK * d_inner, |_, delta| {
        delta.iter_mut().for_each(|d| *d = elementwise::softplus(*d));
    });
    let columns = |start: usize| -> Vec<f32> {
        projected.chunks_exact(width).flat_map(|row| &row[start..start + d_state]).copied().collect()
    };
    let (b, c) = (columns(rank), columns(rank + d_state));
    Selection { projected, delta, b, c }
}

/// `A = −exp(A_log)`.
fn decay(w: &MambaTensors<&[f32]>) -> Vec<f32> {
    w.a_log.iter().map(|a| -a.exp()).collect()
}

fn shape(ctx: &Ctx<'_>) -> ScanShape {
    let layout = &ctx.env.layout;
    ScanShape { seq: ctx.seq, d_inner: layout.d_inner(), d_state: layout.spec.d_state }
}

fn inputs<'a>(
    w: &MambaTensors<&'a [f32]>,
    u: &'a [f32],
    selection: &'a Selection,
    a: &'a [f32],
) -> ScanInputs<'a> {
    let Selection { delta, b, c, .. } = selection;
    ScanInputs { u, delta, a, b, c, d: w.d }
}
