//! The gated delta rule in f64, token by token, and its gradient by back-propagation through time.

use crate::gated_delta::DeltaShape;

/// Inputs as in [`crate::gated_delta::DeltaInputs`], in f64.
#[derive(Clone, Debug)]
pub struct DeltaData {
    /// `[seq, heads · d_state]`.
    pub q: Vec<f64>,
    /// `[seq, d_state]`.
    pub k: Vec<f64>,
    /// `[seq, head_dim]`.
    pub v: Vec<f64>,
    /// `[seq]`.
    pub log_a: Vec<f64>,
    /// `[seq]`.
    pub beta: Vec<f64>,
    /// Initial state `[d_state, head_dim]`.
    pub state: Vec<f64>,
}

impl DeltaData {
    /// The inputs in a fixed order, for code that treats them alike.
    pub fn parts_mut(&mut self) -> [&mut Vec<f64>; 6] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.log_a, &mut self.beta, &mut self.state]
    }
}

/// `v_t − a_t S_{t−1}ᵀ k_t`, one value per column of the state.
fn errors(shape: DeltaShape, data: &DeltaData, t: usize, state: &[f64]) -> Vec<f64> {
    let DeltaShape { d_state, head_dim, .. } = shape;
    let decay = data.log_a[t].exp();
    (0..head_dim)
        .map(|p| {
            let read: f64 = (0..d_state).map(|n| state[n * head_dim + p] * data.k[t * d_state + n]).sum();
            data.v[t * head_dim + p] - decay * read
        })
        .collect()
}

/// Output `[seq, heads · head_dim]` and the states after `0..=seq` tokens.
fn states(shape: DeltaShape, data: &DeltaData) -> (Vec<f64>, Vec<Vec<f64>>) {
    let DeltaShape { seq, heads, d_state, head_dim } = shape;
    let mut y = vec![0.0; seq * heads * head_dim];
    let mut states = vec![data.state.clone()];
    for t in 0..seq {
        let mut state = states[t].clone();
        let errors = errors(shape, data, t, &state);
        let decay = data.log_a[t].exp();
        for n in 0..d_state {
            for p in 0..head_dim {
                let entry = &mut state[n * head_dim + p];
                *entry = decay * *entry + data.beta[t] * data.k[t * d_state + n] * errors[p];
                for h in 0..heads {
                    y[(t * heads + h) * head_dim + p] += *entry * data.q[(t * heads + h) * d_state + n];
                }
            }
        }
        states.push(state);
    }
    (y, states)
}

/// Output `[seq, heads · head_dim]` and final state.
pub fn gated_delta(shape: DeltaShape, data: &DeltaData) -> (Vec<f64>, Vec<f64>) {
    let (y, mut states) = states(shape, data);
    (y, states.pop().unwrap_or_default())
}

/// Gradients of every input and of the initial state, given those of the output and of the final state.
pub fn gated_delta_backward(
    shape: DeltaShape,
    data: &DeltaData,
    dy: &[f64],
    d_final_state: &[f64],
) -> DeltaData {
    let DeltaShape { seq, heads, d_state, head_dim } = shape;
    let (_, states) = states(shape, data);
    let mut grads = data.clone();
    grads.parts_mut().into_iter().for_each(|part| part.fill(0.0));
    grads.state.copy_from_slice(d_final_state);
    for t in (0..seq).rev() {
        let (before, after) = (&states[t], &states[t + 1]);
        let errors = errors(shape, data, t, before);
        let (decay, beta) = (data.log_a[t].exp(), data.beta[t]);
        let k = &data.k[t * d_state..(t + 1) * d_state];
        for h in 0..heads {
            let row = t * heads + h;
            for n in 0..d_state {
                for p in 0..head_dim {
                    let grad = dy[row * head_dim + p];
                    grads.q[row * d_state + n] += grad * after[n * head_dim + p];
                    grads.state[n * head_dim + p] += grad * data.q[row * d_state + n];
                }
            }
        }
        for (p, error) in errors.iter().enumerate() {
            let read: f64 = k.iter().enumerate().map(|(n, k)| grads.state[n * head_dim + p] * k).sum();
            let d_error = beta * read;
            grads.beta[t] += error * read;
            grads.v[t * head_dim + p] += d_error;
            for (n, k) in k.iter().enumerate() {
                let i = n * head_dim + p;
                let d = grads.state[i];
                grads.k[t * d_state + n] += d * beta * error - d_error * decay * before[i];
                grads.log_a[t] += decay * before[i] * (d - d_error * k);
                grads.state[i] = decay * (d - d_error * k);
            }
        }
    }
    grads
}
