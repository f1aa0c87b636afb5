//! Naive f64 reference of softmax attention: every score is formed.

use crate::attention::{AttnMask, AttnShape};

/// Dense row-major inputs of one call: `q` `[q_len, q_heads · head_dim]`, `k` and `v` `[kv_len, kv_heads · head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a [f64],
    /// Keys.
    pub k: &'a [f64],
    /// Values.
    pub v: &'a [f64],
}

/// Whether query row `i` sees key row `j`: the definition of the masks.
pub fn sees(mask: AttnMask<'_>, i: usize, j: usize) -> bool {
    match mask {
        AttnMask::Causal { q_pos0 } => j <= q_pos0 + i,
        AttnMask::Local { q_pos0, kv_pos, window, sinks } => {
            let (p, r) = (q_pos0 + i, kv_pos[j]);
            r <= p && (p - r < window || r < sinks)
        }
    }
}

/// Softmax weights of query row `i`, head `h` over all keys, and the log of their denominator.
fn weights(shape: AttnShape, mask: AttnMask<'_>, x: Inputs<'_>, i: usize, h: usize) -> (Vec<f64>, f64) {
    let AttnShape { q_heads, kv_heads, head_dim, scale } = shape;
    let kv_len = x.k.len() / (kv_heads * head_dim);
    let q = &x.q[(i * q_heads + h) * head_dim..][..head_dim];
    let score = |j: usize| {
        let k = &x.k[(j * kv_heads + h / (q_heads / kv_heads)) * head_dim..][..head_dim];
        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
        if sees(mask, i, j) { f64::from(scale) * dot } else { f64::NEG_INFINITY }
    };
    let scores: Vec<f64> = (0..kv_len).map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; kv_len], max);
    }
    let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
}

/// The output `[q_len, q_heads · head_dim]` and the log denominators `[q_len, q_heads]`.
pub fn attention(shape: AttnShape, mask: AttnMask<'_>, x: Inputs<'_>) -> (Vec<f64>, Vec<f64>) {
    let AttnShape { q_heads, kv_heads, head_dim, .. } = shape;
    let (mut out, mut lse) = (vec![0.0; x.q.len()], Vec::new());
    for row in 0..x.q.len() / head_dim {
        let (p, denominator) = weights(shape, mask, x, row / q_heads, row % q_heads);
        for (j, p) in p.iter().enumerate() {
            let v = &x.v[(j * kv_heads + row % q_heads / (q_heads / kv_heads)) * head_dim..][..head_dim];
            out[row * head_dim..][..head_dim].iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
        }
        lse.push(denominator);
    }
    (out, lse)
}

/// Gradients of [`attention`] for `q`, `k` and `v` from those of the output and of the log denominators.
pub fn attention_backward(
    shape: AttnShape,
    mask: AttnMask<'_>,
    x: Inputs<'_>,
    dout: &[f64],
    dlse: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let AttnShape { q_heads, kv_heads, head_dim, scale } = shape;
    let (mut dq, mut dk, mut dv) = (vec![0.0; x.q.len()], vec![0.0; x.k.len()], vec![0.0; x.v.len()]);
    for (row, dlse) in dlse.iter().enumerate() {
        let (p, _) = weights(shape, mask, x, row / q_heads, row % q_heads);
        let at = row * head_dim;
        let kv = |j: usize| (j * kv_heads + row % q_heads / (q_heads / kv_heads)) * head_dim;
        let dp = |j: usize| (0..head_dim).map(|d| dout[at + d] * x.v[kv(j) + d]).sum::<f64>();
        let mean: f64 = p.iter().enumerate().map(|(j, p)| p * dp(j)).sum();
        for (j, p) in p.iter().enumerate() {
            let ds = f64::from(scale) * p * (dp(j) - mean + dlse);
            for d in 0..head_dim {
                dv[kv(j) + d] += p * dout[at + d];
                dq[at + d] += ds * x.k[kv(j) + d];
                dk[kv(j) + d] += ds * x.q[at + d];
            }
        }
    }
    (dq, dk, dv)
}
