//! The output gate of a recurrent head: `out += 2 · gain ⊙ y ⊙ σ(z)`, forward and backward.

use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, MatRef};

/// Rows per task. Fixed, so that results do not depend on the number of threads.
const ROWS: usize = 64;

/// Adds `2 · gain[c] · y[t, c] · σ(z[t, c])` to `out[t, c]`. `y` is dense, `z` and `out` may be strided; all `[rows, gain.len()]`.
///
/// Panics when shapes do not fit.
pub fn add_gated(exec: &Exec, y: &[f32], z: MatRef<'_>, gain: &[f32], out: MatMut<'_>) {
    let width = gain.len();
    assert_eq!((z.rows(), z.cols()), (out.rows(), out.cols()), "gate: z and out");
    assert_eq!(z.cols(), width, "gate: columns");
    check_len("y", y.len(), z.rows() * width);
    let mut rows = out.into_rows();
    exec.parallel_chunks(&mut rows, ROWS, |block, rows| {
        dispatch!(exec.isa(), |s| {
            for (i, out) in rows.iter_mut().enumerate() {
                let t = block * ROWS + i;
                add_row(s, &y[t * width..(t + 1) * width], z.row(t), gain, out);
            }
        });
    });
}

#[inline(always)]
fn add_row<S: Simd>(s: S, y: &[f32], z: &[f32], gain: &[f32], out: &mut [f32]) {
    for (((out, &y), &z), &gain) in out.iter_mut().zip(y).zip(z).zip(gain) {
        *out += 2.0 * gain * y * simd::sigmoid(s, z);
    }
}

/// Gradient of [`add_gated`] from `dout`: overwrites `dy` and `dz`, adds to `dgain` when it is wanted. All dense, `[rows, gain.len()]` but `gain` and `dgain`.
///
/// Panics when a length does not fit.
pub fn add_gated_backward(
    exec: &Exec,
    [y, z, dout]: [&[f32]; 3],
    gain: &[f32],
    [dy, dz]: [&mut [f32]; 2],
    dgain: Option<&mut [f32]>,
) {
    let width = gain.len();
    assert!(width > 0, "a gate of no columns");
    check_len("y", y.len(), y.len() / width * width);
    for (name, len) in [("z", z.len()), ("dout", dout.len()), ("dy", dy.len()), ("dz", dz.len())] {
        check_len(name, len, y.len());
    }
    let wanted = dgain.is_some();
    let tasks: Vec<_> = dy.chunks_mut(ROWS * width).zip(dz.chunks_mut(ROWS * width)).collect();
    let sums = exec.parallel_map_items(tasks, |block, (dy, dz)| {
        let range = block * ROWS * width..block * ROWS * width + dy.len();
        let (y, z, dout) = (&y[range.clone()], &z[range.clone()], &dout[range]);
        let mut sums = vec![0.0f32; if wanted { width } else { 0 }];
        dispatch!(exec.isa(), |s| {
            let rows = dy.chunks_exact_mut(width).zip(dz.chunks_exact_mut(width)).enumerate();
            for (i, (dy, dz)) in rows {
                let row = i * width..(i + 1) * width;
                let (y, z, dout) = (&y[row.clone()], &z[row.clone()], &dout[row]);
                row_gradient(s, [y, z, dout, gain], [dy, dz], wanted.then_some(&mut sums[..]));
            }
        });
        sums
    });
    if let Some(dgain) = dgain {
        check_len("dgain", dgain.len(), width);
        for sums in &sums {
            dgain.iter_mut().zip(sums).for_each(|(dgain, sum)| *dgain += sum);
        }
    }
}

#[inline(always)]
fn row_gradient<S: Simd>(
    s: S,
    [y, z, dout, gain]: [&[f32]; 4],
    [dy, dz]: [&mut [f32]; 2],
    sums: Option<&mut [f32]>,
) {
    let width = gain.len();
    let (y, z, dout, dy, dz) = (&y[..width], &z[..width], &dout[..width], &mut dy[..width], &mut dz[..width]);
    for c in 0..width {
        let gate = simd::sigmoid(s, z[c]);
        let d = 2.0 * dout[c] * gate;
        dz[c] = d * gain[c] * y[c] * (1.0 - gate);
        dy[c] = d;
    }
    if let Some(sums) = sums {
        let sums = &mut sums[..width];
        for c in 0..width {
            sums[c] += dy[c] * y[c];
        }
    }
    for c in 0..width {
        dy[c] *= gain[c];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::testing::{assert_close, assert_gradient, execs, noise, numeric_gradient, to_f64};

    /// A few f32 operations and the approximation of the exponential.
    const TOLERANCE: f64 = 3e-6;
    const SHAPES: [(usize, usize); 6] = [(0, 3), (1, 1), (63, 5), (64, 64), (65, 192), (200, 7)];

    #[test]
    fn agrees_with_naive() {
        for exec in execs() {
            for (rows, width) in SHAPES {
                let n = rows * width;
                let (y, dout, gain) = (noise(1, n), noise(3, n), noise(4, width));
                let z: Vec<f32> = noise(2, n).iter().map(|z| 8.0 * z).collect();
                // Strided, with something between the rows.
                let stride = width + 3;
                let (mut wide_z, mut out) = (noise(5, rows * stride), noise(6, rows * stride));
                for (to, from) in wide_z.chunks_mut(stride).zip(z.chunks(width)) {
                    to[..width].copy_from_slice(from);
                }
                let before = out.clone();
                let gated = naive::gate::gated(&to_f64(&y), &to_f64(&z), &to_f64(&gain));
                let z_mat = MatRef::new(&wide_z, rows, width, stride);
                add_gated(&exec, &y, z_mat, &gain, MatMut::new(&mut out, rows, width, stride));
                for (t, (row, before)) in out.chunks(stride).zip(before.chunks(stride)).enumerate() {
                    let want: Vec<f64> =
                        (0..width).map(|c| f64::from(before[c]) + gated[t * width + c]).collect();
                    assert_close("out", &row[..width], &want, TOLERANCE);
                    assert_eq!(row[width..], before[width..]);
                }

                let (mut dy, mut dz, mut dgain) = (vec![f32::NAN; n], vec![f32::NAN; n], vec![1.0; width]);
                add_gated_backward(&exec, [&y, &z, &dout], &gain, [&mut dy, &mut dz], Some(&mut dgain));
                let [want_dy, want_dz, mut want_dgain] =
                    naive::gate::backward(&to_f64(&y), &to_f64(&z), &to_f64(&gain), &to_f64(&dout));
                want_dgain.iter_mut().for_each(|d| *d += 1.0);
                assert_close("dy", &dy, &want_dy, TOLERANCE);
                assert_close("dz", &dz, &want_dz, TOLERANCE);
                assert_close("dgain", &dgain, &want_dgain, 1e-5);
                let (mut again_dy, mut again_dz) = (vec![f32::NAN; n], vec![f32::NAN; n]);
                add_gated_backward(&exec, [&y, &z, &dout], &gain, [&mut again_dy, &mut again_dz], None);
                assert!(again_dy == dy && again_dz == dz);
            }
        }
    }

    #[test]
    fn the_naive_gradient_is_the_forward_pass_derived() {
        let (y, z, gain, dout) =
            (to_f64(&noise(1, 15)), to_f64(&noise(2, 15)), to_f64(&noise(3, 5)), to_f64(&noise(4, 15)));
        let [dy, dz, dgain] = naive::gate::backward(&y, &z, &gain, &dout);
        let loss = |y: &[f64], z: &[f64], gain: &[f64]| -> f64 {
            naive::gate::gated(y, z, gain).iter().zip(&dout).map(|(a, b)| a * b).sum()
        };
        assert_gradient("dy", &dy, &numeric_gradient(&y, |y| loss(y, &z, &gain)));
        assert_gradient("dz", &dz, &numeric_gradient(&z, |z| loss(&y, z, &gain)));
        assert_gradient("dgain", &dgain, &numeric_gradient(&gain, |gain| loss(&y, &z, gain)));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let isa = crate::Isa::available()[0];
        let (y, z, dout, gain) = (noise(1, 200 * 9), noise(2, 200 * 9), noise(3, 200 * 9), noise(4, 9));
        let run = |threads| {
            let exec = Exec::with_isa(threads, isa).expect("an instruction set of this CPU");
            let (mut dy, mut dz, mut dgain) = (vec![0.0; 1800], vec![0.0; 1800], vec![0.0; 9]);
            add_gated_backward(&exec, [&y, &z, &dout], &gain, [&mut dy, &mut dz], Some(&mut dgain));
            (dy, dz, dgain)
        };
        assert!(run(1) == run(3));
    }
}
