//! Matrix products, all shapes, through one entry point.

use crate::{Exec, MatMut, MatRef};

/// Whether an operand is used as stored or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trans {
    /// As stored.
    No,
    /// Transposed.
    Yes,
}

/// What happens to the output's old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Overwritten (the old content is never read).
    Overwrite,
    /// Added to.
    Accumulate,
}

/// `out = alpha · op(a) · op(b)` (or `+=`). `out` is `[m, n]`, `op(a)` `[m, k]`, `op(b)` `[k, n]`; any of them may be a
/// strided view. With weights stored `[out_features, in_features]`, a linear layer is `gemm(x, No, w, Yes)`.
/// Panics when the shapes do not fit. `k == 0` gives zeros (or leaves `out` when accumulating).
pub fn gemm(exec: &Exec, out: MatMut<'_>, a: MatRef<'_>, ta: Trans, b: MatRef<'_>, tb: Trans, alpha: f32, store: Store) {
    let _ = (exec, out, a, ta, b, tb, alpha, store);
    todo!()
}
