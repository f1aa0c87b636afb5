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
