//! Naive f64 reference of `rope`.

use crate::rope::Rotation;

/// Rotates `x` `[seq, n_heads · head_dim]`, row `t` at position `pos0 + t`; see [`crate::rope::rope`].
pub fn rope(
    x: &[f64],
    head_dim: usize,
    inv_freq: &[f64],
    seq_len: usize,
    pos0: usize,
    rotation: Rotation,
) -> Vec<f64> {
    let (mut out, half) = (x.to_vec(), head_dim / 2);
    let heads = x.len() / (seq_len * head_dim).max(1);
    for t in 0..seq_len {
        for head in 0..heads {
            for (i, freq) in inv_freq.iter().enumerate() {
                let sign = if rotation == Rotation::Forward { 1.0 } else { -1.0 };
                let (sin, cos) = (sign * (pos0 + t) as f64 * freq).sin_cos();
                let low = (t * heads + head) * head_dim + i;
                let high = low + half;
                out[low] = x[low] * cos - x[high] * sin;
                out[high] = x[high] * cos + x[low] * sin;
            }
        }
    }
    out
}
