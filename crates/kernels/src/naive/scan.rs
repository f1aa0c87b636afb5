//! Mamba-1's selective scan in f64, token by token, and its gradient by back-propagation through time.

use crate::scan::ScanShape;

/// Inputs as in [`crate::scan::ScanInputs`], in f64.
#[derive(Clone, Debug)]
pub struct ScanData {
    /// `[seq, d_inner]`.
    pub u: Vec<f64>,
    /// `[seq, d_inner]`.
    pub delta: Vec<f64>,
    /// `[d_inner, d_state]`.
    pub a: Vec<f64>,
    /// `[seq, d_state]`.
    pub b: Vec<f64>,
    /// `[seq, d_state]`.
    pub c: Vec<f64>,
    /// `[d_inner]`.
    pub d: Vec<f64>,
    /// Initial state `[d_inner, d_state]`.
    pub state: Vec<f64>,
}

impl ScanData {
    /// The inputs in a fixed order, for code that treats them alike.
    pub fn parts_mut(&mut self) -> [&mut Vec<f64>; 7] {
        [&mut self.u, &mut self.delta, &mut self.a, &mut self.b, &mut self.c, &mut self.d, &mut self.state]
    }
}

/// Output `[seq, d_inner]` and the states after `0..=seq` tokens.
fn states(shape: ScanShape, data: &ScanData) -> (Vec<f64>, Vec<Vec<f64>>) {
    let ScanShape { seq, d_inner, d_state } = shape;
    let mut y = vec![0.0; seq * d_inner];
    let mut states = vec![data.state.clone()];
    for t in 0..seq {
        let mut state = states[t].clone();
        for i in 0..d_inner {
            let (u, delta) = (data.u[t * d_inner + i], data.delta[t * d_inner + i]);
            let mut sum = data.d[i] * u;
            for n in 0..d_state {
                let entry = &mut state[i * d_state + n];
                *entry =
                    (delta * data.a[i * d_state + n]).exp() * *entry + delta * data.b[t * d_state + n] * u;
                sum += *entry * data.c[t * d_state + n];
            }
            y[t * d_inner + i] = sum;
        }
        states.push(state);
    }
    (y, states)
}

/// Output `[seq, d_inner]` and final state.
pub fn selective_scan(shape: ScanShape, data: &ScanData) -> (Vec<f64>, Vec<f64>) {
    let (y, mut states) = states(shape, data);
    (y, states.pop().unwrap_or_default())
}

/// Gradients of every input and of the initial state, given those of the output and of the final state.
pub fn selective_scan_backward(
    shape: ScanShape,
    data: &ScanData,
    dy: &[f64],
    d_final_state: &[f64],
) -> ScanData {
    let ScanShape { seq, d_inner, d_state } = shape;
    let (_, states) = states(shape, data);
    let mut grads = data.clone();
    grads.parts_mut().into_iter().for_each(|part| part.fill(0.0));
    grads.state.copy_from_slice(d_final_state);
    for t in (0..seq).rev() {
        for i in 0..d_inner {
            let row = t * d_inner + i;
            let (u, delta, grad) = (data.u[row], data.delta[row], dy[row]);
            grads.d[i] += grad * u;
            grads.u[row] += grad * data.d[i];
            for n in 0..d_state {
                let at = i * d_state + n;
                let a = data.a[at];
                let b = data.b[t * d_state + n];
                let decay = (delta * a).exp();
                grads.c[t * d_state + n] += grad * states[t + 1][at];
                let d = grads.state[at] + grad * data.c[t * d_state + n];
                grads.b[t * d_state + n] += d * delta * u;
                grads.u[row] += d * delta * b;
                grads.delta[row] += d * (a * decay * states[t][at] + b * u);
                grads.a[at] += d * delta * decay * states[t][at];
                grads.state[at] = d * decay;
            }
        }
    }
    grads
}
