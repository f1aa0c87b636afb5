//! Attention over the KV cache of a 30-layer model with 9 query and 3 KV heads of 64, two threads, every cache type:
//! `cargo bench -p recurformer-kernels --bench kv`. Beside it the kernel that training uses, and the naive reference.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use kernels::attention::{AttnMask, AttnShape};
use kernels::kv::{AttendJob, AttendScratch, KvStore, KvType, attend};
use kernels::{Exec, MatMut, MatRef};
use recurformer_kernels as kernels;

fn main() {
    divan::main();
}

const LAYERS: usize = 30;
const GROUP: usize = 3;
const HEAD_DIM: usize = 64;
const SCALE: f32 = 0.125;
const KINDS: [&str; 4] = ["f32", "f16", "bf16", "q8"];

fn exec() -> Exec {
    Exec::new(2).expect("two threads and a known instruction set")
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1000) as f32 * 2e-3 - 1.0).collect()
}

fn store(exec: &Exec, kind: &str, kv_heads: usize, len: usize) -> KvStore {
    let (kind, width) = (KvType::parse(kind).expect("a cache type"), kv_heads * HEAD_DIM);
    let x = values(len * width);
    let mut store = KvStore::new(kind, kv_heads, HEAD_DIM);
    store.append(exec, MatRef::dense(&x, len, width), MatRef::dense(&x, len, width));
    store
}

fn columns(kv_heads: usize) -> Vec<usize> {
    (0..kv_heads).map(|head| head * GROUP * HEAD_DIM).collect()
}

/// One token through all layers, whose caches are streamed one after another. Bytes are those of the pages.
fn decode(bencher: Bencher<'_, '_>, kind: &str, kv_heads: usize, len: usize) {
    let exec = exec();
    let stores: Vec<KvStore> = (0..LAYERS).map(|_| store(&exec, kind, kv_heads, len)).collect();
    let width = kv_heads * GROUP * HEAD_DIM;
    let (q, mut out, columns) = (values(width), vec![0.0; width], columns(kv_heads));
    let mut scratch = AttendScratch::new();
    let kind = stores[0].kv_type();
    let bytes = LAYERS * KvStore::bytes_for(kind, kv_heads, HEAD_DIM, 256) * len / 256;
    bencher.counter(BytesCount::new(bytes)).bench_local(|| {
        for store in &stores {
            let (q, out) = (MatRef::dense(&q, 1, width), MatMut::dense(&mut out, 1, width));
            let job = AttendJob { store, q, out, out_columns: &columns, window: None, lse: None };
            attend(&exec, GROUP, SCALE, &mut [job], &mut scratch);
        }
    });
}

#[divan::bench(args = KINDS, consts = [512, 2048, 7900], sample_count = 30)]
fn decode_3_heads<const LEN: usize>(bencher: Bencher<'_, '_>, kind: &str) {
    decode(bencher, kind, 3, LEN);
}
#[divan::bench(args = ["f16", "q8"], consts = [512, 7900], sample_count = 30)]
fn decode_1_head<const LEN: usize>(bencher: Bencher<'_, '_>, kind: &str) {
    decode(bencher, kind, 1, LEN);
}

const ROWS: usize = 512;

/// Floating-point operations that the visible pairs of a prefill chunk need, as items.
fn operations(depth: usize) -> ItemsCount {
    ItemsCount::new((ROWS * depth + ROWS * (ROWS + 1) / 2) * 9 * 4 * HEAD_DIM)
}

/// 512 rows of one layer at a depth; items are floating-point operations.
#[divan::bench(args = KINDS, consts = [0, 2048, 4096, 7900], sample_count = 10)]
fn prefill_512_rows<const DEPTH: usize>(bencher: Bencher<'_, '_>, kind: &str) {
    let exec = exec();
    let store = store(&exec, kind, 3, DEPTH + ROWS);
    let (q, mut out, columns) = (values(ROWS * 576), vec![0.0; ROWS * 576], columns(3));
    let mut scratch = AttendScratch::new();
    bencher.counter(operations(DEPTH)).bench_local(|| {
        let (q, out) = (MatRef::dense(&q, ROWS, 576), MatMut::dense(&mut out, ROWS, 576));
        let job = AttendJob { store: &store, q, out, out_columns: &columns, window: None, lse: None };
        attend(&exec, GROUP, SCALE, &mut [job], &mut scratch);
    });
}

/// The kernel over dense `f32` keys and values.
fn training_kernel(exec: &Exec, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
    let (rows, len) = (q.len() / 576, k.len() / 192);
    let shape = AttnShape { q_heads: 9, kv_heads: 3, head_dim: HEAD_DIM, scale: SCALE };
    let mask = AttnMask::Causal { q_pos0: len - rows };
    let (q, out) = (MatRef::dense(q, rows, 576), MatMut::dense(out, rows, 576));
    kernels::attention::attention(
        exec,
        shape,
        mask,
        q,
        MatRef::dense(k, len, 192),
        MatRef::dense(v, len, 192),
        out,
        None,
    );
}

#[divan::bench(args = [512, 2048, 7900], sample_count = 5)]
fn decode_training_kernel(bencher: Bencher<'_, '_>, len: usize) {
    let exec = exec();
    let layers: Vec<Vec<f32>> = (0..LAYERS).map(|_| values(len * 192)).collect();
    let (q, mut out) = (values(576), vec![0.0; 576]);
    bencher.counter(BytesCount::new(LAYERS * len * 192 * 4 * 2)).bench_local(|| {
        // The values of a layer are the keys of another: as much memory as a layer of its own.
        for (i, k) in layers.iter().enumerate() {
            training_kernel(&exec, &q, k, &layers[(i + LAYERS / 2) % LAYERS], &mut out);
        }
    });
}
#[divan::bench(args = [0, 2048, 7900], sample_count = 5)]
fn prefill_training_kernel(bencher: Bencher<'_, '_>, depth: usize) {
    let (exec, kv) = (exec(), values((depth + ROWS) * 192));
    let (q, mut out) = (values(ROWS * 576), vec![0.0; ROWS * 576]);
    bencher.counter(operations(depth)).bench_local(|| training_kernel(&exec, &q, &kv, &kv, &mut out));
}

#[divan::bench(sample_count = 1)]
fn decode_naive_2048_one_layer(bencher: Bencher<'_, '_>) {
    let exec = exec();
    let (store, q) = (store(&exec, "f16", 3, 2048), values(576));
    let q = MatRef::dense(&q, 1, 576);
    bencher.bench_local(|| black_box(kernels::naive::kv::attend(&store, q, GROUP, SCALE, None)));
}

#[divan::bench(args = KINDS, sample_count = 30)]
fn append_512_rows_one_layer(bencher: Bencher<'_, '_>, kind: &str) {
    let (exec, x) = (exec(), values(ROWS * 192));
    let mut store = store(&exec, kind, 3, ROWS);
    let counter = BytesCount::new(x.len() * 2 * 4);
    bencher.counter(counter).bench_local(|| {
        store.truncate(0);
        store.append(&exec, MatRef::dense(&x, ROWS, 192), MatRef::dense(&x, ROWS, 192));
    });
}
#[divan::bench(args = KINDS, sample_count = 100)]
fn append_1_row_30_layers(bencher: Bencher<'_, '_>, kind: &str) {
    let (exec, x) = (exec(), values(192));
    let mut stores: Vec<KvStore> = (0..LAYERS).map(|_| store(&exec, kind, 3, 1)).collect();
    bencher.bench_local(|| {
        for store in &mut stores {
            store.truncate(1);
            store.append(&exec, MatRef::dense(&x, 1, 192), MatRef::dense(&x, 1, 192));
        }
    });
}
