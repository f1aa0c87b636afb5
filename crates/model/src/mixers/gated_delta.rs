//! The recurrence of the `gated-delta` mixer: one state per group, read by all its query heads.

use super::{Ctx, Form, HeadDims, Qkv, Rates};
use kernels::gated_delta as kernel;
use kernels::gated_delta::{DeltaGrads, DeltaInputs, DeltaSaved, DeltaShape};

/// Overwrites `y`; advances `state`. In training returns what [`backward`] reads.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    unit: &Qkv,
    rates: &Rates,
    state: &mut [f32],
    form: Form,
    y: &mut [f32],
) -> Option<DeltaSaved> {
    let inputs = inputs(unit, rates);
    match form {
        Form::Training => return Some(kernel::gated_delta_train(ctx.exec, shape(ctx), inputs, state, y)),
        Form::Chunked => kernel::gated_delta(ctx.exec, shape(ctx), inputs, state, y),
        Form::Step => kernel::gated_delta_step(ctx.exec, shape(ctx), inputs, state, y),
    }
    None
}

/// Adds to `d_unit` and `d_rates` (its `input`: of `beta`).
pub(super) fn backward(
    ctx: &Ctx<'_>,
    unit: &Qkv,
    rates: &Rates,
    saved: &DeltaSaved,
    dy: &[f32],
    d_unit: &mut Qkv,
    d_rates: &mut Rates,
) {
    let grads = DeltaGrads {
        dq: &mut d_unit.q,
        dk: &mut d_unit.k,
        dv: &mut d_unit.v,
        dlog_a: &mut d_rates.log_a,
        dbeta: &mut d_rates.input,
    };
    kernel::gated_delta_backward(ctx.exec, shape(ctx), inputs(unit, rates), saved, dy, None, grads, None);
}

fn shape(ctx: &Ctx<'_>) -> DeltaShape {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    DeltaShape { seq: ctx.seq, heads: q_heads, d_state: head_dim, head_dim }
}

fn inputs<'a>(unit: &'a Qkv, rates: &'a Rates) -> DeltaInputs<'a> {
    DeltaInputs { q: &unit.q, k: &unit.k, v: &unit.v, log_a: &rates.log_a, beta: &rates.input }
}
