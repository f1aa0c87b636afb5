//! Linear layers of training, `y = x · Wᵀ`, in the context's precision: forward and both gradients, every operand rounded once.
//! Knows matrices; knows nothing of models.

use crate::packed::{self, Packed, Shared};
use crate::{Exec, MatMut, MatRef, Precision, Store, Trans, mixed_gemm};

/// What a linear layer reads, `[rows, in_features]`, with its rounded forms where somebody made them for several layers at once.
#[derive(Clone, Copy, Debug)]
pub struct LayerInput<'a> {
    /// The values.
    pub values: MatRef<'a>,
    /// Of the same values.
    pub shared: Option<&'a Shared>,
}

impl<'a> From<MatRef<'a>> for LayerInput<'a> {
    fn from(values: MatRef<'a>) -> Self {
        Self { values, shared: None }
    }
}

/// A weight `[out_features, in_features]`, with its rounded forms where somebody made them for several products.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeight<'a> {
    /// The values.
    pub values: MatRef<'a>,
    /// Of the same values.
    pub rounded: Option<&'a RoundedWeight>,
}

impl<'a> From<MatRef<'a>> for LayerWeight<'a> {
    fn from(values: MatRef<'a>) -> Self {
        Self { values, rounded: None }
    }
}

/// A weight as the right side of the forward product and of its input's gradient.
#[derive(Debug)]
pub struct RoundedWeight {
    forward: Packed,
    backward: Packed,
}

impl RoundedWeight {
    /// Rounds `weight`; `None` where the context multiplies in f32.
    pub fn new(exec: &Exec, weight: MatRef<'_>) -> Option<Self> {
        if exec.precision() == Precision::F32 {
            return None;
        }
        let mut rounded = Self { forward: Packed::empty(), backward: Packed::empty() };
        rounded.set(exec, weight);
        Some(rounded)
    }

    /// Becomes `weight`, rounded, in the same memory.
    ///
    /// # Panics
    /// On an instruction set without bfloat16.
    pub fn set(&mut self, exec: &Exec, weight: MatRef<'_>) {
        self.forward.set_bf16(exec, weight, Trans::Yes);
        self.backward.set_bf16(exec, weight, Trans::No);
    }
}

/// `out = x · weightᵀ` (or `+=`).
///
/// # Panics
/// When shapes do not fit.
pub fn linear<'w>(
    exec: &Exec,
    x: LayerInput<'_>,
    weight: impl Into<LayerWeight<'w>>,
    out: MatMut<'_>,
    store: Store,
) {
    let LayerWeight { values: weight, rounded } = weight.into();
    let pays = || packed::pays(exec, x.values.rows(), weight.rows(), weight.cols());
    match (rounded, x.shared) {
        (Some(rounded), _) if pays() => packed::product_with(exec, out, x.values, &rounded.forward, store),
        (_, Some(shared)) => shared.linear(exec, weight, out, store),
        _ => mixed_gemm(exec, out, x.values, Trans::No, weight, Trans::Yes, 1.0, store),
    }
}

/// Gradients of [`linear`] from that of its output, `dy` `[rows, out_features]`: `dw = dyᵀ · x` and `dx = dy · weight` (or `+=`), those that
/// are wanted; `x` comes with `dw`, which alone needs it.
///
/// # Panics
/// When shapes do not fit.
pub fn linear_backward<'w>(
    exec: &Exec,
    weight: impl Into<LayerWeight<'w>>,
    dy: MatRef<'_>,
    dw: Option<(LayerInput<'_>, MatMut<'_>, Store)>,
    dx: Option<(MatMut<'_>, Store)>,
) {
    let LayerWeight { values: weight, rounded } = weight.into();
    let (rows, n, k) = (dy.rows(), dy.cols(), weight.cols());
    let rounds = exec.precision() != Precision::F32
        && packed::pays(exec, rows, k, n)
        && packed::pays(exec, n, k, rows);
    let (dw, dx) = match (dw, dx) {
        (Some((x, dw, store)), Some(dx)) if rounds => {
            let rounded = rounded.map(|rounded| &rounded.backward);
            return packed::linear_backward(
                exec,
                (x.values, x.shared),
                (weight, rounded),
                dy,
                (dw, store),
                dx,
            );
        }
        other => other,
    };
    if let Some((dx, store)) = dx {
        match rounded.filter(|_| packed::pays(exec, rows, k, n)) {
            Some(rounded) => packed::product_with(exec, dx, dy, &rounded.backward, store),
            None => mixed_gemm(exec, dx, dy, Trans::No, weight, Trans::No, 1.0, store),
        }
    }
    if let Some((x, dw, store)) = dw {
        match x.shared {
            Some(shared) => shared.weight_grad(exec, dy, dw, store),
            None => mixed_gemm(exec, dw, dy, Trans::Yes, x.values, Trans::No, 1.0, store),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive::gemm::gemm as naive;
    use crate::packed::Uses;
    use crate::testing::{assert_close, execs_of_both_precisions, noise, to_f64};

    /// Every context in f32, and those that can in bfloat16, with the error that a sum of products may have, times the root of their number.
    /// Rounding two factors to bfloat16 costs a product 8e-4 in the mean of squares; the largest of thousands of sums is 4 to 5 times that.
    fn contexts() -> Vec<(Exec, f64)> {
        execs_of_both_precisions(1e-6, 4e-3)
    }

    #[test]
    fn both_gradients_agree_with_naive_at_every_size() {
        for (exec, error) in contexts() {
            let tolerance = |products: usize| error * (products as f64).sqrt();
            for (rows, n, k) in [(1, 3, 5), (9, 4, 33), (40, 33, 70), (65, 130, 96), (600, 48, 17)] {
                let (x, w, dy) = (noise(1, rows * k), noise(2, n * k), noise(3, rows * n));
                let (x6, w6, dy6) = (to_f64(&x), to_f64(&w), to_f64(&dy));
                let dw_wanted = naive(n, k, rows, &dy6, Trans::Yes, &x6, Trans::No, 1.0);
                let dx_wanted = naive(rows, k, n, &dy6, Trans::No, &w6, Trans::No, 1.0);
                let y_wanted = naive(rows, n, k, &x6, Trans::No, &w6, Trans::Yes, 1.0);
                let (x, w, dy) =
                    (MatRef::dense(&x, rows, k), MatRef::dense(&w, n, k), MatRef::dense(&dy, rows, n));
                let mut shared = Shared::default();
                let shared = shared.set(&exec, x, Uses::Both);
                let kept = RoundedWeight::new(&exec, w);
                let kept = kept.as_ref();
                for (shared, rounded) in [(None, None), (shared, None), (None, kept), (shared, kept)] {
                    let x = LayerInput { values: x, shared };
                    let w = LayerWeight { values: w, rounded };
                    for (with_dw, with_dx, store) in [
                        (true, true, Store::Overwrite),
                        (true, true, Store::Accumulate),
                        (true, false, Store::Overwrite),
                        (true, false, Store::Accumulate),
                        (false, true, Store::Overwrite),
                    ] {
                        let old = if store == Store::Accumulate { 1.0 } else { f32::NAN };
                        let (mut dw, mut dx) = (vec![old; n * k], vec![old; rows * k]);
                        let to_dw = with_dw.then(|| (x, MatMut::dense(&mut dw, n, k), store));
                        let to_dx = with_dx.then(|| (MatMut::dense(&mut dx, rows, k), store));
                        linear_backward(&exec, w, dy, to_dw, to_dx);
                        if store == Store::Accumulate {
                            dw.iter_mut().chain(&mut dx).for_each(|value| *value -= 1.0);
                        }
                        if with_dw {
                            assert_close("dw", &dw, &dw_wanted, tolerance(rows));
                        }
                        if with_dx {
                            assert_close("dx", &dx, &dx_wanted, tolerance(n));
                        }
                    }
                    let mut y = vec![f32::NAN; rows * n];
                    linear(&exec, x, w, MatMut::dense(&mut y, rows, n), Store::Overwrite);
                    assert_close("y", &y, &y_wanted, tolerance(k));
                }
            }
        }
    }
}
