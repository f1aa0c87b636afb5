//! Products of two f32 matrices that are rounded to bfloat16 on the way: training's large products, where the weights
//! change with every step. Knows when that pays; knows nothing of what the matrices are.

use std::cell::RefCell;

use super::{Input, MATVEC_ROWS, PANEL, Packed, Product, matmul};
use crate::{Exec, IsaLevel, MatMut, MatRef, Precision, Store, Trans};

/// Below this many multiply-adds the conversions cost more than they gain.
const MIN_WORK: usize = 128 * 1024;

/// Both operands as bfloat16; memory only grows.
struct Operands {
    rows: Input,
    panels: Packed,
}

thread_local! {
    static OPERANDS: RefCell<Operands> =
        RefCell::new(Operands { rows: Input::new(), panels: Packed::empty() });
}

/// Whether [`product`] can take an `[m, k] · [k, n]` on this instruction set, and pays.
pub(crate) fn pays(exec: &Exec, m: usize, n: usize, k: usize) -> bool {
    let thin = m <= 2 * MATVEC_ROWS || n < PANEL || k < PANEL;
    exec.isa().level() >= IsaLevel::Avx512Bf16 && !thin && m * n * k >= MIN_WORK
}

/// `out = alpha · op(a) · op(b)` (or `+=`) with both operands rounded to bfloat16 and sums in f32. Shapes as in
/// [`gemm`](crate::gemm), which checks them.
///
/// # Panics
/// On an instruction set without bfloat16.
pub(crate) fn product(
    exec: &Exec,
    out: MatMut<'_>,
    (a, ta): (MatRef<'_>, Trans),
    (b, tb): (MatRef<'_>, Trans),
    alpha: f32,
    store: Store,
) {
    OPERANDS.with_borrow_mut(|Operands { rows, panels }| {
        rows.set_bf16(exec, a, ta, alpha);
        panels.set_bf16(exec, b, tb);
        matmul(exec, rows, &mut [Product { weight: panels, bias: None, out, store }]);
    });
}

/// A matrix `x` `[rows, cols]` as both operands, rounded once for all linear layers that read it and for their gradients.
#[derive(Debug)]
pub struct Shared {
    rows: Input,
    panels: Packed,
}

impl Shared {
    /// Rounds `x`; `None` where the context multiplies in f32, or `x` is so small that everything with it would.
    pub fn new(exec: &Exec, x: MatRef<'_>) -> Option<Self> {
        let small = x.rows() <= 2 * MATVEC_ROWS || x.cols() <= 2 * MATVEC_ROWS;
        if exec.precision() == Precision::F32 || small || x.rows() * x.cols() * PANEL < MIN_WORK {
            return None;
        }
        let (mut rows, mut panels) = (Input::new(), Packed::empty());
        rows.set_bf16(exec, x, Trans::No, 1.0);
        panels.set_bf16(exec, x, Trans::No);
        Some(Self { rows, panels })
    }

    /// `out = x · weightᵀ` (or `+=`), `weight` `[out_features, cols]`, rounded as well.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn linear(&self, exec: &Exec, weight: MatRef<'_>, out: MatMut<'_>, store: Store) {
        OPERANDS.with_borrow_mut(|Operands { panels, .. }| {
            panels.set_bf16(exec, weight, Trans::Yes);
            matmul(exec, &self.rows, &mut [Product { weight: panels, bias: None, out, store }]);
        });
    }

    /// The gradient of [`linear`](Self::linear)'s weight: `out += dyᵀ · x`, `dy` `[rows, out_features]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn weight_grad(&self, exec: &Exec, dy: MatRef<'_>, mut out: MatMut<'_>) {
        let (n, k) = (out.rows(), out.cols());
        assert!(dy.cols() == n && dy.rows() == self.rows.rows() && k == self.panels.rows());
        OPERANDS.with_borrow_mut(|Operands { rows, .. }| {
            rows.set_bf16(exec, dy, Trans::Yes, 1.0);
            if n > MATVEC_ROWS {
                let store = Store::Accumulate;
                return matmul(exec, rows, &mut [Product { weight: &self.panels, bias: None, out, store }]);
            }
            // So few rows are multiplied in f32; rows of zeros make them many.
            rows.pad_bf16(MATVEC_ROWS + 1);
            let mut wide = vec![0.0; (MATVEC_ROWS + 1) * k];
            let to = MatMut::dense(&mut wide, MATVEC_ROWS + 1, k);
            let product = Product { weight: &self.panels, bias: None, out: to, store: Store::Overwrite };
            matmul(exec, rows, &mut [product]);
            for (row, from) in wide.chunks_exact(k).take(n).enumerate() {
                out.row_mut(row).iter_mut().zip(from).for_each(|(out, from)| *out += from);
            }
        });
    }
}
