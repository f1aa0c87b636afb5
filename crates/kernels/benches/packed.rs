//! Products with packed weights beside the `gemm` crate in f32 and the naive definition, with all threads:
//! `cargo bench -p recurformer-kernels --bench packed`. One item is one multiply-add (2 floating-point operations).

use std::cell::Cell;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use kernels::packed::{Input, Packed, Product, Rows, matmul, matmul_swiglu};
use kernels::quant::Dtype;
use kernels::{Exec, MatMut, MatRef, Store, Trans};
use recurformer_kernels as kernels;

fn main() {
    divan::main();
}

const PLAIN: [&str; 3] = ["F32", "F16", "BF16"];
const ALL: [&str; 11] =
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"];

fn dtype(name: &str) -> Dtype {
    use Dtype::*;
    let all = [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K];
    all.into_iter().find(|dtype| dtype.name() == name).expect("a listed name")
}

fn exec() -> Exec {
    Exec::new(0).expect("threads start")
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1000) as f32 * 2e-3 - 1.0).collect()
}

fn packed(exec: &Exec, dtype: Dtype, n: usize, k: usize) -> Packed {
    let bytes: Vec<u8> = values(n * k).iter().flat_map(|v| v.to_le_bytes()).collect();
    let ids: Vec<u32> = (0..n as u32).collect();
    let rows = Rows { dtype: Dtype::F32, bytes: &bytes, cols: k, ids: &ids };
    Packed::pack(exec, dtype, k, &[rows]).expect("finite values")
}

/// Weights `[n, k]`, together beyond the last-level cache; each run takes the next one.
fn decode(bencher: Bencher<'_, '_>, name: &str, m: usize, n: usize, k: usize, bytes: usize) {
    let exec = exec();
    let first = packed(&exec, dtype(name), n, k);
    let count = (bytes / first.bytes()).max(1);
    let mut weights = vec![first];
    weights.extend((1..count).map(|_| packed(&exec, dtype(name), n, k)));
    let (x, mut out) = (values(m * k), vec![0.0; m * n]);
    let mut input = Input::new();
    input.set(&exec, MatRef::dense(&x, m, k), &[&weights[0]]);
    let next = Cell::new(0);
    bencher.counter(ItemsCount::new(m * n * k)).counter(BytesCount::new(weights[0].bytes())).bench_local(
        || {
            let weight = &weights[next.replace((next.get() + 1) % count)];
            let out = MatMut::dense(&mut out, m, n);
            matmul(&exec, &input, &mut [Product { weight, bias: None, out, store: Store::Overwrite }]);
        },
    );
}

/// The output projection of one token: read from memory once.
#[divan::bench(args = ALL, sample_count = 20)]
fn decode_vocabulary(bencher: Bencher<'_, '_>, name: &str) {
    decode(bencher, name, 1, 49152, 768, 0);
}

/// One MLP matrix after another for one token.
#[divan::bench(args = ALL, sample_count = 300)]
fn decode_layers(bencher: Bencher<'_, '_>, name: &str) {
    decode(bencher, name, 1, 1536, 768, 128 << 20);
}

/// The same for four tokens of as many sequences.
#[divan::bench(args = ALL, sample_count = 300)]
fn decode_four(bencher: Bencher<'_, '_>, name: &str) {
    decode(bencher, name, 4, 1536, 768, 128 << 20);
}

/// A prompt of 512 tokens; conversion of the activations included.
#[divan::bench(args = ALL, sample_count = 20)]
fn prefill(bencher: Bencher<'_, '_>, name: &str) {
    let (m, n, k) = (512, 1536, 768);
    let exec = exec();
    let weight = packed(&exec, dtype(name), n, k);
    let (x, mut out) = (values(m * k), vec![0.0; m * n]);
    let mut input = Input::new();
    bencher.counter(ItemsCount::new(m * n * k)).bench_local(|| {
        input.set(&exec, MatRef::dense(&x, m, k), &[&weight]);
        let out = MatMut::dense(&mut out, m, n);
        matmul(&exec, &input, &mut [Product { weight: &weight, bias: None, out, store: Store::Overwrite }]);
    });
}

/// The MLP's first half of a prompt of 512 tokens.
#[divan::bench(args = PLAIN, sample_count = 20)]
fn prefill_swiglu(bencher: Bencher<'_, '_>, name: &str) {
    let (m, n, k) = (512, 1536, 768);
    let exec = exec();
    let (gate, up) = (packed(&exec, dtype(name), n, k), packed(&exec, dtype(name), n, k));
    let (x, norm, mut out) = (values(m * k), values(k), vec![0.0; m * n]);
    let mut input = Input::new();
    bencher.counter(ItemsCount::new(2 * m * n * k)).bench_local(|| {
        input.set_rms_norm(&exec, MatRef::dense(&x, m, k), &norm, 1e-5, &[&gate, &up]);
        matmul_swiglu(&exec, &input, &gate, &up, MatMut::dense(&mut out, m, n));
    });
}

/// The same product with f32 weights as stored.
#[divan::bench(sample_count = 20)]
fn prefill_gemm(bencher: Bencher<'_, '_>) {
    let (m, n, k) = (512, 1536, 768);
    let exec = exec();
    let (a, b, mut out) = (values(m * k), values(n * k), vec![0.0; m * n]);
    bencher.counter(ItemsCount::new(m * n * k)).bench_local(|| {
        let (a, b) = (MatRef::dense(&a, m, k), MatRef::dense(&b, n, k));
        let out = MatMut::dense(&mut out, m, n);
        kernels::gemm(&exec, out, a, Trans::No, b, Trans::Yes, 1.0, Store::Overwrite);
    });
}

/// The definition, in f64, for a sixteenth of the rows.
#[divan::bench(sample_count = 2)]
fn prefill_naive(bencher: Bencher<'_, '_>) {
    let (m, n, k) = (32, 1536, 768);
    let a: Vec<f64> = values(m * k).into_iter().map(f64::from).collect();
    let b: Vec<f64> = values(n * k).into_iter().map(f64::from).collect();
    bencher
        .counter(ItemsCount::new(m * n * k))
        .bench_local(|| black_box(kernels::naive::packed::matmul(m, n, k, &a, &b, None)));
}
