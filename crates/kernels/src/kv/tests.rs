use super::*;
use crate::testing::{assert_close, execs_and_modelled_amx as execs, noise};
use crate::{Exec, IsaLevel, naive};

/// f32 products over 513 keys, and 2^x to 2 ulp of scores of a few units.
const F32_TOLERANCE: f64 = 3e-6;
/// Query, key, weight and value rounded to bfloat16 (2⁻⁹ each) against averages of values up to 1.
const BF16_TOLERANCE: f64 = 4e-3;

#[derive(Clone, Copy, Debug)]
struct Shape {
    kind: KvType,
    kv_heads: usize,
    group: usize,
    dim: usize,
}

impl Shape {
    fn scale(self) -> f32 {
        (self.dim as f32).powf(-0.5)
    }
    /// A store of `len` positions; unused slots hold NaN.
    fn store(self, exec: &Exec, len: usize, chunk: usize) -> KvStore {
        let width = self.kv_heads * self.dim;
        let (k, v) = (noise(1, len * width), noise(2, len * width));
        let mut store = KvStore::new(self.kind, self.kv_heads, self.dim);
        for first in (0..len).step_by(chunk) {
            let rows = chunk.min(len - first);
            let part = |x| MatRef::dense(x, len, width).rows_at(first, rows);
            store.append(exec, part(&k), part(&v));
            store.poison();
        }
        store
    }
    fn tolerance(self, exec: &Exec, t: usize, window: Option<Window>) -> f64 {
        let pairs = exec.isa().level() >= IsaLevel::Avx512Bf16
            && self.kind != KvType::F32
            && (t > 4 || window.is_some());
        if pairs { BF16_TOLERANCE } else { F32_TOLERANCE }
    }
    fn q_width(self) -> usize {
        self.kv_heads * self.group * self.dim
    }
}

/// One job with dense output, heads in order.
fn attend_one(
    exec: &Exec,
    shape: Shape,
    store: &KvStore,
    q: &[f32],
    window: Option<Window>,
    scratch: &mut AttendScratch,
) -> Vec<f32> {
    attend_with(exec, shape, store, q, window, None, scratch)
}

fn attend_with(
    exec: &Exec,
    shape: Shape,
    store: &KvStore,
    q: &[f32],
    window: Option<Window>,
    lse: Option<&mut [f32]>,
    scratch: &mut AttendScratch,
) -> Vec<f32> {
    let width = shape.q_width();
    let t = q.len() / width;
    let mut out = vec![f32::NAN; q.len()];
    let columns: Vec<usize> = (0..shape.kv_heads).map(|h| h * shape.group * shape.dim).collect();
    let job = AttendJob {
        store,
        q: MatRef::dense(q, t, width),
        out: MatMut::dense(&mut out, t, width),
        out_columns: &columns,
        window,
        lse,
    };
    attend(exec, shape.group, shape.scale(), &mut [job], scratch);
    out
}

fn check(exec: &Exec, shape: Shape, len: usize, t: usize, scratch: &mut AttendScratch) {
    check_seen(exec, shape, len, t, None, scratch);
}

fn check_seen(
    exec: &Exec,
    shape: Shape,
    len: usize,
    t: usize,
    window: Option<Window>,
    scratch: &mut AttendScratch,
) {
    let store = shape.store(exec, len, len);
    let q = noise(3, t * shape.q_width());
    let mut lse = vec![f32::NAN; q.len() / shape.dim];
    let got = attend_with(exec, shape, &store, &q, window, Some(&mut lse), scratch);
    assert!(got == attend_one(exec, shape, &store, &q, window, scratch));
    let q = MatRef::dense(&q, t, shape.q_width());
    let (want, want_lse) = naive::kv::attend(&store, q, shape.group, shape.scale(), window);
    let what = format!("{} {shape:?} len {len} t {t} {window:?}", exec.isa());
    assert_close(&what, &got, &want, shape.tolerance(exec, t, window));
    assert_close(&format!("lse {what}"), &lse, &want_lse, shape.tolerance(exec, t, window));
}

#[test]
fn agrees_with_naive_at_odd_lengths() {
    let mut scratch = AttendScratch::new();
    for exec in execs() {
        for kind in KvType::ALL {
            let shape = Shape { kind, kv_heads: 2, group: 3, dim: 64 };
            for len in [1, 2, 15, 16, 17, 63, 127, 128, 129, 255, 256, 257, 500, 513] {
                for t in [0, 1, 2, 3, 4, 5, 17, 65] {
                    if t <= len {
                        check(&exec, shape, len, t, &mut scratch);
                    }
                }
                if len <= 257 {
                    check(&exec, shape, len, len, &mut scratch);
                }
            }
        }
    }
}

#[test]
fn windows_agree_with_naive_at_odd_lengths() {
    let mut scratch = AttendScratch::new();
    for exec in execs() {
        for kind in KvType::ALL {
            let shape = Shape { kind, kv_heads: 2, group: 3, dim: 32 };
            for (tokens, sinks) in [(64, 1), (64, 0), (1, 0), (1, 4), (16, 3), (130, 130), (7, 300)] {
                let window = Some(Window { tokens, sinks });
                for (len, t) in [(1, 1), (40, 40), (65, 3), (129, 128), (300, 1), (300, 257), (577, 512)] {
                    check_seen(&exec, shape, len, t, window, &mut scratch);
                }
            }
        }
    }
}

#[test]
fn a_window_of_everything_changes_no_bit() {
    for exec in execs() {
        let shape = Shape { kind: KvType::F16, kv_heads: 1, group: 3, dim: 64 };
        let (store, q) = (shape.store(&exec, 300, 300), noise(3, 200 * shape.q_width()));
        let mut scratch = AttendScratch::new();
        let all = attend_one(&exec, shape, &store, &q, None, &mut scratch);
        let window = Some(Window { tokens: 300, sinks: 0 });
        assert!(attend_one(&exec, shape, &store, &q, window, &mut scratch) == all, "{}", exec.isa());
    }
}

#[test]
fn agrees_with_naive_for_any_heads() {
    let mut scratch = AttendScratch::new();
    for exec in execs() {
        for kind in KvType::ALL {
            for (kv_heads, group, dim) in [
                (1, 1, 64),
                (1, 3, 64),
                (3, 4, 64),
                (3, 1, 16),
                (2, 3, 80),
                (1, 9, 24),
                (2, 4, 10),
                (1, 5, 128),
            ] {
                let shape = Shape { kind, kv_heads, group, dim };
                for (len, t) in [(7, 7), (40, 1), (301, 1), (300, 3), (301, 5), (130, 64), (257, 33)] {
                    check(&exec, shape, len, t, &mut scratch);
                }
            }
        }
    }
}

#[test]
fn threads_chunks_and_neighbours_do_not_change_a_bit() {
    for isa in crate::Isa::available() {
        let execs = [1, 2, 3].map(|threads| Exec::with_isa(threads, isa).unwrap());
        for kind in KvType::ALL {
            let shape = Shape { kind, kv_heads: 2, group: 3, dim: 64 };
            let mut scratch = AttendScratch::new();
            let (len, width) = (700, shape.q_width());
            let store = shape.store(&execs[0], len, len);
            let q = noise(3, len * width);
            let full = attend_one(&execs[0], shape, &store, &q, None, &mut scratch);
            for exec in &execs {
                assert!(attend_one(exec, shape, &store, &q, None, &mut scratch) == full, "{isa} {kind:?}");
                // Growing as a chunked prefill does.
                for chunk in [64, 257] {
                    let grown = shape.store(exec, len, chunk);
                    for first in (0..len - 5).step_by(chunk) {
                        let end = len.min(first + chunk);
                        let mut part = grown.clone();
                        part.truncate(end);
                        part.poison();
                        let got = attend_one(
                            exec,
                            shape,
                            &part,
                            &q[first * width..end * width],
                            None,
                            &mut scratch,
                        );
                        assert!(got == full[first * width..end * width], "{isa} {kind:?} {first}");
                    }
                }
                let last = &q[(len - 1) * width..];
                let alone = attend_one(&execs[0], shape, &store, last, None, &mut scratch);
                assert!(attend_one(exec, shape, &store, last, None, &mut scratch) == alone, "{isa} {kind:?}");
                let tolerance = shape.tolerance(exec, len, None);
                let want: Vec<f64> = full[(len - 1) * width..].iter().copied().map(f64::from).collect();
                assert_close("decode and prefill", &alone, &want, tolerance + F32_TOLERANCE);
            }
        }
    }
}

#[test]
fn several_jobs_write_their_own_columns() {
    for exec in execs() {
        for kind in [KvType::F16, KvType::Q8] {
            let shape = Shape { kind, kv_heads: 3, group: 2, dim: 16 };
            let (width, head) = (shape.q_width(), shape.group * shape.dim);
            let sizes = [(600, 1), (3, 3), (300, 40), (256, 1), (1, 1), (90, 90), (0, 0)];
            let stores: Vec<KvStore> =
                sizes.iter().map(|&(len, _)| shape.store(&exec, len, len.max(1))).collect();
            let queries: Vec<Vec<f32>> = sizes.iter().map(|&(_, t)| noise(9, t * width)).collect();
            // Heads permuted, with a gap, in rows with a margin.
            let (columns, cols, stride) = ([head + 3, 2 * head + 3, 0], 3 * head + 3, 3 * head + 7);
            let mut outs: Vec<Vec<f32>> = sizes.iter().map(|&(_, t)| vec![7.0; t * stride]).collect();
            let mut jobs = Vec::new();
            for (((store, q), out), &(_, t)) in stores.iter().zip(&queries).zip(&mut outs).zip(&sizes) {
                let (q, out) = (MatRef::dense(q, t, width), MatMut::new(out, t, cols, stride));
                jobs.push(AttendJob { store, q, out, out_columns: &columns, window: None, lse: None });
            }
            let mut scratch = AttendScratch::new();
            attend(&exec, shape.group, shape.scale(), &mut jobs, &mut scratch);
            for (((store, q), out), &(_, t)) in stores.iter().zip(&queries).zip(&outs).zip(&sizes) {
                let alone = attend_one(&exec, shape, store, q, None, &mut scratch);
                for i in 0..t {
                    let row = &out[i * stride..][..stride];
                    for (h, &column) in columns.iter().enumerate() {
                        assert_eq!(row[column..][..head], alone[i * width + h * head..][..head]);
                    }
                    assert!(row[head..head + 3].iter().chain(&row[cols..]).all(|&x| x == 7.0));
                }
            }
        }
    }
}

#[test]
fn huge_scores_and_their_ties_stay_finite() {
    for exec in execs() {
        for kind in KvType::ALL {
            let shape = Shape { kind, kv_heads: 1, group: 2, dim: 16 };
            for t in [1, 20] {
                let (len, width) = (300, shape.q_width());
                let k: Vec<f32> = noise(1, len * 16).iter().map(|x| x * 200.0).collect();
                let v = noise(2, len * 16);
                let mut store = KvStore::new(kind, 1, 16);
                store.append(&exec, MatRef::dense(&k, len, 16), MatRef::dense(&v, len, 16));
                store.poison();
                let q: Vec<f32> = noise(3, t * width).iter().map(|x| x * 50.0).collect();
                let got = attend_one(&exec, shape, &store, &q, None, &mut AttendScratch::new());
                assert!(got.iter().all(|x| x.abs() <= 1.01), "{kind:?} {t}");
                // Equal keys: the mean of the visible values.
                let mut store = KvStore::new(kind, 1, 16);
                store.append(&exec, MatRef::dense(&[500.0; 20 * 16], 20, 16), MatRef::dense(&v, 20, 16));
                let q = vec![-50.0; t * width];
                let got = attend_one(&exec, shape, &store, &q, None, &mut AttendScratch::new());
                let q = MatRef::dense(&q, t, width);
                let (want, _) = naive::kv::attend(&store, q, 2, shape.scale(), None);
                assert_close("ties", &got, &want, shape.tolerance(&exec, t, None));
            }
        }
    }
}

#[test]
fn nan_in_a_query_stays_in_its_rows() {
    for exec in execs() {
        let shape = Shape { kind: KvType::F16, kv_heads: 1, group: 1, dim: 16 };
        let store = shape.store(&exec, 40, 40);
        for t in [2, 9] {
            let mut q = noise(3, t * 16);
            q[3] = f32::NAN;
            let got = attend_one(&exec, shape, &store, &q, None, &mut AttendScratch::new());
            assert!(got[..16].iter().all(|x| x.is_nan()) && got[16..].iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn stored_values_are_the_nearest() {
    let (len, width) = (300, 2 * 24);
    let (k, v) = (noise(1, len * width), noise(2, len * width));
    for exec in execs() {
        for kind in KvType::ALL {
            let mut store = KvStore::new(kind, 2, 24);
            store.append(&exec, MatRef::dense(&k, len, width), MatRef::dense(&v, len, width));
            let (mut got_k, mut got_v) = ([0.0; 24], [0.0; 24]);
            for position in 0..len {
                for head in 0..2 {
                    store.read(position, head, &mut got_k, &mut got_v);
                    for (got, want) in [(got_k, &k), (got_v, &v)] {
                        let want = &want[position * width + head * 24..][..24];
                        let largest = want.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                        for (&got, &want) in got.iter().zip(want) {
                            match kind {
                                KvType::F32 => assert_eq!(got, want),
                                KvType::F16 => assert_eq!(got, half::f16::from_f32(want).to_f32()),
                                KvType::Bf16 => assert_eq!(got, half::bf16::from_f32(want).to_f32()),
                                // Half a step of largest / 127, and the rounding of the product.
                                KvType::Q8 => assert!((got - want).abs() <= largest / 253.9),
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn roundings_agree_with_the_reference_library() {
    for bits in (0..=u32::MAX).step_by(7919).chain([0x387f_f000, 0x3880_0000, 0x3300_0000, 0x3300_0001]) {
        let x = f32::from_bits(bits);
        let (f16, bf16) =
            (half::f16::from_bits(rounding::to_f16(x)), half::bf16::from_bits(rounding::to_bf16(x)));
        if x.is_nan() {
            assert!(f16.is_nan() && bf16.is_nan(), "{bits:x}");
            continue;
        }
        let clamped = if x.is_finite() { x.clamp(-65504.0, 65504.0) } else { x };
        assert_eq!(f16, half::f16::from_f32(clamped), "{bits:x}");
        assert_eq!(bf16, half::bf16::from_f32(x), "{bits:x}");
    }
}

#[test]
fn special_values_are_stored_as_said() {
    let exec = execs().remove(0);
    let row = [1e6, -1e6, f32::NAN, f32::INFINITY, 1e-8, -0.0];
    let (mut k, mut v) = ([0.0; 6], [0.0; 6]);
    for kind in KvType::ALL {
        let mut store = KvStore::new(kind, 1, 6);
        store.append(&exec, MatRef::dense(&row, 1, 6), MatRef::dense(&[0.0; 6], 1, 6));
        store.read(0, 0, &mut k, &mut v);
        assert_eq!(v, [0.0; 6]);
        match kind {
            KvType::F16 => assert_eq!((k[0], k[1], k[3]), (65504.0, -65504.0, f32::INFINITY)),
            KvType::Q8 => assert!(k.iter().all(|x| x.is_nan())),
            _ => assert_eq!(k[3], f32::INFINITY),
        }
        assert!(k[2].is_nan());
        // Tiny rows become 0 or stay what they are.
        store.append(&exec, MatRef::dense(&[1e-38; 6], 1, 6), MatRef::dense(&[0.0; 6], 1, 6));
        store.read(1, 0, &mut k, &mut v);
        assert!(k.iter().all(|x| (0.0..=1.01e-38).contains(x)) && v == [0.0; 6], "{kind:?} {k:?}");
    }
}

#[test]
fn forks_are_independent_and_share_pages() {
    let exec = execs().pop().unwrap();
    for kind in KvType::ALL {
        let shape = Shape { kind, kv_heads: 2, group: 1, dim: 16 };
        let mut store = shape.store(&exec, 300, 300);
        let state = |store: &KvStore| -> Vec<f32> {
            let (mut all, mut k, mut v) = (Vec::new(), [0.0; 16], [0.0; 16]);
            for position in 0..store.len() {
                for head in 0..2 {
                    store.read(position, head, &mut k, &mut v);
                    all.extend(k.iter().chain(&v));
                }
            }
            all
        };
        let before = state(&store);
        let mut fork = store.clone();
        assert_eq!(store.shared_pages(&fork), 2);
        let x = noise(5, 10 * 32);
        fork.append(&exec, MatRef::dense(&x, 10, 32), MatRef::dense(&x, 10, 32));
        assert_eq!((store.len(), fork.len(), store.shared_pages(&fork)), (300, 310, 1));
        assert_eq!(state(&store), before);
        assert_eq!(state(&fork)[..before.len()], before);
        let forked = state(&fork);
        // The same slots of the original, other values; then back and once more.
        let y = noise(6, 300 * 32);
        store.append(&exec, MatRef::dense(&y, 300, 32), MatRef::dense(&y, 300, 32));
        assert_eq!(state(&fork), forked);
        store.truncate(257);
        assert_eq!(store.bytes(), KvStore::bytes_for(kind, 2, 16, 257));
        store.append(&exec, MatRef::dense(&x, 10, 32), MatRef::dense(&x, 10, 32));
        fork.truncate(256);
        assert_eq!(state(&fork), before[..256 * 64]);
        assert_eq!(state(&store)[..257 * 64], before[..257 * 64]);
        assert_eq!(store.len(), 267);
        store.truncate(0);
        assert_eq!((store.len(), store.bytes(), store.is_empty()), (0, 0, true));
    }
}

#[test]
fn a_cleared_store_is_as_new() {
    let mut scratch = AttendScratch::new();
    for exec in execs() {
        let shape = Shape { kind: KvType::F16, kv_heads: 2, group: 3, dim: 32 };
        let (long, width) = (700, shape.kv_heads * shape.dim);
        let mut reused = shape.store(&exec, long, long);
        for len in [3, 300, 257] {
            reused.clear();
            let (k, v) = (noise(1, len * width), noise(2, len * width));
            reused.append(&exec, MatRef::dense(&k, len, width), MatRef::dense(&v, len, width));
            let q = noise(3, len * shape.q_width());
            let new = attend_one(&exec, shape, &shape.store(&exec, len, len), &q, None, &mut scratch);
            assert_eq!(reused.len(), len);
            assert!(attend_one(&exec, shape, &reused, &q, None, &mut scratch) == new, "{} {len}", exec.isa());
        }
    }
}

#[test]
fn sizes_follow_the_layout() {
    let exec = execs().remove(0);
    for kind in KvType::ALL {
        assert_eq!(KvType::parse(kind.name()), Some(kind));
        let mut store = KvStore::new(kind, 2, 24);
        for rows in [0, 1, 254, 1, 1, 300] {
            let x = noise(1, rows * 48);
            store.append(&exec, MatRef::dense(&x, rows, 48), MatRef::dense(&x, rows, 48));
            assert_eq!(store.bytes(), KvStore::bytes_for(kind, 2, 24, store.len()));
        }
    }
    assert_eq!(KvStore::bytes_for(KvType::F16, 3, 64, 257), 2 * 256 * 3 * 2 * 64 * 2);
    assert_eq!(KvType::parse("f64"), None);
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_output_columns_are_refused() {
    let exec = execs().remove(0);
    let store = Shape { kind: KvType::F32, kv_heads: 2, group: 1, dim: 16 }.store(&exec, 1, 1);
    let (q, mut out) = ([0.0; 32], [0.0; 32]);
    let job = AttendJob {
        store: &store,
        q: MatRef::dense(&q, 1, 32),
        out: MatMut::dense(&mut out, 1, 32),
        out_columns: &[0, 15],
        window: None,
        lse: None,
    };
    attend(&exec, 1, 1.0, &mut [job], &mut AttendScratch::new());
}
