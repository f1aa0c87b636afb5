use proptest::prelude::*;

use super::*;
use crate::naive::attention::{self as naive, Inputs};
use crate::testing::{assert_close, assert_gradient, execs, noise, numeric_gradient, rounding_execs, to_f64};
use crate::{IsaLevel, Precision};
use half::f16;

/// f32 rounding of scores of magnitude ~10 through one exponential and a weighted mean.
const TOLERANCE: f64 = 1e-5;
/// Gradients multiply two such roundings and sum over up to 500 queries.
const GRADIENT_TOLERANCE: f64 = 4e-5;

/// Rounding two factors to bfloat16 costs a product up to 2⁻⁸ of it; scores of magnitude 1 keep weights within a percent.
const ROUNDED_TOLERANCE: f64 = 1e-2;
/// Gradients of keys sum such errors over every query row that sees them: this times the root of their number.
const ROUNDED_GRADIENT_TOLERANCE: f64 = 4e-3;

/// Heads, KV heads and head width of a multi-head, a grouped and a many-query call.
const SHAPES: [(usize, usize, usize); 4] = [(2, 2, 8), (3, 1, 64), (9, 3, 16), (10, 1, 5)];

struct Case {
    shape: AttnShape,
    q_len: usize,
    kv_len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
    dlse: Vec<f32>,
}

struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Case {
    fn new(
        (q_heads, kv_heads, head_dim): (usize, usize, usize),
        q_len: usize,
        kv_len: usize,
        size: f32,
    ) -> Self {
        let values = |seed, n| noise(seed, n).into_iter().map(|x| x * size).collect();
        Self {
            shape: AttnShape { q_heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() },
            q_len,
            kv_len,
            q: values(1, q_len * q_heads * head_dim),
            k: values(2, kv_len * kv_heads * head_dim),
            v: noise(3, kv_len * kv_heads * head_dim),
            dout: noise(4, q_len * q_heads * head_dim),
            dlse: noise(5, q_len * q_heads),
        }
    }

    fn mats(&self) -> [MatRef<'_>; 3] {
        let AttnShape { q_heads, kv_heads, head_dim, .. } = self.shape;
        [
            MatRef::dense(&self.q, self.q_len, q_heads * head_dim),
            MatRef::dense(&self.k, self.kv_len, kv_heads * head_dim),
            MatRef::dense(&self.v, self.kv_len, kv_heads * head_dim),
        ]
    }

    /// Forward and backward; gradients start from 1 because they are added to.
    fn run(&self, exec: &Exec, mask: AttnMask<'_>) -> Results {
        let [q, k, v] = self.mats();
        let width = self.shape.q_heads * self.shape.head_dim;
        let mut r = Results {
            out: vec![f32::NAN; self.q.len()],
            lse: vec![f32::NAN; self.q_len * self.shape.q_heads],
            dq: vec![1.0; self.q.len()],
            dk: vec![1.0; self.k.len()],
            dv: vec![1.0; self.v.len()],
        };
        let out = MatMut::dense(&mut r.out, self.q_len, width);
        attention(exec, self.shape, mask, q, k, v, out, Some(&mut r.lse));
        let (out, dout) =
            (MatRef::dense(&r.out, self.q_len, width), MatRef::dense(&self.dout, self.q_len, width));
        let saved = AttnSaved { q, k, v, out, lse: &r.lse, dout, dlse: Some(&self.dlse) };
        attention_backward(exec, self.shape, mask, saved, &mut r.dq, &mut r.dk, &mut r.dv);
        r
    }

    fn check(&self, exec: &Exec, mask: AttnMask<'_>) {
        self.check_within(exec, mask, TOLERANCE, GRADIENT_TOLERANCE);
    }

    fn check_within(&self, exec: &Exec, mask: AttnMask<'_>, tolerance: f64, gradient_tolerance: f64) {
        let got = self.run(exec, mask);
        let (q, k, v) = (to_f64(&self.q), to_f64(&self.k), to_f64(&self.v));
        let inputs = Inputs { q: &q, k: &k, v: &v };
        let (out, lse) = naive::attention(self.shape, mask, inputs);
        let what = |name: &str| {
            let (isa, threads) = (exec.isa(), exec.threads());
            format!("{isa} {threads} {:?} {}x{} {mask:?} {name}", self.shape, self.q_len, self.kv_len)
        };
        assert_close(&what("out"), &got.out, &out, tolerance);
        assert_close(&what("lse"), &got.lse, &lse, tolerance);
        let (dout, dlse) = (to_f64(&self.dout), to_f64(&self.dlse));
        let (dq, dk, dv) = naive::attention_backward(self.shape, mask, inputs, &dout, &dlse);
        for (name, got, want) in [("dq", got.dq, dq), ("dk", got.dk, dk), ("dv", got.dv, dv)] {
            let want: Vec<f64> = want.iter().map(|x| x + 1.0).collect();
            assert_close(&what(name), &got, &want, gradient_tolerance);
        }
    }
}

#[test]
fn causal_agrees_with_naive() {
    for exec in execs() {
        for shape in SHAPES {
            for len in [0, 1, 2, 63, 64, 65, 130] {
                Case::new(shape, len, len, 2.0).check(&exec, AttnMask::Causal { q_pos0: 0 });
            }
            // Decoding and chunked prefill: queries at the end of the keys.
            for (q_len, kv_len) in [(1, 65), (1, 700), (3, 600), (7, 64), (65, 200)] {
                Case::new(shape, q_len, kv_len, 2.0)
                    .check(&exec, AttnMask::Causal { q_pos0: kv_len - q_len });
            }
        }
        Case::new((3, 1, 16), 500, 500, 2.0).check(&exec, AttnMask::Causal { q_pos0: 0 });
        // Keys past every query's position, and no keys at all.
        Case::new((4, 2, 8), 5, 9, 1.0).check(&exec, AttnMask::Causal { q_pos0: 1 });
        Case::new((4, 2, 8), 5, 0, 1.0).check(&exec, AttnMask::Causal { q_pos0: 1 });
    }
}

#[test]
fn local_agrees_with_naive() {
    for exec in execs() {
        for shape in SHAPES {
            for (window, sinks) in [(1, 0), (7, 4), (64, 1), (0, 2), (0, 0), (65, 64), (usize::MAX, 0)] {
                for len in [1, 63, 65, 200] {
                    let kv_pos: Vec<usize> = (0..len).collect();
                    let mask = AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks };
                    Case::new(shape, len, len, 2.0).check(&exec, mask);
                }
            }
            // A cache that has dropped tokens: sinks, a gap, then the latest.
            let kv_pos: Vec<usize> = (0..4).chain(900..1003).collect();
            for q_len in [1, 3, 64] {
                let q_pos0 = 1003 - q_len;
                let mask = AttnMask::Local { q_pos0, kv_pos: &kv_pos, window: 70, sinks: 4 };
                Case::new(shape, q_len, kv_pos.len(), 2.0).check(&exec, mask);
            }
        }
    }
}

/// Whole sequences take the cache's kernel, other masks the general pass.
#[test]
fn passes_in_bf16_agree_with_naive() {
    for exec in rounding_execs() {
        let check = |shape, q_len, kv_len, mask: AttnMask<'_>| {
            let case = Case::new(shape, q_len, kv_len, 1.0);
            let rows = (q_len * case.shape.group()).max(1) as f64;
            case.check_within(&exec, mask, ROUNDED_TOLERANCE, ROUNDED_GRADIENT_TOLERANCE * rows.sqrt());
        };
        for shape in SHAPES.into_iter().chain([(6, 2, 32), (2, 2, 96)]) {
            for len in [0, 1, 2, 65, 300] {
                check(shape, len, len, AttnMask::Causal { q_pos0: 0 });
                let kv_pos: Vec<usize> = (0..len).collect();
                for (window, sinks) in
                    [(1, 0), (7, 4), (64, 1), (0, 2), (3, 5), (65, 64), (usize::MAX, usize::MAX)]
                {
                    check(shape, len, len, AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks });
                }
            }
            for (q_len, kv_len) in [(1, 65), (3, 300), (65, 200)] {
                check(shape, q_len, kv_len, AttnMask::Causal { q_pos0: kv_len - q_len });
            }
            check(shape, 5, 9, AttnMask::Causal { q_pos0: 1 });
            let kv_pos: Vec<usize> = (0..4).chain(900..1003).collect();
            let mask = AttnMask::Local { q_pos0: 939, kv_pos: &kv_pos, window: 70, sinks: 4 };
            check(shape, 64, kv_pos.len(), mask);
        }
    }
}

/// Scores of 20 rounded to bfloat16 would be off by 0.04, the same in every row.
#[test]
fn few_sinks_are_not_rounded() {
    for exec in rounding_execs() {
        for sinks in [1, 4] {
            let (len, window, width) = (90, 8, 64);
            let mut case = Case::new((3, 1, width), len, len, 1.0);
            case.q.iter_mut().step_by(width).for_each(|x| *x = 4.013);
            case.k.iter_mut().step_by(width).take(sinks).for_each(|x| *x = 40.17);
            let kv_pos: Vec<usize> = (0..len).collect();
            let mask = AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window, sinks };
            let (q, k, v) = (to_f64(&case.q), to_f64(&case.k), to_f64(&case.v));
            let inputs = Inputs { q: &q, k: &k, v: &v };
            let (_, lse) = naive::attention(case.shape, mask, inputs);
            let (dout, dlse) = (to_f64(&case.dout), to_f64(&case.dlse));
            let (dq, ..) = naive::attention_backward(case.shape, mask, inputs, &dout, &dlse);
            let got = case.run(&exec, mask);
            // From here on the window has left every sink.
            let first = (window + sinks) * 3;
            assert_close(&format!("{} lse", exec.isa()), &got.lse[first..], &lse[first..], 1e-5);
            let got: Vec<f32> = got.dq[first * width..].iter().map(|x| x - 1.0).collect();
            // What the window gives is still rounded, and weighs e⁻¹⁵ here.
            assert_close(&format!("{} dq", exec.isa()), &got, &dq[first * width..], 1e-4);
        }
    }
}

#[test]
fn large_scores_stay_finite() {
    for exec in execs() {
        let case = Case::new((3, 1, 64), 70, 70, 1e3);
        let got = case.run(&exec, AttnMask::Causal { q_pos0: 0 });
        for values in [&got.out, &got.lse, &got.dq, &got.dk, &got.dv] {
            assert!(values.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn strided_views_agree_with_dense_ones() {
    // q, k and v as column blocks of one fused projection, the output inside a wider NaN-filled buffer.
    let case = Case::new((4, 2, 8), 65, 65, 1.0);
    let mask = AttnMask::Causal { q_pos0: 0 };
    let [q, k, v] = case.mats();
    let (wide, total) = (32, 32 + 16 + 16 + 3);
    let mut fused = vec![f32::NAN; 65 * total];
    for t in 0..65 {
        let row = &mut fused[t * total..][..total];
        row[..32].copy_from_slice(q.row(t));
        row[32..48].copy_from_slice(k.row(t));
        row[48..64].copy_from_slice(v.row(t));
    }
    let fused = MatRef::dense(&fused, 65, total);
    for exec in execs() {
        let want = case.run(&exec, mask).out;
        let mut out = vec![f32::NAN; 65 * 40];
        let (q, k, v) = (fused.columns(0, 32), fused.columns(32, 16), fused.columns(48, 16));
        attention(&exec, case.shape, mask, q, k, v, MatMut::new(&mut out, 65, wide, 40), None);
        for t in 0..65 {
            assert_eq!(out[t * 40..][..32], want[t * 32..][..32]);
            assert!(out[t * 40 + 32..][..8].iter().all(|x| x.is_nan()));
        }
    }
}

#[test]
fn an_unbounded_window_is_causal_and_chunks_are_the_whole() {
    let case = Case::new((3, 1, 16), 150, 150, 2.0);
    let kv_pos: Vec<usize> = (0..150).collect();
    for exec in execs() {
        let full = case.run(&exec, AttnMask::Causal { q_pos0: 0 });
        let local = case.run(&exec, AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window: 150, sinks: 0 });
        assert_eq!(full.out, local.out);
        assert_eq!(full.dq, local.dq);
        assert_eq!(full.dk, local.dk);
        let [q, k, v] = case.mats();
        for chunk in [1, 7, 64, 149] {
            let mut out = vec![f32::NAN; full.out.len()];
            for start in (0..150).step_by(chunk) {
                let rows = chunk.min(150 - start);
                let part = MatMut::dense(&mut out[start * 48..(start + rows) * 48], rows, 48);
                let (q, seen) = (q.rows_at(start, rows), start + rows);
                let mask = AttnMask::Causal { q_pos0: start };
                attention(&exec, case.shape, mask, q, k.rows_at(0, seen), v.rows_at(0, seen), part, None);
            }
            assert_close("chunked", &out, &to_f64(&full.out), TOLERANCE);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for isa in crate::Isa::available() {
        for (q_len, kv_len) in [(300, 300), (1, 3000)] {
            let case = Case::new((9, 3, 64), q_len, kv_len, 1.0);
            let run = |threads, precision| {
                let exec = Exec::with_isa(threads, isa).unwrap().with_precision(precision).unwrap();
                let r = case.run(&exec, AttnMask::Causal { q_pos0: kv_len - q_len });
                [r.out, r.lse, r.dq, r.dk, r.dv]
            };
            let rounds = isa.level() >= IsaLevel::Avx512Bf16;
            for precision in [Precision::F32].into_iter().chain(rounds.then_some(Precision::Bf16)) {
                let one = run(1, precision);
                assert_eq!(one, run(2, precision));
                assert_eq!(one, run(3, precision));
            }
        }
    }
}

#[test]
fn naive_gradients_agree_with_finite_differences() {
    let case = Case::new((4, 2, 3), 6, 6, 1.0);
    let (q, k, v, d) = (to_f64(&case.q), to_f64(&case.k), to_f64(&case.v), to_f64(&case.dout));
    let dlse = to_f64(&case.dlse);
    let kv_pos = [0, 1, 2, 3, 4, 5];
    for mask in
        [AttnMask::Causal { q_pos0: 0 }, AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window: 2, sinks: 1 }]
    {
        let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            let (out, lse) = naive::attention(case.shape, mask, Inputs { q, k, v });
            out.iter().zip(&d).chain(lse.iter().zip(&dlse)).map(|(o, d)| o * d).sum()
        };
        let (dq, dk, dv) =
            naive::attention_backward(case.shape, mask, Inputs { q: &q, k: &k, v: &v }, &d, &dlse);
        assert_gradient("dq", &dq, &numeric_gradient(&q, |q| loss(q, &k, &v)));
        assert_gradient("dk", &dk, &numeric_gradient(&k, |k| loss(&q, k, &v)));
        assert_gradient("dv", &dv, &numeric_gradient(&v, |v| loss(&q, &k, v)));
    }
}

#[test]
#[should_panic(expected = "strictly increasing")]
fn unordered_positions_are_refused() {
    let case = Case::new((1, 1, 2), 2, 2, 1.0);
    let mask = AttnMask::Local { q_pos0: 0, kv_pos: &[1, 0], window: 2, sinks: 0 };
    case.run(&Exec::new(1).unwrap(), mask);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn visible_ranges_are_the_definition(
        gaps in proptest::collection::vec(1usize..6, 0..60),
        first in 0usize..3,
        q_pos0 in 0usize..150,
        rows in 1usize..20,
        window in 0usize..40,
        sinks in 0usize..12,
    ) {
        let kv_pos: Vec<usize> = gaps.iter().scan(first, |p, gap| { let r = *p; *p += gap; Some(r) }).collect();
        let n = kv_pos.len();
        let local = AttnMask::Local { q_pos0, kv_pos: &kv_pos, window, sinks };
        for mask in [local, AttnMask::Causal { q_pos0 }] {
            let tiles = mask.tiles(0..rows, n);
            for i in 0..rows {
                let visible = mask.visible(i, n);
                for j in 0..n {
                    let seen = naive::sees(mask, i, j);
                    prop_assert_eq!(visible.sinks.contains(&j) || visible.recent.contains(&j), seen);
                    let times: usize = tiles
                        .iter()
                        .filter(|(start, cols)| (*start..start + cols).contains(&j))
                        .filter(|(start, cols)| visible.in_tile(*start, *cols).iter().any(|r| r.contains(&(j - start))))
                        .count();
                    prop_assert_eq!(times, usize::from(seen));
                }
            }
        }
    }
}

#[test]
fn a_window_step_is_attention_to_every_key() {
    for exec in execs() {
        for (heads, head_dim, keys) in [(1, 2, 1), (3, 64, 65), (4, 24, 17), (2, 80, 200)] {
            let q = noise(1, heads * head_dim);
            let (k, v) = (noise(2, keys * head_dim), noise(3, keys * head_dim));
            let shape = AttnShape { q_heads: heads, kv_heads: 1, head_dim, scale: 0.3 };
            let mut expected = vec![f32::NAN; heads * head_dim];
            let (mut lse, mut expected_lse) = (vec![f32::NAN; heads], vec![f32::NAN; heads]);
            attention(
                &exec,
                shape,
                AttnMask::Causal { q_pos0: keys - 1 },
                MatRef::dense(&q, 1, heads * head_dim),
                MatRef::dense(&k, keys, head_dim),
                MatRef::dense(&v, keys, head_dim),
                MatMut::dense(&mut expected, 1, heads * head_dim),
                Some(&mut expected_lse),
            );
            let (mut out, mut scores) = (vec![f32::NAN; heads * head_dim], Vec::new());
            let rows = [WindowRows::F32(&k), WindowRows::F32(&v)];
            window_step(&exec, 0.3, &q, rows, None, head_dim, &mut scores, (&mut out, &mut lse));
            for (found, expected) in out.iter().zip(&expected).chain(lse.iter().zip(&expected_lse)) {
                assert!((found - expected).abs() < 2e-6, "{}: {found} {expected}", exec.isa());
            }
            // What is stored as f16 is as good as its values in f32.
            let halves = |x: &[f32]| x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
            let (half_k, half_v) = (halves(&k), halves(&v));
            let widened = |x: &[f16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
            let rows = [WindowRows::F16(&half_k), WindowRows::F16(&half_v)];
            window_step(&exec, 0.3, &q, rows, None, head_dim, &mut scores, (&mut out, &mut lse));
            let (k, v) = (widened(&half_k), widened(&half_v));
            let rows = [WindowRows::F32(&k), WindowRows::F32(&v)];
            let expect = (&mut expected[..], &mut expected_lse[..]);
            window_step(&exec, 0.3, &q, rows, None, head_dim, &mut scores, expect);
            assert_eq!((&out, &lse), (&expected, &expected_lse), "{}", exec.isa());
            // A mean of weight three is three equal keys.
            let (key, value) = (noise(4, head_dim), noise(5, head_dim));
            let mean = WindowMean { key: &key, value: &value, log_weight: 3f32.ln() };
            window_step(&exec, 0.3, &q, rows, Some(mean), head_dim, &mut scores, (&mut out, &mut lse));
            let thrice = |x: &[f32], row: &[f32]| [x, row, row, row].concat();
            let (k, v) = (thrice(&k, &key), thrice(&v, &value));
            let rows = [WindowRows::F32(&k), WindowRows::F32(&v)];
            let expect = (&mut expected[..], &mut expected_lse[..]);
            window_step(&exec, 0.3, &q, rows, None, head_dim, &mut scores, expect);
            for (found, expected) in out.iter().zip(&expected).chain(lse.iter().zip(&expected_lse)) {
                assert!((found - expected).abs() < 2e-6, "{}: {found} {expected}", exec.isa());
            }
        }
    }
}
