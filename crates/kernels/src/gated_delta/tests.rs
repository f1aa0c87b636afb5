use proptest::prelude::*;

use super::*;
use crate::chunk::testing::{LENGTHS, assert_close, assert_gradient, execs, inner, random, rng, wide};
use crate::naive;
use crate::naive::gated_delta::DeltaData;
use crate::testing::rounding_execs;

/// Against f64, relative to the largest value: f32 sums of a few thousand products of mixed sign, after a triangular
/// solve whose inverse has no entry above 1.
const TOLERANCE: f64 = 1e-5;
/// Chunked against step-by-step: both are off f64 by up to [`TOLERANCE`].
const FORM_TOLERANCE: f64 = 2.0 * TOLERANCE;

/// The same where the context multiplies in bfloat16: outputs and gradients are sums of products of factors rounded by up to 2⁻⁹.
const ROUNDED_TOLERANCE: f64 = 1e-2;
/// States are solved for with 16 bits of mantissa.
const SPLIT_TOLERANCE: f64 = 2e-4;

/// Ranges of `log_a`: as trained, forgetting at once, hardly forgetting, and all of them mixed.
const DECAYS: [(f32, f32); 4] = [(-0.5, -0.01), (-50.0, -50.0), (-1e-6, -1e-6), (-200.0, 0.0)];

struct Case {
    shape: DeltaShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    log_a: Vec<f32>,
    beta: Vec<f32>,
    state: Vec<f32>,
    dy: Vec<f32>,
    d_final: Vec<f32>,
}

fn shape(seq: usize, heads: usize, d_state: usize, head_dim: usize) -> DeltaShape {
    DeltaShape { seq, heads, d_state, head_dim }
}

/// Unit keys; `scale` is that of values and state.
fn case(shape: DeltaShape, decay: (f32, f32), scale: f32) -> Case {
    let DeltaShape { seq, heads, d_state, head_dim } = shape;
    let mut rng = rng((seq * 100 + heads * 10 + d_state + head_dim) as u64);
    let mut fill = |n, low, high| random(&mut rng, n, low, high);
    let mut log_a = fill(seq, decay.0, decay.1);
    if decay.1 == 0.0 {
        // Mostly weak decay after rare strong ones: differences of large sums must stay exact.
        log_a.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % 17 == 3 { 1.0 } else { 1e-4 });
    }
    let mut k = fill(seq * d_state, -1.0, 1.0);
    for k in k.chunks_mut(d_state) {
        let norm = k.iter().map(|k| k * k).sum::<f32>().sqrt();
        k.iter_mut().for_each(|k| *k /= norm);
    }
    Case {
        shape,
        q: fill(seq * heads * d_state, -1.0, 1.0),
        k,
        v: fill(seq * head_dim, -scale, scale),
        log_a,
        beta: fill(seq, 0.0, 1.0),
        state: fill(d_state * head_dim, -scale, scale),
        dy: fill(seq * heads * head_dim, -1.0, 1.0),
        d_final: fill(d_state * head_dim, -1.0, 1.0),
    }
}

type Form = fn(&Exec, DeltaShape, DeltaInputs<'_>, &mut [f32], &mut [f32]);

impl Case {
    fn inputs(&self) -> DeltaInputs<'_> {
        let Self { q, k, v, log_a, beta, .. } = self;
        DeltaInputs { q, k, v, log_a, beta }
    }
    fn data(&self) -> DeltaData {
        DeltaData {
            q: wide(&self.q),
            k: wide(&self.k),
            v: wide(&self.v),
            log_a: wide(&self.log_a),
            beta: wide(&self.beta),
            state: wide(&self.state),
        }
    }
    /// Output and final state of consecutive calls over tokens `cuts[0]..cuts[1]`, `cuts[1]..cuts[2]`, ….
    fn run(&self, exec: &Exec, form: Form, cuts: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let row = self.shape.heads * self.shape.head_dim;
        let (mut y, mut state) = (vec![f32::NAN; self.dy.len()], self.state.clone());
        for part in cuts.windows(2) {
            let (shape, inputs) = self.inputs().tokens(self.shape, part[0], part[1]);
            form(exec, shape, inputs, &mut state, &mut y[part[0] * row..part[1] * row]);
        }
        (y, state)
    }
    fn whole(&self, exec: &Exec) -> (Vec<f32>, Vec<f32>) {
        self.run(exec, gated_delta, &[0, self.shape.seq])
    }
    /// Gradients in the order of [`DeltaData::parts_mut`], each starting from `start`.
    fn gradients(&self, exec: &Exec, start: f32, with_states: bool) -> [Vec<f32>; 6] {
        let mut all =
            [&self.q, &self.k, &self.v, &self.log_a, &self.beta, &self.state].map(|x| vec![start; x.len()]);
        let [dq, dk, dv, dlog_a, dbeta, d_state] = &mut all;
        let mut state = if with_states { self.state.clone() } else { vec![0.0; self.state.len()] };
        let mut y = vec![f32::NAN; self.dy.len()];
        let saved = gated_delta_train(exec, self.shape, self.inputs(), &mut state, &mut y);
        gated_delta_backward(
            exec,
            self.shape,
            self.inputs(),
            &saved,
            &self.dy,
            with_states.then_some(&self.d_final[..]),
            DeltaGrads { dq, dk, dv, dlog_a, dbeta },
            with_states.then_some(&mut d_state[..]),
        );
        all
    }
    /// Compares output, final state and gradients with the reference on every instruction set.
    fn check(&self, what: &str) {
        let (y, state) = naive::gated_delta::gated_delta(self.shape, &self.data());
        let mut gradients = naive::gated_delta::gated_delta_backward(
            self.shape,
            &self.data(),
            &wide(&self.dy),
            &wide(&self.d_final),
        );
        for exec in execs() {
            let what = format!("{} {:?} {what}", exec.isa(), self.shape);
            let found = self.whole(&exec);
            assert_close(&format!("y {what}"), &found.0, &y, TOLERANCE);
            assert_close(&format!("state {what}"), &found.1, &state, TOLERANCE);
            let found = self.gradients(&exec, 0.0, true);
            for (i, (found, expected)) in found.iter().zip(gradients.parts_mut()).enumerate() {
                assert_close(&format!("gradient {i} {what}"), found, expected, TOLERANCE);
            }
        }
    }
}

#[test]
fn agrees_with_naive() {
    let mut shapes: Vec<_> = LENGTHS.map(|seq| shape(seq, 3, 16, 8)).into();
    shapes.extend([1, 2, 4].map(|heads| shape(130, heads, 12, 20)));
    shapes.extend([shape(65, 2, 64, 64), shape(70, 1, 1, 3), shape(70, 2, 5, 1)]);
    for shape in shapes {
        for decay in DECAYS {
            case(shape, decay, 1.0).check(&format!("{decay:?}"));
        }
    }
}

#[test]
fn agrees_with_naive_in_bf16() {
    let rounding = rounding_execs();
    for shape in [shape(1, 3, 64, 64), shape(65, 2, 64, 64), shape(200, 3, 64, 64), shape(130, 3, 40, 24)] {
        for decay in DECAYS {
            let case = case(shape, decay, 1.0);
            let (y, state) = naive::gated_delta::gated_delta(shape, &case.data());
            let (dy, d_final) = (wide(&case.dy), wide(&case.d_final));
            let mut gradients = naive::gated_delta::gated_delta_backward(shape, &case.data(), &dy, &d_final);
            for exec in &rounding {
                let what = format!("{} {shape:?} {decay:?}", exec.isa());
                let found = case.whole(exec);
                assert_close(&format!("y {what}"), &found.0, &y, ROUNDED_TOLERANCE);
                assert_close(&format!("state {what}"), &found.1, &state, SPLIT_TOLERANCE);
                let found = case.gradients(exec, 0.0, true);
                for (i, (found, expected)) in found.iter().zip(gradients.parts_mut()).enumerate() {
                    assert_close(&format!("gradient {i} {what}"), found, expected, ROUNDED_TOLERANCE);
                }
            }
        }
    }
}

/// The same key again and again at full rate is the stiffest system: every token overwrites the one before.
#[test]
fn repeated_keys_at_full_rate_stay_accurate() {
    let mut case = case(shape(200, 2, 16, 16), (-1e-6, -1e-6), 1.0);
    let (first, rest) = case.k.split_at_mut(16);
    rest.chunks_mut(16).for_each(|k| k.copy_from_slice(first));
    case.beta.fill(1.0);
    case.check("repeated keys");
}

#[test]
fn gradients_are_added_and_states_are_optional() {
    let mut case = case(shape(100, 2, 8, 8), DECAYS[0], 1.0);
    let exec = &execs()[0];
    let from_zero = case.gradients(exec, 0.0, true);
    let from_one = case.gradients(exec, 1.0, true);
    for (zero, one) in from_zero.iter().zip(&from_one) {
        let expected: Vec<f64> = wide(zero).iter().map(|x| x + 1.0).collect();
        assert_close("added", one, &expected, TOLERANCE);
    }
    let without = case.gradients(exec, 0.0, false);
    case.state.fill(0.0);
    case.d_final.fill(0.0);
    assert_eq!(without[..5], case.gradients(exec, 0.0, true)[..5]);
    assert!(without[5].iter().all(|&x| x == 0.0));
}

#[test]
fn naive_gradient_is_the_derivative() {
    let shape = shape(5, 2, 3, 2);
    let case = case(shape, (-1.0, -0.1), 1.0);
    let (dy, d_final) = (wide(&case.dy), wide(&case.d_final));
    let mut gradients = naive::gated_delta::gated_delta_backward(shape, &case.data(), &dy, &d_final);
    let loss = |data: &DeltaData| {
        let (y, state) = naive::gated_delta::gated_delta(shape, data);
        inner(&y, &dy) + inner(&state, &d_final)
    };
    for (i, gradient) in gradients.parts_mut().into_iter().enumerate() {
        assert_gradient(&format!("part {i}"), &case.data(), |data| data.parts_mut()[i], loss, gradient);
    }
}

#[test]
fn steps_agree_with_chunks() {
    for decay in DECAYS {
        let case = case(shape(150, 3, 16, 24), decay, 1.0);
        for exec in execs() {
            let (y, state) = case.whole(&exec);
            let steps = case.run(&exec, gated_delta_step, &(0..=150).collect::<Vec<_>>());
            assert_close("y", &steps.0, &wide(&y), FORM_TOLERANCE);
            assert_close("state", &steps.1, &wide(&state), FORM_TOLERANCE);
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    // Longer than the block of chunk states held at once.
    let case = case(shape(BLOCK_CHUNKS * CHUNK + 70, 2, 8, 8), DECAYS[0], 1.0);
    for execs in execs().chunks_exact(2) {
        assert_eq!(case.whole(&execs[0]), case.whole(&execs[1]));
        assert_eq!(case.gradients(&execs[0], 0.0, true), case.gradients(&execs[1], 0.0, true));
    }
    case.check("longer than a block");
}

#[test]
fn large_inputs_and_total_forgetting_stay_finite() {
    let mut case = case(shape(130, 2, 16, 16), DECAYS[0], 1e6);
    case.check("large");
    case.log_a.iter_mut().step_by(3).for_each(|log_a| *log_a = f32::NEG_INFINITY);
    for exec in execs() {
        let (y, state) = case.whole(&exec);
        assert!(y.iter().chain(&state).all(|x| x.is_finite()));
        assert!(case.gradients(&exec, 0.0, true).iter().flatten().all(|x| x.is_finite()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Two calls that carry the state agree with one, wherever the cut is.
    #[test]
    fn split_calls_agree(seq in 0usize..200, cut in 0usize..200, heads in 1usize..5) {
        let cut = cut.min(seq);
        let case = case(shape(seq, heads, 9, 6), DECAYS[0], 1.0);
        for exec in execs() {
            let (y, state) = case.whole(&exec);
            let split = case.run(&exec, gated_delta, &[0, cut, seq]);
            assert_close("y", &split.0, &wide(&y), FORM_TOLERANCE);
            assert_close("state", &split.1, &wide(&state), FORM_TOLERANCE);
        }
    }
}
