//! The recurrence of the `mamba2` mixer: SSD with a decay and an input scale per query head.

use super::{Ctx, Form, HeadDims, INPUT_SCALE_MAX, Qkv, QkvTensors, Rates};
use kernels::ssd::{SsdGrads, SsdInputs, SsdShape, ssd, ssd_backward, ssd_step};

/// Overwrites `y`; advances `state`.
pub(super) fn forward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    unit: &Qkv,
    rates: &Rates,
    state: &mut [f32],
    form: Form,
    y: &mut [f32],
) {
    let b = input_scale(rates);
    let inputs = inputs(w, unit, rates, &b);
    match form {
        Form::Chunked | Form::Training => ssd(ctx.exec, shape(ctx), inputs, state, y),
        Form::Step => ssd_step(ctx.exec, shape(ctx), inputs, state, y),
    }
}

/// Adds to `d_unit`, `d_rates` (its `input`: of `in_scale`'s logits) and, when given, `dd_skip`.
pub(super) fn backward(
    ctx: &Ctx<'_>,
    w: &QkvTensors<&[f32]>,
    unit: &Qkv,
    rates: &Rates,
    dy: &[f32],
    d_unit: &mut Qkv,
    d_rates: &mut Rates,
    dd_skip: Option<&mut [f32]>,
) {
    let b = input_scale(rates);
    let mut db = vec![0.0; b.len()];
    let mut unwanted = vec![0.0; ctx.env.layout.dims.q_heads];
    let grads = SsdGrads {
        dq: &mut d_unit.q,
        dk: &mut d_unit.k,
        dv: &mut d_unit.v,
        dlog_a: &mut d_rates.log_a,
        db: &mut db,
        dd_skip: dd_skip.unwrap_or(&mut unwanted),
    };
    ssd_backward(ctx.exec, shape(ctx), inputs(w, unit, rates, &b), None, dy, None, grads, None);
    for i in 0..b.len() {
        let logit = rates.input[i];
        // b = dt · e^min(logit, max) and log_a = −dt.
        d_rates.log_a[i] -= db[i] * logit.min(INPUT_SCALE_MAX).exp();
        if logit <= INPUT_SCALE_MAX {
            d_rates.input[i] += db[i] * b[i];
        }
    }
}

/// `b = dt · exp(min(in, INPUT_SCALE_MAX))`.
fn input_scale(rates: &Rates) -> Vec<f32> {
    let scale = |(log_a, logit): (&f32, &f32)| -log_a * logit.min(INPUT_SCALE_MAX).exp();
    rates.log_a.iter().zip(&rates.input).map(scale).collect()
}

fn shape(ctx: &Ctx<'_>) -> SsdShape {
    let HeadDims { q_heads, head_dim, .. } = ctx.env.layout.dims;
    SsdShape { seq: ctx.seq, heads: q_heads, d_state: head_dim, head_dim }
}

fn inputs<'a>(w: &QkvTensors<&'a [f32]>, unit: &'a Qkv, rates: &'a Rates, b: &'a [f32]) -> SsdInputs<'a> {
    let d_skip = w.d_skip.expect("mamba2 has a d_skip tensor");
    SsdInputs { q: &unit.q, k: &unit.k, v: &unit.v, log_a: &rates.log_a, b, d_skip }
}
