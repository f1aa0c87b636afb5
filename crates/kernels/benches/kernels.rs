//! Fast kernels beside their naive references, on one thread, with each instruction set of this CPU:
//! `cargo bench -p recurformer-kernels`. The ratio of a `fast` to a `naive` row is the speed-up.

use divan::{Bencher, black_box};
use kernels::attention::{AttnMask, AttnSaved, AttnShape};
use kernels::{Exec, Isa, MatMut, MatRef, Store, Trans};
use recurformer_kernels as kernels;

fn main() {
    divan::main();
}

fn isas() -> Vec<String> {
    Isa::available().iter().map(|isa| isa.name().to_string()).collect()
}

fn exec(isa: &str) -> Exec {
    Exec::with_isa(1, Isa::named(isa).expect("listed as available")).expect("one thread needs no pool")
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1000) as f32 * 2e-3 - 1.0).collect()
}

fn values_f64(n: usize) -> Vec<f64> {
    values(n).into_iter().map(f64::from).collect()
}

#[divan::bench_group(sample_count = 20)]
mod gemm {
    use super::*;

    /// Rows × output features × input features: a prefill chunk and one decoded token of a small model's MLP.
    const SHAPES: [(usize, usize, usize); 2] = [(256, 1536, 576), (1, 1536, 576)];

    fn fast(bencher: Bencher<'_, '_>, isa: &str, (m, n, k): (usize, usize, usize)) {
        let (exec, a, b, mut out) = (exec(isa), values(m * k), values(n * k), vec![0.0; m * n]);
        bencher.counter(divan::counter::ItemsCount::new(m * n * k)).bench_local(|| {
            let (a, b) = (MatRef::dense(&a, m, k), MatRef::dense(&b, n, k));
            let dst = MatMut::dense(&mut out, m, n);
            kernels::gemm(&exec, dst, a, Trans::No, b, Trans::Yes, 1.0, Store::Overwrite);
        });
    }

    fn naive(bencher: Bencher<'_, '_>, (m, n, k): (usize, usize, usize)) {
        let (a, b) = (values_f64(m * k), values_f64(n * k));
        bencher.counter(divan::counter::ItemsCount::new(m * n * k)).bench_local(|| {
            black_box(kernels::naive::gemm::gemm(m, n, k, &a, Trans::No, &b, Trans::Yes, 1.0))
        });
    }

    #[divan::bench(args = isas())]
    fn prefill_fast(bencher: Bencher<'_, '_>, isa: &str) {
        fast(bencher, isa, SHAPES[0]);
    }
    #[divan::bench(sample_count = 2)]
    fn prefill_naive(bencher: Bencher<'_, '_>) {
        naive(bencher, SHAPES[0]);
    }
    #[divan::bench(args = isas())]
    fn decode_fast(bencher: Bencher<'_, '_>, isa: &str) {
        fast(bencher, isa, SHAPES[1]);
    }
    #[divan::bench]
    fn decode_naive(bencher: Bencher<'_, '_>) {
        naive(bencher, SHAPES[1]);
    }
}

#[divan::bench_group(sample_count = 5)]
mod attention {
    use super::*;

    const SHAPE: AttnShape = AttnShape { q_heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125 };
    const WIDTH: usize = 9 * 64;
    const KV_WIDTH: usize = 3 * 64;

    fn forward(bencher: Bencher<'_, '_>, isa: &str, q_len: usize, kv_len: usize) {
        let exec = exec(isa);
        let (q, k, v) = (values(q_len * WIDTH), values(kv_len * KV_WIDTH), values(kv_len * KV_WIDTH));
        let mut out = vec![0.0; q.len()];
        bencher.bench_local(|| {
            let q = MatRef::dense(&q, q_len, WIDTH);
            let (k, v) = (MatRef::dense(&k, kv_len, KV_WIDTH), MatRef::dense(&v, kv_len, KV_WIDTH));
            let mask = AttnMask::Causal { q_pos0: kv_len - q_len };
            let out = MatMut::dense(&mut out, q_len, WIDTH);
            kernels::attention::attention(&exec, SHAPE, mask, q, k, v, out, None);
        });
    }

    #[divan::bench(args = isas())]
    fn prefill_1024_fast(bencher: Bencher<'_, '_>, isa: &str) {
        forward(bencher, isa, 1024, 1024);
    }
    #[divan::bench(sample_count = 1)]
    fn prefill_1024_naive(bencher: Bencher<'_, '_>) {
        let (q, k, v) = (values_f64(1024 * WIDTH), values_f64(1024 * KV_WIDTH), values_f64(1024 * KV_WIDTH));
        let x = kernels::naive::attention::Inputs { q: &q, k: &k, v: &v };
        let mask = AttnMask::Causal { q_pos0: 0 };
        bencher.bench_local(|| black_box(kernels::naive::attention::attention(SHAPE, mask, x)));
    }
    #[divan::bench(args = isas())]
    fn prefill_4096_fast(bencher: Bencher<'_, '_>, isa: &str) {
        forward(bencher, isa, 4096, 4096);
    }
    #[divan::bench(args = isas(), sample_count = 50)]
    fn decode_8192_fast(bencher: Bencher<'_, '_>, isa: &str) {
        forward(bencher, isa, 1, 8192);
    }
    #[divan::bench]
    fn decode_8192_naive(bencher: Bencher<'_, '_>) {
        let (q, k, v) = (values_f64(WIDTH), values_f64(8192 * KV_WIDTH), values_f64(8192 * KV_WIDTH));
        let x = kernels::naive::attention::Inputs { q: &q, k: &k, v: &v };
        let mask = AttnMask::Causal { q_pos0: 8191 };
        bencher.bench_local(|| black_box(kernels::naive::attention::attention(SHAPE, mask, x)));
    }
    #[divan::bench(args = isas())]
    fn backward_1024_fast(bencher: Bencher<'_, '_>, isa: &str) {
        let (exec, n) = (exec(isa), 1024);
        let (q, k, v) = (values(n * WIDTH), values(n * KV_WIDTH), values(n * KV_WIDTH));
        let (mut out, mut lse) = (vec![0.0; n * WIDTH], vec![0.0; n * 9]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let (q, mask) = (MatRef::dense(&q, n, WIDTH), AttnMask::Causal { q_pos0: 0 });
        let (k, v) = (MatRef::dense(&k, n, KV_WIDTH), MatRef::dense(&v, n, KV_WIDTH));
        let dst = MatMut::dense(&mut out, n, WIDTH);
        kernels::attention::attention(&exec, SHAPE, mask, q, k, v, dst, Some(&mut lse));
        let out = MatRef::dense(&out, n, WIDTH);
        let saved = AttnSaved { q, k, v, out, lse: &lse, dout: q, dlse: None };
        bencher.bench_local(|| {
            kernels::attention::attention_backward(&exec, SHAPE, mask, saved, &mut dq, &mut dk, &mut dv);
        });
    }
}

#[divan::bench_group(sample_count = 50)]
mod elementwise {
    use super::*;
    use kernels::elementwise;
    use kernels::naive::elementwise as reference;

    const ROWS: usize = 256;

    #[divan::bench(args = isas())]
    fn rms_norm_fast(bencher: Bencher<'_, '_>, isa: &str) {
        let (exec, x, w) = (exec(isa), values(ROWS * 576), values(576));
        let mut out = vec![0.0; x.len()];
        bencher.bench_local(|| elementwise::rms_norm(&exec, &x, &w, 1e-5, &mut out));
    }
    #[divan::bench]
    fn rms_norm_naive(bencher: Bencher<'_, '_>) {
        let (x, w) = (values_f64(ROWS * 576), values_f64(576));
        bencher.bench_local(|| black_box(reference::rms_norm(&x, &w, 1e-5)));
    }
    #[divan::bench(args = isas())]
    fn swiglu_fast(bencher: Bencher<'_, '_>, isa: &str) {
        let (exec, x) = (exec(isa), values(ROWS * 1536));
        let mut out = vec![0.0; x.len()];
        bencher.bench_local(|| elementwise::swiglu(&exec, &x, &x, &mut out));
    }
    #[divan::bench]
    fn swiglu_naive(bencher: Bencher<'_, '_>) {
        let x = values_f64(ROWS * 1536);
        bencher.bench_local(|| black_box(reference::swiglu(&x, &x)));
    }
    #[divan::bench(args = isas())]
    fn cross_entropy_fast(bencher: Bencher<'_, '_>, isa: &str) {
        let (exec, x, targets) = (exec(isa), values(16 * 49152), [5; 16]);
        let (mut nll, mut dx) = (vec![0.0; 16], vec![0.0; x.len()]);
        bencher.bench_local(|| {
            kernels::loss::cross_entropy(&exec, &x, 49152, &targets, 1.0, &mut nll, Some(&mut dx));
        });
    }
    #[divan::bench(sample_count = 5)]
    fn cross_entropy_naive(bencher: Bencher<'_, '_>) {
        let x = values_f64(16 * 49152);
        bencher.bench_local(|| {
            x.chunks(49152).for_each(|x| drop(black_box(kernels::naive::loss::cross_entropy(x, 5))));
        });
    }
}
