//! Products of two f32 matrices that are rounded to bfloat16 on the way: training's large products, where the weights
//! change with every step. Knows when that pays; knows nothing of what the matrices are.

use std::cell::RefCell;

use super::{Input, MATVEC_ROWS, PANEL, Packed, Product, matmul};
use crate::{Exec, IsaLevel, MatMut, MatRef, Precision, Store, Trans};

/// Below this many multiply-adds the conversions cost more than they gain.
const MIN_WORK: usize = 128 * 1024;

/// Operands as bfloat16; memory only grows.
struct Operands {
    rows: Input,
    /// The left side of a second product.
    more_rows: Input,
    panels: Packed,
}

thread_local! {
    static OPERANDS: RefCell<Operands> =
        RefCell::new(Operands { rows: Input::new(), more_rows: Input::new(), panels: Packed::empty() });
}

/// Whether [`product`] and [`product_with`] can take an `[m, k] · [k, n]` on this instruction set, and pays.
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
    OPERANDS.with_borrow_mut(|Operands { rows, panels, .. }| {
        rows.set_bf16(exec, a, ta, alpha);
        panels.set_bf16(exec, b, tb);
        matmul(exec, rows, &mut [Product { weight: panels, bias: None, out, store }]);
    });
}

/// `out = a · weightᵀ` (or `+=`) with `a` rounded to bfloat16 and a weight that is already. The product pays.
///
/// # Panics
/// On an instruction set without bfloat16, and when shapes do not fit.
pub(crate) fn product_with(exec: &Exec, out: MatMut<'_>, a: MatRef<'_>, weight: &Packed, store: Store) {
    OPERANDS.with_borrow_mut(|Operands { rows, .. }| {
        rows.set_bf16(exec, a, Trans::No, 1.0);
        matmul(exec, rows, &mut [Product { weight, bias: None, out, store }]);
    });
}

/// Both gradients of a linear layer, `dw = dyᵀ · x` and `dx = dy · weight` (or `+=`), from one reading of `dy`; shapes as in
/// [`linear_backward`](crate::linear::linear_backward), which checks them. Both products pay.
///
/// # Panics
/// On an instruction set without bfloat16.
pub(crate) fn linear_backward(
    exec: &Exec,
    (x, shared): (MatRef<'_>, Option<&Shared>),
    (weight, rounded): (MatRef<'_>, Option<&Packed>),
    dy: MatRef<'_>,
    (dw, dw_store): (MatMut<'_>, Store),
    (dx, store): (MatMut<'_>, Store),
) {
    let (rows, n, k) = (dy.rows(), dy.cols(), weight.cols());
    assert!(x.rows() == rows && weight.rows() == n && x.cols() == k, "shapes of a linear layer");
    OPERANDS.with_borrow_mut(|Operands { rows, more_rows: columns, panels }| {
        rows.set_bf16_both(exec, dy, columns);
        if rounded.is_none() {
            panels.set_bf16(exec, weight, Trans::No);
        }
        let weight = rounded.unwrap_or(panels);
        matmul(exec, rows, &mut [Product { weight, bias: None, out: dx, store }]);
        let weight = match shared {
            Some(shared) => shared.panels(),
            None => {
                panels.set_bf16(exec, x, Trans::No);
                &*panels
            }
        };
        matmul(exec, columns, &mut [Product { weight, bias: None, out: dw, store: dw_store }]);
    });
}

/// A matrix `x` `[rows, cols]` as an operand, rounded once for all linear layers that read it ([`linear`](Self::linear)) or for their
/// weights' gradients ([`weight_grad`](Self::weight_grad)), or for both.
#[derive(Debug)]
pub struct Shared {
    rows: Input,
    panels: Packed,
    uses: Uses,
}

/// What a [`Shared`] is set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uses {
    /// Linear layers.
    Linear,
    /// Gradients of their weights.
    WeightGrads,
    /// Both.
    Both,
}

impl Default for Shared {
    /// Set for nothing yet.
    fn default() -> Self {
        Self { rows: Input::new(), panels: Packed::empty(), uses: Uses::Both }
    }
}

impl Shared {
    /// Becomes `x`, rounded; memory only grows. `None` where the context multiplies in f32, or `x` is so small that everything with it would.
    pub fn set(&mut self, exec: &Exec, x: MatRef<'_>, uses: Uses) -> Option<&Self> {
        let small = x.rows() <= 2 * MATVEC_ROWS || x.cols() <= 2 * MATVEC_ROWS;
        if exec.precision() == Precision::F32 || small || x.rows() * x.cols() * PANEL < MIN_WORK {
            return None;
        }
        if uses != Uses::WeightGrads {
            self.rows.set_bf16(exec, x, Trans::No, 1.0);
        }
        if uses != Uses::Linear {
            self.panels.set_bf16(exec, x, Trans::No);
        }
        self.uses = uses;
        Some(self)
    }

    /// The left side of linear layers.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn input(&self) -> &Input {
        assert!(self.uses != Uses::WeightGrads, "rounded for weights' gradients only");
        &self.rows
    }

    /// The right side of weights' gradients.
    pub(super) fn panels(&self) -> &Packed {
        assert!(self.uses != Uses::Linear, "rounded for linear layers only");
        &self.panels
    }

    /// `out = x · weightᵀ` (or `+=`), `weight` `[out_features, cols]`, rounded as well.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn linear(&self, exec: &Exec, weight: MatRef<'_>, out: MatMut<'_>, store: Store) {
        assert!(self.uses != Uses::WeightGrads, "rounded for weights' gradients only");
        OPERANDS.with_borrow_mut(|Operands { panels, .. }| {
            panels.set_bf16(exec, weight, Trans::Yes);
            matmul(exec, &self.rows, &mut [Product { weight: panels, bias: None, out, store }]);
        });
    }

    /// The gradient of [`linear`](Self::linear)'s weight: `out = dyᵀ · x` (or `+=`), `dy` `[rows, out_features]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn weight_grad(&self, exec: &Exec, dy: MatRef<'_>, mut out: MatMut<'_>, store: Store) {
        let (n, k) = (out.rows(), out.cols());
        let panels = self.panels();
        assert!(dy.cols() == n && dy.rows() == panels.cols() && k == panels.rows());
        OPERANDS.with_borrow_mut(|Operands { rows, .. }| {
            rows.set_bf16(exec, dy, Trans::Yes, 1.0);
            if n > MATVEC_ROWS {
                return matmul(exec, rows, &mut [Product { weight: panels, bias: None, out, store }]);
            }
            // So few rows are multiplied in f32; rows of zeros make them many.
            rows.pad_bf16(MATVEC_ROWS + 1);
            let mut wide = vec![0.0; (MATVEC_ROWS + 1) * k];
            let to = MatMut::dense(&mut wide, MATVEC_ROWS + 1, k);
            let product = Product { weight: panels, bias: None, out: to, store: Store::Overwrite };
            matmul(exec, rows, &mut [product]);
            for (row, from) in wide.chunks_exact(k).take(n).enumerate() {
                match store {
                    Store::Overwrite => out.row_mut(row).copy_from_slice(from),
                    Store::Accumulate => {
                        out.row_mut(row).iter_mut().zip(from).for_each(|(out, from)| *out += from)
                    }
                }
            }
        });
    }
}
