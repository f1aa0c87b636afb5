//! Short causal depthwise convolution with a carried tail.

use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{Simd, axpy, dot};
use crate::{Exec, MatRef};

/// Rows per task. Fixed, so that results do not depend on the number of threads.
const ROWS: usize = 128;

/// `out[t, c] = Σ_{i<d_conv} weight[c, i] · x[t − (d_conv−1) + i, c] (+ bias[c])`. `x`: `[seq, channels]`, `out` the same, dense; `weight`:
/// `[channels, d_conv]` (the last tap is the current token). Rows before the first come from `tail`
/// `[(d_conv−1), channels]` (oldest first), which is replaced by the last rows seen.
///
/// Panics when a length does not fit.
pub fn short_conv(
    exec: &Exec,
    x: MatRef<'_>,
    weight: &[f32],
    bias: Option<&[f32]>,
    tail: &mut [f32],
    out: &mut [f32],
) {
    convolve(exec, x, weight, (bias, None), tail, out);
}

/// [`short_conv`] without bias, each `head_dim` channels of its output then normalised as by [`l2_norm`](crate::elementwise::l2_norm).
pub fn short_conv_unit(
    exec: &Exec,
    x: MatRef<'_>,
    weight: &[f32],
    (head_dim, eps): (usize, f32),
    tail: &mut [f32],
    out: &mut [f32],
) {
    let whole = head_dim > 0 && x.cols().is_multiple_of(head_dim);
    assert!(whole, "{} channels in heads of {head_dim}", x.cols());
    convolve(exec, x, weight, (None, Some((head_dim, eps))), tail, out);
}

fn convolve(
    exec: &Exec,
    x: MatRef<'_>,
    weight: &[f32],
    (bias, unit): (Option<&[f32]>, Option<(usize, f32)>),
    tail: &mut [f32],
    out: &mut [f32],
) {
    let (seq, channels) = (x.rows(), x.cols());
    let d_conv = taps(weight, channels);
    let before = d_conv - 1;
    check_len("out", out.len(), seq * channels);
    check_len("tail", tail.len(), before * channels);
    if let Some(bias) = bias {
        check_len("bias", bias.len(), channels);
    }
    let weight = transposed(weight, channels, d_conv);
    let rows_before: &[f32] = tail;
    exec.parallel_chunks(out, ROWS * channels, |block, out| {
        dispatch!(exec.isa(), |s| {
            for (row, out) in out.chunks_exact_mut(channels).enumerate() {
                match bias {
                    Some(bias) => out.copy_from_slice(bias),
                    None => out.fill(0.0),
                }
                for (i, weight) in weight.chunks_exact(channels).enumerate() {
                    // Row of the tail followed by x.
                    let source = block * ROWS + row + i;
                    let source = match source.checked_sub(before) {
                        Some(t) => x.row(t),
                        None => &rows_before[source * channels..(source + 1) * channels],
                    };
                    add_product(s, weight, source, out);
                }
                if let Some((head_dim, eps)) = unit {
                    for head in out.chunks_exact_mut(head_dim) {
                        let inverse = 1.0 / (dot(s, head, head) + eps).sqrt();
                        head.iter_mut().for_each(|x| *x *= inverse);
                    }
                }
            }
        });
    });
    let kept = before.saturating_sub(seq);
    tail.copy_within((before - kept) * channels.., 0);
    for (row, tail) in tail.chunks_exact_mut(channels).enumerate().skip(kept) {
        tail.copy_from_slice(x.row(row + seq - before));
    }
}

/// `weight` `[channels, d_conv]` as [`short_conv_step`] reads it, `[d_conv, channels]`.
pub fn short_conv_taps(weight: &[f32], channels: usize) -> Vec<f32> {
    transposed(weight, channels, weight.len().checked_div(channels).unwrap_or(0))
}

/// [`short_conv`] without bias of one token, `taps` from [`short_conv_taps`]; on the calling thread, allocates nothing. Panics when a length does not
/// fit.
pub fn short_conv_step(exec: &Exec, x: &[f32], taps: &[f32], tail: &mut [f32], out: &mut [f32]) {
    let channels = x.len();
    check_len("out", out.len(), channels);
    check_len("taps", taps.len(), tail.len() + channels);
    dispatch!(exec.isa(), |s| {
        let (before, current) = taps.split_at(tail.len());
        for ((out, x), tap) in out.iter_mut().zip(x).zip(current) {
            *out = x * tap;
        }
        for (tap, row) in before.chunks_exact(channels.max(1)).zip(tail.chunks_exact(channels.max(1))) {
            add_product(s, tap, row, out);
        }
    });
    if !tail.is_empty() {
        tail.copy_within(channels.., 0);
        let last = tail.len() - channels;
        tail[last..].copy_from_slice(x);
    }
}

/// Gradient of [`short_conv`] started from a zero tail; adds to `dx`, `dweight`, `dbias`.
///
/// Panics when a length does not fit.
pub fn short_conv_backward(
    exec: &Exec,
    x: &[f32],
    weight: &[f32],
    channels: usize,
    dout: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let d_conv = taps(weight, channels);
    check_len("x", x.len(), x.len() / channels * channels);
    check_len("dout", dout.len(), x.len());
    check_len("dx", dx.len(), x.len());
    check_len("dweight", dweight.len(), weight.len());
    let seq = x.len() / channels;
    let weight = transposed(weight, channels, d_conv);
    exec.parallel_chunks(dx, ROWS * channels, |block, dx| {
        dispatch!(exec.isa(), |s| {
            for (row, dx) in dx.chunks_exact_mut(channels).enumerate() {
                for (i, weight) in weight.chunks_exact(channels).enumerate() {
                    let t = block * ROWS + row + d_conv - 1 - i;
                    if t < seq {
                        add_product(s, weight, &dout[t * channels..(t + 1) * channels], dx);
                    }
                }
            }
        });
    });
    // Per block `[d_conv, channels]` for the weight, then, where it is wanted, `[channels]` for the bias; summed in order.
    let with_bias = dbias.is_some();
    let partial_sums = exec.parallel_map(seq.div_ceil(ROWS), |block| {
        let mut sums = vec![0.0f32; (d_conv + usize::from(with_bias)) * channels];
        dispatch!(exec.isa(), |s| {
            let (weight_sums, bias_sums) = sums.split_at_mut(d_conv * channels);
            for t in block * ROWS..seq.min((block + 1) * ROWS) {
                let dout = &dout[t * channels..(t + 1) * channels];
                for (i, sums) in weight_sums.chunks_exact_mut(channels).enumerate() {
                    if let Some(source) = (t + i).checked_sub(d_conv - 1) {
                        add_product(s, dout, &x[source * channels..(source + 1) * channels], sums);
                    }
                }
                if with_bias {
                    axpy(s, 1.0, dout, bias_sums);
                }
            }
        });
        sums
    });
    for sums in &partial_sums {
        for (c, dweight) in dweight.chunks_exact_mut(d_conv).enumerate() {
            for (i, dweight) in dweight.iter_mut().enumerate() {
                *dweight += sums[i * channels + c];
            }
        }
    }
    if let Some(dbias) = dbias {
        check_len("dbias", dbias.len(), channels);
        for sums in &partial_sums {
            for (dbias, sum) in dbias.iter_mut().zip(&sums[d_conv * channels..]) {
                *dbias += sum;
            }
        }
    }
}

/// `d_conv`, after checking that the shapes fit.
fn taps(weight: &[f32], channels: usize) -> usize {
    assert!(channels > 0, "a convolution over 0 channels");
    let d_conv = weight.len() / channels;
    assert!(d_conv > 0, "a convolution with 0 taps");
    check_len("weight", weight.len(), channels * d_conv);
    d_conv
}

/// `[channels, d_conv]` to `[d_conv, channels]`, so that channels are the vector dimension.
fn transposed(weight: &[f32], channels: usize, d_conv: usize) -> Vec<f32> {
    let mut out = vec![0.0; weight.len()];
    for c in 0..channels {
        for i in 0..d_conv {
            out[i * channels + c] = weight[c * d_conv + i];
        }
    }
    out
}

/// `out += a ⊙ b`.
#[inline(always)]
fn add_product<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!(a.len(), out.len());
    assert_eq!(b.len(), out.len());
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *out = s.fma(a, b, *out);
    }
}

#[cfg(test)]
mod tests;
