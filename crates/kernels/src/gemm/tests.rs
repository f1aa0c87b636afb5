use proptest::prelude::*;

use super::*;
use crate::naive;
use crate::testing::{execs, noise, to_f64};

/// f32 rounding of a k-term sum of products of values in [-1, 1], per term.
const PER_TERM: f64 = 2e-7;

const BOTH: [Trans; 2] = [Trans::No, Trans::Yes];

/// A `rows × cols` matrix inside rows of `stride` values whose padding is NaN.
fn padded(dense: &[f32], rows: usize, cols: usize, stride: usize) -> Vec<f32> {
    let mut data = vec![f32::NAN; rows * stride];
    for r in 0..rows {
        data[r * stride..r * stride + cols].copy_from_slice(&dense[r * cols..(r + 1) * cols]);
    }
    data
}

fn check(exec: &Exec, m: usize, n: usize, k: usize, pad: usize, ta: Trans, tb: Trans, store: Store) {
    let (ar, ac) = if ta == Trans::No { (m, k) } else { (k, m) };
    let (br, bc) = if tb == Trans::No { (k, n) } else { (n, k) };
    let (a, b) = (noise(1, m * k), noise(2, k * n));
    let old = noise(3, m * n);
    let alpha = 0.75;
    let product = naive::gemm::gemm(m, n, k, &to_f64(&a), ta, &to_f64(&b), tb, f64::from(alpha));
    let (a, b) = (padded(&a, ar, ac, ac + pad), padded(&b, br, bc, bc + pad));
    let stride = n + 2 * pad;
    let mut out = match store {
        Store::Overwrite => vec![f32::NAN; m * stride],
        Store::Accumulate => padded(&old, m, n, stride),
    };
    gemm(
        exec,
        MatMut::new(&mut out, m, n, stride),
        MatRef::new(&a, ar, ac, ac + pad),
        ta,
        MatRef::new(&b, br, bc, bc + pad),
        tb,
        alpha,
        store,
    );
    for i in 0..m {
        for j in 0..stride {
            let got = out[i * stride + j];
            if j >= n {
                assert!(got.is_nan(), "padding touched at ({i}, {j})");
                continue;
            }
            let base = if store == Store::Accumulate { f64::from(old[i * n + j]) } else { 0.0 };
            let want = base + product[i * n + j];
            let error = (f64::from(got) - want).abs();
            assert!(
                error <= PER_TERM * (k as f64 + 4.0),
                "{} threads {} {m}x{n}x{k} pad {pad} {ta:?} {tb:?} {store:?} ({i}, {j}): {got} vs {want}",
                exec.isa(),
                exec.threads()
            );
        }
    }
}

#[test]
fn agrees_with_naive_on_every_instruction_set() {
    for exec in execs() {
        for (m, n, k) in [
            (0, 3, 4),
            (3, 0, 4),
            (3, 4, 0),
            (1, 1, 1),
            (1, 64, 65),
            (1, 65, 500),
            (1, 300, 257),
            (2, 63, 64),
            (3, 70, 33),
            (4, 65, 64),
            (5, 13, 130),
            (8, 67, 31),
            (9, 9, 9),
            (63, 64, 65),
            (65, 1, 64),
            (130, 70, 90),
        ] {
            for (ta, tb) in BOTH.iter().flat_map(|&ta| BOTH.map(|tb| (ta, tb))) {
                for store in [Store::Overwrite, Store::Accumulate] {
                    for pad in [0, 3] {
                        check(&exec, m, n, k, pad, ta, tb, store);
                    }
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for isa in crate::Isa::available() {
        let run = |threads: usize, m: usize, tb: Trans| {
            let exec = Exec::with_isa(threads, isa).unwrap();
            let (n, k) = (577, 320);
            let (a, b) = (noise(1, m * k), noise(2, k * n));
            let b = if tb == Trans::No { MatRef::dense(&b, k, n) } else { MatRef::dense(&b, n, k) };
            let mut out = vec![f32::NAN; m * n];
            let (dst, a) = (MatMut::dense(&mut out, m, n), MatRef::dense(&a, m, k));
            gemm(&exec, dst, a, Trans::No, b, tb, 1.0, Store::Overwrite);
            out
        };
        for m in [1, 3, 4, 8, 9, 130] {
            for tb in BOTH {
                let one = run(1, m, tb);
                for threads in [2, 3] {
                    assert_eq!(one, run(threads, m, tb), "{isa} m {m} {tb:?} threads {threads}");
                }
            }
        }
    }
}

#[test]
fn is_callable_inside_a_parallel_region() {
    let exec = Exec::new(2).unwrap();
    let (a, b) = (noise(1, 64 * 64), noise(2, 64 * 64));
    let results = exec.parallel_map(8, |_| {
        let mut out = vec![f32::NAN; 64 * 64];
        let (a, b) = (MatRef::dense(&a, 64, 64), MatRef::dense(&b, 64, 64));
        gemm(&exec, MatMut::dense(&mut out, 64, 64), a, Trans::No, b, Trans::No, 1.0, Store::Overwrite);
        out
    });
    assert!(results.iter().all(|r| *r == results[0]));
}

#[test]
#[should_panic(expected = "out [2, 3]")]
fn shapes_that_do_not_fit_are_refused() {
    let exec = Exec::new(1).unwrap();
    let zeros = [0.0; 12];
    let (a, b) = (MatRef::dense(&zeros, 2, 4), MatRef::dense(&zeros, 3, 3));
    gemm(&exec, MatMut::dense(&mut [0.0; 6], 2, 3), a, Trans::No, b, Trans::No, 1.0, Store::Overwrite);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_shape_agrees(m in 0usize..40, n in 0usize..40, k in 0usize..70, pad in 0usize..3, ta: bool, tb: bool, add: bool) {
        let trans = |yes| if yes { Trans::Yes } else { Trans::No };
        let store = if add { Store::Accumulate } else { Store::Overwrite };
        for isa in crate::Isa::available() {
            check(&Exec::with_isa(1, isa).unwrap(), m, n, k, pad, trans(ta), trans(tb), store);
        }
    }
}

#[test]
fn bfloat16_products_are_products_of_rounded_factors() {
    let round = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect::<Vec<f32>>();
    let execs = execs().into_iter().filter_map(|exec| exec.with_precision(Precision::Bf16).ok());
    for exec in execs {
        for (m, n, k) in
            [(9, 16, 1000), (16, 17, 512), (33, 50, 131), (130, 70, 90), (300, 49, 33), (24, 700, 16)]
        {
            assert!(packed::pays(&exec, m, n, k), "[{m}, {k}] · [{k}, {n}] would run in f32");
            let (a, b, old) = (noise(1, m * k), noise(2, k * n), noise(3, m * n));
            let alpha = 0.5;
            for (ta, tb) in BOTH.iter().flat_map(|&ta| BOTH.map(|tb| (ta, tb))) {
                let (a, b) = (round(&a), round(&b));
                let want = naive::gemm::gemm(m, n, k, &to_f64(&a), ta, &to_f64(&b), tb, alpha);
                for store in [Store::Overwrite, Store::Accumulate] {
                    for pad in [0, 3] {
                        let (ar, ac) = if ta == Trans::No { (m, k) } else { (k, m) };
                        let (br, bc) = if tb == Trans::No { (k, n) } else { (n, k) };
                        // Rounding is part of the product: it gets factors that are not rounded yet.
                        let (a, b) = (noise(1, m * k), noise(2, k * n));
                        let (a, b) = (padded(&a, ar, ac, ac + pad), padded(&b, br, bc, bc + pad));
                        let mut out = padded(&old, m, n, n + pad);
                        mixed_gemm(
                            &exec,
                            MatMut::new(&mut out, m, n, n + pad),
                            MatRef::new(&a, ar, ac, ac + pad),
                            ta,
                            MatRef::new(&b, br, bc, bc + pad),
                            tb,
                            alpha as f32,
                            store,
                        );
                        for (i, row) in out.chunks_exact(n + pad).enumerate() {
                            for (j, &got) in row[..n].iter().enumerate() {
                                let base = if store == Store::Accumulate { old[i * n + j] } else { 0.0 };
                                let want = f64::from(base) + want[i * n + j];
                                let what = format!("{} {m}x{n}x{k} {ta:?} {tb:?} {store:?}", exec.isa());
                                let error = (f64::from(got) - want).abs();
                                assert!(
                                    error <= PER_TERM * (k as f64 + 4.0),
                                    "{what} ({i}, {j}): {got}, {want}"
                                );
                            }
                            assert!(row[n..].iter().all(|v| v.is_nan()), "padding touched in row {i}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn small_products_and_f32_contexts_round_nothing() {
    for exec in execs() {
        for (m, n, k, precision) in [(4, 64, 64, Precision::Bf16), (64, 64, 64, Precision::F32)] {
            let Ok(exec) = exec.with_precision(precision) else { continue };
            let (a, b) = (noise(1, m * k), noise(2, k * n));
            let (a, b) = (MatRef::dense(&a, m, k), MatRef::dense(&b, k, n));
            let (mut mixed, mut exact) = (vec![0.0; m * n], vec![0.0; m * n]);
            mixed_gemm(
                &exec,
                MatMut::dense(&mut mixed, m, n),
                a,
                Trans::No,
                b,
                Trans::No,
                1.0,
                Store::Overwrite,
            );
            gemm(&exec, MatMut::dense(&mut exact, m, n), a, Trans::No, b, Trans::No, 1.0, Store::Overwrite);
            assert_eq!(mixed, exact);
        }
    }
}

#[test]
fn bfloat16_is_refused_where_there_is_none() {
    let exec = Exec::with_isa(1, crate::Isa::SCALAR).unwrap();
    let refused = exec.with_precision(Precision::Bf16).unwrap_err().to_string();
    assert!(refused.contains("scalar"), "{refused}");
}
