//! Mamba-2's state-space duality recurrence (arXiv 2405.21060) for one KV group: scalar decay per query head.
//!
//! `S_t = a_t S_{t−1} + b_t k_t v_tᵀ`, `y_t = S_tᵀ q_t + d_skip · v_t`, `a_t = exp(log_a_t)`.

use crate::chunk::{CHUNK, Decay, check_len, pass_state, scale, scaled};
use crate::isa::dispatch;
use crate::simd::{Simd, axpy};
use crate::{Exec, MatMut, MatRef, Reused, Store, Trans, mixed_gemm};

mod backward;
#[cfg(test)]
mod tests;

pub use backward::ssd_backward;

/// Sizes of one call. Query heads share `k` and `v`, each has its own decay, input scale and state.
#[derive(Clone, Copy, Debug)]
pub struct SsdShape {
    /// Tokens.
    pub seq: usize,
    /// Query heads `G`.
    pub heads: usize,
    /// Width of keys and queries `N`.
    pub d_state: usize,
    /// Width of values `P`.
    pub head_dim: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct SsdInputs<'a> {
    /// `[seq, heads · d_state]`.
    pub q: &'a [f32],
    /// `[seq, d_state]`.
    pub k: &'a [f32],
    /// `[seq, head_dim]`.
    pub v: &'a [f32],
    /// `[seq, heads]`, ≤ 0.
    pub log_a: &'a [f32],
    /// `[seq, heads]`.
    pub b: &'a [f32],
    /// `[heads]`.
    pub d_skip: &'a [f32],
}

/// Gradients of [`SsdInputs`], same shapes; added to.
#[derive(Debug)]
pub struct SsdGrads<'a> {
    /// Of `q`.
    pub dq: &'a mut [f32],
    /// Of `k`.
    pub dk: &'a mut [f32],
    /// Of `v`.
    pub dv: &'a mut [f32],
    /// Of `log_a`.
    pub dlog_a: &'a mut [f32],
    /// Of `b`.
    pub db: &'a mut [f32],
    /// Of `d_skip`.
    pub dd_skip: &'a mut [f32],
}

/// Chunks whose states are held at once in the forward pass: bounds the memory of a long prefill.
const BLOCK_CHUNKS: usize = 32;

impl SsdShape {
    fn state_len(self) -> usize {
        self.heads * self.d_state * self.head_dim
    }
    /// Panics when a length does not fit.
    #[track_caller]
    fn check(self, inputs: SsdInputs<'_>, y: usize) {
        let SsdShape { seq, heads, d_state, head_dim } = self;
        assert!(heads > 0 && d_state > 0 && head_dim > 0, "empty {self:?}");
        check_len("q", inputs.q.len(), seq * heads * d_state);
        check_len("k", inputs.k.len(), seq * d_state);
        check_len("v", inputs.v.len(), seq * head_dim);
        check_len("log_a", inputs.log_a.len(), seq * heads);
        check_len("b", inputs.b.len(), seq * heads);
        check_len("d_skip", inputs.d_skip.len(), heads);
        check_len("y", y, seq * heads * head_dim);
    }
}

impl<'a> SsdInputs<'a> {
    /// The same inputs for tokens `start..end` only.
    fn tokens(self, shape: SsdShape, start: usize, end: usize) -> (SsdShape, SsdInputs<'a>) {
        let SsdShape { heads, d_state, head_dim, .. } = shape;
        let inputs = SsdInputs {
            q: &self.q[start * heads * d_state..end * heads * d_state],
            k: &self.k[start * d_state..end * d_state],
            v: &self.v[start * head_dim..end * head_dim],
            log_a: &self.log_a[start * heads..end * heads],
            b: &self.b[start * heads..end * heads],
            d_skip: self.d_skip,
        };
        (SsdShape { seq: end - start, ..shape }, inputs)
    }
    /// The same inputs for chunk `index` only.
    fn chunk(self, shape: SsdShape, index: usize) -> (SsdShape, SsdInputs<'a>) {
        self.tokens(shape, index * CHUNK, shape.seq.min((index + 1) * CHUNK))
    }
}

/// Chunked parallel form. `state` `[heads, d_state, head_dim]` is read and replaced; `y` is `[seq, heads · head_dim]`.
///
/// Panics when a length does not fit. Source: arXiv 2405.21060, section 6: what each chunk adds to the state, a pass over
/// the chunks, then all outputs.
pub fn ssd(exec: &Exec, shape: SsdShape, inputs: SsdInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    shape.check(inputs, y.len());
    check_len("state", state.len(), shape.state_len());
    let y_row = shape.heads * shape.head_dim;
    let mut states = Vec::new();
    for (i, y) in y.chunks_mut(BLOCK_CHUNKS * CHUNK * y_row).enumerate() {
        let start = i * BLOCK_CHUNKS * CHUNK;
        let (shape, inputs) = inputs.tokens(shape, start, start + y.len() / y_row);
        states.resize(shape.seq.div_ceil(CHUNK) * shape.state_len(), 0.0);
        let decays = decays(exec, shape, inputs);
        chunk_states(exec, shape, inputs, &decays, state, &mut states);
        let tasks = y.chunks_mut(CHUNK * y_row).zip(states.chunks(shape.state_len())).collect();
        exec.parallel_items(tasks, |chunk, (y, state)| {
            let (shape, inputs) = inputs.chunk(shape, chunk);
            chunk_output(&exec.single(), shape, inputs, &decays[chunk], state, y);
        });
    }
}

/// Decays of every chunk and head.
fn decays(exec: &Exec, shape: SsdShape, inputs: SsdInputs<'_>) -> Vec<Vec<Decay>> {
    exec.parallel_map(shape.seq.div_ceil(CHUNK), |chunk| {
        let (shape, inputs) = inputs.chunk(shape, chunk);
        let heads = shape.heads;
        dispatch!(exec.isa(), |s| {
            // A plain loop: an iterator's `collect` is compiled apart, without the instruction set.
            let mut decays = Vec::with_capacity(heads);
            for head in 0..heads {
                decays.push(Decay::new(s, &inputs.log_a[head..], heads));
            }
            decays
        })
    })
}

/// Writes the state at the start of every chunk to `states` `[chunks, heads, d_state, head_dim]` and moves `carry`
/// from the first chunk's start to the last one's end.
fn chunk_states(
    exec: &Exec,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    decays: &[Vec<Decay>],
    carry: &mut [f32],
    states: &mut [f32],
) {
    exec.parallel_chunks(states, shape.state_len(), |chunk, added| {
        let (shape, inputs) = inputs.chunk(shape, chunk);
        let SsdShape { seq, heads, d_state, head_dim } = shape;
        let mut keys = Reused::new(seq * heads * d_state);
        dispatch!(exec.isa(), weighted_keys(shape, inputs, &decays[chunk], &mut keys));
        mixed_gemm(
            &exec.single(),
            MatMut::dense(added, heads * d_state, head_dim),
            MatRef::dense(&keys, seq, heads * d_state),
            Trans::Yes,
            MatRef::dense(inputs.v, seq, head_dim),
            Trans::No,
            1.0,
            Store::Overwrite,
        );
    });
    let head_state = shape.d_state * shape.head_dim;
    for (decays, slot) in decays.iter().zip(states.chunks_mut(shape.state_len())) {
        pass_heads(exec, decays, head_state, carry, slot);
    }
}

/// [`pass_state`] for every head of one chunk.
fn pass_heads(exec: &Exec, decays: &[Decay], head_state: usize, carry: &mut [f32], slot: &mut [f32]) {
    dispatch!(exec.isa(), |s| {
        let heads = carry.chunks_exact_mut(head_state).zip(slot.chunks_exact_mut(head_state));
        for (decay, (carry, slot)) in decays.iter().zip(heads) {
            pass_state(s, decay.total, carry, slot);
        }
    });
}

/// `keys[t, h] = b_t,h · (decay to the chunk's end) · k_t`: what a chunk's keys weigh in its final state.
#[inline(always)]
fn weighted_keys(shape: SsdShape, inputs: SsdInputs<'_>, decays: &[Decay], keys: &mut [f32]) {
    let SsdShape { heads, d_state, .. } = shape;
    for (t, keys) in keys.chunks_exact_mut(heads * d_state).enumerate() {
        for (head, keys) in keys.chunks_exact_mut(d_state).enumerate() {
            let weight = inputs.b[t * heads + head] * decays[head].to_end[t];
            scaled(weight, &inputs.k[t * d_state..(t + 1) * d_state], keys);
        }
    }
}

/// Output of one chunk from the state at its start.
fn chunk_output(
    exec: &Exec,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    decays: &[Decay],
    state: &[f32],
    y: &mut [f32],
) {
    let SsdShape { seq, heads, d_state, head_dim } = shape;
    let (q_row, y_row) = (heads * d_state, heads * head_dim);
    for head in 0..heads {
        mixed_gemm(
            exec,
            MatMut::new(&mut y[head * head_dim..], seq, head_dim, y_row),
            MatRef::new(&inputs.q[head * d_state..], seq, d_state, q_row),
            Trans::No,
            MatRef::dense(
                &state[head * d_state * head_dim..(head + 1) * d_state * head_dim],
                d_state,
                head_dim,
            ),
            Trans::No,
            1.0,
            Store::Overwrite,
        );
    }
    // [seq · heads, seq]: a row per token and head.
    let mut scores = Reused::new(seq * heads * CHUNK);
    mixed_gemm(
        exec,
        MatMut::new(&mut scores, seq * heads, seq, CHUNK),
        MatRef::dense(inputs.q, seq * heads, d_state),
        Trans::No,
        MatRef::dense(inputs.k, seq, d_state),
        Trans::Yes,
        1.0,
        Store::Overwrite,
    );
    dispatch!(exec.isa(), |s| weigh_chunk(s, shape, inputs, decays, &mut scores, y));
    mixed_gemm(
        exec,
        MatMut::dense(y, seq * heads, head_dim),
        MatRef::new(&scores, seq * heads, seq, CHUNK),
        Trans::No,
        MatRef::dense(inputs.v, seq, head_dim),
        Trans::No,
        1.0,
        Store::Accumulate,
    );
}

/// Scales what `y` reads from the chunk's first state, adds the skip, and turns `scores` into causal decayed weights.
#[inline(always)]
fn weigh_chunk<S: Simd>(
    s: S,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    decays: &[Decay],
    scores: &mut [f32],
    y: &mut [f32],
) {
    let SsdShape { heads, head_dim, .. } = shape;
    for (head, decay) in decays.iter().enumerate() {
        let b = column(inputs.b, head, heads);
        for t in 0..shape.seq {
            let row = t * heads + head;
            let y = &mut y[row * head_dim..(row + 1) * head_dim];
            scale(decay.from_start[t], y);
            axpy(s, inputs.d_skip[head], &inputs.v[t * head_dim..(t + 1) * head_dim], y);
            let scores = &mut scores[row * CHUNK..(row + 1) * CHUNK];
            decay.for_row(s, t, |start, weights| {
                let scores = &mut scores[start..start + weights.len()];
                let b = &b[start..start + weights.len()];
                for i in 0..weights.len() {
                    scores[i] *= weights[i] * b[i];
                }
            });
            scores[Decay::causal_width(t)..].fill(0.0);
        }
    }
}

/// One head's values of a `[seq, heads]` chunk, padded with zeros.
#[inline(always)]
fn column(values: &[f32], head: usize, heads: usize) -> [f32; CHUNK] {
    let mut out = [0.0; CHUNK];
    for (out, &value) in out.iter_mut().zip(values[head..].iter().step_by(heads)) {
        *out = value;
    }
    out
}

/// One-token form of [`ssd`] (`shape.seq == 1`), for decoding. Panics when a length does not fit.
pub fn ssd_step(exec: &Exec, shape: SsdShape, inputs: SsdInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    assert_eq!(shape.seq, 1, "one step takes one token");
    shape.check(inputs, y.len());
    check_len("state", state.len(), shape.state_len());
    dispatch!(exec.isa(), |s| step(s, shape, inputs, state, y));
}

#[inline(always)]
fn step<S: Simd>(s: S, shape: SsdShape, inputs: SsdInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let SsdShape { d_state, head_dim, .. } = shape;
    let heads = state.chunks_exact_mut(d_state * head_dim).zip(y.chunks_exact_mut(head_dim));
    for (head, (state, y)) in heads.enumerate() {
        let decay = crate::simd::exp(s, inputs.log_a[head]);
        scaled(inputs.d_skip[head], inputs.v, y);
        let q = &inputs.q[head * d_state..(head + 1) * d_state];
        for ((row, &q), &k) in state.chunks_exact_mut(head_dim).zip(q).zip(inputs.k) {
            let write = inputs.b[head] * k;
            for ((row, y), &v) in row.iter_mut().zip(&mut *y).zip(inputs.v) {
                *row = s.fma(decay, *row, write * v);
                *y = s.fma(q, *row, *y);
            }
        }
    }
}
