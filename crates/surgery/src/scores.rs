//! Attention scores of one head, some queries at a time.

use kernels::{Exec, MatMut, MatRef, Store, Trans, gemm};

/// Queries whose scores exist at once.
const QUERY_BLOCK: usize = 64;

/// Calls `f(i, scores)` with the scores of each query `i` in `[first, T)` against keys `0..=i`. `q`, `k`: `[T, head_dim]` after RoPE.
pub(crate) fn each_query(
    exec: &Exec,
    (q, k): (MatRef<'_>, MatRef<'_>),
    scale: f32,
    first: usize,
    mut f: impl FnMut(usize, &[f32]),
) {
    let seq = q.rows();
    assert_eq!(seq, k.rows(), "one key per query");
    let mut scores = vec![0.0f32; QUERY_BLOCK.min(seq) * seq];
    for block in (first..seq).step_by(QUERY_BLOCK) {
        let rows = QUERY_BLOCK.min(seq - block);
        let keys = block + rows;
        gemm(
            exec,
            MatMut::dense(&mut scores[..rows * keys], rows, keys),
            q.rows_at(block, rows),
            Trans::No,
            k.rows_at(0, keys),
            Trans::Yes,
            scale,
            Store::Overwrite,
        );
        for row in 0..rows {
            f(block + row, &scores[row * keys..][..block + row + 1]);
        }
    }
}
