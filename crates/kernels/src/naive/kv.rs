//! Naive f64 reference of attention over a KV cache: every score of every stored key is formed.

use crate::MatRef;
use crate::kv::{KvStore, Window};

/// Output `[t, kv_heads · group · head_dim]` of the queries `q` of the same shape, which are the last `t` positions of
/// the store, and the logs of the softmax denominators `[t, kv_heads · group]`; computed over the values as stored. See [`crate::kv::attend()`].
pub fn attend(
    store: &KvStore,
    q: MatRef<'_>,
    group: usize,
    scale: f32,
    window: Option<Window>,
) -> (Vec<f64>, Vec<f64>) {
    let (kv_heads, head_dim, len) = (store.kv_heads(), store.head_dim(), store.len());
    let mut out = vec![0.0; q.rows() * q.cols()];
    let mut lse = vec![0.0; out.len() / head_dim];
    let (mut k, mut v) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    for kv_head in 0..kv_heads {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for position in 0..len {
            store.read(position, kv_head, &mut k, &mut v);
            keys.push(k.clone());
            values.push(v.clone());
        }
        for i in 0..q.rows() {
            for h in 0..group {
                let at = (kv_head * group + h) * head_dim;
                let q_row = &q.row(i)[at..][..head_dim];
                let dot = |k: &[f32]| -> f64 {
                    q_row.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum()
                };
                let visible = len - q.rows() + i + 1;
                let seen = |j: usize| window.is_none_or(|w| j + w.tokens >= visible || j < w.sinks);
                let score =
                    |j: usize| if seen(j) { f64::from(scale) * dot(&keys[j]) } else { f64::NEG_INFINITY };
                let scores: Vec<f64> = (0..visible).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                lse[(i * q.cols() + at) / head_dim] = max + sum.ln();
                let out = &mut out[i * q.cols() + at..][..head_dim];
                for (score, v) in scores.iter().zip(&values) {
                    let p = (score - max).exp() / sum;
                    out.iter_mut().zip(v).for_each(|(out, &v)| *out += p * f64::from(v));
                }
            }
        }
    }
    (out, lse)
}
