//! Rotary position embedding, Hugging Face's half-split convention (`rotate_half`).

use crate::Exec;

/// Direction of the rotation; the backward pass of one is the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// By `+position · frequency`.
    Forward,
    /// By `−position · frequency`.
    Inverse,
}

/// Rotates `x` `[seq, n_heads · head_dim]` in place; row `t` has position `pos0 + t` and angle
/// `position · inv_freq[i]` for the pair `(i, i + head_dim / 2)` of every head. `inv_freq` has `head_dim / 2` values;
/// angles are formed in f64.
pub fn rope(exec: &Exec, x: &mut [f32], head_dim: usize, inv_freq: &[f64], seq_len: usize, pos0: usize, rotation: Rotation) {
    let _ = (exec, x, head_dim, inv_freq, seq_len, pos0, rotation);
    todo!()
}
