use super::*;
use crate::naive::elementwise as naive;
use crate::testing::{assert_close, assert_gradient, execs, noise, numeric_gradient, to_f64};

/// f32 rounding of a handful of operations and of sums of up to 64 k terms in vector lanes.
const TOLERANCE: f64 = 3e-6;
/// Column sums of thousands of rows lose a little more.
const SUM_TOLERANCE: f64 = 3e-5;

const DIMS: [(usize, usize); 9] =
    [(0, 5), (1, 1), (3, 7), (2, 63), (5, 64), (2, 65), (7, 500), (2, 2049), (90, 576)];

fn sum_of_products(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn norms_agree_with_naive() {
    let eps = 1e-5;
    for exec in execs() {
        for (rows, dim) in DIMS {
            for scale in [1.0, 1e4, 1e-4] {
                let x: Vec<f32> = noise(1, rows * dim).iter().map(|x| x * scale).collect();
                let (w, d) = (noise(2, dim), noise(3, rows * dim));
                let (x6, w6, d6) = (to_f64(&x), to_f64(&w), to_f64(&d));

                let mut out = vec![f32::NAN; x.len()];
                rms_norm(&exec, &x, &w, eps, &mut out);
                assert_close("rms_norm", &out, &naive::rms_norm(&x6, &w6, f64::from(eps)), TOLERANCE);
                let (mut dx, mut dw) = (vec![1.0; x.len()], vec![2.0; dim]);
                rms_norm_backward(&exec, &x, &w, eps, &d, &mut dx, Some(&mut dw));
                let (want_dx, want_dw) = naive::rms_norm_backward(&x6, &w6, f64::from(eps), &d6);
                let plus = |x: &[f64], y: f64| x.iter().map(|x| x + y).collect::<Vec<_>>();
                assert_close("rms_norm dx", &dx, &plus(&want_dx, 1.0), TOLERANCE);
                assert_close("rms_norm dw", &dw, &plus(&want_dw, 2.0), SUM_TOLERANCE);
                let mut only_dx = vec![1.0; x.len()];
                rms_norm_backward(&exec, &x, &w, eps, &d, &mut only_dx, None);
                assert_eq!(only_dx, dx);

                let mut out = vec![f32::NAN; x.len()];
                l2_norm(&exec, &x, dim, eps, &mut out);
                assert_close("l2_norm", &out, &naive::l2_norm(&x6, dim, f64::from(eps)), TOLERANCE);
                let mut dx = vec![1.0; x.len()];
                l2_norm_backward(&exec, &x, dim, eps, &d, &mut dx);
                let want = naive::l2_norm_backward(&x6, dim, f64::from(eps), &d6);
                assert_close("l2_norm dx", &dx, &plus(&want, 1.0), TOLERANCE);
            }
        }
    }
}

#[test]
fn rows_of_zeros_stay_zero() {
    for exec in execs() {
        let mut out = vec![f32::NAN; 6];
        rms_norm(&exec, &[0.0; 6], &[1.0; 3], 1e-6, &mut out);
        assert_eq!(out, [0.0; 6]);
        l2_norm(&exec, &[0.0; 6], 3, 1e-6, &mut out);
        assert_eq!(out, [0.0; 6]);
    }
}

#[test]
fn swiglu_agrees_with_naive() {
    for exec in execs() {
        for n in [0, 1, 63, 64, 65, 500, TASK + 3] {
            let mut gate: Vec<f32> = noise(1, n).iter().map(|x| 12.0 * x).collect();
            for (gate, &large) in gate.iter_mut().zip(&[0.0, 80.0, -80.0, 1e4, -1e4, 1e30, -1e30]) {
                *gate = large;
            }
            let (up, d) = (noise(2, n), noise(3, n));
            let (g6, u6, d6) = (to_f64(&gate), to_f64(&up), to_f64(&d));
            let mut out = vec![f32::NAN; n];
            swiglu(&exec, &gate, &up, &mut out);
            assert_close("swiglu", &out, &naive::swiglu(&g6, &u6), TOLERANCE);
            let (mut dg, mut du) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            swiglu_backward(&exec, &gate, &up, &d, &mut dg, &mut du);
            let (want_dg, want_du) = naive::swiglu_backward(&g6, &u6, &d6);
            assert_close("swiglu dgate", &dg, &want_dg, TOLERANCE);
            assert_close("swiglu dup", &du, &want_du, TOLERANCE);
        }
    }
}

#[test]
fn sums_and_biases_agree() {
    for exec in execs() {
        for (rows, dim) in DIMS {
            let (x, bias) = (noise(1, rows * dim), noise(2, dim));
            let mut y = x.clone();
            add_bias(&exec, &bias, &mut y);
            assert!(y.iter().enumerate().all(|(i, &y)| y == x[i] + bias[i % dim]));
            let mut sums = bias.clone();
            add_column_sums(&exec, &x, &mut sums);
            let mut want = to_f64(&bias);
            x.iter().enumerate().for_each(|(i, &x)| want[i % dim] += f64::from(x));
            assert_close("column sums", &sums, &want, SUM_TOLERANCE);
            let mut y = x.clone();
            axpy(&exec, 0.5, &vec![2.0; x.len()], &mut y);
            assert!(y.iter().zip(&x).all(|(&y, &x)| y == x + 1.0));
        }
    }
    for exec in execs() {
        for (rows, cols) in [(0, 7), (3, 0), (1, 5), (33, 70), (5, TASK + 1)] {
            let wide = noise(1, rows * (cols + 3));
            let mut to = vec![f32::NAN; 11];
            let from = MatRef::new(&wide, rows, cols, cols + 3);
            copy(&exec, from, &mut to);
            assert_eq!(to, from.to_dense());
        }
    }
    let mut sums = Vec::new();
    for isa in Isa::available() {
        let (a, b) = (noise(1, 501), noise(2, 501));
        let want = sum_of_products(&to_f64(&a), &to_f64(&b));
        sums.push(tensor_dot(isa, &a, &b));
        assert!((sums[0] - want).abs() < 1e-12 && (dot(&a, &b) - want).abs() < 1e-12);
        assert_eq!((tensor_dot(isa, &[], &[]), dot(&[], &[])), (0.0, 0.0));
    }
    assert!(sums.iter().all(|&sum| sum == sums[0]), "{sums:?}");
}

#[test]
fn logistic_functions_are_stable() {
    for x in [-1e30, -200.0, -88.0, -20.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 20.0, 88.0, 200.0, 1e30f32] {
        let (exact, got) = (naive::sigmoid(f64::from(x)), f64::from(sigmoid(x)));
        assert!((got - exact).abs() <= 2e-7 * exact.max(1e-30), "sigmoid({x}) = {got}, exact {exact}");
        let (exact, got) = (naive::softplus(f64::from(x)), f64::from(softplus(x)));
        assert!((got - exact).abs() <= 2e-7 * exact.max(1e-30), "softplus({x}) = {got}, exact {exact}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (rows, dim) = (200, 576);
    let (x, w, d) = (noise(1, rows * dim), noise(2, dim), noise(3, rows * dim));
    for isa in Isa::available() {
        let run = |threads| {
            let exec = Exec::with_isa(threads, isa).unwrap();
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; dim]);
            rms_norm_backward(&exec, &x, &w, 1e-5, &d, &mut dx, Some(&mut dw));
            (dx, dw)
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn naive_gradients_agree_with_finite_differences() {
    let (rows, dim) = (3, 5);
    let (x, w) = (to_f64(&noise(1, rows * dim)), to_f64(&noise(2, dim)));
    let (up, d) = (to_f64(&noise(4, rows * dim)), to_f64(&noise(3, rows * dim)));
    let loss = |out: Vec<f64>| sum_of_products(&out, &d);

    let (dx, dw) = naive::rms_norm_backward(&x, &w, 1e-3, &d);
    assert_gradient("rms_norm dx", &dx, &numeric_gradient(&x, |x| loss(naive::rms_norm(x, &w, 1e-3))));
    assert_gradient("rms_norm dw", &dw, &numeric_gradient(&w, |w| loss(naive::rms_norm(&x, w, 1e-3))));
    let dx = naive::l2_norm_backward(&x, dim, 1e-3, &d);
    assert_gradient("l2_norm dx", &dx, &numeric_gradient(&x, |x| loss(naive::l2_norm(x, dim, 1e-3))));
    let (dg, du) = naive::swiglu_backward(&x, &up, &d);
    assert_gradient("swiglu dgate", &dg, &numeric_gradient(&x, |x| loss(naive::swiglu(x, &up))));
    assert_gradient("swiglu dup", &du, &numeric_gradient(&up, |up| loss(naive::swiglu(&x, up))));
}

#[test]
#[should_panic(expected = "7 values are not rows of 3")]
fn ragged_rows_are_refused() {
    rms_norm(&Exec::new(1).unwrap(), &[0.0; 7], &[0.0; 3], 1e-5, &mut [0.0; 7]);
}

#[test]
fn sigmoid_in_place_is_sigmoid() {
    for exec in execs() {
        for n in [0, 1, 17, 40_000] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 - 8.0) * 0.37 % 90.0).collect();
            let mut found = x.clone();
            sigmoid_in_place(&exec, &mut found);
            for (found, &x) in found.iter().zip(&x) {
                assert!((found - sigmoid(x)).abs() < 3e-7, "{}: {x}", exec.isa());
            }
        }
    }
}
