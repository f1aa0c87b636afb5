use proptest::prelude::*;

use super::*;
use crate::chunk::testing::{LENGTHS, assert_close, assert_gradient, execs, inner, random, rng, wide};
use crate::naive;
use crate::naive::ssd::SsdData;

/// Against f64, relative to the largest value: f32 sums of a few thousand products of mixed sign.
const TOLERANCE: f64 = 1e-5;
/// Chunked against step-by-step: both are off f64 by up to [`TOLERANCE`].
const FORM_TOLERANCE: f64 = 2.0 * TOLERANCE;

/// Ranges of `log_a`: as trained, forgetting at once, hardly forgetting, and all of them mixed.
const DECAYS: [(f32, f32); 4] = [(-0.5, -0.01), (-50.0, -50.0), (-1e-6, -1e-6), (-200.0, 0.0)];

struct Case {
    shape: SsdShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    log_a: Vec<f32>,
    b: Vec<f32>,
    d_skip: Vec<f32>,
    state: Vec<f32>,
    dy: Vec<f32>,
    d_final: Vec<f32>,
}

fn shape(seq: usize, heads: usize, d_state: usize, head_dim: usize) -> SsdShape {
    SsdShape { seq, heads, d_state, head_dim }
}

fn case(shape: SsdShape, decay: (f32, f32), scale: f32) -> Case {
    let SsdShape { seq, heads, d_state, head_dim } = shape;
    let mut rng = rng((seq * 100 + heads * 10 + d_state + head_dim) as u64);
    let mut fill = |n, low, high| random(&mut rng, n, low, high);
    let mut log_a = fill(seq * heads, decay.0, decay.1);
    if decay.1 == 0.0 {
        // Mostly weak decay after rare strong ones: differences of large sums must stay exact.
        log_a.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % 17 == 3 { 1.0 } else { 1e-4 });
    }
    Case {
        shape,
        q: fill(seq * heads * d_state, -scale, scale),
        k: fill(seq * d_state, -scale, scale),
        v: fill(seq * head_dim, -scale, scale),
        log_a,
        b: fill(seq * heads, 0.0, 1.0),
        d_skip: fill(heads, -1.0, 1.0),
        state: fill(heads * d_state * head_dim, -scale, scale),
        dy: fill(seq * heads * head_dim, -1.0, 1.0),
        d_final: fill(heads * d_state * head_dim, -1.0, 1.0),
    }
}

impl Case {
    fn inputs(&self) -> SsdInputs<'_> {
        let Self { q, k, v, log_a, b, d_skip, .. } = self;
        SsdInputs { q, k, v, log_a, b, d_skip }
    }
    fn data(&self) -> SsdData {
        SsdData {
            q: wide(&self.q),
            k: wide(&self.k),
            v: wide(&self.v),
            log_a: wide(&self.log_a),
            b: wide(&self.b),
            d_skip: wide(&self.d_skip),
            state: wide(&self.state),
        }
    }
    fn run(&self, exec: &Exec) -> (Vec<f32>, Vec<f32>) {
        let mut state = self.state.clone();
        let mut y = vec![f32::NAN; self.dy.len()];
        ssd(exec, self.shape, self.inputs(), &mut state, &mut y);
        (y, state)
    }
    /// Gradients in the order of [`SsdData::parts_mut`], each starting from `start`.
    fn gradients(&self, exec: &Exec, start: f32, with_states: bool) -> [Vec<f32>; 7] {
        let new = |x: &[f32]| vec![start; x.len()];
        let mut all =
            [&self.q, &self.k, &self.v, &self.log_a, &self.b, &self.d_skip, &self.state].map(|x| new(x));
        let [dq, dk, dv, dlog_a, db, dd_skip, d_state] = &mut all;
        ssd_backward(
            exec,
            self.shape,
            self.inputs(),
            with_states.then_some(&self.state[..]),
            &self.dy,
            with_states.then_some(&self.d_final[..]),
            SsdGrads { dq, dk, dv, dlog_a, db, dd_skip },
            with_states.then_some(&mut d_state[..]),
        );
        all
    }
}

fn shapes() -> Vec<SsdShape> {
    let mut shapes: Vec<_> = LENGTHS.map(|seq| shape(seq, 3, 16, 8)).into();
    shapes.extend([1, 2, 4].map(|heads| shape(130, heads, 12, 20)));
    shapes.extend([shape(65, 2, 64, 64), shape(70, 1, 1, 3), shape(70, 2, 5, 1)]);
    shapes
}

#[test]
fn agrees_with_naive() {
    for shape in shapes() {
        for decay in DECAYS {
            let case = case(shape, decay, 1.0);
            let (y, state) = naive::ssd::ssd(shape, &case.data());
            for exec in execs() {
                let found = case.run(&exec);
                let what = format!("{} {shape:?} {decay:?}", exec.isa());
                assert_close(&format!("y {what}"), &found.0, &y, TOLERANCE);
                assert_close(&format!("state {what}"), &found.1, &state, TOLERANCE);
            }
        }
    }
}

#[test]
fn gradients_agree_with_naive() {
    for shape in shapes() {
        for decay in DECAYS {
            let case = case(shape, decay, 1.0);
            let mut expected =
                naive::ssd::ssd_backward(shape, &case.data(), &wide(&case.dy), &wide(&case.d_final));
            for exec in execs() {
                let found = case.gradients(&exec, 0.0, true);
                for (i, (found, expected)) in found.iter().zip(expected.parts_mut()).enumerate() {
                    assert_close(
                        &format!("gradient {i} {} {shape:?} {decay:?}", exec.isa()),
                        found,
                        expected,
                        TOLERANCE,
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_are_added_and_states_are_optional() {
    let shape = shape(100, 2, 8, 8);
    let mut case = case(shape, DECAYS[0], 1.0);
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
    let with_zeros = case.gradients(exec, 0.0, true);
    assert_eq!(without[..6], with_zeros[..6]);
    assert!(without[6].iter().all(|&x| x == 0.0));
}

#[test]
fn naive_gradient_is_the_derivative() {
    let shape = shape(5, 2, 3, 2);
    let case = case(shape, (-1.0, -0.1), 1.0);
    let (dy, d_final) = (wide(&case.dy), wide(&case.d_final));
    let mut gradients = naive::ssd::ssd_backward(shape, &case.data(), &dy, &d_final);
    let loss = |data: &SsdData| {
        let (y, state) = naive::ssd::ssd(shape, data);
        inner(&y, &dy) + inner(&state, &d_final)
    };
    for (i, gradient) in gradients.parts_mut().into_iter().enumerate() {
        assert_gradient(&format!("part {i}"), &case.data(), |data| data.parts_mut()[i], loss, gradient);
    }
}

/// Runs tokens `start..end` with the given form.
fn run_part(
    exec: &Exec,
    case: &Case,
    form: fn(&Exec, SsdShape, SsdInputs<'_>, &mut [f32], &mut [f32]),
    (start, end): (usize, usize),
    state: &mut [f32],
    y: &mut [f32],
) {
    let row = case.shape.heads * case.shape.head_dim;
    let (shape, inputs) = case.inputs().tokens(case.shape, start, end);
    form(exec, shape, inputs, state, &mut y[start * row..end * row]);
}

#[test]
fn steps_agree_with_chunks() {
    for decay in DECAYS {
        let case = case(shape(150, 3, 16, 24), decay, 1.0);
        for exec in execs() {
            let (y, state) = case.run(&exec);
            let (mut step_y, mut step_state) = (vec![f32::NAN; y.len()], case.state.clone());
            for t in 0..150 {
                run_part(&exec, &case, ssd_step, (t, t + 1), &mut step_state, &mut step_y);
            }
            assert_close("y", &step_y, &wide(&y), FORM_TOLERANCE);
            assert_close("state", &step_state, &wide(&state), FORM_TOLERANCE);
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    // Longer than the block of chunk states held at once.
    let case = case(shape(BLOCK_CHUNKS * CHUNK + 70, 2, 8, 8), DECAYS[0], 1.0);
    for execs in execs().chunks_exact(2) {
        assert_eq!(case.run(&execs[0]), case.run(&execs[1]));
        assert_eq!(case.gradients(&execs[0], 0.0, true), case.gradients(&execs[1], 0.0, true));
    }
    let (y, state) = naive::ssd::ssd(case.shape, &case.data());
    let found = case.run(&execs()[0]);
    assert_close("y", &found.0, &y, TOLERANCE);
    assert_close("state", &found.1, &state, TOLERANCE);
}

#[test]
fn large_inputs_and_total_forgetting_stay_finite() {
    let shape = shape(130, 2, 16, 16);
    let mut case = case(shape, DECAYS[0], 1e6);
    let (y, state) = naive::ssd::ssd(shape, &case.data());
    for exec in execs() {
        let found = case.run(&exec);
        assert_close("y", &found.0, &y, TOLERANCE);
        assert_close("state", &found.1, &state, TOLERANCE);
    }
    case.log_a.iter_mut().step_by(3).for_each(|log_a| *log_a = f32::NEG_INFINITY);
    for exec in execs() {
        let (y, state) = case.run(&exec);
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
            let (y, state) = case.run(&exec);
            let (mut split_y, mut split_state) = (vec![f32::NAN; y.len()], case.state.clone());
            for part in [(0, cut), (cut, seq)] {
                run_part(&exec, &case, ssd, part, &mut split_state, &mut split_y);
            }
            assert_close("y", &split_y, &wide(&y), FORM_TOLERANCE);
            assert_close("state", &split_state, &wide(&state), FORM_TOLERANCE);
        }
    }
}
