//! The gated delta rule (arXiv 2412.06464) for one KV group whose query heads share one state.
//!
//! `S_t = a_t S_{t−1} + β_t k_t (v_t − a_t S_{t−1}ᵀ k_t)ᵀ`, `y_{t,h} = S_tᵀ q_{t,h}`, `a_t = exp(log_a_t)`.

use crate::chunk::{CHUNK, Decay, check_len, scale};
use crate::gemm::split_gemm;
use crate::isa::dispatch;
use crate::simd::{Simd, axpy, exp};
use crate::{Exec, MatMut, MatRef, Reused, STACK, Store, Trans, mixed_gemm};
use smallvec::{SmallVec, smallvec};

mod backward;
#[cfg(test)]
mod tests;

pub use backward::gated_delta_backward;

/// Sizes of one call.
#[derive(Clone, Copy, Debug)]
pub struct DeltaShape {
    /// Tokens.
    pub seq: usize,
    /// Query heads that read the one state.
    pub heads: usize,
    /// Width of keys and queries.
    pub d_state: usize,
    /// Width of values.
    pub head_dim: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct DeltaInputs<'a> {
    /// `[seq, heads · d_state]`.
    pub q: &'a [f32],
    /// `[seq, d_state]`, unit rows expected (stable for any row of norm ≤ 1).
    pub k: &'a [f32],
    /// `[seq, head_dim]`.
    pub v: &'a [f32],
    /// `[seq]`, ≤ 0.
    pub log_a: &'a [f32],
    /// `[seq]`, in (0, 1).
    pub beta: &'a [f32],
}

/// Gradients of [`DeltaInputs`], same shapes; added to.
#[derive(Debug)]
pub struct DeltaGrads<'a> {
    /// Of `q`.
    pub dq: &'a mut [f32],
    /// Of `k`.
    pub dk: &'a mut [f32],
    /// Of `v`.
    pub dv: &'a mut [f32],
    /// Of `log_a`.
    pub dlog_a: &'a mut [f32],
    /// Of `beta`.
    pub dbeta: &'a mut [f32],
}

/// Chunks whose states are held at once in the forward pass: bounds the memory of a long prefill.
const BLOCK_CHUNKS: usize = 32;

impl DeltaShape {
    fn state_len(self) -> usize {
        self.d_state * self.head_dim
    }
    /// Panics when a length does not fit.
    #[track_caller]
    fn check(self, inputs: DeltaInputs<'_>, y: usize) {
        let DeltaShape { seq, heads, d_state, head_dim } = self;
        assert!(heads > 0 && d_state > 0 && head_dim > 0, "empty {self:?}");
        check_len("q", inputs.q.len(), seq * heads * d_state);
        check_len("k", inputs.k.len(), seq * d_state);
        check_len("v", inputs.v.len(), seq * head_dim);
        check_len("log_a", inputs.log_a.len(), seq);
        check_len("beta", inputs.beta.len(), seq);
        check_len("y", y, seq * heads * head_dim);
    }
}

impl<'a> DeltaInputs<'a> {
    /// The same inputs for tokens `start..end` only.
    fn tokens(self, shape: DeltaShape, start: usize, end: usize) -> (DeltaShape, DeltaInputs<'a>) {
        let DeltaShape { heads, d_state, head_dim, .. } = shape;
        let inputs = DeltaInputs {
            q: &self.q[start * heads * d_state..end * heads * d_state],
            k: &self.k[start * d_state..end * d_state],
            v: &self.v[start * head_dim..end * head_dim],
            log_a: &self.log_a[start..end],
            beta: &self.beta[start..end],
        };
        (DeltaShape { seq: end - start, ..shape }, inputs)
    }
    /// The same inputs for chunk `index` only.
    fn chunk(self, shape: DeltaShape, index: usize) -> (DeltaShape, DeltaInputs<'a>) {
        self.tokens(shape, index * CHUNK, shape.seq.min((index + 1) * CHUNK))
    }
}

/// Chunked parallel form. `state` `[d_state, head_dim]` is read and replaced; `y` is `[seq, heads · head_dim]`.
///
/// Inside a chunk `S_t = e^{c_t} S_0 + Σ_{s≤t} e^{c_t−c_s} k_s w_sᵀ`, where `c` sums the log decays and the corrections `w`
/// solve `(I + T) w = β (v − e^c S_0ᵀ k)` with `T_ts = β_t e^{c_t−c_s} k_t·k_s` for `s < t`. `I + T` is inverted for all chunks
/// at once (its inverse has no entry above 1 for keys of norm ≤ 1); a pass over the chunks then finds states and
/// corrections, and all outputs follow. Products of queries and outputs are in the context's precision; states are f32, and so are the products
/// that the recurrence is solved with, or of factors of two bfloat16 values each.
///
/// Panics when a length does not fit. Source: arXiv 2412.06464, section 3.3, and arXiv 2406.06484 (UT transform).
pub fn gated_delta(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
) {
    blocks(exec, shape, inputs, state, y, |_| {});
}

/// [`gated_delta`], with what its backward pass reads.
pub fn gated_delta_train(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
) -> DeltaSaved {
    let mut saved = DeltaSaved { solvers: Vec::new(), borders: Vec::new() };
    blocks(exec, shape, inputs, state, y, |block| {
        saved.solvers.extend(block.solvers);
        saved.borders.extend(block.borders);
    });
    saved
}

/// Runs blocks of chunks, one after another, and hands out what they were solved with.
fn blocks(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
    mut done: impl FnMut(DeltaSaved),
) {
    shape.check(inputs, y.len());
    check_len("state", state.len(), shape.state_len());
    let y_row = shape.heads * shape.head_dim;
    for (i, y) in y.chunks_mut(BLOCK_CHUNKS * CHUNK * y_row).enumerate() {
        let start = i * BLOCK_CHUNKS * CHUNK;
        let (shape, inputs) = inputs.tokens(shape, start, start + y.len() / y_row);
        let solvers = solvers(exec, shape, inputs);
        let borders = chunk_borders(exec, shape, inputs, &solvers, state);
        exec.parallel_items(y.chunks_mut(CHUNK * y_row).collect(), |chunk, y| {
            let (shape, inputs) = inputs.chunk(shape, chunk);
            chunk_output(&exec.single(), shape, inputs, &solvers[chunk], &borders[chunk], y);
        });
        done(DeltaSaved { solvers, borders });
    }
}

/// What a forward pass knows that its backward pass reads: per token, a row of two `CHUNK · CHUNK` matrices, of the state at its chunk's
/// start, and two of `head_dim` values.
pub struct DeltaSaved {
    /// Of every chunk.
    solvers: Vec<Solver>,
    borders: Vec<Border>,
}

/// What a chunk's corrections depend on besides the state at its start.
struct Solver {
    decay: Decay,
    /// `e^{c_t−c_s} k_t·k_s` for `s ≤ t`, rows [`CHUNK`] apart.
    triangle: Reused,
    /// `(I + T)⁻¹`, likewise.
    inverse: Reused,
}

/// The state at a chunk's start and what follows from it.
struct Border {
    /// `S_0` `[d_state, head_dim]`.
    state: Vec<f32>,
    /// `S_0ᵀ k_t` `[seq, head_dim]`.
    reads: Reused,
    /// `w_t` `[seq, head_dim]`.
    corrections: Reused,
}

fn solvers(exec: &Exec, shape: DeltaShape, inputs: DeltaInputs<'_>) -> Vec<Solver> {
    exec.parallel_map(shape.seq.div_ceil(CHUNK), |chunk| {
        let (shape, inputs) = inputs.chunk(shape, chunk);
        let mut triangle = Reused::new(shape.seq * CHUNK);
        let keys = MatRef::dense(inputs.k, shape.seq, shape.d_state);
        let out = MatMut::new(&mut triangle, shape.seq, shape.seq, CHUNK);
        split_gemm(&exec.single(), out, (keys, Trans::No), (keys, Trans::Yes), Store::Overwrite);
        dispatch!(exec.isa(), |s| {
            let decay = Decay::new(s, inputs.log_a, 1);
            for (t, row) in triangle.chunks_exact_mut(CHUNK).enumerate() {
                weigh_row(s, &decay, t, row);
            }
            Solver { inverse: unit_lower_inverse(s, &triangle, inputs.beta), triangle, decay }
        })
    })
}

/// `out[i, j] = a_i · b_j` for `rows` rows `a` and as many rows `b` as there are, rows of `out` [`CHUNK`] apart; in the context's precision.
fn products(exec: &Exec, rows: usize, width: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
    let columns = b.len() / width;
    let (a, b) = (MatRef::dense(a, rows, width), MatRef::dense(b, columns, width));
    let out = MatMut::new(out, rows, columns, CHUNK);
    mixed_gemm(exec, out, a, Trans::No, b, Trans::Yes, 1.0, Store::Overwrite);
}

/// Multiplies row `t` of a chunk's scores by the decays since each token; tokens after `t` get 0.
#[inline(always)]
fn weigh_row<S: Simd>(s: S, decay: &Decay, t: usize, row: &mut [f32]) {
    decay.for_row(s, t, |start, weights| {
        for (score, weight) in row[start..].iter_mut().zip(weights) {
            *score *= weight;
        }
    });
    row[Decay::causal_width(t)..].fill(0.0);
}

/// Inverse of `I + T` by forward substitution, where row `t` of `T` is `beta[t]` times what `triangle` has left of its diagonal.
#[inline(always)]
fn unit_lower_inverse<S: Simd>(s: S, triangle: &[f32], beta: &[f32]) -> Reused {
    let mut inverse = Reused::new(triangle.len());
    for (t, (row, &beta)) in triangle.chunks_exact(CHUNK).zip(beta).enumerate() {
        let (done, current) = inverse.split_at_mut(t * CHUNK);
        let mut sum = [0.0f32; CHUNK];
        sum[t] = 1.0;
        for (done, &factor) in done.chunks_exact(CHUNK).zip(row) {
            axpy(s, -(beta * factor), done, &mut sum);
        }
        current[..CHUNK].copy_from_slice(&sum);
    }
    inverse
}

/// Walks `carry` from the first chunk's start to the last one's end.
fn chunk_borders(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    solvers: &[Solver],
    carry: &mut [f32],
) -> Vec<Border> {
    let single = exec.single();
    let walk = solvers.iter().enumerate().map(|(chunk, Solver { decay, inverse, .. })| {
        let (shape, DeltaInputs { k, v, beta, .. }) = inputs.chunk(shape, chunk);
        let DeltaShape { seq, d_state, head_dim, .. } = shape;
        let (no, yes) = (Trans::No, Trans::Yes);
        let product = |out: &mut [f32], a: MatRef<'_>, ta, b: &[f32], rows, store| {
            let out_rows = out.len() / head_dim;
            let (out, b) = (MatMut::dense(out, out_rows, head_dim), MatRef::dense(b, rows, head_dim));
            split_gemm(&single, out, (a, ta), (b, no), store);
        };
        let keys = MatRef::dense(k, seq, d_state);
        let state = carry.to_vec();
        let mut reads = Reused::new(seq * head_dim);
        product(&mut reads, keys, no, &state, d_state, Store::Overwrite);
        let mut target = Reused::new(seq * head_dim);
        dispatch!(exec.isa(), |s| for (t, &beta) in beta.iter().enumerate() {
            let row = t * head_dim..(t + 1) * head_dim;
            error(s, decay.from_start[t], &v[row.clone()], &reads[row.clone()], &mut target[row.clone()]);
            scale(beta, &mut target[row]);
        });
        let mut corrections = Reused::new(seq * head_dim);
        let inverse = MatRef::new(inverse, seq, seq, CHUNK);
        product(&mut corrections, inverse, no, &target, seq, Store::Overwrite);
        // The target is no longer needed: its place takes the corrections as the chunk's end sees them.
        dispatch!(exec.isa(), {
            scale_rows(&corrections, &decay.to_end, head_dim, &mut target);
            scale(decay.total, carry);
        });
        product(carry, keys, yes, &target, seq, Store::Accumulate);
        Border { state, reads, corrections }
    });
    walk.collect()
}

/// `out = v − decay · read`: what the state gets wrong about one token.
#[inline(always)]
fn error<S: Simd>(s: S, decay: f32, v: &[f32], read: &[f32], out: &mut [f32]) {
    assert!(v.len() == out.len() && read.len() == out.len());
    for ((out, &v), &read) in out.iter_mut().zip(v).zip(read) {
        *out = s.fma(-decay, read, v);
    }
}

/// `out[t] = factors[t] · x[t]` for rows of `width` values.
#[inline(always)]
fn scale_rows(x: &[f32], factors: &[f32], width: usize, out: &mut [f32]) {
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for ((x, out), &factor) in rows.zip(factors) {
        crate::chunk::scaled(factor, x, out);
    }
}

/// Output of one chunk.
fn chunk_output(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    solver: &Solver,
    border: &Border,
    y: &mut [f32],
) {
    let DeltaShape { seq, heads, d_state, head_dim } = shape;
    let rows = seq * heads;
    mixed_gemm(
        exec,
        MatMut::dense(y, rows, head_dim),
        MatRef::dense(inputs.q, rows, d_state),
        Trans::No,
        MatRef::dense(&border.state, d_state, head_dim),
        Trans::No,
        1.0,
        Store::Overwrite,
    );
    dispatch!(exec.isa(), {
        for (row, y) in y.chunks_exact_mut(head_dim).enumerate() {
            scale(solver.decay.from_start[row / heads], y);
        }
    });
    let mut scores = Reused::new(rows * CHUNK);
    products(exec, rows, d_state, inputs.q, inputs.k, &mut scores);
    dispatch!(exec.isa(), |s| weigh_heads(s, &solver.decay, heads, &mut scores));
    mixed_gemm(
        exec,
        MatMut::dense(y, rows, head_dim),
        MatRef::new(&scores, rows, seq, CHUNK),
        Trans::No,
        MatRef::dense(&border.corrections, seq, head_dim),
        Trans::No,
        1.0,
        Store::Accumulate,
    );
}

/// [`weigh_row`] for all heads' rows of every token.
#[inline(always)]
fn weigh_heads<S: Simd>(s: S, decay: &Decay, heads: usize, scores: &mut [f32]) {
    for (t, rows) in scores.chunks_exact_mut(heads * CHUNK).enumerate() {
        let mut weights = [1.0f32; CHUNK];
        weigh_row(s, decay, t, &mut weights);
        for row in rows.chunks_exact_mut(CHUNK) {
            for (score, weight) in row.iter_mut().zip(&weights) {
                *score *= weight;
            }
        }
    }
}

/// One-token form of [`gated_delta`] (`shape.seq == 1`). Panics when a length does not fit.
pub fn gated_delta_step(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
) {
    assert_eq!(shape.seq, 1, "one step takes one token");
    shape.check(inputs, y.len());
    check_len("state", state.len(), shape.state_len());
    dispatch!(exec.isa(), |s| step(s, shape, inputs, state, y));
}

#[inline(always)]
fn step<S: Simd>(s: S, shape: DeltaShape, inputs: DeltaInputs<'_>, state: &mut [f32], y: &mut [f32]) {
    let DeltaShape { d_state, head_dim, .. } = shape;
    let decay = exp(s, inputs.log_a[0]);
    let mut read: SmallVec<[f32; STACK]> = smallvec![0.0; head_dim];
    for (row, &k) in state.chunks_exact(head_dim).zip(inputs.k) {
        axpy(s, k, row, &mut read);
    }
    let mut wrong: SmallVec<[f32; STACK]> = smallvec![0.0; head_dim];
    error(s, decay, inputs.v, &read, &mut wrong);
    for (row, &k) in state.chunks_exact_mut(head_dim).zip(inputs.k) {
        let write = inputs.beta[0] * k;
        for (row, &wrong) in row.iter_mut().zip(&*wrong) {
            *row = s.fma(decay, *row, write * wrong);
        }
    }
    for (y, q) in y.chunks_exact_mut(head_dim).zip(inputs.q.chunks_exact(d_state)) {
        y.fill(0.0);
        for (row, &q) in state.chunks_exact(head_dim).zip(q) {
            axpy(s, q, row, y);
        }
    }
}
