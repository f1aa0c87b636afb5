//! Gradient of the chunked gated delta rule: states and state gradients at chunk borders, then every chunk alone.

use super::{
    Border, DeltaGrads, DeltaInputs, DeltaSaved, DeltaShape, Solver, error, products, scale_rows,
    weigh_heads, weigh_row,
};
use crate::chunk::{CHUNK, add_suffix_sums, check_len, scale};
use crate::gemm::split_gemm;
use crate::isa::dispatch;
use crate::simd::{Simd, axpy, dot};
use crate::{Exec, MatMut, MatRef, Reused, Store, Trans, mixed_gemm};

/// Gradient of [`super::gated_delta_train`], which left `saved`, as [`crate::ssd::ssd_backward`]. Chunked throughout. Products are in the context's
/// precision, but those that carry the gradient of the state from chunk to chunk, which are as the forward pass's own.
///
/// Panics when a length does not fit.
pub fn gated_delta_backward(
    exec: &Exec,
    shape: DeltaShape,
    inputs: DeltaInputs<'_>,
    saved: &DeltaSaved,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: DeltaGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let DeltaShape { heads, d_state, head_dim, .. } = shape;
    let state_len = shape.state_len();
    shape.check(inputs, dy.len());
    check_len("dq", grads.dq.len(), inputs.q.len());
    check_len("dk", grads.dk.len(), inputs.k.len());
    check_len("dv", grads.dv.len(), inputs.v.len());
    check_len("dlog_a", grads.dlog_a.len(), inputs.log_a.len());
    check_len("dbeta", grads.dbeta.len(), inputs.beta.len());
    assert_eq!(saved.solvers.len(), shape.seq.div_ceil(CHUNK), "chunks of the forward pass");
    let mut d_carry = match d_final_state {
        Some(state) => {
            check_len("d_final_state", state.len(), state_len);
            state.to_vec()
        }
        None => vec![0.0; state_len],
    };
    let chunks: Vec<Chunk<'_>> = saved
        .solvers
        .iter()
        .zip(&saved.borders)
        .zip(dy.chunks(CHUNK * heads * head_dim))
        .enumerate()
        .map(|(chunk, ((solver, border), dy))| {
            let (shape, inputs) = inputs.chunk(shape, chunk);
            Chunk { shape, inputs, solver, border, dy }
        })
        .collect();
    let mut borders = exec.parallel_map(chunks.len(), |i| chunks[i].border_gradients(&exec.single()));
    for (chunk, border) in chunks.iter().zip(&mut borders).rev() {
        chunk.walk_back(&exec.single(), &mut d_carry, border);
    }
    if let Some(d_initial_state) = d_initial_state {
        check_len("d_initial_state", d_initial_state.len(), state_len);
        dispatch!(exec.isa(), |s| axpy(s, 1.0, &d_carry, d_initial_state));
    }

    let DeltaGrads { dq, dk, dv, dlog_a, dbeta } = grads;
    let slices = dq
        .chunks_mut(CHUNK * heads * d_state)
        .zip(dk.chunks_mut(CHUNK * d_state))
        .zip(dv.chunks_mut(CHUNK * head_dim))
        .zip(dlog_a.chunks_mut(CHUNK))
        .zip(dbeta.chunks_mut(CHUNK));
    let tasks =
        slices.map(|((((dq, dk), dv), dlog_a), dbeta)| DeltaGrads { dq, dk, dv, dlog_a, dbeta }).collect();
    exec.parallel_items(tasks, |i, grads: DeltaGrads<'_>| {
        chunks[i].backward(&exec.single(), &borders[i], grads);
    });
}

/// Gradients at a chunk's borders.
struct BorderGrads {
    /// Before the walk: what `y` adds to the gradient of the state at the chunk's start. After it: the gradient of
    /// the state at the chunk's end.
    state: Reused,
    /// Before the walk: what `y` adds to the gradient of the corrections. After it: the gradient of what the
    /// corrections solve for, `β (v − e^c S_0ᵀ k)`.
    target: Reused,
    /// `e^{c_t−c_s} q_t·k_s` for `s ≤ t`, rows [`CHUNK`] apart.
    scores: Reused,
}

/// One chunk's part of the backward pass.
struct Chunk<'a> {
    shape: DeltaShape,
    inputs: DeltaInputs<'a>,
    solver: &'a Solver,
    border: &'a Border,
    dy: &'a [f32],
}

/// `out = op(a) · op(b)` or `+=`, in the context's precision.
fn product(exec: &Exec, out: MatMut<'_>, a: (MatRef<'_>, Trans), b: (MatRef<'_>, Trans), store: Store) {
    mixed_gemm(exec, out, a.0, a.1, b.0, b.1, 1.0, store);
}

impl Chunk<'_> {
    /// `dy` decayed from the chunk's start.
    fn decayed(&self, exec: &Exec) -> Reused {
        let DeltaShape { heads, head_dim, .. } = self.shape;
        let mut decayed = Reused::new(self.dy.len());
        dispatch!(
            exec.isa(),
            scale_rows(self.dy, &self.solver.decay.from_start, heads * head_dim, &mut decayed)
        );
        decayed
    }

    fn border_gradients(&self, exec: &Exec) -> BorderGrads {
        let DeltaShape { seq, heads, d_state, head_dim } = self.shape;
        let DeltaInputs { q, k, .. } = self.inputs;
        let rows = seq * heads;
        let mut scores = Reused::new(rows * CHUNK);
        products(exec, rows, d_state, q, k, &mut scores);
        dispatch!(exec.isa(), |s| weigh_heads(s, &self.solver.decay, heads, &mut scores));
        let mut target = Reused::new(seq * head_dim);
        product(
            exec,
            MatMut::dense(&mut target, seq, head_dim),
            (MatRef::new(&scores, rows, seq, CHUNK), Trans::Yes),
            (MatRef::dense(self.dy, rows, head_dim), Trans::No),
            Store::Overwrite,
        );
        let mut state = Reused::new(d_state * head_dim);
        product(
            exec,
            MatMut::dense(&mut state, d_state, head_dim),
            (MatRef::dense(q, rows, d_state), Trans::Yes),
            (MatRef::dense(&self.decayed(exec), rows, head_dim), Trans::No),
            Store::Overwrite,
        );
        BorderGrads { state, target, scores }
    }

    /// Walks `d_carry` from the chunk's end to its start.
    fn walk_back(&self, exec: &Exec, d_carry: &mut [f32], border: &mut BorderGrads) {
        let DeltaShape { seq, d_state, head_dim, .. } = self.shape;
        let DeltaInputs { k, beta, .. } = self.inputs;
        let decay = &self.solver.decay;
        let keys = MatRef::dense(k, seq, d_state);
        let mut d_corrections = Reused::new(seq * head_dim);
        split_gemm(
            exec,
            MatMut::dense(&mut d_corrections, seq, head_dim),
            (keys, Trans::No),
            (MatRef::dense(d_carry, d_state, head_dim), Trans::No),
            Store::Overwrite,
        );
        dispatch!(exec.isa(), |s| for t in 0..seq {
            let row = t * head_dim..(t + 1) * head_dim;
            scale(decay.to_end[t], &mut d_corrections[row.clone()]);
            axpy(s, 1.0, &border.target[row.clone()], &mut d_corrections[row]);
        });
        split_gemm(
            exec,
            MatMut::dense(&mut border.target, seq, head_dim),
            (MatRef::new(&self.solver.inverse, seq, seq, CHUNK), Trans::Yes),
            (MatRef::dense(&d_corrections, seq, head_dim), Trans::No),
            Store::Overwrite,
        );
        let mut d_reads = d_corrections;
        dispatch!(exec.isa(), |s| {
            let mut factors = [0.0; CHUNK];
            for ((factor, beta), decay) in factors.iter_mut().zip(beta).zip(&decay.from_start) {
                *factor = -beta * decay;
            }
            scale_rows(&border.target, &factors, head_dim, &mut d_reads);
            crate::chunk::pass_state(s, decay.total, d_carry, &mut border.state);
        });
        split_gemm(
            exec,
            MatMut::dense(d_carry, d_state, head_dim),
            (keys, Trans::Yes),
            (MatRef::dense(&d_reads, seq, head_dim), Trans::No),
            Store::Accumulate,
        );
    }

    fn backward(&self, exec: &Exec, border: &BorderGrads, grads: DeltaGrads<'_>) {
        let DeltaShape { seq, heads, d_state, head_dim } = self.shape;
        let DeltaInputs { q, k, .. } = self.inputs;
        let DeltaGrads { dq, dk, dv, dlog_a, dbeta } = grads;
        let rows = seq * heads;
        let (no, yes) = (Trans::No, Trans::Yes);
        let (add, overwrite) = (Store::Accumulate, Store::Overwrite);
        let keys = MatRef::dense(k, seq, d_state);
        let state = MatRef::dense(&self.border.state, d_state, head_dim);
        let mut sums = Sums { d_sums: [0.0; CHUNK], d_beta: [0.0; CHUNK] };

        // y_t += Σ_{s≤t} e^{c_t−c_s} (q_t·k_s) w_s
        let mut d_scores = Reused::new(rows * CHUNK);
        products(exec, rows, head_dim, self.dy, &self.border.corrections, &mut d_scores);
        dispatch!(exec.isa(), |s| self.weigh_scores(s, &border.scores, &mut d_scores, &mut sums));
        let d_scores = MatRef::new(&d_scores, rows, seq, CHUNK);
        let queries = MatRef::dense(q, rows, d_state);
        product(exec, MatMut::dense(dq, rows, d_state), (d_scores, no), (keys, no), add);
        product(exec, MatMut::dense(dk, seq, d_state), (d_scores, yes), (queries, no), add);

        // y_t += e^{c_t} S_0ᵀ q_t
        let decayed = self.decayed(exec);
        let mut reads = Reused::new(rows * d_state);
        let out = MatMut::dense(&mut reads, rows, d_state);
        product(exec, out, (MatRef::dense(&decayed, rows, head_dim), no), (state, yes), overwrite);

        // T_ts = β_t e^{c_t−c_s} (k_t·k_s); its gradient is −(target gradient)·wᵀ.
        let mut d_triangle = Reused::new(seq * CHUNK);
        products(exec, seq, head_dim, &border.target, &self.border.corrections, &mut d_triangle);
        dispatch!(exec.isa(), |s| self.weigh_triangle(s, &mut d_triangle, &mut sums));
        let d_triangle = MatRef::new(&d_triangle, seq, seq, CHUNK);
        product(exec, MatMut::dense(dk, seq, d_state), (d_triangle, no), (keys, no), add);
        product(exec, MatMut::dense(dk, seq, d_state), (d_triangle, yes), (keys, no), add);

        // target_t = β_t (v_t − e^{c_t} S_0ᵀ k_t)
        let mut d_reads = Reused::new(seq * head_dim);
        dispatch!(exec.isa(), |s| self.target(s, border, dv, &mut d_reads, &mut sums));
        let out = MatMut::dense(dk, seq, d_state);
        product(exec, out, (MatRef::dense(&d_reads, seq, head_dim), no), (state, yes), add);

        // S_last = e^{c_last} S_0 + Σ_s e^{c_last−c_s} k_s w_sᵀ
        let mut writes = Reused::new(seq * d_state);
        let corrections = MatRef::dense(&self.border.corrections, seq, head_dim);
        let d_state_out = MatRef::dense(&border.state, d_state, head_dim);
        let out = MatMut::dense(&mut writes, seq, d_state);
        product(exec, out, (corrections, no), (d_state_out, yes), overwrite);
        dispatch!(exec.isa(), |s| {
            axpy(s, 1.0, &reads, dq);
            let decay = &self.solver.decay;
            let mut at_end = f64::from(decay.total * dot(s, &self.border.state, &border.state));
            for (t, dbeta) in dbeta.iter_mut().enumerate() {
                let queries = t * heads * d_state..(t + 1) * heads * d_state;
                let key = t * d_state..(t + 1) * d_state;
                let written = decay.to_end[t] * dot(s, &k[key.clone()], &writes[key.clone()]);
                axpy(s, decay.to_end[t], &writes[key.clone()], &mut dk[key]);
                at_end += f64::from(written);
                sums.d_sums[t] +=
                    f64::from(dot(s, &q[queries.clone()], &reads[queries])) - f64::from(written);
                *dbeta += sums.d_beta[t];
            }
            sums.d_sums[seq - 1] += at_end;
        });
        add_suffix_sums(&sums.d_sums[..seq], dlog_a, 1);
    }

    /// Turns `d_scores` (dy·w) into the gradient of q·k, zero after the diagonal.
    #[inline(always)]
    fn weigh_scores<S: Simd>(&self, s: S, scores: &[f32], d_scores: &mut [f32], sums: &mut Sums) {
        let heads = self.shape.heads;
        let mut columns = [0.0f32; CHUNK];
        for t in 0..self.shape.seq {
            let mut weights = [1.0f32; CHUNK];
            weigh_row(s, &self.solver.decay, t, &mut weights);
            let rows = t * heads * CHUNK..(t + 1) * heads * CHUNK;
            let mut row_sums = [0.0f32; CHUNK];
            let pairs = scores[rows.clone()].chunks_exact(CHUNK).zip(d_scores[rows].chunks_exact_mut(CHUNK));
            for (scores, d_scores) in pairs {
                for i in 0..CHUNK {
                    // Without the diagonal, which does not decay: its part of both sums would only cancel.
                    row_sums[i] += if i < t { d_scores[i] * scores[i] } else { 0.0 };
                    d_scores[i] *= weights[i];
                }
            }
            axpy(s, 1.0, &row_sums, &mut columns);
            sums.d_sums[t] += row_sums.iter().copied().map(f64::from).sum::<f64>();
        }
        sums.leave(&columns);
    }

    /// Turns `d_triangle` (target gradient · w) into the gradient of k_t·k_s, zero from the diagonal on.
    #[inline(always)]
    fn weigh_triangle<S: Simd>(&self, s: S, d_triangle: &mut [f32], sums: &mut Sums) {
        let mut columns = [0.0f32; CHUNK];
        let rows = self.solver.triangle.chunks_exact(CHUNK).zip(d_triangle.chunks_exact_mut(CHUNK));
        for (t, (triangle, d_triangle)) in rows.enumerate() {
            let beta = self.inputs.beta[t];
            let mut row_sums = [0.0f32; CHUNK];
            for i in 0..CHUNK {
                // Columns from the diagonal on become zero, or are no tokens.
                row_sums[i] = if i < t { -d_triangle[i] * triangle[i] } else { 0.0 };
                columns[i] = s.fma(beta, row_sums[i], columns[i]);
            }
            weigh_row(s, &self.solver.decay, t, d_triangle);
            d_triangle[t] = 0.0;
            scale(-beta, d_triangle);
            let row_sum = row_sums.iter().copied().map(f64::from).sum::<f64>();
            sums.d_beta[t] += row_sum as f32;
            sums.d_sums[t] += f64::from(beta) * row_sum;
        }
        sums.leave(&columns);
    }

    /// Gradients through `β (v − e^c S_0ᵀ k)`; writes that of `S_0ᵀ k` to `d_reads`.
    #[inline(always)]
    fn target<S: Simd>(
        &self,
        s: S,
        border: &BorderGrads,
        dv: &mut [f32],
        d_reads: &mut [f32],
        sums: &mut Sums,
    ) {
        let head_dim = self.shape.head_dim;
        let mut wrong = vec![0.0; head_dim];
        for t in 0..self.shape.seq {
            let row = t * head_dim..(t + 1) * head_dim;
            let (d_target, read) = (&border.target[row.clone()], &self.border.reads[row.clone()]);
            let (beta, decay) = (self.inputs.beta[t], self.solver.decay.from_start[t]);
            error(s, decay, &self.inputs.v[row.clone()], read, &mut wrong);
            sums.d_beta[t] += dot(s, d_target, &wrong);
            axpy(s, beta, d_target, &mut dv[row.clone()]);
            crate::chunk::scaled(-beta * decay, d_target, &mut d_reads[row.clone()]);
            sums.d_sums[t] += f64::from(dot(s, &d_reads[row], read));
        }
    }
}

/// What the gradients of `log_a` and `beta` are summed from.
struct Sums {
    /// Of the inclusive sums of log decays; f64, since what enters one sum leaves another.
    d_sums: [f64; CHUNK],
    d_beta: [f32; CHUNK],
}

impl Sums {
    /// Subtracts, from every token's sum, what decays since that token.
    #[inline(always)]
    fn leave(&mut self, columns: &[f32; CHUNK]) {
        for (d_sum, &column) in self.d_sums.iter_mut().zip(columns) {
            *d_sum -= f64::from(column);
        }
    }
}
