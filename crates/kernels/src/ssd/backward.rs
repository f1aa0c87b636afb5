//! Gradient of the chunked state-space recurrence: states and state gradients at chunk borders, then every chunk alone.

use super::{SsdGrads, SsdInputs, SsdShape, chunk_states, column, decays, pass_heads, weighted_keys};
use crate::chunk::{CHUNK, DECAY_LANES, Decay, add_suffix_sums, check_len, scaled};
use crate::isa::dispatch;
use crate::simd::{Simd, axpy, dot};
use crate::{Exec, MatMut, MatRef, Reused, Store, Trans, mixed_gemm};

/// Gradient of [`super::ssd`] from `initial_state` (zeros when `None`), given the gradients of `y` and, when given, of the
/// final state. Adds to `grads` and, when given, to `d_initial_state`. Chunked; recomputes the states, and holds two
/// states per 64 tokens meanwhile.
///
/// Panics when a length does not fit.
pub fn ssd_backward(
    exec: &Exec,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    initial_state: Option<&[f32]>,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: SsdGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let SsdShape { seq, heads, d_state, head_dim } = shape;
    let state_len = shape.state_len();
    shape.check(inputs, dy.len());
    check_len("dq", grads.dq.len(), inputs.q.len());
    check_len("dk", grads.dk.len(), inputs.k.len());
    check_len("dv", grads.dv.len(), inputs.v.len());
    check_len("dlog_a", grads.dlog_a.len(), inputs.log_a.len());
    check_len("db", grads.db.len(), inputs.b.len());
    check_len("dd_skip", grads.dd_skip.len(), heads);
    let or_zeros = |state: Option<&[f32]>, name| match state {
        Some(state) => {
            check_len(name, state.len(), state_len);
            state.to_vec()
        }
        None => vec![0.0; state_len],
    };
    let mut carry = or_zeros(initial_state, "initial_state");
    let mut d_carry = or_zeros(d_final_state, "d_final_state");
    let chunks = seq.div_ceil(CHUNK);
    let decays = decays(exec, shape, inputs);
    let mut states = Reused::new(chunks * state_len);
    chunk_states(exec, shape, inputs, &decays, &mut carry, &mut states);
    let mut d_states = Reused::new(chunks * state_len);
    chunk_state_gradients(exec, shape, inputs, dy, &decays, &mut d_carry, &mut d_states);
    if let Some(d_initial_state) = d_initial_state {
        check_len("d_initial_state", d_initial_state.len(), state_len);
        dispatch!(exec.isa(), |s| axpy(s, 1.0, &d_carry, d_initial_state));
    }

    let SsdGrads { dq, dk, dv, dlog_a, db, dd_skip } = grads;
    let mut d_skips = vec![0.0; chunks * heads];
    let mut tasks = Vec::with_capacity(chunks);
    let slices = dq
        .chunks_mut(CHUNK * heads * d_state)
        .zip(dk.chunks_mut(CHUNK * d_state))
        .zip(dv.chunks_mut(CHUNK * head_dim))
        .zip(dlog_a.chunks_mut(CHUNK * heads))
        .zip(db.chunks_mut(CHUNK * heads))
        .zip(d_skips.chunks_mut(heads));
    for (((((dq, dk), dv), dlog_a), db), dd_skip) in slices {
        tasks.push(SsdGrads { dq, dk, dv, dlog_a, db, dd_skip });
    }
    exec.parallel_items(tasks, |chunk, grads| {
        let (shape, inputs) = inputs.chunk(shape, chunk);
        let rows = chunk * CHUNK * heads * head_dim;
        let task = Chunk {
            shape,
            inputs,
            decays: &decays[chunk],
            state: &states[chunk * state_len..(chunk + 1) * state_len],
            d_state_out: &d_states[chunk * state_len..(chunk + 1) * state_len],
            dy: &dy[rows..rows + shape.seq * heads * head_dim],
        };
        task.backward(&exec.single(), grads);
    });
    for d_skips in d_skips.chunks_exact(heads) {
        for (dd_skip, d_skip) in dd_skip.iter_mut().zip(d_skips) {
            *dd_skip += d_skip;
        }
    }
}

/// Writes the gradient of the state at the end of every chunk to `d_states` and moves `d_carry` from the last chunk's
/// end to the first one's start.
fn chunk_state_gradients(
    exec: &Exec,
    shape: SsdShape,
    inputs: SsdInputs<'_>,
    dy: &[f32],
    decays: &[Vec<Decay>],
    d_carry: &mut [f32],
    d_states: &mut [f32],
) {
    let SsdShape { heads, d_state, head_dim, .. } = shape;
    let (q_row, y_row) = (heads * d_state, heads * head_dim);
    exec.parallel_chunks(d_states, shape.state_len(), |chunk, d_states| {
        let (shape, inputs) = inputs.chunk(shape, chunk);
        let mut decayed = Reused::new(shape.seq * y_row);
        let dy = &dy[chunk * CHUNK * y_row..][..shape.seq * y_row];
        dispatch!(exec.isa(), decayed_rows(shape, &decays[chunk], dy, &mut decayed));
        for (head, d_state_out) in d_states.chunks_exact_mut(d_state * head_dim).enumerate() {
            mixed_gemm(
                &exec.single(),
                MatMut::dense(d_state_out, d_state, head_dim),
                MatRef::new(&inputs.q[head * d_state..], shape.seq, d_state, q_row),
                Trans::Yes,
                MatRef::new(&decayed[head * head_dim..], shape.seq, head_dim, y_row),
                Trans::No,
                1.0,
                Store::Overwrite,
            );
        }
    });
    let chunks = decays.iter().zip(d_states.chunks_mut(shape.state_len()));
    for (decays, slot) in chunks.rev() {
        pass_heads(exec, decays, d_state * head_dim, d_carry, slot);
    }
}

/// `out[t, h] = (decay from the chunk's start) · dy[t, h]`.
#[inline(always)]
fn decayed_rows(shape: SsdShape, decays: &[Decay], dy: &[f32], out: &mut [f32]) {
    let SsdShape { heads, head_dim, .. } = shape;
    let rows = dy.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
    for (row, (dy, out)) in rows.enumerate() {
        scaled(decays[row % heads].from_start[row / heads], dy, out);
    }
}

/// One chunk's part of the backward pass.
struct Chunk<'a> {
    shape: SsdShape,
    inputs: SsdInputs<'a>,
    decays: &'a [Decay],
    /// State at the chunk's start.
    state: &'a [f32],
    /// Gradient of the state at its end.
    d_state_out: &'a [f32],
    dy: &'a [f32],
}

impl Chunk<'_> {
    fn backward(&self, exec: &Exec, grads: SsdGrads<'_>) {
        let SsdShape { seq, heads, d_state, head_dim } = self.shape;
        let SsdInputs { q, k, v, .. } = self.inputs;
        let SsdGrads { dq, dk, dv, dlog_a, db, dd_skip } = grads;
        let rows = seq * heads;
        let (no, yes) = (Trans::No, Trans::Yes);
        let product = |out: MatMut<'_>, a: MatRef<'_>, ta, b: MatRef<'_>, tb, store| {
            mixed_gemm(exec, out, a, ta, b, tb, 1.0, store);
        };
        let (q_mat, k_mat) = (MatRef::dense(q, rows, d_state), MatRef::dense(k, seq, d_state));
        let (dy_mat, v_mat) = (MatRef::dense(self.dy, rows, head_dim), MatRef::dense(v, seq, head_dim));

        // Inside the chunk: q·k and dy·v of every pair become the weights of v and of q, k.
        let mut scores = Reused::new(rows * CHUNK);
        let mut d_scores = Reused::new(rows * CHUNK);
        product(MatMut::new(&mut scores, rows, seq, CHUNK), q_mat, no, k_mat, yes, Store::Overwrite);
        product(MatMut::new(&mut d_scores, rows, seq, CHUNK), dy_mat, no, v_mat, yes, Store::Overwrite);
        let mut sums = vec![HeadSums::default(); heads];
        dispatch!(exec.isa(), |s| self.weigh(s, &mut scores, &mut d_scores, &mut sums, dd_skip));
        let scores = MatRef::new(&scores, rows, seq, CHUNK);
        let d_scores = MatRef::new(&d_scores, rows, seq, CHUNK);
        product(MatMut::dense(dv, seq, head_dim), scores, yes, dy_mat, no, Store::Accumulate);
        product(MatMut::dense(dq, rows, d_state), d_scores, no, k_mat, no, Store::Accumulate);
        product(MatMut::dense(dk, seq, d_state), d_scores, yes, q_mat, no, Store::Accumulate);

        // Reads of the first state, and writes to the last one.
        let mut decayed = Reused::new(rows * head_dim);
        dispatch!(exec.isa(), decayed_rows(self.shape, self.decays, self.dy, &mut decayed));
        let mut reads = Reused::new(rows * d_state);
        for (head, state) in self.state.chunks_exact(d_state * head_dim).enumerate() {
            product(
                MatMut::new(&mut reads[head * d_state..], seq, d_state, heads * d_state),
                MatRef::new(&decayed[head * head_dim..], seq, head_dim, heads * head_dim),
                no,
                MatRef::dense(state, d_state, head_dim),
                yes,
                Store::Overwrite,
            );
        }
        let d_state_mat = MatRef::dense(self.d_state_out, heads * d_state, head_dim);
        let mut writes = Reused::new(rows * d_state);
        product(
            MatMut::dense(&mut writes, seq, heads * d_state),
            v_mat,
            no,
            d_state_mat,
            yes,
            Store::Overwrite,
        );
        let mut keys = Reused::new(rows * d_state);
        dispatch!(exec.isa(), weighted_keys(self.shape, self.inputs, self.decays, &mut keys));
        let keys = MatRef::dense(&keys, seq, heads * d_state);
        product(MatMut::dense(dv, seq, head_dim), keys, no, d_state_mat, no, Store::Accumulate);
        dispatch!(exec.isa(), |s| self.finish(s, &reads, &writes, &sums, [dq, dk, dv, dlog_a, db]));
    }

    /// Turns `scores` (q·k) into the weights of `dy` in `dv`, and `d_scores` (dy·v) into those of `k` and `q`; sums
    /// what the decays and input scales need. Writes `dd_skip`.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        s: S,
        scores: &mut [f32],
        d_scores: &mut [f32],
        sums: &mut [HeadSums],
        dd_skip: &mut [f32],
    ) {
        let SsdShape { seq, heads, .. } = self.shape;
        for (head, (decay, sums)) in self.decays.iter().zip(sums).enumerate() {
            let b = column(self.inputs.b, head, heads);
            let mut d_skip = 0.0;
            for t in 0..seq {
                let row = (t * heads + head) * CHUNK;
                let (scores, d_scores) = (&mut scores[row..row + CHUNK], &mut d_scores[row..row + CHUNK]);
                d_skip += d_scores[t];
                sums.diagonal[t] = scores[t] * d_scores[t];
                // Without the diagonal, which does not decay: its part of row and column sums would only cancel.
                let mut row_sum = [0.0; DECAY_LANES];
                decay.for_row(s, t, |start, weights| {
                    let scores = &mut scores[start..start + DECAY_LANES];
                    let d_scores = &mut d_scores[start..start + DECAY_LANES];
                    let b = &b[start..start + DECAY_LANES];
                    let columns = &mut sums.columns[start..start + DECAY_LANES];
                    for i in 0..DECAY_LANES {
                        let weight = weights[i] * b[i];
                        let both = scores[i] * d_scores[i];
                        let both = if start + i < t { both * weights[i] } else { 0.0 };
                        columns[i] += both;
                        row_sum[i] = s.fma(both, b[i], row_sum[i]);
                        scores[i] *= weight;
                        d_scores[i] *= weight;
                    }
                });
                sums.rows[t] = row_sum.iter().sum();
                scores[Decay::causal_width(t)..].fill(0.0);
                d_scores[Decay::causal_width(t)..].fill(0.0);
            }
            dd_skip[head] = d_skip;
        }
    }

    /// Everything that is not a matrix product. `reads` `[seq, heads, d_state]`: decayed `S₀ dy`; `writes`, the same
    /// shape: `D v` with `D` the gradient of the last state. `outs`: `dq`, `dk`, `dv`, `dlog_a`, `db`.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, reads: &[f32], writes: &[f32], sums: &[HeadSums], outs: [&mut [f32]; 5]) {
        let SsdShape { seq, heads, d_state, head_dim } = self.shape;
        let SsdInputs { q, k, b, d_skip, .. } = self.inputs;
        let [dq, dk, dv, dlog_a, db] = outs;
        axpy(s, 1.0, reads, dq);
        for (head, (decay, sums)) in self.decays.iter().zip(sums).enumerate() {
            let state = head * d_state * head_dim..(head + 1) * d_state * head_dim;
            // Gradient of the inclusive sums of log decays; f64, since what enters one sum leaves another.
            let mut d_sums = [0.0f64; CHUNK];
            let mut at_end =
                f64::from(decay.total * dot(s, &self.state[state.clone()], &self.d_state_out[state]));
            for t in 0..seq {
                let row = t * heads + head;
                let vector = row * d_state..(row + 1) * d_state;
                let (k, dk) = (&k[t * d_state..(t + 1) * d_state], &mut dk[t * d_state..(t + 1) * d_state]);
                let to_end = decay.to_end[t];
                let written = to_end * dot(s, k, &writes[vector.clone()]);
                axpy(s, b[row] * to_end, &writes[vector.clone()], dk);
                let (dy, dv) = (&self.dy[row * head_dim..], &mut dv[t * head_dim..(t + 1) * head_dim]);
                axpy(s, d_skip[head], &dy[..head_dim], dv);
                db[row] += sums.columns[t] + sums.diagonal[t] + written;
                at_end += f64::from(b[row] * written);
                d_sums[t] = f64::from(sums.rows[t]) - f64::from(b[row] * sums.columns[t])
                    + f64::from(dot(s, &q[vector.clone()], &reads[vector]))
                    - f64::from(b[row] * written);
            }
            d_sums[seq - 1] += at_end;
            add_suffix_sums(&d_sums[..seq], &mut dlog_a[head..], heads);
        }
    }
}

/// Sums over the pairs `s < t` of one head's `(q_t·k_s)(dy_t·v_s) e^{c_t − c_s}`, and the same at `s = t`.
#[derive(Clone)]
struct HeadSums {
    /// Over `s`, times `b_s`.
    rows: [f32; CHUNK],
    /// Over `t`.
    columns: [f32; CHUNK],
    /// At `s = t`.
    diagonal: [f32; CHUNK],
}

impl Default for HeadSums {
    fn default() -> Self {
        Self { rows: [0.0; CHUNK], columns: [0.0; CHUNK], diagonal: [0.0; CHUNK] }
    }
}
