//! Short measurements of this machine for `doctor`: what the kernels could reach, not what a model reaches.

use std::time::Instant;

use crate::isa::dispatch;
use crate::packed::{self, Input, Packed, Rows};
use crate::quant::Dtype;
use crate::simd;
use crate::{Exec, KernelError, MatMut, MatRef, Store, Trans, gemm};

/// Side of the square product that [`gemm_gflops`] times.
const SIDE: usize = 768;
/// Tokens × output features × input features of the product that [`packed_gflops`] times: a prompt through a layer.
const PACKED_SHAPE: (usize, usize, usize) = (512, 1536, 576);
/// Values that [`read_gigabytes_per_second`] streams: 256 MiB, beyond common caches.
const STREAM: usize = 64 << 20;
/// Repetitions, of which the fastest counts.
const REPEATS: usize = 8;

/// The shortest of [`REPEATS`] runs after a warm-up, in seconds.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    let times = (0..REPEATS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE)
}

/// Measured speed of an f32 matrix product of 768³ in 10⁹ floating-point operations per second.
pub fn gemm_gflops(exec: &Exec) -> f64 {
    let a: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 17) as f32 * 0.01).collect();
    let mut out = vec![0.0; SIDE * SIDE];
    let seconds = fastest(|| {
        let (out, a) = (MatMut::dense(&mut out, SIDE, SIDE), MatRef::dense(&a, SIDE, SIDE));
        gemm(exec, out, a, Trans::No, a, Trans::Yes, 1.0, Store::Overwrite);
    });
    std::hint::black_box(&out);
    2.0 * (SIDE as f64).powi(3) / seconds / 1e9
}

/// Measured speed of a product of 512 tokens with a packed weight matrix of type `dtype`, in 10⁹ operations (multiply
/// and add count as two) per second. Preparing the activations, as a model does once per layer input, is included.
///
/// # Errors
/// As [`Packed::pack`].
pub fn packed_gflops(exec: &Exec, dtype: Dtype) -> Result<f64, KernelError> {
    let (m, n, k) = PACKED_SHAPE;
    let values = |len: usize| (0..len).map(|i| ((i * 7919) % 1000) as f32 * 2e-3 - 1.0).collect::<Vec<f32>>();
    let bytes: Vec<u8> = values(n * k).into_iter().flat_map(f32::to_le_bytes).collect();
    let ids: Vec<u32> = (0..n as u32).collect();
    let weight =
        Packed::pack(exec, dtype, k, &[Rows { dtype: Dtype::F32, bytes: &bytes, cols: k, ids: &ids }])?;
    let (x, mut input, mut out) = (values(m * k), Input::new(), vec![0.0; m * n]);
    let seconds = fastest(|| {
        input.set(exec, MatRef::dense(&x, m, k), &[&weight]);
        let out = MatMut::dense(&mut out, m, n);
        let product = packed::Product { weight: &weight, bias: None, out, store: Store::Overwrite };
        packed::matmul(exec, &input, &mut [product]);
    });
    std::hint::black_box(&out);
    Ok(2.0 * (m * n * k) as f64 / seconds / 1e9)
}

/// Measured time of an almost empty parallel region in seconds, workers awake: what splitting work costs.
pub fn region_seconds(exec: &Exec) -> f64 {
    const REGIONS: usize = 10_000;
    fastest(|| (0..REGIONS).for_each(|_| exec.parallel_for(exec.threads(), |i| _ = std::hint::black_box(i))))
        / REGIONS as f64
}

/// Measured speed of reading 256 MiB once with all threads, in 10⁹ bytes per second: the bound on decoding.
pub fn read_gigabytes_per_second(exec: &Exec) -> f64 {
    let data = vec![1.0f32; STREAM];
    let chunk = STREAM / 64;
    let seconds = fastest(|| {
        let sums = exec.parallel_map(STREAM / chunk, |i| {
            let data = &data[i * chunk..][..chunk];
            dispatch!(exec.isa(), |s| simd::sum(s, data))
        });
        std::hint::black_box(sums);
    });
    (STREAM * size_of::<f32>()) as f64 / seconds / 1e9
}
