//! One decoding step of a converted group without allocating: what [`forward`](super::forward) computes for one token.

use super::merged::dropped_at;
use super::{HeadCache, HeadDims, HeadLayout, HeadView, INPUT_SCALE_MAX, L2_EPS, QkvTensors, weighed};
use crate::plan::RecurrentKind;
use kernels::attention::{WindowMean, window_step};
use kernels::conv::{short_conv_step, short_conv_taps};
use kernels::gated_delta::{DeltaInputs, DeltaShape, gated_delta_step};
use kernels::ssd::{SsdInputs, SsdShape, ssd_step};
use kernels::{Exec, MatRef, elementwise};

/// The small tensors of a group in the form that steps read.
#[derive(Clone, Debug)]
pub struct StepWeights {
    layout: HeadLayout,
    scale: f32,
    recurrence: Option<Recurrence>,
}

#[derive(Clone, Debug)]
struct Recurrence {
    /// Of q, k and v, `[d_conv, channels]`.
    taps: [Vec<f32>; 3],
    d_skip: Vec<f32>,
    gain: Vec<f32>,
    /// `far_count`; empty where dropped tokens are not weighed.
    far_count: Vec<f32>,
}

/// One token's projections, biases included.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs<'a> {
    /// Gate logits `[G·D]`, and the logits of the rates `[decays]`; empty without a recurrence.
    pub gate: &'a [f32],
    /// See `gate`.
    pub dt: &'a [f32],
    /// See `gate`.
    pub input: &'a [f32],
    /// Estimated log weight of dropped tokens but for their number, `[G]`; empty where they are not weighed.
    pub far: &'a [f32],
    /// `[G·D]`.
    pub q: &'a [f32],
    /// `[D]`.
    pub k: &'a [f32],
    /// `[D]`.
    pub v: &'a [f32],
    /// `q` after norm and RoPE; empty without a window.
    pub rotated_q: &'a [f32],
    /// `k` after norm and RoPE; empty without a window.
    pub rotated_k: &'a [f32],
}

/// Buffers of a step; they only grow.
#[derive(Debug, Default)]
pub struct StepScratch {
    conv: [Vec<f32>; 3],
    unit: [Vec<f32>; 2],
    log_a: Vec<f32>,
    input: Vec<f32>,
    gate: Vec<f32>,
    y: Vec<f32>,
    mean_key: Vec<f32>,
    mean_value: Vec<f32>,
    scores: Vec<f32>,
    lse: Vec<f32>,
}

impl StepWeights {
    /// Of a group's tensors, projections of the layer input left out; `None` for `mamba`, which has no step of this form.
    pub fn new(layout: HeadLayout, tensors: &HeadView<'_>) -> Option<Self> {
        let recurrence = match layout.spec.recurrent {
            RecurrentKind::Mamba => return None,
            RecurrentKind::None => None,
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {
                let w = QkvTensors::new(&layout, tensors.values.iter().copied());
                let d_conv = layout.spec.d_conv;
                let taps =
                    [w.q_conv, w.k_conv, w.v_conv].map(|conv| short_conv_taps(conv, conv.len() / d_conv));
                let d_skip = w.d_skip.unwrap_or(&[]).to_vec();
                let far_count = w.far.map_or(Vec::new(), |far| far.count.to_vec());
                Some(Recurrence { taps, d_skip, gain: w.gain.to_vec(), far_count })
            }
        };
        let scale = 1.0 / (layout.dims.head_dim as f32).sqrt();
        Some(Self { layout, scale, recurrence })
    }

    /// Overwrites `out` `[G·D]` and advances `cache` by one token.
    pub fn step(
        &self,
        exec: &Exec,
        inputs: StepInputs<'_>,
        cache: &mut HeadCache,
        scratch: &mut StepScratch,
        out: &mut [f32],
    ) {
        let HeadDims { q_heads, head_dim, .. } = self.layout.dims;
        if self.layout.has_local() {
            let StepScratch { mean_key, mean_value, scores, lse, .. } = scratch;
            lse.resize(q_heads, 0.0);
            let dropped = cache.drop_next();
            let row = |x| MatRef::dense(x, 1, head_dim);
            cache.ring.push(cache.seen, row(inputs.rotated_k), row(inputs.v));
            let mean = cache.dropped.as_ref().filter(|_| dropped > 0).map(|sums| {
                sums.means_into(dropped, mean_key, mean_value);
                WindowMean { key: mean_key, value: mean_value, log_weight: (dropped as f32).ln() }
            });
            let held = cache.ring.held(cache.seen + 1);
            window_step(exec, self.scale, inputs.rotated_q, held, mean, head_dim, scores, (out, lse));
        } else {
            out.fill(0.0);
        }
        if let Some(recurrence) = &self.recurrence {
            self.recur(exec, recurrence, inputs, cache, scratch, out);
        }
        cache.seen += 1;
    }

    fn recur(
        &self,
        exec: &Exec,
        w: &Recurrence,
        inputs: StepInputs<'_>,
        cache: &mut HeadCache,
        scratch: &mut StepScratch,
        out: &mut [f32],
    ) {
        let HeadDims { q_heads, head_dim, .. } = self.layout.dims;
        let StepScratch { conv, unit, log_a, input, gate, y, lse, .. } = scratch;
        let raw = [inputs.q, inputs.k, inputs.v];
        for (((raw, taps), tail), conv) in
            raw.into_iter().zip(&w.taps).zip(&mut cache.tails).zip(conv.iter_mut())
        {
            conv.resize(raw.len(), 0.0);
            short_conv_step(exec, raw, taps, tail, conv);
        }
        let [q, k, v] = &*conv;
        for (values, unit) in [q, k].into_iter().zip(unit.iter_mut()) {
            unit.resize(values.len(), 0.0);
            elementwise::l2_norm(exec, values, head_dim, L2_EPS, unit);
        }
        let [q, k] = &*unit;
        log_a.clear();
        log_a.extend(inputs.dt.iter().map(|&dt| -elementwise::softplus(dt)));
        input.clear();
        y.resize(out.len(), 0.0);
        match self.layout.spec.recurrent {
            RecurrentKind::GatedDelta => {
                input.extend(inputs.input.iter().map(|&beta| elementwise::sigmoid(beta)));
                let shape = DeltaShape { seq: 1, heads: q_heads, d_state: head_dim, head_dim };
                let inputs = DeltaInputs { q, k, v, log_a, beta: input };
                gated_delta_step(exec, shape, inputs, &mut cache.state, y);
            }
            _ => {
                let logits = inputs.input.iter().zip(&*log_a);
                input.extend(logits.map(|(logit, log_a)| -log_a * logit.min(INPUT_SCALE_MAX).exp()));
                let shape = SsdShape { seq: 1, heads: q_heads, d_state: head_dim, head_dim };
                let inputs = SsdInputs { q, k, v, log_a, b: input, d_skip: &w.d_skip };
                ssd_step(exec, shape, inputs, &mut cache.state, y);
            }
        }
        gate.clear();
        gate.extend_from_slice(inputs.gate);
        elementwise::sigmoid_in_place(exec, gate);
        let recurred = y.iter().zip(&*gate).zip(&w.gain).map(|((y, gate), gain)| 2.0 * gain * y * gate);
        if w.far_count.is_empty() {
            out.iter_mut().zip(recurred).for_each(|(out, recurred)| *out += recurred);
            return;
        }
        let spec = &self.layout.spec;
        let dropped = dropped_at(spec.window, spec.sinks, cache.seen);
        let heads = w.far_count.iter().zip(inputs.far).zip(&*lse);
        let keep = heads.map(|((&count, &far), &lse)| weighed::keep_at(dropped, count, far, lse));
        for ((out, recurred), keep) in
            out.iter_mut().zip(recurred).zip(keep.flat_map(|keep| std::iter::repeat_n(keep, head_dim)))
        {
            *out = keep * *out + (1.0 - keep) * recurred;
        }
    }
}
