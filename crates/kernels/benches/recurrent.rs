//! The recurrences at training size: chunked against token by token against the f64 reference, one thread.
//! `cargo bench -p recurformer-kernels --bench recurrent`

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use recurformer_kernels::gated_delta::{
    DeltaGrads, DeltaInputs, DeltaShape, gated_delta, gated_delta_backward, gated_delta_step,
    gated_delta_train,
};
use recurformer_kernels::scan::{
    ScanGrads, ScanInputs, ScanShape, selective_scan, selective_scan_backward, selective_scan_step,
};
use recurformer_kernels::ssd::{SsdGrads, SsdInputs, SsdShape, ssd, ssd_backward, ssd_step};
use recurformer_kernels::{Exec, naive};

const SEQ: usize = 1024;
const HEADS: usize = 3;
const DIM: usize = 64;
/// Mamba-1: as wide as the group's heads together.
const D_INNER: usize = HEADS * DIM;
const D_STATE: usize = 16;

fn main() {
    divan::main();
}

fn exec() -> Exec {
    Exec::new(1).expect("RECURFORMER_ISA names an instruction set of this CPU")
}

fn random(n: usize, low: f32, high: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    (0..n).map(|_| rng.random_range(low..=high)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

struct Ssd {
    parts: [Vec<f32>; 6],
    state: Vec<f32>,
    y: Vec<f32>,
}

impl Ssd {
    const SHAPE: SsdShape = SsdShape { seq: SEQ, heads: HEADS, d_state: DIM, head_dim: DIM };

    fn new() -> Self {
        let parts = [
            random(SEQ * HEADS * DIM, -0.1, 0.1),
            random(SEQ * DIM, -0.1, 0.1),
            random(SEQ * DIM, -1.0, 1.0),
            random(SEQ * HEADS, -0.2, -0.01),
            random(SEQ * HEADS, 0.5, 1.0),
            random(HEADS, 0.0, 1.0),
        ];
        Self { parts, state: vec![0.0; HEADS * DIM * DIM], y: vec![0.0; SEQ * HEADS * DIM] }
    }
    fn inputs(&self) -> SsdInputs<'_> {
        let [q, k, v, log_a, b, d_skip] = &self.parts;
        SsdInputs { q, k, v, log_a, b, d_skip }
    }
}

#[divan::bench]
fn ssd_chunked(bencher: Bencher) {
    let (exec, case) = (exec(), Ssd::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher
        .counter(ItemsCount::new(SEQ))
        .bench_local(|| ssd(&exec, Ssd::SHAPE, black_box(case.inputs()), &mut state, &mut y));
}

#[divan::bench]
fn ssd_steps(bencher: Bencher) {
    let (exec, case) = (exec(), Ssd::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        for (t, y) in y.chunks_exact_mut(HEADS * DIM).enumerate() {
            let inputs = SsdInputs {
                q: &case.parts[0][t * HEADS * DIM..(t + 1) * HEADS * DIM],
                k: &case.parts[1][t * DIM..(t + 1) * DIM],
                v: &case.parts[2][t * DIM..(t + 1) * DIM],
                log_a: &case.parts[3][t * HEADS..(t + 1) * HEADS],
                b: &case.parts[4][t * HEADS..(t + 1) * HEADS],
                d_skip: &case.parts[5],
            };
            ssd_step(&exec, SsdShape { seq: 1, ..Ssd::SHAPE }, black_box(inputs), &mut state, y);
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn ssd_naive(bencher: Bencher) {
    let case = Ssd::new();
    let [q, k, v, log_a, b, d_skip] = case.parts.each_ref().map(|part| wide(part));
    let data = naive::ssd::SsdData { q, k, v, log_a, b, d_skip, state: wide(&case.state) };
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| naive::ssd::ssd(Ssd::SHAPE, black_box(&data)));
}

#[divan::bench]
fn ssd_chunked_backward(bencher: Bencher) {
    let (exec, case) = (exec(), Ssd::new());
    let dy = random(case.y.len(), -1.0, 1.0);
    let mut grads = case.parts.each_ref().map(|part| vec![0.0; part.len()]);
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        let [dq, dk, dv, dlog_a, db, dd_skip] = &mut grads;
        let grads = SsdGrads { dq, dk, dv, dlog_a, db, dd_skip };
        ssd_backward(&exec, Ssd::SHAPE, black_box(case.inputs()), None, &dy, None, grads, None);
    });
}

struct Delta {
    parts: [Vec<f32>; 5],
    state: Vec<f32>,
    y: Vec<f32>,
}

impl Delta {
    const SHAPE: DeltaShape = DeltaShape { seq: SEQ, heads: HEADS, d_state: DIM, head_dim: DIM };

    fn new() -> Self {
        // Keys of norm below one.
        let parts = [
            random(SEQ * HEADS * DIM, -0.1, 0.1),
            random(SEQ * DIM, -0.12, 0.12),
            random(SEQ * DIM, -1.0, 1.0),
            random(SEQ, -0.2, -0.01),
            random(SEQ, 0.1, 0.9),
        ];
        Self { parts, state: vec![0.0; DIM * DIM], y: vec![0.0; SEQ * HEADS * DIM] }
    }
    fn inputs(&self) -> DeltaInputs<'_> {
        let [q, k, v, log_a, beta] = &self.parts;
        DeltaInputs { q, k, v, log_a, beta }
    }
}

#[divan::bench]
fn gated_delta_chunked(bencher: Bencher) {
    let (exec, case) = (exec(), Delta::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher
        .counter(ItemsCount::new(SEQ))
        .bench_local(|| gated_delta(&exec, Delta::SHAPE, black_box(case.inputs()), &mut state, &mut y));
}

#[divan::bench]
fn gated_delta_steps(bencher: Bencher) {
    let (exec, case) = (exec(), Delta::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        for (t, y) in y.chunks_exact_mut(HEADS * DIM).enumerate() {
            let inputs = DeltaInputs {
                q: &case.parts[0][t * HEADS * DIM..(t + 1) * HEADS * DIM],
                k: &case.parts[1][t * DIM..(t + 1) * DIM],
                v: &case.parts[2][t * DIM..(t + 1) * DIM],
                log_a: &case.parts[3][t..t + 1],
                beta: &case.parts[4][t..t + 1],
            };
            gated_delta_step(&exec, DeltaShape { seq: 1, ..Delta::SHAPE }, black_box(inputs), &mut state, y);
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn gated_delta_naive(bencher: Bencher) {
    let case = Delta::new();
    let [q, k, v, log_a, beta] = case.parts.each_ref().map(|part| wide(part));
    let data = naive::gated_delta::DeltaData { q, k, v, log_a, beta, state: wide(&case.state) };
    bencher
        .counter(ItemsCount::new(SEQ))
        .bench_local(|| naive::gated_delta::gated_delta(Delta::SHAPE, black_box(&data)));
}

#[divan::bench]
fn gated_delta_chunked_backward(bencher: Bencher) {
    let (exec, case) = (exec(), Delta::new());
    let dy = random(case.y.len(), -1.0, 1.0);
    let mut grads = case.parts.each_ref().map(|part| vec![0.0; part.len()]);
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    let saved = gated_delta_train(&exec, Delta::SHAPE, case.inputs(), &mut state, &mut y);
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        let [dq, dk, dv, dlog_a, dbeta] = &mut grads;
        let grads = DeltaGrads { dq, dk, dv, dlog_a, dbeta };
        gated_delta_backward(&exec, Delta::SHAPE, black_box(case.inputs()), &saved, &dy, None, grads, None);
    });
}

struct Scan {
    parts: [Vec<f32>; 6],
    state: Vec<f32>,
    y: Vec<f32>,
}

impl Scan {
    const SHAPE: ScanShape = ScanShape { seq: SEQ, d_inner: D_INNER, d_state: D_STATE };

    fn new() -> Self {
        let parts = [
            random(SEQ * D_INNER, -1.0, 1.0),
            random(SEQ * D_INNER, 1e-3, 0.1),
            random(D_INNER * D_STATE, -16.0, -1.0),
            random(SEQ * D_STATE, -1.0, 1.0),
            random(SEQ * D_STATE, -1.0, 1.0),
            random(D_INNER, 0.0, 1.0),
        ];
        Self { parts, state: vec![0.0; D_INNER * D_STATE], y: vec![0.0; SEQ * D_INNER] }
    }
    fn inputs(&self) -> ScanInputs<'_> {
        let [u, delta, a, b, c, d] = &self.parts;
        ScanInputs { u, delta, a, b, c, d }
    }
}

#[divan::bench]
fn scan_sequence(bencher: Bencher) {
    let (exec, case) = (exec(), Scan::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher
        .counter(ItemsCount::new(SEQ))
        .bench_local(|| selective_scan(&exec, Scan::SHAPE, black_box(case.inputs()), &mut state, &mut y));
}

#[divan::bench]
fn scan_steps(bencher: Bencher) {
    let (exec, case) = (exec(), Scan::new());
    let (mut state, mut y) = (case.state.clone(), case.y.clone());
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        for (t, y) in y.chunks_exact_mut(D_INNER).enumerate() {
            let inputs = ScanInputs {
                u: &case.parts[0][t * D_INNER..(t + 1) * D_INNER],
                delta: &case.parts[1][t * D_INNER..(t + 1) * D_INNER],
                b: &case.parts[3][t * D_STATE..(t + 1) * D_STATE],
                c: &case.parts[4][t * D_STATE..(t + 1) * D_STATE],
                ..case.inputs()
            };
            selective_scan_step(&exec, ScanShape { seq: 1, ..Scan::SHAPE }, black_box(inputs), &mut state, y);
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn scan_naive(bencher: Bencher) {
    let case = Scan::new();
    let [u, delta, a, b, c, d] = case.parts.each_ref().map(|part| wide(part));
    let data = naive::scan::ScanData { u, delta, a, b, c, d, state: wide(&case.state) };
    bencher
        .counter(ItemsCount::new(SEQ))
        .bench_local(|| naive::scan::selective_scan(Scan::SHAPE, black_box(&data)));
}

#[divan::bench]
fn scan_backward(bencher: Bencher) {
    let (exec, case) = (exec(), Scan::new());
    let dy = random(case.y.len(), -1.0, 1.0);
    let mut grads = case.parts.each_ref().map(|part| vec![0.0; part.len()]);
    bencher.counter(ItemsCount::new(SEQ)).bench_local(|| {
        let [du, ddelta, da, db, dc, dd] = &mut grads;
        let grads = ScanGrads { du, ddelta, da, db, dc, dd };
        selective_scan_backward(&exec, Scan::SHAPE, black_box(case.inputs()), None, &dy, None, grads, None);
    });
}
