use proptest::prelude::*;

use super::*;
use crate::chunk::testing::{LENGTHS, assert_close, assert_gradient, execs, inner, random, rng, wide};
use crate::elementwise::l2_norm;
use crate::naive;
use crate::testing::noise;

/// A few f32 roundings per tap; the weight gradient sums 500 of them.
const TOLERANCE: f64 = 3e-6;

struct Case {
    channels: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    tail: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    fn mat(&self) -> MatRef<'_> {
        MatRef::dense(&self.x, self.x.len() / self.channels, self.channels)
    }
}

fn case(seq: usize, channels: usize, d_conv: usize) -> Case {
    let mut rng = rng((seq * 1000 + channels * 10 + d_conv) as u64);
    let mut random = |n| random(&mut rng, n, -1.0, 1.0);
    Case {
        channels,
        x: random(seq * channels),
        weight: random(channels * d_conv),
        bias: random(channels),
        tail: random((d_conv - 1) * channels),
        dout: random(seq * channels),
    }
}

#[test]
fn agrees_with_naive() {
    for exec in execs() {
        for seq in LENGTHS {
            for d_conv in [1, 2, 4] {
                for channels in [1, 5, 64] {
                    let case = case(seq, channels, d_conv);
                    for bias in [None, Some(&case.bias[..])] {
                        let wide_bias = bias.map(wide);
                        let (expected, expected_tail) = naive::conv::short_conv(
                            &wide(&case.x),
                            &wide(&case.weight),
                            wide_bias.as_deref(),
                            channels,
                            &wide(&case.tail),
                        );
                        let mut tail = case.tail.clone();
                        let mut out = vec![f32::NAN; seq * channels];
                        short_conv(&exec, case.mat(), &case.weight, bias, &mut tail, &mut out);
                        assert_close("out", &out, &expected, TOLERANCE);
                        assert_eq!(wide(&tail), expected_tail);
                    }
                }
            }
        }
    }
}

#[test]
fn gradient_agrees_with_naive() {
    for exec in execs() {
        for seq in LENGTHS {
            for d_conv in [1, 2, 4] {
                let case = case(seq, 5, d_conv);
                let (dx, dweight, dbias) = naive::conv::short_conv_backward(
                    &wide(&case.x),
                    &wide(&case.weight),
                    5,
                    &wide(&case.dout),
                );
                // Gradients are added to what is there.
                let plus_one = |grad: &[f64]| grad.iter().map(|grad| grad + 1.0).collect::<Vec<_>>();
                let mut found = [vec![1.0; seq * 5], vec![1.0; 5 * d_conv], vec![1.0; 5]];
                let [x, weight, bias] = &mut found;
                short_conv_backward(&exec, &case.x, &case.weight, 5, &case.dout, x, weight, Some(bias));
                assert_close("dx", x, &plus_one(&dx), TOLERANCE);
                assert_close("dweight", weight, &plus_one(&dweight), TOLERANCE);
                assert_close("dbias", bias, &plus_one(&dbias), TOLERANCE);
                let (mut x, mut weight) = (vec![0.0; seq * 5], vec![0.0; 5 * d_conv]);
                short_conv_backward(&exec, &case.x, &case.weight, 5, &case.dout, &mut x, &mut weight, None);
                assert_close("dx", &x, &dx, TOLERANCE);
            }
        }
    }
}

#[test]
fn naive_gradient_is_the_derivative() {
    for d_conv in [1, 2, 4] {
        let case = case(6, 2, d_conv);
        let dout = wide(&case.dout);
        let data = [wide(&case.x), wide(&case.weight), wide(&case.bias)];
        let loss = |data: &[Vec<f64>; 3]| {
            let tail = vec![0.0; (d_conv - 1) * 2];
            inner(&naive::conv::short_conv(&data[0], &data[1], Some(&data[2]), 2, &tail).0, &dout)
        };
        let (dx, dweight, dbias) = naive::conv::short_conv_backward(&data[0], &data[1], 2, &dout);
        for (i, grad) in [dx, dweight, dbias].iter().enumerate() {
            assert_gradient("conv", &data, |data| &mut data[i], loss, grad);
        }
    }
}

#[test]
fn strided_input_and_unit_heads_change_no_bit() {
    for exec in execs() {
        for seq in LENGTHS {
            for (head_dim, heads) in [(1, 3), (16, 2), (64, 3)] {
                let (channels, stride) = (head_dim * heads, head_dim * heads + 5);
                let case = case(seq, channels, 4);
                let mut spread = noise(9, seq * stride);
                for (to, from) in spread.chunks_mut(stride).zip(case.x.chunks(channels)) {
                    to[..channels].copy_from_slice(from);
                }
                let (mut tail, mut spread_tail) = (case.tail.clone(), case.tail.clone());
                let (mut conv, mut expected) = (vec![f32::NAN; case.x.len()], vec![f32::NAN; case.x.len()]);
                short_conv(&exec, case.mat(), &case.weight, None, &mut tail, &mut conv);
                l2_norm(&exec, &conv, head_dim, 1e-6, &mut expected);
                let x = MatRef::new(&spread, seq, channels, stride);
                let mut out = vec![f32::NAN; case.x.len()];
                short_conv_unit(&exec, x, &case.weight, (head_dim, 1e-6), &mut spread_tail, &mut out);
                assert!(out == expected && tail == spread_tail, "{} {seq} {channels}", exec.isa());
            }
        }
    }
}

proptest! {
    /// Any split into two calls carries the tail, however short the parts.
    #[test]
    fn split_calls_agree(seq in 0usize..12, cut in 0usize..12, d_conv in 1usize..6, channels in 1usize..20) {
        let cut = cut.min(seq);
        let case = case(seq, channels, d_conv);
        for exec in execs() {
            let run = |parts: &[&[f32]]| {
                let (mut tail, mut all) = (case.tail.clone(), Vec::new());
                for x in parts {
                    let mut out = vec![f32::NAN; x.len()];
                    let x = MatRef::dense(x, x.len() / case.channels, case.channels);
                    short_conv(&exec, x, &case.weight, Some(&case.bias), &mut tail, &mut out);
                    all.extend(out);
                }
                (all, tail)
            };
            let (first, second) = case.x.split_at(cut * channels);
            prop_assert_eq!(run(&[&case.x]), run(&[first, second]));
        }
    }
}

#[test]
fn steps_are_the_convolution() {
    for exec in execs() {
        for (channels, d_conv, seq) in [(1, 1, 5), (3, 4, 9), (64, 4, 7), (192, 2, 3)] {
            let (x, weight) = (noise(1, seq * channels), noise(2, channels * d_conv));
            let mut tail = noise(3, (d_conv - 1) * channels);
            let (mut step_tail, mut expected) = (tail.clone(), vec![f32::NAN; x.len()]);
            let rows = MatRef::dense(&x, x.len() / channels, channels);
            short_conv(&exec, rows, &weight, None, &mut tail, &mut expected);
            let taps = short_conv_taps(&weight, channels);
            for (x, expected) in x.chunks(channels).zip(expected.chunks(channels)) {
                let mut out = vec![f32::NAN; channels];
                short_conv_step(&exec, x, &taps, &mut step_tail, &mut out);
                for (found, expected) in out.iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-6, "{}: {found} {expected}", exec.isa());
                }
            }
            assert_eq!(step_tail, tail);
        }
    }
}
