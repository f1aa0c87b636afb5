//! The output gate of a recurrent head, forward and backward: `r = 2 · gain ⊙ y ⊙ σ(z)`, added to what is there, or blended with it.

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

/// `out[t, c] = keep[t, h] · out[t, c] + (1 − keep[t, h]) · r[t, c]` with `r` of [`add_gated`] and head `h` of column `c`. `keep` is
/// `[rows, heads]`; the columns are the heads', as many each.
///
/// Panics when shapes do not fit.
pub fn blend_gated(exec: &Exec, y: &[f32], z: MatRef<'_>, gain: &[f32], keep: &[f32], out: MatMut<'_>) {
    let (width, count) = (gain.len(), z.rows());
    assert_eq!((count, z.cols()), (out.rows(), out.cols()), "gate: z and out");
    assert_eq!(z.cols(), width, "gate: columns");
    check_len("y", y.len(), count * width);
    let Some(heads) = keep.len().checked_div(count) else { return };
    let head_dim = head_width(width, keep.len(), count);
    let mut rows = out.into_rows();
    exec.parallel_chunks(&mut rows, ROWS, |block, rows| {
        dispatch!(exec.isa(), |s| {
            for (i, out) in rows.iter_mut().enumerate() {
                let t = block * ROWS + i;
                let (y, keep) = (&y[t * width..(t + 1) * width], &keep[t * heads..(t + 1) * heads]);
                blend_row(s, [y, z.row(t), gain, keep], head_dim, out);
            }
        });
    });
}

#[inline(always)]
fn blend_row<S: Simd>(s: S, [y, z, gain, keep]: [&[f32]; 4], head_dim: usize, out: &mut [f32]) {
    for (h, (&keep, out)) in keep.iter().zip(out.chunks_exact_mut(head_dim)).enumerate() {
        let head = h * head_dim..(h + 1) * head_dim;
        let (y, z, gain) = (&y[head.clone()], &z[head.clone()], &gain[head]);
        let rest = 2.0 * (1.0 - keep);
        for (((out, &y), &z), &gain) in out.iter_mut().zip(y).zip(z).zip(gain) {
            *out = keep * *out + rest * gain * y * simd::sigmoid(s, z);
        }
    }
}

/// Columns of a head, where `width` columns are those of `keep / rows` heads.
fn head_width(width: usize, keep: usize, rows: usize) -> usize {
    let heads = keep.checked_div(rows).unwrap_or(0);
    assert!(
        heads > 0 && keep == heads * rows && width.is_multiple_of(heads),
        "gate: {keep} shares for {rows} rows of {width}"
    );
    width / heads
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
                row_gradient(s, [y, z, dout, gain], 1.0, [dy, dz], wanted.then_some(&mut sums[..]));
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

/// Gradient of [`blend_gated`] from `dout`: overwrites `dy`, `dz`, the gradient `dkept` of what was there before (`kept`, not the blend) and
/// `dkeep` `[rows, heads]`, adds to `dgain` when it is wanted. All dense, `[rows, gain.len()]` but `gain`, `dgain`, `keep` and `dkeep`.
///
/// Panics when a length does not fit.
pub fn blend_gated_backward(
    exec: &Exec,
    [y, z, dout, kept]: [&[f32]; 4],
    gain: &[f32],
    keep: &[f32],
    [dy, dz, dkept]: [&mut [f32]; 3],
    dkeep: &mut [f32],
    dgain: Option<&mut [f32]>,
) {
    let width = gain.len();
    assert!(width > 0, "a gate of no columns");
    let rows = y.len() / width;
    check_len("y", y.len(), rows * width);
    let lens = [z.len(), dout.len(), kept.len(), dy.len(), dz.len(), dkept.len()];
    for (name, len) in ["z", "dout", "kept", "dy", "dz", "dkept"].into_iter().zip(lens) {
        check_len(name, len, y.len());
    }
    check_len("dkeep", dkeep.len(), keep.len());
    if rows == 0 {
        return;
    }
    let head_dim = head_width(width, keep.len(), rows);
    let heads = width / head_dim;
    let wanted = dgain.is_some();
    let step = ROWS * width;
    let outputs = dy.chunks_mut(step).zip(dz.chunks_mut(step)).zip(dkept.chunks_mut(step));
    let tasks: Vec<_> = outputs.zip(dkeep.chunks_mut(ROWS * heads)).collect();
    let sums = exec.parallel_map_items(tasks, |block, (((dy, dz), dkept), dkeep)| {
        let mut sums = vec![0.0f32; if wanted { width } else { 0 }];
        dispatch!(exec.isa(), |s| {
            for (i, dkeep) in dkeep.iter_mut().enumerate() {
                let (first, h) = (block * ROWS * heads, i % heads);
                let (here, there) =
                    (i * head_dim..(i + 1) * head_dim, (first + i) * head_dim..(first + i + 1) * head_dim);
                let channels = h * head_dim..(h + 1) * head_dim;
                let (y, z, dout) = (&y[there.clone()], &z[there.clone()], &dout[there.clone()]);
                let (keep, sums) = (keep[first + i], wanted.then(|| &mut sums[channels.clone()]));
                let (dy, dz) = (&mut dy[here.clone()], &mut dz[here.clone()]);
                let with_r = row_gradient(s, [y, z, dout, &gain[channels]], 1.0 - keep, [dy, dz], sums);
                *dkeep = simd::dot(s, dout, &kept[there]) - with_r;
                dkept[here].iter_mut().zip(dout).for_each(|(to, dout)| *to = keep * dout);
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

/// Gradients of `share · r`; returns `Σ dout · r`.
#[inline(always)]
fn row_gradient<S: Simd>(
    s: S,
    [y, z, dout, gain]: [&[f32]; 4],
    share: f32,
    [dy, dz]: [&mut [f32]; 2],
    sums: Option<&mut [f32]>,
) -> f32 {
    let width = gain.len();
    let (y, z, dout, dy, dz) = (&y[..width], &z[..width], &dout[..width], &mut dy[..width], &mut dz[..width]);
    for c in 0..width {
        let gate = simd::sigmoid(s, z[c]);
        let d = 2.0 * dout[c] * gate;
        dz[c] = share * d * gain[c] * y[c] * (1.0 - gate);
        dy[c] = d;
    }
    if let Some(sums) = sums {
        let sums = &mut sums[..width];
        for c in 0..width {
            sums[c] += share * dy[c] * y[c];
        }
    }
    for c in 0..width {
        dy[c] *= gain[c];
    }
    let with_r = simd::dot(s, dy, y);
    dy.iter_mut().for_each(|dy| *dy *= share);
    with_r
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
    fn blends_agree_with_naive() {
        for exec in execs() {
            for (rows, heads, head_dim) in [(1, 1, 1), (63, 1, 5), (65, 3, 64), (130, 2, 17), (0, 3, 4)] {
                let width = heads * head_dim;
                let n = rows * width;
                let [y, dout, kept] = [1, 3, 7].map(|seed| noise(seed, n));
                let gain = noise(4, width);
                let z: Vec<f32> = noise(2, n).iter().map(|z| 8.0 * z).collect();
                // All of both ends, and between.
                let keep: Vec<f32> =
                    noise(5, rows * heads).iter().map(|x| (0.5 + 0.75 * x).clamp(0.0, 1.0)).collect();
                let stride = width + 3;
                let (mut wide_z, mut out) = (noise(5, rows * stride), noise(6, rows * stride));
                for t in 0..rows {
                    wide_z[t * stride..][..width].copy_from_slice(&z[t * width..][..width]);
                    out[t * stride..][..width].copy_from_slice(&kept[t * width..][..width]);
                }
                let before = out.clone();
                let z_mat = MatRef::new(&wide_z, rows, width, stride);
                blend_gated(&exec, &y, z_mat, &gain, &keep, MatMut::new(&mut out, rows, width, stride));
                let wide = [&y, &z, &gain, &keep, &kept].map(|x| to_f64(x));
                let [y64, z64, gain64, keep64, kept64] = wide.each_ref().map(Vec::as_slice);
                if rows > 0 {
                    let want = naive::gate::blended(y64, z64, gain64, keep64, kept64);
                    for (t, (row, before)) in out.chunks(stride).zip(before.chunks(stride)).enumerate() {
                        assert_close("out", &row[..width], &want[t * width..(t + 1) * width], TOLERANCE);
                        assert_eq!(row[width..], before[width..]);
                    }
                }

                let [mut dy, mut dz, mut dkept] = [(); 3].map(|()| vec![f32::NAN; n]);
                let (mut dkeep, mut dgain) = (vec![f32::NAN; keep.len()], vec![1.0; width]);
                let inputs = [&y[..], &z, &dout, &kept];
                let outputs = [&mut dy[..], &mut dz, &mut dkept];
                blend_gated_backward(&exec, inputs, &gain, &keep, outputs, &mut dkeep, Some(&mut dgain));
                if rows == 0 {
                    continue;
                }
                let wide = [y64, z64, gain64, keep64, kept64];
                let [want_dy, want_dz, mut want_dgain, want_dkept, want_dkeep] =
                    naive::gate::blended_backward(wide, &to_f64(&dout));
                want_dgain.iter_mut().for_each(|d| *d += 1.0);
                assert_close("dy", &dy, &want_dy, TOLERANCE);
                assert_close("dz", &dz, &want_dz, TOLERANCE);
                assert_close("dkept", &dkept, &want_dkept, TOLERANCE);
                assert_close("dkeep", &dkeep, &want_dkeep, 1e-5);
                assert_close("dgain", &dgain, &want_dgain, 1e-5);
                let [mut again_dy, mut again_dz, mut again_dkept] = [(); 3].map(|()| vec![f32::NAN; n]);
                let outputs = [&mut again_dy[..], &mut again_dz, &mut again_dkept];
                blend_gated_backward(&exec, inputs, &gain, &keep, outputs, &mut dkeep, None);
                assert!(again_dy == dy && again_dz == dz && again_dkept == dkept);
            }
        }
    }

    #[test]
    fn the_naive_gradient_of_a_blend_is_the_forward_pass_derived() {
        let [y, z, kept, dout] = [1, 2, 6, 4].map(|seed| to_f64(&noise(seed, 18)));
        let (gain, keep) = (to_f64(&noise(3, 6)), to_f64(&noise(5, 9)));
        let [dy, dz, dgain, dkept, dkeep] =
            naive::gate::blended_backward([&y, &z, &gain, &keep, &kept], &dout);
        let loss = |y: &[f64], z: &[f64], gain: &[f64], keep: &[f64], kept: &[f64]| -> f64 {
            naive::gate::blended(y, z, gain, keep, kept).iter().zip(&dout).map(|(a, b)| a * b).sum()
        };
        assert_gradient("dy", &dy, &numeric_gradient(&y, |y| loss(y, &z, &gain, &keep, &kept)));
        assert_gradient("dz", &dz, &numeric_gradient(&z, |z| loss(&y, z, &gain, &keep, &kept)));
        assert_gradient("dgain", &dgain, &numeric_gradient(&gain, |gain| loss(&y, &z, gain, &keep, &kept)));
        assert_gradient("dkeep", &dkeep, &numeric_gradient(&keep, |keep| loss(&y, &z, &gain, keep, &kept)));
        assert_gradient("dkept", &dkept, &numeric_gradient(&kept, |kept| loss(&y, &z, &gain, &keep, kept)));
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
