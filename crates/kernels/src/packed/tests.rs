use super::*;
use crate::naive;
use crate::testing::{noise, to_f64};
use crate::{Isa, IsaLevel, MatMut, MatRef, Store};
use kernel::{Form, Route};

/// Rounding of sums of `k` products of values up to 1 in f32, of which no order is worse than this per term.
const SUM_ERROR: f64 = 1e-7;
/// Relative error of one activation rounded to bfloat16, half a unit of the last of its 8 bits.
const BF16_ERROR: f64 = 1.0 / 256.0;

/// Every instruction set of this CPU, and AMX, modelled in software if need be.
fn isas() -> Vec<Isa> {
    let mut isas = Isa::available();
    isas.extend(Isa::modelled_amx().filter(|amx| !isas.contains(amx)));
    isas
}

/// Every instruction set with 1, 2 and 3 threads.
fn execs() -> Vec<Exec> {
    let all = isas().into_iter().flat_map(|isa| [1, 2, 3].map(|threads| (isa, threads)));
    all.map(|(isa, threads)| Exec::with_isa(threads, isa).unwrap()).collect()
}

/// Stored rows of a plain type and their exact values.
fn stored(dtype: Dtype, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; values.len() * dtype.block().1];
    dense::store_row(dtype, values, &mut bytes);
    let mut rounded = vec![f32::NAN; values.len()];
    dequantize(dtype, &bytes, &mut rounded);
    (bytes, rounded)
}

/// A packed matrix of noise and its exact values.
fn weight(exec: &Exec, dtype: Dtype, seed: u64, n: usize, k: usize) -> (Packed, Vec<f32>) {
    let (bytes, values) = stored(dtype, &noise(seed, n * k));
    let ids: Vec<u32> = (0..n as u32).collect();
    let packed = Packed::pack(exec, dtype, k, &[Rows { dtype, bytes: &bytes, cols: k, ids: &ids }]).unwrap();
    assert_eq!((packed.rows(), packed.cols(), packed.dtype()), (n, k, dtype));
    (packed, values)
}

/// The largest error of a dot product of `k` values up to 1 with this weight.
fn bound(isa: Isa, dtype: Dtype, m: usize, x: &[f32], w: &[f32]) -> f64 {
    let magnitude: f64 = x.iter().zip(w).map(|(x, w)| f64::from(x * w).abs()).sum();
    let rounding = match Route::of(isa, dtype, m).form() {
        Form::Bf16 => BF16_ERROR,
        _ => 0.0,
    };
    magnitude * (rounding + SUM_ERROR * (x.len() as f64).sqrt()) + 1e-7
}

const PLAIN: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];
const ROWS: [usize; 13] = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 65];
const SHAPES: [(usize, usize); 12] = [
    (1, 1),
    (15, 2),
    (16, 31),
    (17, 32),
    (48, 33),
    (50, 64),
    (50, 576),
    (16, 33),
    (1, 64),
    (49, 1),
    (200, 96),
    (97, 200),
];

fn check(what: &str, got: f32, want: f64, bound: f64) {
    assert!((f64::from(got) - want).abs() <= bound, "{what}: {got}, reference {want}, bound {bound}");
}

#[test]
fn products_agree_with_the_definition_on_every_instruction_set() {
    let execs = execs();
    let mut input = Input::new();
    for dtype in PLAIN {
        for (n, k) in SHAPES {
            let (packed, w) = weight(&execs[0], dtype, 1, n, k);
            for m in ROWS {
                let x = noise(2, m * k);
                let want = naive::packed::matmul(m, n, k, &to_f64(&x), &to_f64(&w), None);
                let mut first: Option<(Isa, Vec<f32>)> = None;
                for exec in &execs {
                    input.set(exec, MatRef::dense(&x, m, k), &[&packed]);
                    // Strided, and what lies between must stay untouched.
                    let stride = n + 3;
                    let mut out = vec![f32::NAN; m * stride + 1];
                    let len = out.len();
                    let view = MatMut::new(&mut out[1..], m, n, stride);
                    let mut products =
                        [Product { weight: &packed, bias: None, out: view, store: Store::Overwrite }];
                    matmul(exec, &input, &mut products);
                    let what = format!("{} {dtype:?} [{m}, {k}] x [{n}, {k}]", exec.isa());
                    for i in 0..m {
                        for j in 0..n {
                            let (x, w) = (&x[i * k..][..k], &w[j * k..][..k]);
                            let at = 1 + i * stride + j;
                            check(&what, out[at], want[i * n + j], bound(exec.isa(), dtype, m, x, w));
                        }
                    }
                    let outside = (0..len).filter(|&at| at == 0 || (at - 1) % stride >= n);
                    assert!(outside.into_iter().all(|at| out[at].is_nan()), "{what}: wrote outside");
                    let values: Vec<f32> = out.into_iter().filter(|v| !v.is_nan()).collect();
                    match &first {
                        Some((isa, first)) if *isa == exec.isa() => {
                            assert_eq!(&values, first, "{what}: threads")
                        }
                        _ => first = Some((exec.isa(), values)),
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let (n, k) = (50, 96);
    for exec in execs() {
        for dtype in PLAIN {
            let (packed, _) = weight(&exec, dtype, 3, n, k);
            for (low, high) in [(1, MATVEC_ROWS), (MATVEC_ROWS + 1, 70)] {
                let x = noise(4, high * k);
                let run = |m: usize| {
                    let mut input = Input::new();
                    input.set(&exec, MatRef::dense(&x[..m * k], m, k), &[&packed]);
                    let mut out = vec![f32::NAN; m * n];
                    let view = MatMut::dense(&mut out, m, n);
                    matmul(
                        &exec,
                        &input,
                        &mut [Product { weight: &packed, bias: None, out: view, store: Store::Overwrite }],
                    );
                    out
                };
                let all = run(high);
                for m in low..high {
                    assert_eq!(run(m), all[..m * n], "{} {dtype:?} {m} of {high} rows", exec.isa());
                }
            }
        }
    }
}

#[test]
fn bias_residual_and_several_products_share_a_call() {
    let k = 72;
    for exec in execs() {
        for m in [1, 3, 6, 40] {
            let x = noise(5, m * k);
            let shapes = [(Dtype::BF16, 50), (Dtype::F32, 7), (Dtype::F16, 129), (Dtype::BF16, 1)];
            let weights: Vec<_> =
                shapes.iter().map(|&(dtype, n)| weight(&exec, dtype, n as u64, n, k)).collect();
            let mut input = Input::new();
            let refs: Vec<&Packed> = weights.iter().map(|(packed, _)| packed).collect();
            input.set(&exec, MatRef::dense(&x, m, k), &refs);
            let bias = noise(6, 129);
            let old = noise(7, m * 129);
            for (biased, store) in [
                (false, Store::Accumulate),
                (true, Store::Overwrite),
                (true, Store::Accumulate),
                (false, Store::Overwrite),
            ] {
                let mut outs: Vec<Vec<f32>> = shapes
                    .iter()
                    .map(|&(_, n)| {
                        if store == Store::Accumulate { old[..m * n].to_vec() } else { vec![f32::NAN; m * n] }
                    })
                    .collect();
                // More products than share a region.
                let mut extra: Vec<Vec<f32>> = vec![vec![f32::NAN; m * 7]; 20];
                let mut products: Vec<Product<'_>> = Vec::new();
                for ((packed, _), out) in weights.iter().zip(&mut outs) {
                    let n = packed.rows();
                    let bias = biased.then_some(&bias[..n]);
                    products.push(Product { weight: packed, bias, out: MatMut::dense(out, m, n), store });
                }
                for out in &mut extra {
                    let out = MatMut::dense(out, m, 7);
                    products.push(Product {
                        weight: &weights[1].0,
                        bias: None,
                        out,
                        store: Store::Overwrite,
                    });
                }
                matmul(&exec, &input, &mut products);
                for (((packed, w), out), (dtype, n)) in weights.iter().zip(&outs).zip(shapes) {
                    let want = naive::packed::matmul(m, n, k, &to_f64(&x), &to_f64(w), None);
                    for i in 0..m {
                        for j in 0..n {
                            let mut want = want[i * n + j];
                            want += if biased { f64::from(bias[j]) } else { 0.0 };
                            want += if store == Store::Accumulate { f64::from(old[i * n + j]) } else { 0.0 };
                            let bound = bound(exec.isa(), dtype, m, &x[i * k..][..k], &w[j * k..][..k]);
                            check(&format!("{} {packed:?}", exec.isa()), out[i * n + j], want, bound + 1e-6);
                        }
                    }
                }
                assert!(extra.iter().all(|out| out == &extra[0]) && extra[0].iter().all(|v| v.is_finite()));
            }
        }
    }
}

#[test]
fn swiglu_combines_two_products() {
    let (n, k) = (50, 64);
    for exec in execs() {
        for (gate_type, up_type) in
            [(Dtype::BF16, Dtype::BF16), (Dtype::F32, Dtype::BF16), (Dtype::F16, Dtype::F16)]
        {
            let (gate, g) = weight(&exec, gate_type, 8, n, k);
            let (up, u) = weight(&exec, up_type, 9, n, k);
            for m in [0, 1, 4, 5, 9, 33] {
                let x = noise(10, m * k);
                let mut input = Input::new();
                input.set(&exec, MatRef::dense(&x, m, k), &[&gate, &up]);
                let mut out = vec![f32::NAN; m * (n + 1)];
                matmul_swiglu(&exec, &input, &gate, &up, MatMut::new(&mut out, m, n, n + 1));
                let want = naive::packed::matmul_swiglu(m, n, k, &to_f64(&x), &to_f64(&g), &to_f64(&u));
                for i in 0..m {
                    assert!(out[i * (n + 1) + n].is_nan());
                    for j in 0..n {
                        let x = &x[i * k..][..k];
                        let magnitude = |w: &[f32]| {
                            x.iter().zip(&w[j * k..][..k]).map(|(x, w)| f64::from((x * w).abs())).sum::<f64>()
                        };
                        let error =
                            bound(exec.isa(), gate_type, m, x, &g[j * k..][..k]) * 1.1 * magnitude(&u)
                                + bound(exec.isa(), up_type, m, x, &u[j * k..][..k]) * magnitude(&g);
                        check(
                            &format!("{} swiglu m {m}", exec.isa()),
                            out[i * (n + 1) + j],
                            want[i * n + j],
                            error,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn the_norm_is_fused_into_the_input() {
    /// Rounding of the sum of squares, the root and two products.
    const TOLERANCE: f64 = 4e-6;
    for exec in execs() {
        for (m, k) in [(0, 8), (1, 1), (1, 577), (3, 33), (70, 576), (5, 1024)] {
            let (x, norm) = (noise(11, m * (k + 2)), noise(12, k));
            let view = MatRef::new(&x, m, k, k + 2);
            let (packed, _) = weight(&exec, Dtype::BF16, 13, 3, k);
            let mut input = Input::new();
            input.set_rms_norm(&exec, view, &norm, 1e-5, &[&packed]);
            assert_eq!(input.rows(), m);
            for i in 0..m {
                let want = naive::elementwise::rms_norm(&to_f64(view.row(i)), &to_f64(&norm), 1e-5);
                crate::testing::assert_close("norm", input.f32().row(i), &want, TOLERANCE);
            }
            if Route::of(exec.isa(), Dtype::BF16, m).form() == Form::Bf16 {
                let (rows, stride) = input.bf16_rows();
                for i in 0..m {
                    let row = &rows[i * stride..][..stride];
                    for (&got, &x) in row.iter().zip(input.f32().row(i)) {
                        assert_eq!(got, half::bf16::from_f32(x).to_bits());
                    }
                    assert!(row[k..].iter().all(|&v| v == 0));
                }
            }
            // A smaller input afterwards must not see what was there.
            input.set(&exec, MatRef::dense(&x[..m.min(1)], m.min(1), 1), &[]);
            assert_eq!(input.f32().cols(), 1);
        }
    }
}

#[test]
fn rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan() {
    let exec = Exec::with_isa(1, Isa::SCALAR).unwrap();
    let bf16 = Isa::available().into_iter().find(|isa| isa.level() >= IsaLevel::Avx512Bf16);
    let exec = bf16.map_or(exec, |isa| Exec::with_isa(1, isa).unwrap());
    if bf16.is_none() {
        return;
    }
    let bits = [
        0x7fff_ffffu32,
        0xffff_ffff,
        0x7f80_0000,
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_8001,
        0x0000_8001,
        0x7f7f_ffff,
    ];
    let x: Vec<f32> = bits.iter().cycle().take(5 * 8).map(|&bits| f32::from_bits(bits)).collect();
    let (packed, _) = weight(&exec, Dtype::BF16, 1, 1, 8);
    let mut input = Input::new();
    input.set(&exec, MatRef::dense(&x, 5, 8), &[&packed]);
    for (&got, &x) in input.bf16_rows().0.iter().zip(&x[..8]) {
        let want = half::bf16::from_f32(x);
        assert!(got == want.to_bits() || half::bf16::from_bits(got).is_nan() && x.is_nan(), "{x:?}");
    }
}

#[test]
fn parts_are_gathered_and_converted() {
    let exec = Exec::with_isa(2, Isa::SCALAR).unwrap();
    let k = 35;
    let (half_bytes, half_values) = stored(Dtype::F16, &noise(14, 20 * k));
    let (f32_bytes, f32_values) = stored(Dtype::F32, &noise(15, 5 * k));
    let ids = [7u32, 3, 3, 19, 0];
    let parts = [
        Rows { dtype: Dtype::F16, bytes: &half_bytes, cols: k, ids: &ids },
        Rows { dtype: Dtype::BF16, bytes: &[], cols: 999, ids: &[] },
        Rows { dtype: Dtype::F32, bytes: &f32_bytes, cols: k, ids: &[4, 4] },
    ];
    for dtype in PLAIN {
        let packed = Packed::pack(&exec, dtype, k, &parts).unwrap();
        assert_eq!(packed.rows(), 7);
        assert!(packed.bytes() >= 7 * k * dtype.block().1);
        for row in 0..7 {
            let source = match row {
                0..5 => &half_values[ids[row] as usize * k..][..k],
                _ => &f32_values[4 * k..],
            };
            let want = stored(dtype, source).1;
            let mut got = vec![f32::NAN; k];
            packed.row_f32(row, &mut got);
            assert_eq!(got, want, "{dtype:?} row {row}");
        }
    }
    let empty = Packed::pack(&exec, Dtype::BF16, k, &[]).unwrap();
    assert_eq!((empty.rows(), empty.bytes()), (0, 0));
}

#[test]
fn every_finite_half_is_widened_exactly() {
    let halves: Vec<u16> = (0..=u16::MAX).filter(|&bits| half::f16::from_bits(bits).is_finite()).collect();
    let k = 64;
    let n = halves.len() / k;
    let bytes: Vec<u8> = halves[..n * k].iter().flat_map(|h| h.to_le_bytes()).collect();
    let ids: Vec<u32> = (0..n as u32).collect();
    for isa in Isa::available() {
        let exec = Exec::with_isa(1, isa).unwrap();
        let rows = Rows { dtype: Dtype::F16, bytes: &bytes, cols: k, ids: &ids };
        let packed = Packed::pack(&exec, Dtype::F16, k, &[rows]).unwrap();
        let mut wide = vec![f32::NAN; k * PANEL];
        for panel in 0..n / PANEL {
            dense_f32::widen(isa, Dtype::F16, k, packed.panel(panel), &mut wide);
            for row in 0..PANEL {
                for col in 0..k {
                    let want = half::f16::from_bits(halves[(panel * PANEL + row) * k + col]);
                    assert_eq!(wide[col * PANEL + row].to_bits(), want.to_f32().to_bits(), "{isa}");
                }
            }
        }
    }
}

#[test]
fn bad_parts_are_refused_in_words() {
    let exec = Exec::with_isa(1, Isa::SCALAR).unwrap();
    let pack =
        |dtype, cols, part: Rows<'_>| Packed::pack(&exec, dtype, cols, &[part]).unwrap_err().to_string();
    let bytes: Vec<u8> = [1.0f32, f32::NAN, 1e30, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let rows = |ids| Rows { dtype: Dtype::F32, bytes: &bytes, cols: 2, ids };
    assert!(pack(Dtype::F32, 2, rows(&[0])).contains("value 1 is not finite as F32"));
    assert!(pack(Dtype::F16, 2, rows(&[1])).contains("value 0 is not finite as F16"));
    assert!(Packed::pack(&exec, Dtype::BF16, 2, &[rows(&[1])]).is_ok());
    assert!(pack(Dtype::F32, 2, rows(&[2])).contains("has 2 rows, row 2"));
    assert!(pack(Dtype::F32, 3, rows(&[0])).contains("rows of 2 values, the matrix has 3"));
    assert!(pack(Dtype::Q8_0, 2, rows(&[0])).contains("blocks of 32 values"));
    let short = Rows { bytes: &bytes[..9], ..rows(&[0]) };
    assert!(pack(Dtype::F32, 2, short).contains("9 bytes"));
}
