use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::packed::MATVEC_ROWS;
use crate::packed::{Input, Packed, Product, Rows, matmul};
use crate::quant::{dequantize, quantize};
use crate::testing::{execs, noise};
use crate::{Exec, MatMut, MatRef, Store};

const QUANTISED: [Dtype; 8] =
    [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q4K, Dtype::Q5K, Dtype::Q6K];
const COLS: [usize; 6] = [32, 64, 96, 256, 512, 768];
/// Of the sum of the magnitudes: rounding of some 50 f32 operations per output, 2^-24 each.
const TOLERANCE: f64 = 3e-6;

/// Where the f16 scales lie in a stored block.
fn scale_offsets(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
        Dtype::Q6K => &[208],
        _ => &[0, 2],
    }
}

/// Stored rows in which every bit occurs; `code`: all bytes but the f16 scales, random if `None`.
fn stored_rows(seed: u64, dtype: Dtype, rows: usize, cols: usize, code: Option<u8>) -> Vec<u8> {
    let (block, bytes) = dtype.block();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut out = vec![0; rows * cols / block * bytes];
    for out in out.chunks_exact_mut(bytes) {
        out.iter_mut().for_each(|byte| *byte = code.unwrap_or_else(|| rng.random()));
        for &at in scale_offsets(dtype) {
            let scale = f16::from_f32(rng.random_range(-0.01..0.01));
            out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    out
}

fn panels(dtype: Dtype, cols: usize, stored: &[u8]) -> Vec<Vec<u32>> {
    let (block, bytes) = dtype.block();
    let rows: Vec<&[u8]> = stored.chunks_exact(cols / block * bytes).collect();
    rows.chunks(16)
        .map(|rows| {
            // u32 only for its alignment.
            let mut panel = vec![0u32; panel_bytes(dtype, cols).div_ceil(4)];
            pack_panel(dtype, cols, rows, &mut bytes_mut(&mut panel)[..panel_bytes(dtype, cols)]);
            panel
        })
        .collect()
}

fn bytes_mut(x: &mut [u32]) -> &mut [u8] {
    // SAFETY: plain integers.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), 4 * x.len()) }
}
fn bytes_of(x: &[u32]) -> &[u8] {
    // SAFETY: plain integers.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), 4 * x.len()) }
}

/// Activations with their quantised form, in one part or more.
struct Activations {
    parts: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    rows: usize,
    cols: usize,
}

impl Activations {
    fn new(isa: Isa, x: &[f32], parts: usize, rows: usize, cols: usize) -> Self {
        let stride = cols.next_multiple_of(64);
        let per_row = parts * (cols / 32);
        let (mut codes, mut scales, mut sums) =
            (vec![0; rows * parts * stride], vec![0.0; rows * per_row], vec![0; rows * per_row]);
        for r in 0..rows {
            quantize_activations(
                isa,
                &x[r * cols..(r + 1) * cols],
                parts,
                (&mut codes[r * parts * stride..], stride),
                &mut scales[r * per_row..(r + 1) * per_row],
                &mut sums[r * per_row..],
            );
        }
        Self { parts, codes, scales, sums, rows, cols }
    }
    fn blocks(&self) -> Blocks<'_> {
        Blocks {
            codes: &self.codes,
            stride: self.codes.len() / self.rows / self.parts,
            scales: &self.scales,
            sums: &self.sums,
            blocks: self.cols / 32,
        }
    }
    /// The values that the codes stand for.
    fn exact(&self, row: usize) -> Vec<f64> {
        let x = self.blocks();
        let part = |row: usize, i: usize| {
            f64::from(x.codes[row * x.stride + i]) * f64::from(x.scales[row * x.blocks + i / 32])
        };
        let rows = row * self.parts..(row + 1) * self.parts;
        (0..self.cols).map(|i| rows.clone().map(|row| part(row, i)).sum()).collect()
    }
}

/// Compares one row of outputs with exact products; the tolerance is relative to the sum of magnitudes.
fn assert_row(what: &str, got: &[f32], x: &[f64], weights: &[f32]) {
    let cols = x.len();
    let magnitude: f64 = x.iter().map(|x| x.abs()).sum();
    for (n, &got) in got.iter().enumerate() {
        let w = &weights[n * cols..(n + 1) * cols];
        let want: f64 = x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum();
        let largest = f64::from(w.iter().fold(0.0f32, |m, w| m.max(w.abs())));
        let error = (f64::from(got) - want).abs();
        assert!(error <= TOLERANCE * magnitude * largest, "{what}, output {n}: {got}, reference {want}");
    }
}

/// All kernels of one panel set against the reference, on `x` `[rows, cols]`.
fn check_products(isa: Isa, dtype: Dtype, (outs, cols): (usize, usize), stored: &[u8], x: &[f32]) {
    let x_rows = x.len() / cols;
    let [coarse, fine] = [1, FINE].map(|parts| Activations::new(isa, x, parts, x_rows, cols));
    let mut weights = vec![0.0; outs * cols];
    dequantize(dtype, stored, &mut weights);
    let packed = panels(dtype, cols, stored);
    let exact = |x: &Activations| (0..x_rows).map(|row| x.exact(row)).collect::<Vec<_>>();
    let (exact, exact_fine) = (exact(&coarse), exact(&fine));
    let what = format!("{isa} {} [{outs}, {cols}] m {x_rows}", dtype.name());
    let wanted = |panel: usize| &weights[16 * panel * cols..(16 * (panel + 1)).min(outs) * cols];
    let out_count = |panel: usize| (outs - 16 * panel).min(16);

    for (p, panel) in packed.iter().enumerate() {
        for row in (0..x_rows).step_by(4) {
            let rows = (x_rows - row).min(4);
            let mut tile = vec![f32::NAN; 16 * rows];
            matvec(isa, dtype, cols, bytes_of(panel), fine.blocks(), row, rows, &mut tile);
            for (r, tile) in tile.chunks_exact(16).enumerate() {
                assert_row(
                    &format!("{what} vector row {r}"),
                    &tile[..out_count(p)],
                    &exact_fine[row + r],
                    wanted(p),
                );
                assert!(tile[out_count(p)..].iter().all(|&v| v == 0.0), "{what}: padded rows are zero");
            }
        }
    }

    let size = expanded_bytes(isa, dtype, cols);
    let mut expanded = vec![u32::MAX; packed.len() * size / 4];
    for (panel, out) in packed.iter().zip(bytes_mut(&mut expanded).chunks_exact_mut(size)) {
        expand(isa, dtype, cols, bytes_of(panel), out);
    }
    let (most_rows, most_panels) = tile_shape(isa, dtype);
    for row in (0..x_rows).step_by(most_rows) {
        let rows = (x_rows - row).min(most_rows);
        for p in (0..packed.len()).step_by(most_panels) {
            let panels = (packed.len() - p).min(most_panels);
            let mut out = vec![f32::NAN; 16 * rows * panels];
            let expanded = &bytes_of(&expanded)[p * size..];
            tile(isa, dtype, cols, expanded, panels, coarse.blocks(), row, rows, &mut out);
            for (i, tile) in out.chunks_exact(16).enumerate() {
                let (r, p) = (i / panels, p + i % panels);
                assert_row(
                    &format!("{what} tile row {r}"),
                    &tile[..out_count(p)],
                    &exact[row + r],
                    wanted(p),
                );
            }
        }
    }
}

fn cols_of(dtype: Dtype) -> impl Iterator<Item = usize> {
    COLS.into_iter().filter(move |cols| cols.is_multiple_of(dtype.block().0))
}

#[test]
fn products_equal_exact_weights_times_quantised_activations() {
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for (i, cols) in cols_of(dtype).enumerate() {
                for outs in [1, 15, 16, 17, 50] {
                    let stored = stored_rows(outs as u64, dtype, outs, cols, None);
                    for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33] {
                        // Every number of rows with every output count, but not with every number of columns.
                        if rows > 4 && (rows + outs) % 6 != i {
                            continue;
                        }
                        check_products(isa, dtype, (outs, cols), &stored, &noise(rows as u64, rows * cols));
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_saturates_at_the_extremes() {
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for code in [0x00, 0xff, 0x80, 0x7f] {
                let stored = stored_rows(7, dtype, 16, 256, Some(code));
                for pattern in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                    let x: Vec<f32> = (0..5 * 256).map(|i| pattern[i % 2]).collect();
                    let codes = Activations::new(isa, &x, 1, 5, 256).codes;
                    assert!(codes.iter().all(|&code| code.abs() == 127));
                    check_products(isa, dtype, (16, 256), &stored, &x);
                }
            }
        }
    }
}

#[test]
fn rows_come_back_bit_for_bit_in_the_same_number_of_bytes() {
    for dtype in QUANTISED {
        let (block, bytes) = dtype.block();
        for cols in cols_of(dtype) {
            assert_eq!(panel_bytes(dtype, cols), 16 * cols / block * bytes, "{} {cols}", dtype.name());
            let stored = stored_rows(3, dtype, 21, cols, None);
            let mut want = vec![0.0; 21 * cols];
            dequantize(dtype, &stored, &mut want);
            let packed = panels(dtype, cols, &stored);
            for (row, want) in want.chunks_exact(cols).enumerate() {
                let mut got = vec![f32::NAN; cols];
                row_f32(dtype, cols, bytes_of(&packed[row / 16]), row % 16, &mut got);
                // Compared as numbers: a zero may have either sign.
                assert_eq!(got, want, "{} {cols} row {row}", dtype.name());
            }
        }
    }
}

#[test]
fn bf16_panels_are_the_rounded_weights_in_pairs() {
    for isa in Isa::available() {
        for dtype in QUANTISED {
            for cols in cols_of(dtype) {
                let stored = stored_rows(9, dtype, 13, cols, None);
                let mut want = vec![0.0; 16 * cols];
                dequantize(dtype, &stored, &mut want[..13 * cols]);
                let packed = panels(dtype, cols, &stored);
                let mut out = vec![u16::MAX; 16 * cols];
                expand_bf16(isa, dtype, cols, bytes_of(&packed[0]), &mut out);
                for (pair, out) in out.chunks_exact(32).enumerate() {
                    for (i, &got) in out.iter().enumerate() {
                        let want = half::bf16::from_f32(want[i / 2 * cols + 2 * pair + i % 2]);
                        let got = half::bf16::from_bits(got);
                        assert_eq!(got, want, "{isa} {} {cols}: pair {pair}, {i}", dtype.name());
                    }
                }
            }
        }
    }
}

#[test]
fn activations_are_rounded_alike_everywhere() {
    let mut x = noise(5, 32 * 9);
    x[32..64].fill(0.0);
    x[64..96].fill(-3.0);
    x[96..128].iter_mut().for_each(|x| *x *= 1e-38);
    x[128..160].iter_mut().for_each(|x| *x *= 1e38);
    x[160..192].iter_mut().for_each(|x| *x *= 1e-29);
    x[200] = f32::NAN;
    x[230] = f32::NEG_INFINITY;
    for isa in Isa::available() {
        let got = Activations::new(isa, &x, FINE, 1, x.len());
        let scalar = Activations::new(Isa::SCALAR, &x, FINE, 1, x.len());
        assert_eq!(got.codes, scalar.codes, "{isa}");
        assert_eq!(got.sums, scalar.sums, "{isa}");
        let fine = got.exact(0);
        let got = Activations::new(isa, &x, 1, 1, x.len());
        for (b, (&scale, x)) in got.scales.iter().zip(x.chunks_exact(32)).enumerate() {
            let codes = &got.codes[32 * b..32 * (b + 1)];
            assert!(codes.iter().all(|&code| code != -128), "{isa} block {b}");
            let sum = |codes: &[i8]| codes.iter().map(|&c| i32::from(c)).sum::<i32>();
            assert_eq!(halves(got.sums[b]), (sum(&codes[..16]), sum(&codes[16..])), "{isa} block {b}");
            let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            if x.iter().any(|x| !x.is_finite()) {
                assert!(!scale.is_finite(), "{isa} block {b}: {scale}");
            } else if largest < 1e-30 {
                assert_eq!((scale, codes), (0.0, &[0; 32][..]), "{isa} block {b}");
            } else {
                assert_eq!(scale, largest / 127.0);
                for (&fine, &x) in fine[32 * b..].iter().zip(x) {
                    let error = (fine - f64::from(x)).abs() / f64::from(largest);
                    assert!(error <= 1.01 / 32_512.0, "{isa} block {b}: {x} {fine}");
                }
                for (&code, &x) in codes.iter().zip(x) {
                    assert!(
                        (f32::from(code) * scale - x).abs() <= 0.5001 * scale,
                        "{isa} block {b}: {x} {code}"
                    );
                }
            }
        }
    }
}

#[test]
fn packed_matrices_multiply_and_requantise() {
    for exec in execs() {
        for dtype in QUANTISED {
            let (outs, cols) = (50, 512);
            let values = noise(11, outs * cols);
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let ids: Vec<u32> = (0..outs as u32).rev().collect();
            let rows = Rows { dtype: Dtype::F32, bytes: &bytes, cols, ids: &ids };
            let packed = Packed::pack(&exec, dtype, cols, &[rows]).unwrap();
            let mut weights = vec![0.0; outs * cols];
            for (row, (weights, &id)) in weights.chunks_exact_mut(cols).zip(&ids).enumerate() {
                let (block, bytes) = dtype.block();
                let mut stored = vec![0; cols / block * bytes];
                quantize(dtype, &values[id as usize * cols..][..cols], &mut stored);
                dequantize(dtype, &stored, weights);
                let mut got = vec![0.0; cols];
                packed.row_f32(row, &mut got);
                assert_eq!(got, weights);
            }
            for m in [1, 4, 5, 33] {
                let x = noise(m as u64, m * cols);
                let mut input = Input::new();
                input.set(&exec, MatRef::dense(&x, m, cols), &[&packed]);
                let mut out = vec![f32::NAN; m * outs];
                let product = Product {
                    weight: &packed,
                    bias: None,
                    out: MatMut::dense(&mut out, m, outs),
                    store: Store::Overwrite,
                };
                matmul(&exec, &input, &mut [product]);
                // Many rows are multiplied in bf16 where the CPU has it, on both sides.
                let in_bf16 = exec.isa().level() >= IsaLevel::Avx512Bf16 && m > MATVEC_ROWS;
                let round = |v: &f32| half::bf16::from_f32(*v).to_f32();
                let parts = if m <= MATVEC_ROWS { FINE } else { 1 };
                let blocks = Activations::new(exec.isa(), &x, parts, m, cols);
                let rounded: Vec<f32> = weights.iter().map(round).collect();
                for (row, (out, x)) in out.chunks_exact(outs).zip(x.chunks_exact(cols)).enumerate() {
                    let what = format!("{} {} m {m} row {row}", exec.isa(), dtype.name());
                    if in_bf16 {
                        let x: Vec<f64> = x.iter().map(|x| f64::from(round(x))).collect();
                        assert_row(&what, out, &x, &rounded);
                    } else {
                        assert_row(&what, out, &blocks.exact(row), &weights);
                    }
                }
            }
        }
    }
}

#[test]
fn panics_name_what_is_too_short() {
    let exec = Exec::with_isa(1, Isa::SCALAR).unwrap();
    let x = Activations::new(exec.isa(), &[1.0; 64], FINE, 1, 64);
    let refused = std::panic::catch_unwind(|| {
        matvec(Isa::SCALAR, Dtype::Q8_0, 64, &[0; 100], x.blocks(), 0, 1, &mut [0.0; 16]);
    });
    assert!(refused.is_err());
    let refused = std::panic::catch_unwind(|| {
        matvec(Isa::SCALAR, Dtype::Q8_0, 64, &[0; 2048], x.blocks(), 1, 1, &mut [0.0; 16]);
    });
    assert!(refused.is_err());
}
