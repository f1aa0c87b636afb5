//! Every kernel, on every instruction set of this CPU, against PyTorch's values and gradients
//! (`tests/data/*.safetensors`, made by `testdata/make_goldens.py` in f64).
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kernels::attention::{AttnMask, AttnSaved, AttnShape, attention, attention_backward};
use kernels::conv::{short_conv, short_conv_backward};
use kernels::elementwise::{l2_norm, l2_norm_backward, rms_norm, rms_norm_backward, swiglu, swiglu_backward};
use kernels::gated_delta::{DeltaGrads, DeltaInputs, DeltaShape, gated_delta_backward, gated_delta_train};
use kernels::loss::{cross_entropy, kl_divergence};
use kernels::optim::{AdamW, adamw};
use kernels::rope::{Rotation, rope};
use kernels::scan::{ScanGrads, ScanInputs, ScanShape, selective_scan, selective_scan_backward};
use kernels::ssd::{SsdGrads, SsdInputs, SsdShape, ssd, ssd_backward};
use kernels::{Exec, Isa, MatMut, MatRef, Store};
use recurformer_kernels as kernels;
use safetensors::{Dtype, SafeTensors};

/// Largest error allowed, as a share of a tensor's largest value: f32 rounding over sums of some hundred terms is around
/// 1e-6, a wrong term is above 1e-2.
const TOLERANCE: f32 = 1e-5;
/// `eps` of the norm cases in the golden script.
const NORM_EPS: f32 = 1e-5;
/// Loss weight of the loss cases in the golden script.
const LOSS_WEIGHT: f32 = 0.25;

const RECURRENCES: &[u8] = include_bytes!("data/recurrences.safetensors");
const KERNELS: &[u8] = include_bytes!("data/kernels.safetensors");

/// The tensors of one case.
struct Case {
    file: SafeTensors<'static>,
    name: &'static str,
}

impl Case {
    fn new(bytes: &'static [u8], name: &'static str) -> Self {
        Self { file: SafeTensors::deserialize(bytes).unwrap(), name }
    }
    fn words<const N: usize>(&self, tensor: &str, dtype: Dtype) -> ([usize; N], Vec<[u8; 4]>) {
        let view = self.file.tensor(&format!("{}.{tensor}", self.name)).unwrap();
        assert_eq!(view.dtype(), dtype, "{}.{tensor}", self.name);
        let words = view.data().chunks_exact(4).map(|b| b.try_into().unwrap()).collect();
        (view.shape().try_into().unwrap(), words)
    }
    fn shape<const N: usize>(&self, tensor: &str) -> [usize; N] {
        self.words(tensor, Dtype::F32).0
    }
    fn get(&self, tensor: &str) -> Vec<f32> {
        let view = self.file.tensor(&format!("{}.{tensor}", self.name)).unwrap();
        assert_eq!(view.dtype(), Dtype::F32, "{}.{tensor}", self.name);
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    fn zeros(&self, tensor: &str) -> Vec<f32> {
        vec![0.0; self.get(tensor).len()]
    }
    fn poisoned(&self, tensor: &str) -> Vec<f32> {
        vec![f32::NAN; self.get(tensor).len()]
    }
    fn check(&self, exec: &Exec, tensor: &str, found: &[f32]) {
        let expected = self.get(tensor);
        assert_eq!(found.len(), expected.len(), "{}.{tensor}: length", self.name);
        let limit = TOLERANCE * expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            // Written so that NaN fails.
            let close = (f - e).abs() <= limit;
            let isa = exec.isa().name();
            assert!(close, "{}.{tensor}[{i}] on {isa}: found {f}, expected {e} within {limit}", self.name);
        }
    }
}

/// Runs `test` with every instruction set, on one thread and on three.
fn each_exec(test: impl Fn(&Exec)) {
    for isa in Isa::available() {
        for threads in [1, 3] {
            test(&Exec::with_isa(threads, isa).unwrap());
        }
    }
}

#[test]
fn ssd_matches_pytorch() {
    let case = Case::new(RECURRENCES, "ssd");
    let [seq, heads, d_state] = case.shape("q");
    let [_, head_dim] = case.shape("v");
    let shape = SsdShape { seq, heads, d_state, head_dim };
    let (q, k, v) = (case.get("q"), case.get("k"), case.get("v"));
    let (log_a, b, d_skip) = (case.get("log_a"), case.get("b"), case.get("d_skip"));
    let inputs = SsdInputs { q: &q, k: &k, v: &v, log_a: &log_a, b: &b, d_skip: &d_skip };
    each_exec(|exec| {
        let (mut state, mut y) = (case.get("state"), case.poisoned("y"));
        ssd(exec, shape, inputs, &mut state, &mut y);
        case.check(exec, "y", &y);
        case.check(exec, "final_state", &state);

        let (mut dq, mut dk, mut dv) = (case.zeros("q"), case.zeros("k"), case.zeros("v"));
        let (mut dlog_a, mut db, mut dd_skip) = (case.zeros("log_a"), case.zeros("b"), case.zeros("d_skip"));
        let mut dstate = case.zeros("state");
        let grads = SsdGrads {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            dlog_a: &mut dlog_a,
            db: &mut db,
            dd_skip: &mut dd_skip,
        };
        let (dy, dfinal) = (case.get("cot.y"), case.get("cot.final_state"));
        ssd_backward(
            exec,
            shape,
            inputs,
            Some(&case.get("state")),
            &dy,
            Some(&dfinal),
            grads,
            Some(&mut dstate),
        );
        case.check(exec, "grad.q", &dq);
        case.check(exec, "grad.k", &dk);
        case.check(exec, "grad.v", &dv);
        case.check(exec, "grad.log_a", &dlog_a);
        case.check(exec, "grad.b", &db);
        case.check(exec, "grad.d_skip", &dd_skip);
        case.check(exec, "grad.state", &dstate);
    });
}

#[test]
fn gated_delta_matches_pytorch() {
    let case = Case::new(RECURRENCES, "gated_delta");
    let [seq, heads, d_state] = case.shape("q");
    let [_, head_dim] = case.shape("v");
    let shape = DeltaShape { seq, heads, d_state, head_dim };
    let (q, k, v) = (case.get("q"), case.get("k"), case.get("v"));
    let (log_a, beta) = (case.get("log_a"), case.get("beta"));
    let inputs = DeltaInputs { q: &q, k: &k, v: &v, log_a: &log_a, beta: &beta };
    each_exec(|exec| {
        let (mut state, mut y) = (case.get("state"), case.poisoned("y"));
        let saved = gated_delta_train(exec, shape, inputs, &mut state, &mut y);
        case.check(exec, "y", &y);
        case.check(exec, "final_state", &state);

        let (mut dq, mut dk, mut dv) = (case.zeros("q"), case.zeros("k"), case.zeros("v"));
        let (mut dlog_a, mut dbeta) = (case.zeros("log_a"), case.zeros("beta"));
        let mut dstate = case.zeros("state");
        let grads =
            DeltaGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv, dlog_a: &mut dlog_a, dbeta: &mut dbeta };
        let (dy, dfinal) = (case.get("cot.y"), case.get("cot.final_state"));
        gated_delta_backward(exec, shape, inputs, &saved, &dy, Some(&dfinal), grads, Some(&mut dstate));
        case.check(exec, "grad.q", &dq);
        case.check(exec, "grad.k", &dk);
        case.check(exec, "grad.v", &dv);
        case.check(exec, "grad.log_a", &dlog_a);
        case.check(exec, "grad.beta", &dbeta);
        case.check(exec, "grad.state", &dstate);
    });
}

#[test]
fn selective_scan_matches_pytorch() {
    let case = Case::new(RECURRENCES, "selective_scan");
    let [seq, d_inner] = case.shape("u");
    let [_, d_state] = case.shape("a");
    let shape = ScanShape { seq, d_inner, d_state };
    let (u, delta, a) = (case.get("u"), case.get("delta"), case.get("a"));
    let (b, c, d) = (case.get("b"), case.get("c"), case.get("d"));
    let inputs = ScanInputs { u: &u, delta: &delta, a: &a, b: &b, c: &c, d: &d };
    each_exec(|exec| {
        let (mut state, mut y) = (case.get("state"), case.poisoned("y"));
        selective_scan(exec, shape, inputs, &mut state, &mut y);
        case.check(exec, "y", &y);
        case.check(exec, "final_state", &state);

        let (mut du, mut ddelta, mut da) = (case.zeros("u"), case.zeros("delta"), case.zeros("a"));
        let (mut db, mut dc, mut dd) = (case.zeros("b"), case.zeros("c"), case.zeros("d"));
        let mut dstate = case.zeros("state");
        let grads = ScanGrads {
            du: &mut du,
            ddelta: &mut ddelta,
            da: &mut da,
            db: &mut db,
            dc: &mut dc,
            dd: &mut dd,
        };
        let (dy, dfinal) = (case.get("cot.y"), case.get("cot.final_state"));
        selective_scan_backward(
            exec,
            shape,
            inputs,
            Some(&case.get("state")),
            &dy,
            Some(&dfinal),
            grads,
            Some(&mut dstate),
        );
        case.check(exec, "grad.u", &du);
        case.check(exec, "grad.delta", &ddelta);
        case.check(exec, "grad.a", &da);
        case.check(exec, "grad.b", &db);
        case.check(exec, "grad.c", &dc);
        case.check(exec, "grad.d", &dd);
        case.check(exec, "grad.state", &dstate);
    });
}

#[test]
fn short_conv_matches_pytorch() {
    let case = Case::new(KERNELS, "short_conv");
    let [channels, taps] = case.shape("weight");
    let (x, weight, bias) = (case.get("x"), case.get("weight"), case.get("bias"));
    let rows = MatRef::dense(&x, x.len() / channels, channels);
    each_exec(|exec| {
        let (mut tail, mut out) = (vec![0.0; (taps - 1) * channels], case.poisoned("out"));
        short_conv(exec, rows, &weight, Some(&bias), &mut tail, &mut out);
        case.check(exec, "out", &out);
        assert_eq!(tail, x[x.len() - tail.len()..], "the tail is the last rows seen");

        let (mut tail, mut out) = (case.get("tail"), case.poisoned("out"));
        short_conv(exec, rows, &weight, Some(&bias), &mut tail, &mut out);
        case.check(exec, "out_after_tail", &out);

        let (mut dx, mut dweight, mut dbias) = (case.zeros("x"), case.zeros("weight"), case.zeros("bias"));
        let dout = case.get("cot.out");
        short_conv_backward(exec, &x, &weight, channels, &dout, &mut dx, &mut dweight, Some(&mut dbias));
        case.check(exec, "grad.x", &dx);
        case.check(exec, "grad.weight", &dweight);
        case.check(exec, "grad.bias", &dbias);
    });
}

/// Checks one attention case under `mask`, forward and backward.
fn check_attention(name: &'static str, local: Option<(usize, usize)>) {
    let case = Case::new(KERNELS, name);
    let [seq, q_heads, head_dim] = case.shape("q");
    let [_, kv_heads, _] = case.shape("k");
    let shape = AttnShape { q_heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
    let positions: Vec<usize> = (0..seq).collect();
    let mask = match local {
        None => AttnMask::Causal { q_pos0: 0 },
        Some((window, sinks)) => AttnMask::Local { q_pos0: 0, kv_pos: &positions, window, sinks },
    };
    let (d_q, d_kv) = (q_heads * head_dim, kv_heads * head_dim);
    let (q, k, v) = (case.get("q"), case.get("k"), case.get("v"));
    let (q, k, v) = (MatRef::dense(&q, seq, d_q), MatRef::dense(&k, seq, d_kv), MatRef::dense(&v, seq, d_kv));
    each_exec(|exec| {
        let (mut out, mut lse) = (case.poisoned("out"), case.poisoned("lse"));
        attention(exec, shape, mask, q, k, v, MatMut::dense(&mut out, seq, d_q), Some(&mut lse));
        case.check(exec, "out", &out);
        case.check(exec, "lse", &lse);

        let (mut dq, mut dk, mut dv) = (case.zeros("q"), case.zeros("k"), case.zeros("v"));
        let dout = case.get("cot.out");
        let saved = AttnSaved {
            q,
            k,
            v,
            out: MatRef::dense(&out, seq, d_q),
            lse: &lse,
            dout: MatRef::dense(&dout, seq, d_q),
            dlse: None,
        };
        attention_backward(exec, shape, mask, saved, &mut dq, &mut dk, &mut dv);
        case.check(exec, "grad.q", &dq);
        case.check(exec, "grad.k", &dk);
        case.check(exec, "grad.v", &dv);
    });
}

#[test]
fn attention_matches_pytorch() {
    check_attention("attention_causal", None);
    check_attention("attention_local", Some((16, 1)));
    check_attention("attention_local_no_sink", Some((5, 0)));
    check_attention("attention_local_many_sinks", Some((9, 3)));
}

#[test]
fn norms_match_pytorch() {
    let case = Case::new(KERNELS, "rms_norm");
    let (x, weight, dout) = (case.get("x"), case.get("weight"), case.get("cot.out"));
    each_exec(|exec| {
        let mut out = case.poisoned("out");
        rms_norm(exec, &x, &weight, NORM_EPS, &mut out);
        case.check(exec, "out", &out);
        let (mut dx, mut dweight) = (case.zeros("x"), case.zeros("weight"));
        rms_norm_backward(exec, &x, &weight, NORM_EPS, &dout, &mut dx, Some(&mut dweight));
        case.check(exec, "grad.x", &dx);
        case.check(exec, "grad.weight", &dweight);
    });

    let case = Case::new(KERNELS, "l2_norm");
    let [_, dim] = case.shape("x");
    let (x, dout) = (case.get("x"), case.get("cot.out"));
    each_exec(|exec| {
        let mut out = case.poisoned("out");
        l2_norm(exec, &x, dim, NORM_EPS, &mut out);
        case.check(exec, "out", &out);
        let mut dx = case.zeros("x");
        l2_norm_backward(exec, &x, dim, NORM_EPS, &dout, &mut dx);
        case.check(exec, "grad.x", &dx);
    });
}

#[test]
fn swiglu_matches_pytorch() {
    let case = Case::new(KERNELS, "swiglu");
    let (gate, up, dout) = (case.get("gate"), case.get("up"), case.get("cot.out"));
    each_exec(|exec| {
        let mut out = case.poisoned("out");
        swiglu(exec, &gate, &up, &mut out);
        case.check(exec, "out", &out);
        let (mut dgate, mut dup) = (case.poisoned("gate"), case.poisoned("up"));
        swiglu_backward(exec, &gate, &up, &dout, &mut dgate, &mut dup);
        case.check(exec, "grad.gate", &dgate);
        case.check(exec, "grad.up", &dup);
    });
}

#[test]
fn rope_matches_pytorch() {
    /// RoPE base and first position of the case in the golden script.
    const THETA: f64 = 10000.0;
    const FIRST_POSITION: usize = 1000;
    let case = Case::new(KERNELS, "rope");
    let [seq, _, head_dim] = case.shape("x");
    let inv_freq: Vec<f64> =
        (0..head_dim / 2).map(|i| THETA.powf(-((2 * i) as f64) / head_dim as f64)).collect();
    each_exec(|exec| {
        let mut x = case.get("x");
        rope(exec, &mut x, head_dim, &inv_freq, seq, FIRST_POSITION, Rotation::Forward);
        case.check(exec, "out", &x);
        let mut dx = case.get("cot.out");
        rope(exec, &mut dx, head_dim, &inv_freq, seq, FIRST_POSITION, Rotation::Inverse);
        case.check(exec, "grad.x", &dx);
    });
}

#[test]
fn losses_match_pytorch() {
    let case = Case::new(KERNELS, "cross_entropy");
    let [_, vocab] = case.shape("logits");
    let logits = case.get("logits");
    // −1 in the file is `u32::MAX`, the ignored target.
    let (_, words) = case.words::<1>("targets", Dtype::I32);
    let targets: Vec<u32> = words.into_iter().map(u32::from_le_bytes).collect();
    assert!(targets.contains(&u32::MAX));
    each_exec(|exec| {
        let (mut nll, mut dlogits) = (case.poisoned("nll"), case.poisoned("logits"));
        cross_entropy(exec, &logits, vocab, &targets, LOSS_WEIGHT, &mut nll, Some(&mut dlogits));
        case.check(exec, "nll", &nll);
        case.check(exec, "grad.logits", &dlogits);
    });

    let case = Case::new(KERNELS, "kl");
    let (teacher, student) = (case.get("teacher"), case.get("student"));
    each_exec(|exec| {
        let (mut kl, mut dlogits) = (case.poisoned("kl"), case.zeros("student"));
        kl_divergence(
            exec,
            &teacher,
            &student,
            vocab,
            LOSS_WEIGHT,
            &mut kl,
            Some((&mut dlogits, Store::Accumulate)),
        );
        case.check(exec, "kl", &kl);
        case.check(exec, "grad.student", &dlogits);
    });
}

#[test]
fn adamw_matches_pytorch() {
    let case = Case::new(KERNELS, "adamw");
    each_exec(|exec| {
        let mut param = case.get("param0");
        let (mut m, mut v) = (case.zeros("m"), case.zeros("v"));
        for step in 1..=3 {
            let hyper = AdamW {
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                step,
                grad_scale: 0.5,
            };
            adamw(exec, &hyper, &case.get(&format!("grad{step}")), &mut param, &mut m, &mut v);
            case.check(exec, &format!("param{step}"), &param);
        }
        case.check(exec, "m", &m);
        case.check(exec, "v", &v);
    });
}
