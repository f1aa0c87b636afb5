//! The output gate of a recurrent head in f64.

/// `2 · gain ⊙ y ⊙ σ(z)`; `y`, `z` `[rows, gain.len()]`.
pub fn gated(y: &[f64], z: &[f64], gain: &[f64]) -> Vec<f64> {
    (0..y.len()).map(|i| 2.0 * gain[i % gain.len()] * y[i] * sigmoid(z[i])).collect()
}

/// `[dy, dz, dgain]` from the gradient of [`gated`].
pub fn backward(y: &[f64], z: &[f64], gain: &[f64], dout: &[f64]) -> [Vec<f64>; 3] {
    let (mut dy, mut dz, mut dgain) = (vec![0.0; y.len()], vec![0.0; y.len()], vec![0.0; gain.len()]);
    for i in 0..y.len() {
        let (c, gate) = (i % gain.len(), sigmoid(z[i]));
        dy[i] = 2.0 * dout[i] * gain[c] * gate;
        dz[i] = 2.0 * dout[i] * gain[c] * y[i] * gate * (1.0 - gate);
        dgain[c] += 2.0 * dout[i] * y[i] * gate;
    }
    [dy, dz, dgain]
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `keep · kept + (1 − keep) · r` with `r` of [`gated`]; `keep` `[rows, heads]`, `kept` `[rows, gain.len()]`.
pub fn blended(y: &[f64], z: &[f64], gain: &[f64], keep: &[f64], kept: &[f64]) -> Vec<f64> {
    let head_dim = y.len() / keep.len();
    let blend = |(i, r): (usize, f64)| {
        let keep = keep[i / head_dim];
        keep * kept[i] + (1.0 - keep) * r
    };
    gated(y, z, gain).into_iter().enumerate().map(blend).collect()
}

/// `[dy, dz, dgain, dkept, dkeep]` from the gradient of [`blended`].
pub fn blended_backward([y, z, gain, keep, kept]: [&[f64]; 5], dout: &[f64]) -> [Vec<f64>; 5] {
    let head_dim = y.len() / keep.len();
    let rest: Vec<f64> = dout.iter().enumerate().map(|(i, d)| d * (1.0 - keep[i / head_dim])).collect();
    let [dy, dz, dgain] = backward(y, z, gain, &rest);
    let dkept = dout.iter().enumerate().map(|(i, d)| d * keep[i / head_dim]).collect();
    let mut dkeep = vec![0.0; keep.len()];
    for (i, r) in gated(y, z, gain).into_iter().enumerate() {
        dkeep[i / head_dim] += dout[i] * (kept[i] - r);
    }
    [dy, dz, dgain, dkept, dkeep]
}
