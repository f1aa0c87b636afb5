//! What a group's outputs lose when it sees only the last tokens and the sink.

use kernels::attention::{AttnMask, AttnShape, attention};
use kernels::{Exec, MatMut};
use model::ModelConfig;
use model::observe::AttnView;

/// Window of the criteria that restrict a group, in tokens.
pub const WINDOW: usize = 64;
/// First tokens that the restricted group still sees.
pub const SINKS: usize = 1;

/// Overwrites `delta` `[T, heads · head_dim]` with windowed minus full head outputs. Queries that see everything within the
/// window and the sinks get exact zeros.
pub fn window_delta(
    exec: &Exec,
    config: &ModelConfig,
    window: usize,
    view: &AttnView<'_>,
    delta: &mut [f32],
) {
    let (seq, width) = (view.q.rows(), config.heads * config.head_dim);
    let shape = AttnShape {
        q_heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
    };
    let kv_pos: Vec<usize> = (0..seq).collect();
    let mask = AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks: SINKS };
    attention(exec, shape, mask, view.q, view.k, view.v, MatMut::dense(delta, seq, width), None);
    for (t, row) in delta.chunks_exact_mut(width).enumerate() {
        if t < window + SINKS {
            row.fill(0.0);
        } else {
            row.iter_mut().zip(view.out.row(t)).for_each(|(d, full)| *d -= full);
        }
    }
}
