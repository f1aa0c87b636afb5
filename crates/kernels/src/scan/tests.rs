use proptest::prelude::*;

use super::*;
use crate::chunk::testing::{LENGTHS, assert_close, assert_gradient, execs, inner, random, rng, wide};
use crate::naive;
use crate::naive::scan::ScanData;

/// Against f64, relative to the largest value: `f32` recurrences over up to 500 tokens.
const TOLERANCE: f64 = 1e-5;

/// Ranges of `delta` and of `a`: as trained, forgetting at once, hardly forgetting.
const DECAYS: [[(f32, f32); 2]; 3] =
    [[(1e-3, 1.0), (-16.0, -0.5)], [(5.0, 5.0), (-20.0, -10.0)], [(1e-3, 1e-2), (-1e-4, -1e-5)]];

struct Case {
    shape: ScanShape,
    u: Vec<f32>,
    delta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f32>,
    state: Vec<f32>,
    dy: Vec<f32>,
    d_final: Vec<f32>,
}

fn shape(seq: usize, d_inner: usize, d_state: usize) -> ScanShape {
    ScanShape { seq, d_inner, d_state }
}

fn case(shape: ScanShape, [delta, a]: [(f32, f32); 2], scale: f32) -> Case {
    let ScanShape { seq, d_inner, d_state } = shape;
    let mut rng = rng((seq * 100 + d_inner * 10 + d_state) as u64);
    let mut fill = |n, low, high| random(&mut rng, n, low, high);
    Case {
        shape,
        u: fill(seq * d_inner, -scale, scale),
        delta: fill(seq * d_inner, delta.0, delta.1),
        a: fill(d_inner * d_state, a.0, a.1),
        b: fill(seq * d_state, -scale, scale),
        c: fill(seq * d_state, -scale, scale),
        d: fill(d_inner, -1.0, 1.0),
        state: fill(d_inner * d_state, -scale, scale),
        dy: fill(seq * d_inner, -1.0, 1.0),
        d_final: fill(d_inner * d_state, -1.0, 1.0),
    }
}

type Form = fn(&Exec, ScanShape, ScanInputs<'_>, &mut [f32], &mut [f32]);

impl Case {
    fn inputs(&self) -> ScanInputs<'_> {
        let Self { u, delta, a, b, c, d, .. } = self;
        ScanInputs { u, delta, a, b, c, d }
    }
    fn data(&self) -> ScanData {
        ScanData {
            u: wide(&self.u),
            delta: wide(&self.delta),
            a: wide(&self.a),
            b: wide(&self.b),
            c: wide(&self.c),
            d: wide(&self.d),
            state: wide(&self.state),
        }
    }
    /// Output and final state of consecutive calls over tokens `cuts[0]..cuts[1]`, `cuts[1]..cuts[2]`, ….
    fn run(&self, exec: &Exec, form: Form, cuts: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let ScanShape { d_inner, d_state, .. } = self.shape;
        let mut state = self.state.clone();
        let mut y = vec![f32::NAN; self.dy.len()];
        for part in cuts.windows(2) {
            let (wide, narrow) = (part[0] * d_inner..part[1] * d_inner, part[0] * d_state..part[1] * d_state);
            let inputs = ScanInputs {
                u: &self.u[wide.clone()],
                delta: &self.delta[wide.clone()],
                b: &self.b[narrow.clone()],
                c: &self.c[narrow],
                ..self.inputs()
            };
            form(exec, shape(part[1] - part[0], d_inner, d_state), inputs, &mut state, &mut y[wide]);
        }
        (y, state)
    }
    fn whole(&self, exec: &Exec) -> (Vec<f32>, Vec<f32>) {
        self.run(exec, selective_scan, &[0, self.shape.seq])
    }
    /// Gradients in the order of [`ScanData::parts_mut`], each starting from `start`.
    fn gradients(&self, exec: &Exec, start: f32, with_states: bool) -> [Vec<f32>; 7] {
        let mut all = [&self.u, &self.delta, &self.a, &self.b, &self.c, &self.d, &self.state]
            .map(|x| vec![start; x.len()]);
        let [du, ddelta, da, db, dc, dd, d_state] = &mut all;
        selective_scan_backward(
            exec,
            self.shape,
            self.inputs(),
            with_states.then_some(&self.state[..]),
            &self.dy,
            with_states.then_some(&self.d_final[..]),
            ScanGrads { du, ddelta, da, db, dc, dd },
            with_states.then_some(&mut d_state[..]),
        );
        all
    }
}

fn shapes() -> Vec<ScanShape> {
    let mut shapes: Vec<_> = LENGTHS.map(|seq| shape(seq, 24, 16)).into();
    shapes.extend([shape(65, 1, 1), shape(33, 16, 7), shape(17, 40, 20)]);
    shapes
}

#[test]
fn agrees_with_naive() {
    for shape in shapes() {
        for decay in DECAYS {
            let case = case(shape, decay, 1.0);
            let (y, state) = naive::scan::selective_scan(shape, &case.data());
            let mut gradients = naive::scan::selective_scan_backward(
                shape,
                &case.data(),
                &wide(&case.dy),
                &wide(&case.d_final),
            );
            for exec in execs() {
                let what = format!("{} {shape:?} {decay:?}", exec.isa());
                let found = case.whole(&exec);
                assert_close(&format!("y {what}"), &found.0, &y, TOLERANCE);
                assert_close(&format!("state {what}"), &found.1, &state, TOLERANCE);
                let found = case.gradients(&exec, 0.0, true);
                for (i, (found, expected)) in found.iter().zip(gradients.parts_mut()).enumerate() {
                    assert_close(&format!("gradient {i} {what}"), found, expected, TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn gradients_are_added_and_states_are_optional() {
    let mut case = case(shape(50, 20, 16), DECAYS[0], 1.0);
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
    assert_eq!(without[..6], case.gradients(exec, 0.0, true)[..6]);
    assert!(without[6].iter().all(|&x| x == 0.0));
}

#[test]
fn naive_gradient_is_the_derivative() {
    let shape = shape(4, 2, 3);
    let case = case(shape, [(0.2, 1.0), (-1.0, -0.2)], 1.0);
    let (dy, d_final) = (wide(&case.dy), wide(&case.d_final));
    let mut gradients = naive::scan::selective_scan_backward(shape, &case.data(), &dy, &d_final);
    let loss = |data: &ScanData| {
        let (y, state) = naive::scan::selective_scan(shape, data);
        inner(&y, &dy) + inner(&state, &d_final)
    };
    for (i, gradient) in gradients.parts_mut().into_iter().enumerate() {
        assert_gradient(&format!("part {i}"), &case.data(), |data| data.parts_mut()[i], loss, gradient);
    }
}

#[test]
fn large_inputs_stay_finite() {
    let case = case(shape(70, 20, 16), DECAYS[1], 1e6);
    let (y, state) = naive::scan::selective_scan(case.shape, &case.data());
    for exec in execs() {
        let found = case.whole(&exec);
        assert_close("y", &found.0, &y, TOLERANCE);
        assert_close("state", &found.1, &state, TOLERANCE);
        assert!(case.gradients(&exec, 0.0, true).iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn threads_do_not_change_bits() {
    let case = case(shape(100, 70, 16), DECAYS[0], 1.0);
    for execs in execs().chunks_exact(2) {
        assert_eq!(case.whole(&execs[0]), case.whole(&execs[1]));
        assert_eq!(case.gradients(&execs[0], 0.0, true), case.gradients(&execs[1], 0.0, true));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Two calls that carry the state are the same arithmetic as one; single steps agree up to the order of one sum.
    #[test]
    fn split_calls_and_steps_agree(seq in 0usize..100, cut in 0usize..100, d_inner in 1usize..40) {
        let cut = cut.min(seq);
        let case = case(shape(seq, d_inner, 5), DECAYS[0], 1.0);
        for exec in execs() {
            let whole = case.whole(&exec);
            prop_assert_eq!(&case.run(&exec, selective_scan, &[0, cut, seq]), &whole);
            let steps = case.run(&exec, selective_scan_step, &(0..=seq).collect::<Vec<_>>());
            assert_close("y", &steps.0, &wide(&whole.0), TOLERANCE);
            prop_assert_eq!(&steps.1, &whole.1);
        }
    }
}
