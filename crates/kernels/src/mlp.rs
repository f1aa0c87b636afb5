//! The gated MLP of training, `y = (silu(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ`, forward and backward, in the context's precision.
//! Knows matrices; knows nothing of models.

use crate::elementwise::{swiglu, swiglu_backward};
use crate::linear::{LayerInput, linear, linear_backward};
#[cfg(target_arch = "x86_64")]
use crate::packed::gated;
use crate::{Exec, MatMut, MatRef, Store};

/// The three weights: `gate` and `up` `[width, d_model]`, `down` `[d_model, width]`.
#[derive(Clone, Copy, Debug)]
pub struct MlpWeights<'a> {
    /// Of the gate.
    pub gate: MatRef<'a>,
    /// Of what it lets through.
    pub up: MatRef<'a>,
    /// Back to the block's output.
    pub down: MatRef<'a>,
}

/// Gradients of the weights that are wanted, and whether to add to them.
#[derive(Debug, Default)]
pub struct MlpGrads<'a> {
    /// Of `gate`.
    pub gate: Option<(MatMut<'a>, Store)>,
    /// Of `up`.
    pub up: Option<(MatMut<'a>, Store)>,
    /// Of `down`.
    pub down: Option<(MatMut<'a>, Store)>,
}

/// What the forward pass leaves for the backward pass: gate and up activations, rounded to bfloat16 where tiles multiply them. Reuse it over
/// calls: memory only grows.
#[derive(Default)]
pub struct MlpActivations {
    gate: Vec<f32>,
    up: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    rounded: gated::Activations,
    is_rounded: bool,
}

/// Buffers that nobody reads between calls.
#[derive(Default)]
pub struct MlpScratch {
    act: Vec<f32>,
    dact: Vec<f32>,
    dgate: Vec<f32>,
    dup: Vec<f32>,
}

impl MlpWeights<'_> {
    #[track_caller]
    fn check(&self, rows: usize, x_cols: usize) {
        let (width, d_model) = (self.gate.rows(), self.gate.cols());
        let fits = self.up.rows() == width
            && self.up.cols() == d_model
            && self.down.rows() == d_model
            && self.down.cols() == width;
        assert!(
            fits && x_cols == d_model,
            "an MLP of {width} on {d_model} features, {rows} rows of {x_cols}"
        );
    }

    /// Whether everything runs on tiles.
    #[cfg(target_arch = "x86_64")]
    fn on_tiles(&self, exec: &Exec, rows: usize) -> bool {
        exec.precision() == crate::Precision::Bf16
            && gated::pays(exec, rows, self.gate.cols(), self.gate.rows())
    }
}

/// Keeps the activations of `x` `[rows, d_model]`, and adds the block's output to `out` `[rows, d_model]` where it is given.
///
/// # Panics
/// When shapes do not fit.
pub fn mlp(
    exec: &Exec,
    x: LayerInput<'_>,
    weights: MlpWeights<'_>,
    activations: &mut MlpActivations,
    scratch: &mut MlpScratch,
    out: Option<MatMut<'_>>,
) {
    let (rows, width) = (x.values.rows(), weights.gate.rows());
    weights.check(rows, x.values.cols());
    let MlpActivations { gate, up, is_rounded, .. } = activations;
    #[cfg(target_arch = "x86_64")]
    if let Some(shared) = x.shared.filter(|_| weights.on_tiles(exec, rows)) {
        *is_rounded = true;
        let down = out.map(|out| (weights.down, out));
        return gated::forward(exec, shared, [weights.gate, weights.up], down, &mut activations.rounded);
    }
    *is_rounded = false;
    for (weight, out) in [(weights.gate, &mut *gate), (weights.up, &mut *up)] {
        out.resize(rows * width, 0.0);
        linear(exec, x, weight, MatMut::dense(out, rows, width), Store::Overwrite);
    }
    if let Some(out) = out {
        let act = &mut scratch.act;
        act.resize(rows * width, 0.0);
        swiglu(exec, gate, up, act);
        linear(exec, MatRef::dense(act, rows, width).into(), weights.down, out, Store::Accumulate);
    }
}

/// Gradient of [`mlp`] from that of its output, `dy` `[rows, d_model]`: overwrites `dx` `[rows, d_model]`, and the weights' gradients that are wanted;
/// `x` comes with those of `gate` and `up`, which alone need it.
///
/// # Panics
/// When shapes do not fit, or the activations are of another number of rows.
pub fn mlp_backward(
    exec: &Exec,
    x: Option<LayerInput<'_>>,
    weights: MlpWeights<'_>,
    activations: &MlpActivations,
    dy: MatRef<'_>,
    grads: MlpGrads<'_>,
    mut dx: MatMut<'_>,
    scratch: &mut MlpScratch,
) {
    let (rows, width) = (dy.rows(), weights.gate.rows());
    weights.check(rows, dy.cols());
    let MlpGrads { gate: gate_grad, up: up_grad, down: down_grad } = grads;
    assert!(x.is_some() || (gate_grad.is_none() && up_grad.is_none()), "the input of a layer that trains");
    #[cfg(target_arch = "x86_64")]
    if activations.is_rounded {
        let matrices = [weights.gate, weights.up, weights.down];
        let shared = x.and_then(|x| x.shared);
        let grads = [gate_grad, up_grad, down_grad];
        return gated::backward(exec, shared, matrices, &activations.rounded, dy, grads, dx);
    }
    let MlpActivations { gate, up, .. } = activations;
    let MlpScratch { act, dact, dgate, dup } = scratch;
    assert!(gate.len() == rows * width && up.len() == gate.len(), "activations of another number of rows");
    for buffer in [&mut *dact, &mut *dgate, &mut *dup] {
        buffer.resize(rows * width, 0.0);
    }
    let down_grad = down_grad.map(|(out, store)| {
        act.resize(rows * width, 0.0);
        swiglu(exec, gate, up, act);
        (MatRef::dense(act, rows, width).into(), out, store)
    });
    let to_act = Some((MatMut::dense(dact, rows, width), Store::Overwrite));
    linear_backward(exec, weights.down, dy, down_grad, to_act);
    swiglu_backward(exec, gate, up, dact, dgate, dup);
    let parts = [
        (weights.gate, &*dgate, gate_grad, Store::Overwrite),
        (weights.up, &*dup, up_grad, Store::Accumulate),
    ];
    for (weight, d, grad, store) in parts {
        let grad = grad.zip(x).map(|((out, add), x)| (x, out, add));
        linear_backward(exec, weight, MatRef::dense(d, rows, width), grad, Some((dx.reborrow(), store)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::packed::{Shared, Uses};
    use crate::testing::{assert_close, execs_of_both_precisions, noise, to_f64};
    use crate::{IsaLevel, Trans};

    /// Relative to the largest: sums of up to a few hundred products in f32, and of factors rounded to bfloat16 two or three times over.
    fn contexts() -> Vec<(Exec, f64)> {
        execs_of_both_precisions(2e-5, 2e-2)
    }

    struct Case {
        rows: usize,
        d_model: usize,
        width: usize,
        x: Vec<f32>,
        gate: Vec<f32>,
        up: Vec<f32>,
        down: Vec<f32>,
        dy: Vec<f32>,
    }

    impl Case {
        fn new(rows: usize, d_model: usize, width: usize) -> Self {
            let scaled = |seed, n: usize, by: f32| noise(seed, n).into_iter().map(|x| x * by).collect();
            let to_unit = 1.7 / (d_model as f32).sqrt();
            Self {
                rows,
                d_model,
                width,
                x: scaled(1, rows * d_model, 1.7),
                gate: scaled(2, width * d_model, 2.0 * to_unit),
                up: scaled(3, width * d_model, to_unit),
                down: scaled(4, d_model * width, 1.7 / (width as f32).sqrt()),
                dy: noise(5, rows * d_model),
            }
        }

        fn weights(&self) -> MlpWeights<'_> {
            MlpWeights {
                gate: MatRef::dense(&self.gate, self.width, self.d_model),
                up: MatRef::dense(&self.up, self.width, self.d_model),
                down: MatRef::dense(&self.down, self.d_model, self.width),
            }
        }

        /// Output and gradients of x, gate, up, down in f64.
        fn reference(&self) -> [Vec<f64>; 5] {
            let Self { rows, d_model, width, .. } = *self;
            let (no, yes) = (Trans::No, Trans::Yes);
            let [x, gate, up, down, dy] =
                [&self.x, &self.gate, &self.up, &self.down, &self.dy].map(|values| to_f64(values));
            let gemm = |m, n, k, a: &[f64], ta, b: &[f64], tb| naive::gemm::gemm(m, n, k, a, ta, b, tb, 1.0);
            let g = gemm(rows, width, d_model, &x, no, &gate, yes);
            let u = gemm(rows, width, d_model, &x, no, &up, yes);
            let act = naive::elementwise::swiglu(&g, &u);
            let out = gemm(rows, d_model, width, &act, no, &down, yes);
            let dact = gemm(rows, width, d_model, &dy, no, &down, no);
            let (dg, du) = naive::elementwise::swiglu_backward(&g, &u, &dact);
            let mut dx = gemm(rows, d_model, width, &dg, no, &gate, no);
            let through_up = gemm(rows, d_model, width, &du, no, &up, no);
            dx.iter_mut().zip(through_up).for_each(|(x, y)| *x += y);
            [
                out,
                dx,
                gemm(width, d_model, rows, &dg, yes, &x, no),
                gemm(width, d_model, rows, &du, yes, &x, no),
                gemm(d_model, width, rows, &dy, yes, &act, no),
            ]
        }

        /// The same of the kernels; output and wanted gradients of weights are added to 1.
        fn run(&self, exec: &Exec, wanted: [bool; 3], activations: &mut MlpActivations) -> [Vec<f32>; 5] {
            let Self { rows, d_model, width, .. } = *self;
            let x = MatRef::dense(&self.x, rows, d_model);
            let (mut rounded, mut rounded_for_grads) = (Shared::default(), Shared::default());
            let (mut out, mut dx) = (vec![1.0; x.data().len()], vec![f32::NAN; x.data().len()]);
            let mut grads = [(); 3].map(|()| vec![1.0; width * d_model]);
            let mut scratch = MlpScratch::default();
            let shared = rounded.set(exec, x, Uses::Linear);
            let to = Some(MatMut::dense(&mut out, rows, d_model));
            mlp(exec, LayerInput { values: x, shared }, self.weights(), activations, &mut scratch, to);
            let shared = rounded_for_grads.set(exec, x, Uses::WeightGrads);
            let input = (wanted[0] || wanted[1]).then_some(LayerInput { values: x, shared });
            let [gate, up, down] = &mut grads;
            let gradient = |values, rows, cols| Some((MatMut::dense(values, rows, cols), Store::Accumulate));
            let into = MlpGrads {
                gate: gradient(gate, width, d_model).filter(|_| wanted[0]),
                up: gradient(up, width, d_model).filter(|_| wanted[1]),
                down: gradient(down, d_model, width).filter(|_| wanted[2]),
            };
            let dy = MatRef::dense(&self.dy, rows, d_model);
            let dx_out = MatMut::dense(&mut dx, rows, d_model);
            mlp_backward(exec, input, self.weights(), activations, dy, into, dx_out, &mut scratch);
            let [gate, up, down] = grads;
            [out, dx, gate, up, down]
        }
    }

    #[test]
    fn agrees_with_naive_at_every_size() {
        let mut on_tiles = 0;
        for (rows, d_model, width) in
            [(1, 64, 128), (33, 48, 96), (64, 64, 160), (70, 40, 128), (100, 100, 64), (50, 64, 100)]
        {
            let case = Case::new(rows, d_model, width);
            let wanted = case.reference();
            for (exec, tolerance) in contexts() {
                let mut activations = MlpActivations::default();
                let found = case.run(&exec, [true; 3], &mut activations);
                on_tiles += usize::from(activations.is_rounded);
                let names = ["out", "dx", "dgate", "dup", "ddown"];
                for ((name, found), wanted) in names.iter().zip(&found).zip(&wanted) {
                    let what =
                        format!("{} {:?} {rows}x{d_model}x{width} {name}", exec.isa(), exec.precision());
                    let added = if *name == "dx" { 0.0 } else { 1.0 };
                    // Errors of a sum grow with the root of its terms; values do so too, and the largest of them is the yardstick.
                    let largest = wanted.iter().fold(1.0f64, |most, x| most.max(x.abs()));
                    let scaled: Vec<f32> =
                        found.iter().map(|x| ((f64::from(*x) - added) / largest) as f32).collect();
                    let wanted: Vec<f64> = wanted.iter().map(|x| x / largest).collect();
                    assert_close(&what, &scaled, &wanted, tolerance);
                }
            }
        }
        let has_tiles = contexts().iter().any(|(exec, _)| exec.isa().level() >= IsaLevel::Amx);
        assert_eq!(on_tiles > 0, has_tiles, "tiles take some of these sizes");
    }

    #[test]
    fn gradients_that_nobody_wants_are_left_alone() {
        let case = Case::new(70, 64, 96);
        for (exec, _) in contexts() {
            let all = case.run(&exec, [true; 3], &mut MlpActivations::default());
            for wanted in [[false; 3], [true, false, false], [false, true, false], [false, false, true]] {
                // Activations of a larger call before leave nothing behind.
                let mut activations = MlpActivations::default();
                Case::new(100, 64, 128).run(&exec, [true; 3], &mut activations);
                let some = case.run(&exec, wanted, &mut activations);
                assert_eq!(some[..2], all[..2]);
                for i in 0..3 {
                    match wanted[i] {
                        true => assert_eq!(some[2 + i], all[2 + i]),
                        false => assert!(some[2 + i].iter().all(|&x| x == 1.0)),
                    }
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_stay_visible() {
        for (exec, _) in contexts() {
            let mut case = Case::new(64, 64, 96);
            case.x[5] = f32::NAN;
            let found = case.run(&exec, [true; 3], &mut MlpActivations::default());
            assert!(found[0][..64].iter().all(|x| x.is_nan()) && found[1][..64].iter().all(|x| x.is_nan()));
            // Very negative gates let nothing through.
            let mut case = Case::new(64, 64, 96);
            case.gate.iter_mut().zip(case.x.iter().cycle()).for_each(|(gate, x)| *gate = -1e4 * x.signum());
            case.x.iter_mut().for_each(|x| *x = x.abs() + 0.1);
            case.gate.iter_mut().for_each(|gate| *gate = -gate.abs());
            let found = case.run(&exec, [true; 3], &mut MlpActivations::default());
            assert!(found[0].iter().all(|&x| x == 1.0) && found[1].iter().all(|&x| x == 0.0));
        }
    }
}
