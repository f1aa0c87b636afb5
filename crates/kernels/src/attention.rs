//! Softmax attention with grouped queries: causal and local (window + sinks), forward and backward, online softmax,
//! no `T × T` buffer.

use crate::{Exec, MatMut, MatRef};

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
/// softmax denominator (needed by the backward pass). A query that sees no key gives zeros and `lse = -inf`.
pub fn attention(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
    out: MatMut<'_>,
    lse: Option<&mut [f32]>,
) {
    let _ = (exec, shape, mask, q, k, v, out, lse);
    todo!()
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
}

/// Gradient of [`attention`]; adds to dense `dq` `[q_len, q_heads·head_dim]`, `dk`, `dv` `[kv_len, kv_heads·head_dim]`.
pub fn attention_backward(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    saved: AttnSaved<'_>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let _ = (exec, shape, mask, saved, dq, dk, dv);
    todo!()
}
