//! Naive f64 references of the row-wise and element-wise operations. Backward functions return the gradient.

/// `x / sqrt(mean(x²) + eps) · weight`, row by row.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let dim = weight.len();
    let row = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
        x.iter().zip(weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
    };
    x.chunks(dim.max(1)).flat_map(row).collect()
}

/// Gradients of [`rms_norm`] for `x` and `weight`.
pub fn rms_norm_backward(x: &[f64], weight: &[f64], eps: f64, dout: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let dim = weight.len();
    let (mut dx, mut dw) = (Vec::new(), vec![0.0; dim]);
    for (x, dout) in x.chunks(dim.max(1)).zip(dout.chunks(dim.max(1))) {
        let root = (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + eps).sqrt();
        let mean = (0..dim).map(|i| dout[i] * weight[i] * x[i]).sum::<f64>() / dim as f64;
        for i in 0..dim {
            dx.push(dout[i] * weight[i] / root - x[i] * mean / root.powi(3));
            dw[i] += dout[i] * x[i] / root;
        }
    }
    (dx, dw)
}

/// `x / sqrt(Σx² + eps)` over rows of `dim` values.
pub fn l2_norm(x: &[f64], dim: usize, eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        let root = (x.iter().map(|x| x * x).sum::<f64>() + eps).sqrt();
        x.iter().map(|x| x / root).collect()
    };
    x.chunks(dim.max(1)).flat_map(row).collect()
}

/// Gradient of [`l2_norm`].
pub fn l2_norm_backward(x: &[f64], dim: usize, eps: f64, dout: &[f64]) -> Vec<f64> {
    let mut dx = Vec::new();
    for (x, dout) in x.chunks(dim.max(1)).zip(dout.chunks(dim.max(1))) {
        let root = (x.iter().map(|x| x * x).sum::<f64>() + eps).sqrt();
        let along: f64 = x.iter().zip(dout).map(|(x, d)| x * d).sum();
        dx.extend(x.iter().zip(dout).map(|(x, d)| d / root - x * along / root.powi(3)));
    }
    dx
}

/// Numerically stable logistic function.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// Numerically stable `ln(1 + e^x)`.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `silu(gate) · up`.
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(&g, u)| g * sigmoid(g) * u).collect()
}

/// Gradients of [`swiglu`] for `gate` and `up`.
pub fn swiglu_backward(gate: &[f64], up: &[f64], dout: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let one = |i: usize| {
        let (g, s) = (gate[i], sigmoid(gate[i]));
        (dout[i] * up[i] * (s + g * s * (1.0 - s)), dout[i] * g * s)
    };
    (0..gate.len()).map(one).unzip()
}
