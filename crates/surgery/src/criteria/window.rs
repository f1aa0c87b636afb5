//! What a group's outputs lose when it sees only the last tokens and the sinks.

use kernels::attention::{AttnMask, AttnShape, attention};
use kernels::elementwise::dot;
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

/// Puts right what [`window_delta`] wrote for queries whose head has sinks behind the window and the first [`SINKS`] tokens: they see these as
/// well. `sinks`: by head, ascending.
pub fn show_sinks(
    exec: &Exec,
    config: &ModelConfig,
    window: usize,
    view: &AttnView<'_>,
    sinks: &[Vec<usize>],
    delta: &mut [f32],
) {
    let (d, group_size) = (config.head_dim, config.group_size());
    let scale = 1.0 / (d as f64).sqrt();
    let rows: Vec<(usize, &mut [f32])> = delta.chunks_exact_mut(config.heads * d).enumerate().collect();
    exec.parallel_items(rows, |_, (t, row)| {
        for (head, sinks) in sinks.iter().enumerate() {
            let later = sinks.iter().copied().filter(|&sink| sink >= SINKS && sink + window <= t);
            let later: Vec<usize> = later.collect();
            if later.is_empty() {
                continue;
            }
            let shown: Vec<usize> = (0..SINKS).chain(later).chain(t + 1 - window..=t).collect();
            let (k, v) = (view.k.columns(head / group_size * d, d), view.v.columns(head / group_size * d, d));
            let query = &view.q.row(t)[head * d..(head + 1) * d];
            let scores: Vec<f64> = shown.iter().map(|&j| scale * dot(query, k.row(j))).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; d];
            for (&j, weight) in shown.iter().zip(&weights) {
                sum.iter_mut().zip(v.row(j)).for_each(|(sum, &v)| *sum += weight / total * f64::from(v));
            }
            let full = &view.out.row(t)[head * d..(head + 1) * d];
            for ((delta, sum), full) in row[head * d..(head + 1) * d].iter_mut().zip(sum).zip(full) {
                *delta = (sum - f64::from(*full)) as f32;
            }
        }
    });
}
