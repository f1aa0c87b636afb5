//! Softmax attention with grouped queries: causal and local (window + sinks), forward and backward, online softmax,
//! no `T × T` buffer.

mod backward;
mod forward;
mod mask;
mod sinks;
mod stored;
#[cfg(test)]
mod tests;
mod window;

pub use window::{WindowMean, WindowRows, window_step};

use crate::{Exec, MatMut, MatRef, Reused};

/// Head counts and scale of an attention call. `q_heads` is a multiple of `kv_heads`; query head `h` reads KV head
/// `h / (q_heads / kv_heads)`.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    /// Query heads.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Multiplier of the scores, usually `1/sqrt(head_dim)`.
    pub scale: f32,
}

impl AttnShape {
    /// Query heads per KV head.
    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn check(&self, mask: AttnMask<'_>, q: MatRef<'_>, k: MatRef<'_>, v: MatRef<'_>) {
        let AttnShape { q_heads, kv_heads, head_dim, .. } = *self;
        let heads_fit = kv_heads > 0 && head_dim > 0 && q_heads > 0 && q_heads.is_multiple_of(kv_heads);
        assert!(heads_fit, "attention: {q_heads} query heads, {kv_heads} KV heads of {head_dim}");
        assert_eq!(q.cols(), q_heads * head_dim, "attention: q columns");
        assert_eq!(k.cols(), kv_heads * head_dim, "attention: k columns");
        assert_eq!(v.cols(), kv_heads * head_dim, "attention: v columns");
        assert_eq!(k.rows(), v.rows(), "attention: k and v rows");
        if let AttnMask::Local { kv_pos, .. } = mask {
            assert_eq!(kv_pos.len(), k.rows(), "attention: kv_pos");
            assert!(kv_pos.is_sorted_by(|a, b| a < b), "attention: kv_pos is not strictly increasing");
        }
    }
}

/// Which keys a query sees. Query row `i` has position `q_pos0 + i`.
#[derive(Clone, Copy, Debug)]
pub enum AttnMask<'a> {
    /// Key row `j` has position `j`; a query sees positions up to its own.
    Causal {
        /// Position of query row 0.
        q_pos0: usize,
    },
    /// Key row `j` has position `kv_pos[j]` (strictly increasing); a query at `p` sees keys at `r ≤ p` with
    /// `p − r < window` or `r < sinks`. Cost is `O(window + sinks)` per query.
    Local {
        /// Position of query row 0.
        q_pos0: usize,
        /// Position of each key row.
        kv_pos: &'a [usize],
        /// Tokens seen, the query's own included.
        window: usize,
        /// First tokens always seen.
        sinks: usize,
    },
}

/// `out[i, h] = Σ_j softmax_j(scale · q[i,h]·k[j,h']) v[j,h']`. `q`, `out`: `[q_len, q_heads·head_dim]`; `k`, `v`:
/// `[kv_len, kv_heads·head_dim]`, all may be strided. When given, `lse` `[q_len, q_heads]` receives the log of each
/// softmax denominator (needed by the backward pass). A query that sees no key gives zeros and `lse = -inf`. The result
/// does not depend on the number of threads. Panics when the shapes do not fit. Source: arXiv 2205.14135.
pub fn attention(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    mut out: MatMut<'_>,
    lse: Option<&mut [f32]>,
) {
    shape.check(mask, q, k, v);
    assert!(out.rows() == q.rows() && out.cols() == q.cols(), "attention: out has another shape than q");
    if let Some(lse) = &lse {
        assert_eq!(lse.len(), q.rows() * shape.q_heads, "attention: lse");
    }
    let (windows, few_sinks) = mask.without_few_sinks();
    let mut own_lse = Reused::new(if few_sinks && lse.is_none() { q.rows() * shape.q_heads } else { 0 });
    let mut lse = lse.or_else(|| few_sinks.then_some(&mut own_lse[..]));
    let given = (out.reborrow(), lse.as_deref_mut());
    if let Err((out, lse)) = stored::attention(exec, shape, windows, [q, k, v], given) {
        forward::attention(exec, shape, windows, [q, k, v], out, lse);
    }
    if let Some(lse) = lse.filter(|_| few_sinks) {
        sinks::add(exec, shape, mask, [q, k, v], out, lse);
    }
}

/// What [`attention_backward`] reads: the forward's inputs and outputs and the output's gradient.
#[derive(Clone, Copy, Debug)]
pub struct AttnSaved<'a> {
    /// Queries as given to the forward pass.
    pub q: MatRef<'a>,
    /// Keys as given to the forward pass.
    pub k: MatRef<'a>,
    /// Values as given to the forward pass.
    pub v: MatRef<'a>,
    /// The forward's output.
    pub out: MatRef<'a>,
    /// The forward's log denominators `[q_len, q_heads]`.
    pub lse: &'a [f32],
    /// Gradient of the output.
    pub dout: MatRef<'a>,
    /// Gradient of the log denominators `[q_len, q_heads]`, where they are read as well.
    pub dlse: Option<&'a [f32]>,
}

/// Gradient of [`attention`]; adds to dense `dq` `[q_len, q_heads·head_dim]`, `dk`, `dv` `[kv_len, kv_heads·head_dim]`.
/// The result does not depend on the number of threads. Panics when the shapes do not fit.
pub fn attention_backward(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    saved: AttnSaved<'_>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let AttnSaved { q, k, v, out, lse, dout, dlse } = saved;
    shape.check(mask, q, k, v);
    for (name, mat) in [("out", out), ("dout", dout)] {
        assert!(
            mat.rows() == q.rows() && mat.cols() == q.cols(),
            "attention: {name} has another shape than q"
        );
    }
    assert_eq!(lse.len(), q.rows() * shape.q_heads, "attention: lse");
    assert!(dlse.is_none_or(|dlse| dlse.len() == lse.len()), "attention: dlse");
    assert_eq!(dq.len(), q.rows() * q.cols(), "attention: dq");
    let kv_values = k.rows() * k.cols();
    assert!(dk.len() == kv_values && dv.len() == kv_values, "attention: dk and dv hold {kv_values} values");
    backward::attention_backward(exec, shape, mask, saved, [dq, dk, dv]);
}
