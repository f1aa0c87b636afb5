//! Short measurements of this machine for `doctor`: what the kernels could reach, not what a model reaches.

use std::time::Instant;

use crate::isa::dispatch;
use crate::simd;
use crate::{Exec, MatMut, MatRef, Store, Trans, gemm};

/// Side of the square product that [`gemm_gflops`] times.
const SIDE: usize = 768;
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
