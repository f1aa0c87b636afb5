//! Mamba-2's recurrence in f64, token by token, and its gradient by back-propagation through time.

use crate::ssd::SsdShape;

/// Inputs as in [`crate::ssd::SsdInputs`], in f64.
#[derive(Clone, Debug)]
pub struct SsdData {
    /// `[seq, heads · d_state]`.
    pub q: Vec<f64>,
    /// `[seq, d_state]`.
    pub k: Vec<f64>,
    /// `[seq, head_dim]`.
    pub v: Vec<f64>,
    /// `[seq, heads]`.
    pub log_a: Vec<f64>,
    /// `[seq, heads]`.
    pub b: Vec<f64>,
    /// `[heads]`.
    pub d_skip: Vec<f64>,
    /// Initial state `[heads, d_state, head_dim]`.
    pub state: Vec<f64>,
}

impl SsdData {
    /// The inputs in a fixed order, for code that treats them alike.
    pub fn parts_mut(&mut self) -> [&mut Vec<f64>; 7] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.log_a,
            &mut self.b,
            &mut self.d_skip,
            &mut self.state,
        ]
    }
}

/// Output `[seq, heads · head_dim]` and the states after `0..=seq` tokens.
fn states(shape: SsdShape, data: &SsdData) -> (Vec<f64>, Vec<Vec<f64>>) {
    let SsdShape { seq, heads, d_state, head_dim } = shape;
    let mut y = vec![0.0; seq * heads * head_dim];
    let mut states = vec![data.state.clone()];
    for t in 0..seq {
        let mut state = states[t].clone();
        for h in 0..heads {
            let decay = data.log_a[t * heads + h].exp();
            let b = data.b[t * heads + h];
            for p in 0..head_dim {
                let v = data.v[t * head_dim + p];
                let mut sum = data.d_skip[h] * v;
                for n in 0..d_state {
                    let entry = &mut state[(h * d_state + n) * head_dim + p];
                    *entry = decay * *entry + b * data.k[t * d_state + n] * v;
                    sum += *entry * data.q[(t * heads + h) * d_state + n];
                }
                y[(t * heads + h) * head_dim + p] = sum;
            }
        }
        states.push(state);
    }
    (y, states)
}

/// Output `[seq, heads · head_dim]` and final state.
pub fn ssd(shape: SsdShape, data: &SsdData) -> (Vec<f64>, Vec<f64>) {
    let (y, mut states) = states(shape, data);
    (y, states.pop().unwrap_or_default())
}

/// Gradients of every input and of the initial state, given those of the output and of the final state.
pub fn ssd_backward(shape: SsdShape, data: &SsdData, dy: &[f64], d_final_state: &[f64]) -> SsdData {
    let SsdShape { seq, heads, d_state, head_dim } = shape;
    let (_, states) = states(shape, data);
    let mut grads = data.clone();
    grads.parts_mut().into_iter().for_each(|part| part.fill(0.0));
    grads.state.copy_from_slice(d_final_state);
    for t in (0..seq).rev() {
        for h in 0..heads {
            let row = t * heads + h;
            let decay = data.log_a[row].exp();
            for p in 0..head_dim {
                let grad = dy[row * head_dim + p];
                let v = data.v[t * head_dim + p];
                grads.d_skip[h] += grad * v;
                grads.v[t * head_dim + p] += grad * data.d_skip[h];
                for n in 0..d_state {
                    let i = (h * d_state + n) * head_dim + p;
                    let k = data.k[t * d_state + n];
                    grads.q[row * d_state + n] += grad * states[t + 1][i];
                    let d = grads.state[i] + grad * data.q[row * d_state + n];
                    grads.k[t * d_state + n] += d * data.b[row] * v;
                    grads.v[t * head_dim + p] += d * data.b[row] * k;
                    grads.b[row] += d * k * v;
                    grads.log_a[row] += d * decay * states[t][i];
                    grads.state[i] = d * decay;
                }
            }
        }
    }
    grads
}
