//! Short causal depthwise convolution in f64.

/// Output `[seq, channels]` and the tail after the last row, from inputs as in [`crate::conv::short_conv`].
pub fn short_conv(
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
    channels: usize,
    tail: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let d_conv = weight.len() / channels;
    let seq = x.len() / channels;
    let padded = [tail, x].concat();
    let mut out = vec![0.0; seq * channels];
    for t in 0..seq {
        for c in 0..channels {
            let taps: f64 =
                (0..d_conv).map(|i| weight[c * d_conv + i] * padded[(t + i) * channels + c]).sum();
            out[t * channels + c] = taps + bias.map_or(0.0, |bias| bias[c]);
        }
    }
    (out, padded[seq * channels..].to_vec())
}

/// Gradients `(dx, dweight, dbias)` of [`short_conv`] started from a zero tail.
pub fn short_conv_backward(
    x: &[f64],
    weight: &[f64],
    channels: usize,
    dout: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let d_conv = weight.len() / channels;
    let seq = x.len() / channels;
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; channels]);
    for t in 0..seq {
        for c in 0..channels {
            let grad = dout[t * channels + c];
            dbias[c] += grad;
            for i in 0..d_conv {
                if let Some(source) = (t + i).checked_sub(d_conv - 1) {
                    dx[source * channels + c] += grad * weight[c * d_conv + i];
                    dweight[c * d_conv + i] += grad * x[source * channels + c];
                }
            }
        }
    }
    (dx, dweight, dbias)
}
