//! Heads against their f64 twin: every way of running them, and every gradient.

mod initial;
mod naive;

use super::*;
use crate::plan::Dropped;
use kernels::Precision;
use kernels::attention::WindowRows;
use kernels::kv::KvType;
use kernels::packed::{Shared, Uses};
use naive::Naive;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Largest error of an output relative to the largest output: f32 sums over some hundred terms.
const OUTPUT_TOLERANCE: f64 = 2e-5;
/// Largest error of a gradient relative to the tensor's largest: f32 sums through several stages.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Values are compared as if their tensor's largest were at least this: f32 leaves some ulps of the terms of order one that cancel.
const SMALLEST_SCALE: f64 = 3e-3;
/// A tensor whose exact values all lie below this vanishes (one visible key has no softmax gradient); central differences in f64 leave less.
const VANISHING: f64 = 1e-8;
/// What stands for the scale of a vanishing tensor: f32 leaves some ulps of the terms of order one that cancel.
const VANISHING_SCALE: f64 = 1e-2;
/// Step of the central differences, in f64.
const STEP: f64 = 1e-5;
/// Elements of each tensor whose derivative is taken by differences.
const PROBES: usize = 16;

const KINDS: [RecurrentKind; 4] =
    [RecurrentKind::None, RecurrentKind::Mamba, RecurrentKind::Mamba2, RecurrentKind::GatedDelta];

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: RecurrentKind,
    window: usize,
    sinks: usize,
    q_heads: usize,
    seq: usize,
    /// Biases and q/k norms in the base.
    dressed: bool,
    dropped: Dropped,
}

/// A head with random tensors, as f32 and as f64.
struct Fixture {
    layout: HeadLayout,
    tensors: HeadTensors,
    base: [Vec<f32>; 8],
    inv_freq: Vec<f64>,
    x: Vec<f32>,
    dout: Vec<f32>,
}

fn layout(case: Case) -> HeadLayout {
    let (d_state, d_conv) = match case.kind {
        RecurrentKind::None => (0, 0),
        RecurrentKind::Mamba => (5, 4),
        RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => (6, 4),
    };
    let Case { kind, window, sinks, q_heads, dressed, dropped, .. } = case;
    HeadLayout {
        spec: MixerSpec { recurrent: kind, window, sinks, d_state, d_conv, dropped },
        dims: HeadDims { d_model: 18, q_heads, head_dim: 6, qkv_bias: dressed },
    }
}

impl Fixture {
    fn new(case: Case) -> Self {
        Self::of(case, layout(case))
    }

    fn of(case: Case, layout: HeadLayout) -> Self {
        let HeadDims { d_model, head_dim, .. } = layout.dims;
        let d_inner = layout.d_inner();
        let mut rng = ChaCha8Rng::seed_from_u64(7 + case.seq as u64);
        let mut draw = |n: usize, scale: f32, middle: f32| -> Vec<f32> {
            (0..n).map(|_| middle + scale * rng.random_range(-1.0f32..1.0)).collect()
        };
        let mut tensors = layout.zeros();
        for (info, values) in layout.tensors().iter().zip(&mut tensors.values) {
            let middle = if ["out_gain", "D"].contains(&info.name) { 1.0 } else { 0.0 };
            *values = draw(values.len(), 0.5, middle);
        }
        let optional = |n: usize| if case.dressed { n } else { 0 };
        let base = [
            draw(d_inner * d_model, 0.5, 0.0),
            draw(head_dim * d_model, 0.5, 0.0),
            draw(head_dim * d_model, 0.5, 0.0),
            draw(optional(d_inner), 0.5, 0.0),
            draw(optional(head_dim), 0.5, 0.0),
            draw(optional(head_dim), 0.5, 0.0),
            draw(optional(head_dim), 0.5, 1.0),
            draw(optional(head_dim), 0.5, 1.0),
        ];
        let x = draw(case.seq * d_model, 1.0, 0.0);
        let dout = draw(case.seq * d_inner, 1.0, 0.0);
        let inv_freq = (0..head_dim / 2).map(|i| 0.21f64.powi(i as i32)).collect();
        Self { layout, tensors, base, inv_freq, x, dout }
    }

    fn env(&self) -> HeadEnv<'_> {
        let optional = |i: usize| Some(&self.base[i][..]).filter(|b| !b.is_empty());
        HeadEnv {
            layout: self.layout,
            weights: self.tensors.view(),
            base: BaseGroup {
                q_proj: &self.base[0],
                k_proj: &self.base[1],
                v_proj: &self.base[2],
                q_bias: optional(3),
                k_bias: optional(4),
                v_bias: optional(5),
                q_norm: optional(6),
                k_norm: optional(7),
                norm_eps: 1e-5,
            },
            inv_freq: &self.inv_freq,
        }
    }

    fn naive(&self) -> Naive {
        let wide = |v: &Vec<f32>| -> Vec<f64> { v.iter().map(|&x| f64::from(x)).collect() };
        Naive {
            layout: self.layout,
            tensors: self.tensors.values.iter().map(wide).collect(),
            base: self.base.each_ref().map(wide),
            norm_eps: f64::from(1e-5f32),
            inv_freq: self.inv_freq.clone(),
            x: wide(&self.x),
        }
    }

    fn x(&self) -> MatRef<'_> {
        let d_model = self.layout.dims.d_model;
        MatRef::dense(&self.x, self.x.len() / d_model, d_model)
    }

    fn dout(&self) -> MatRef<'_> {
        let d_inner = self.layout.d_inner();
        MatRef::dense(&self.dout, self.dout.len() / d_inner, d_inner)
    }

    fn trained(&self, exec: &Exec) -> (Vec<f32>, HeadSaved) {
        let mut out = vec![f32::NAN; self.dout.len()];
        let d_inner = self.layout.d_inner();
        let out_mat = MatMut::dense(&mut out, self.x().rows(), d_inner);
        let saved = forward_train(exec, &self.env(), self.x(), out_mat);
        (out, saved)
    }

    /// Inference in chunks of the given lengths (repeated), from strided input into strided, poisoned output.
    fn chunked(&self, exec: &Exec, chunks: &[usize]) -> Vec<f32> {
        let (d_model, d_inner) = (self.layout.dims.d_model, self.layout.d_inner());
        let seq = self.x.len() / d_model;
        let (x_stride, out_stride) = (d_model + 3, d_inner + 5);
        let mut x = vec![f32::NAN; seq * x_stride];
        for t in 0..seq {
            x[t * x_stride..t * x_stride + d_model].copy_from_slice(self.x().row(t));
        }
        let mut out = vec![f32::NAN; seq * out_stride];
        let mut cache = self.layout.new_cache();
        let (env, mut at, mut lengths) = (self.env(), 0, chunks.iter().cycle());
        while at < seq {
            assert_eq!((cache.len(), cache.bytes()), (at, self.layout.cache_bytes(KvType::F32)));
            let rows = (*lengths.next().unwrap()).min(seq - at);
            let x = MatRef::new(&x[at * x_stride..], rows, d_model, x_stride);
            let out = MatMut::new(&mut out[at * out_stride..], rows, d_inner, out_stride);
            forward(exec, &env, x, &mut cache, out);
            at += rows;
        }
        assert_eq!(cache.len(), seq);
        assert!(
            out.chunks(out_stride).all(|row| row[d_inner..].iter().all(|v| v.is_nan())),
            "wrote past a row"
        );
        out.chunks(out_stride).flat_map(|row| &row[..d_inner]).copied().collect()
    }
}

/// Whether a kind starts from the attention head, and can weigh what a window drops.
fn attention_initialised(kind: RecurrentKind) -> bool {
    matches!(kind, RecurrentKind::Mamba2 | RecurrentKind::GatedDelta)
}

/// Every kind with everything that a window beside it may do with what it drops.
fn kinds_and_ways() -> impl Iterator<Item = (RecurrentKind, Dropped)> {
    KINDS.into_iter().flat_map(|kind| {
        let weighed = attention_initialised(kind).then_some(Dropped::Weighed);
        [Dropped::Forgotten, Dropped::Averaged].into_iter().chain(weighed).map(move |way| (kind, way))
    })
}

fn exec() -> Exec {
    Exec::new(2).unwrap()
}

fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f64, |m, e| m.max(e.abs()));
    let largest = if largest < VANISHING { VANISHING_SCALE } else { largest.max(SMALLEST_SCALE) };
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(f) - e).abs() / largest;
        assert!(error <= tolerance, "{what} [{i}]: {f} against {e}, relative error {error:.1e}");
    }
}

/// Windows below, at and above the sequence, with and without sinks, for a kind and length.
fn cases(kind: RecurrentKind, seq: usize) -> Vec<Case> {
    let mut list = Vec::new();
    for (i, (window, sinks)) in
        [(0, 0), (1, 0), (1, 1), (3, 4), (16, 0), (16, 1), (16, 4), (200, 0), (200, 4)]
            .into_iter()
            .enumerate()
    {
        if window == 0 && kind == RecurrentKind::None {
            continue;
        }
        let (q_heads, dressed) = [(3, true), (1, false), (3, false), (1, true)][i % 4];
        list.push(Case { kind, window, sinks, q_heads, seq, dressed, dropped: Dropped::Forgotten });
        if window > 0 {
            list.push(Case { kind, window, sinks, q_heads, seq, dressed, dropped: Dropped::Averaged });
        }
        if window > 0 && attention_initialised(kind) {
            list.push(Case { kind, window, sinks, q_heads, seq, dressed, dropped: Dropped::Weighed });
        }
    }
    list
}

#[test]
fn every_way_of_running_a_head_agrees_with_the_naive_one() {
    let exec = exec();
    for kind in KINDS {
        for seq in [1, 2, 17, 65, 130] {
            for case in cases(kind, seq) {
                let fixture = Fixture::new(case);
                let expected = fixture.naive().output();
                let (trained, _) = fixture.trained(&exec);
                assert_near(&trained, &expected, OUTPUT_TOLERANCE, &format!("training {case:?}"));
                for chunks in [&[seq][..], &[1], &[5, 1, 2, 0, 23], &[64, 1], &[16]] {
                    let found = fixture.chunked(&exec, chunks);
                    assert_near(&found, &expected, OUTPUT_TOLERANCE, &format!("chunks {chunks:?} {case:?}"));
                }
            }
        }
    }
}

#[test]
fn no_tokens_change_nothing() {
    let exec = exec();
    for (kind, dropped) in kinds_and_ways() {
        let case = Case { kind, window: 4, sinks: 1, q_heads: 3, seq: 0, dressed: true, dropped };
        let fixture = Fixture::new(case);
        let (out, saved) = fixture.trained(&exec);
        assert!(out.is_empty());
        let mut grads = fixture.layout.zeros();
        backward(&exec, &fixture.env(), fixture.x(), &saved, fixture.dout(), Some(&mut grads), None, None);
        assert_eq!(grads, fixture.layout.zeros());
    }
}

/// Gradients of everything, each added to buffers that start at `start`.
struct AllGrads {
    tensors: HeadTensors,
    base: [Vec<f32>; 8],
    dx: Vec<f32>,
}

fn all_grads(fixture: &Fixture, exec: &Exec, start: f32) -> AllGrads {
    let (_, saved) = fixture.trained(exec);
    let filled = |n: usize| vec![start; n];
    let mut tensors = fixture.layout.zeros();
    tensors.values.iter_mut().for_each(|t| t.fill(start));
    let wanted = |i: usize| Some(filled(fixture.base[i].len())).filter(|b| !b.is_empty());
    let mut base = BaseGroupGrads {
        q_proj: wanted(0),
        k_proj: wanted(1),
        v_proj: wanted(2),
        q_bias: wanted(3),
        k_bias: wanted(4),
        v_bias: wanted(5),
        q_norm: wanted(6),
        k_norm: wanted(7),
    };
    let mut dx = filled(fixture.x.len());
    let dx_mat = MatMut::dense(&mut dx, fixture.x().rows(), fixture.x().cols());
    backward(
        exec,
        &fixture.env(),
        fixture.x(),
        &saved,
        fixture.dout(),
        Some(&mut tensors),
        Some(dx_mat),
        Some(&mut base),
    );
    let BaseGroupGrads { q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm } = base;
    let base =
        [q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm].map(Option::unwrap_or_default);
    AllGrads { tensors, base, dx }
}

/// Compares some elements of a gradient with central differences of `⟨dout, output⟩` in f64.
fn probe(
    fixture: &Fixture,
    start: f32,
    found: &[f32],
    what: &str,
    select: impl Fn(&mut Naive) -> &mut Vec<f64>,
) {
    let mut naive = fixture.naive();
    let loss = |naive: &Naive| -> f64 {
        naive.output().iter().zip(&fixture.dout).map(|(o, &d)| o * f64::from(d)).sum()
    };
    let stride = found.len().div_ceil(PROBES).max(1) | 1;
    let (mut expected, mut probed) = (Vec::new(), Vec::new());
    for i in (0..found.len()).step_by(stride) {
        let value = select(&mut naive)[i];
        select(&mut naive)[i] = value + STEP;
        let up = loss(&naive);
        select(&mut naive)[i] = value - STEP;
        let down = loss(&naive);
        select(&mut naive)[i] = value;
        expected.push((up - down) / (2.0 * STEP));
        probed.push(found[i] - start);
    }
    assert_near(&probed, &expected, GRADIENT_TOLERANCE, what);
}

#[test]
fn gradients_agree_with_differences_of_the_naive_head() {
    const START: f32 = 0.5;
    let exec = exec();
    for kind in KINDS {
        for (seq, only) in [(1, None), (2, None), (17, None), (65, Some((16, 1)))] {
            for case in cases(kind, seq) {
                if only.is_some_and(|only| (case.window, case.sinks) != only) {
                    continue;
                }
                let fixture = Fixture::new(case);
                let grads = all_grads(&fixture, &exec, START);
                for (i, info) in fixture.layout.tensors().iter().enumerate() {
                    let what = format!("{} {case:?}", info.name);
                    probe(&fixture, START, &grads.tensors.values[i], &what, |n| &mut n.tensors[i]);
                }
                for (i, grad) in grads.base.iter().enumerate() {
                    probe(&fixture, START, grad, &format!("base {i} {case:?}"), |n| &mut n.base[i]);
                }
                probe(&fixture, START, &grads.dx, &format!("x {case:?}"), |n| &mut n.x);
            }
        }
    }
}

#[test]
fn unwanted_gradients_do_not_change_the_wanted_ones() {
    let exec = exec();
    for (kind, dropped) in kinds_and_ways() {
        let case = Case { kind, window: 3, sinks: 1, q_heads: 3, seq: 9, dressed: true, dropped };
        let fixture = Fixture::new(case);
        let all = all_grads(&fixture, &exec, 0.0);
        let (_, saved) = fixture.trained(&exec);
        let (env, x, dout) = (fixture.env(), fixture.x(), fixture.dout());

        let mut tensors = fixture.layout.zeros();
        backward(&exec, &env, x, &saved, dout, Some(&mut tensors), None, None);
        assert_eq!(tensors, all.tensors, "{kind:?}");

        // Projections are frozen by empty vectors: all of them, or the first (queries' weights) alone.
        let infos = fixture.layout.tensors();
        let frozen: Vec<usize> =
            (0..infos.len()).filter(|&i| infos[i].class == TensorClass::Projection).collect();
        for frozen in [&frozen[..], &frozen[..frozen.len().min(1)]] {
            let [mut tensors, mut expected] = [fixture.layout.zeros(), all.tensors.clone()];
            for &i in frozen {
                tensors.values[i].clear();
                expected.values[i].clear();
            }
            backward(&exec, &env, x, &saved, dout, Some(&mut tensors), None, None);
            assert_eq!(tensors, expected, "{kind:?}, without {frozen:?}");
            let mut dx = vec![0.0; fixture.x.len()];
            let dx_mat = MatMut::dense(&mut dx, x.rows(), x.cols());
            backward(&exec, &env, x, &saved, dout, Some(&mut tensors), Some(dx_mat), None);
            assert_eq!(dx, all.dx, "{kind:?}, without {frozen:?}");
        }

        let mut dx = vec![0.0; fixture.x.len()];
        let dx_mat = MatMut::dense(&mut dx, x.rows(), x.cols());
        backward(&exec, &env, x, &saved, dout, None, Some(dx_mat), None);
        assert_eq!(dx, all.dx, "{kind:?}");

        let norm = vec![0.0; fixture.base[7].len()];
        let mut base = BaseGroupGrads { k_norm: Some(norm), ..Default::default() };
        backward(&exec, &env, x, &saved, dout, None, None, Some(&mut base));
        assert_eq!(base.k_norm.unwrap(), all.base[7], "{kind:?}");
    }
}

#[test]
fn extreme_logits_stay_finite() {
    let exec = exec();
    for (kind, dropped) in kinds_and_ways() {
        for size in [-1e4f32, 1e4] {
            let case = Case { kind, window: 3, sinks: 1, q_heads: 3, seq: 70, dressed: false, dropped };
            let mut fixture = Fixture::new(case);
            for (info, values) in fixture.layout.tensors().iter().zip(&mut fixture.tensors.values) {
                if ["dt_proj.bias", "in_scale.bias", "beta_proj.bias", "far_proj.bias"].contains(&info.name) {
                    values.fill(size);
                }
            }
            let (out, _) = fixture.trained(&exec);
            assert!(out.iter().all(|v| v.is_finite()), "{kind:?} {size}");
            let grads = all_grads(&fixture, &exec, 0.0);
            assert!(
                grads.tensors.values.iter().flatten().chain(&grads.dx).all(|v| v.is_finite()),
                "{kind:?} {size}"
            );
        }
    }
}

#[test]
fn cache_sizes_are_what_the_sizes_say() {
    let dims = HeadDims { d_model: 576, q_heads: 3, head_dim: 64, qkv_bias: false };
    let values = |recurrent, window, sinks, d_state, d_conv| {
        let spec = MixerSpec { recurrent, window, sinks, d_state, d_conv, dropped: Dropped::Forgotten };
        let layout = HeadLayout { spec, dims };
        for kv_type in KvType::ALL {
            assert_eq!(layout.new_cache_beside(kv_type).bytes(), layout.cache_bytes(kv_type));
            let averaged = HeadLayout { spec: MixerSpec { dropped: Dropped::Averaged, ..spec }, dims };
            assert_eq!(averaged.new_cache_beside(kv_type).bytes(), averaged.cache_bytes(kv_type));
            // Two sums of 64 values of four bytes.
            assert_eq!(averaged.cache_bytes(kv_type), layout.cache_bytes(kv_type) + 512);
        }
        layout.cache_bytes(KvType::F32) / 4
    };
    assert_eq!(values(RecurrentKind::None, 64, 1, 0, 0), 8320);
    assert_eq!(values(RecurrentKind::None, 16, 1, 0, 0), 2176);
    assert_eq!(values(RecurrentKind::Mamba2, 0, 0, 64, 4), 12288 + 3 * 5 * 64);
    assert_eq!(values(RecurrentKind::GatedDelta, 16, 1, 64, 4), 4096 + 3 * 5 * 64 + 2176);
    assert_eq!(values(RecurrentKind::Mamba, 0, 0, 16, 4), 3 * 64 * 16 + 3 * 3 * 64);
}

#[test]
fn a_ring_holds_sinks_and_window_once_and_in_order() {
    for (window, sinks) in [(1, 0), (1, 1), (2, 4), (3, 2), (5, 1)] {
        // Small integers are exact in f16.
        for (chunk, kv_type) in
            [(1, KvType::F32), (2, KvType::F16), (3, KvType::F32), (7, KvType::Q8), (20, KvType::F16)]
        {
            let mut ring = Ring::new(window, sinks, 1, kv_type);
            for seen in (0..40).step_by(chunk) {
                let held: Vec<usize> = ring.positions(seen).collect();
                let expected: Vec<usize> = (0..seen).filter(|&p| p < sinks || p + window >= seen).collect();
                assert_eq!(held, expected);
                let new: Vec<f32> = (seen..seen + chunk).map(|p| p as f32).collect();
                let (keys, values) = ring.followed_by(seen, &new, &new);
                let positions: Vec<f32> = held.iter().map(|&p| p as f32).chain(new.clone()).collect();
                assert_eq!((&keys, &values), (&positions, &positions));
                let rows = MatRef::dense(&new, chunk, 1);
                ring.push(seen, rows, rows);
                let expected: Vec<f32> = ring.positions(seen + chunk).map(|p| p as f32).collect();
                for rows in ring.held(seen + chunk) {
                    let mut held: Vec<f32> = match rows {
                        WindowRows::F32(values) => values.to_vec(),
                        WindowRows::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
                    };
                    held.sort_by(f32::total_cmp);
                    assert_eq!(held, expected);
                }
            }
        }
    }
}

#[test]
fn bfloat16_products_stay_close_to_f32() {
    // Factors of 8 bits through a few stages, and sums over tokens that partly cancel; a wrong term would be of order one.
    const TOLERANCE: f64 = 0.06;
    let exact = Exec::new(2).unwrap();
    let Ok(rounded) = exact.with_precision(Precision::Bf16) else { return };
    for kind in KINDS {
        let d_state = match kind {
            RecurrentKind::None => 0,
            RecurrentKind::Mamba => 16,
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => 32,
        };
        let d_conv = if kind == RecurrentKind::None { 0 } else { 4 };
        let case = Case {
            kind,
            window: 16,
            sinks: 1,
            q_heads: 2,
            seq: 100,
            dressed: false,
            dropped: Dropped::Forgotten,
        };
        let spec =
            MixerSpec { recurrent: kind, window: 16, sinks: 1, d_state, d_conv, dropped: Dropped::Forgotten };
        let dims = HeadDims { d_model: 96, q_heads: 2, head_dim: 32, qkv_bias: false };
        let mut fixture = Fixture::of(case, HeadLayout { spec, dims });
        // Sums of 96 terms of order one would saturate every gate.
        fixture.x.iter_mut().for_each(|x| *x *= 0.2);
        let env = fixture.env();
        let run = |exec: &Exec, x: LayerInput<'_>| -> Vec<(&str, Vec<f32>)> {
            let (seq, d_inner) = (fixture.x().rows(), fixture.layout.d_inner());
            let (mut out, mut dx) = (vec![0.0; fixture.dout.len()], vec![0.0; fixture.x.len()]);
            let saved = forward_train(exec, &env, x, MatMut::dense(&mut out, seq, d_inner));
            let mut grads = fixture.layout.zeros();
            let dx_mat = MatMut::dense(&mut dx, seq, dims.d_model);
            backward(exec, &env, x, &saved, fixture.dout(), Some(&mut grads), Some(dx_mat), None);
            let names = fixture.layout.tensors().into_iter().map(|t| t.name);
            [("out", out), ("dx", dx)].into_iter().chain(names.zip(grads.values)).collect()
        };
        let want = run(&exact, fixture.x().into());
        let mut shared = Shared::default();
        let shared = shared.set(&rounded, fixture.x(), Uses::Both);
        assert!(shared.is_some(), "large enough");
        for (form, x) in
            [("alone", fixture.x().into()), ("shared", LayerInput { values: fixture.x(), shared })]
        {
            let got = run(&rounded, x);
            assert_ne!(got, want, "{kind:?} {form}: nothing was rounded");
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let pairs = got.iter().zip(want);
                let error = norm(&mut pairs.map(|(g, w)| f64::from(g - w)));
                let scale = norm(&mut want.iter().map(|&w| f64::from(w)));
                assert!(error <= TOLERANCE * scale, "{kind:?} {form} {name}: {error:e} of {scale:e}");
            }
        }
    }
}
