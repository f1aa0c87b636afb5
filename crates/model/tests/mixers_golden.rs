//! Every mixer, whole, against PyTorch: outputs of the training, prefill and step forms, and all gradients
//! (`tests/data/mixers.*`, made by `testdata/make_goldens.py` in f64).
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kernels::{Exec, MatMut, MatRef};
use recurformer_model::MixerSpec;
use recurformer_model::mixers::{
    BaseGroup, BaseGroupGrads, HeadDims, HeadEnv, HeadLayout, HeadTensors, backward, forward, forward_train,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest error allowed, as a share of a tensor's largest value: f32 rounding through projections, convolution, norm and
/// recurrence is around 1e-6, a wrong term is above 1e-2.
const TOLERANCE: f32 = 1e-5;

const TENSORS: &[u8] = include_bytes!("data/mixers.safetensors");
const CASES: &str = include_str!("data/mixers.json");

/// One converted group with everything that was recorded about it.
struct Case {
    name: String,
    file: SafeTensors<'static>,
    layout: HeadLayout,
    inv_freq: Vec<f64>,
    norm_eps: f32,
    head: HeadTensors,
    base: Vec<(&'static str, Vec<f32>)>,
}

/// What a base group consists of, and whether only biased cases have it.
const BASE_TENSORS: [(&str, bool); 8] = [
    ("q_proj.weight", false),
    ("k_proj.weight", false),
    ("v_proj.weight", false),
    ("q_proj.bias", true),
    ("k_proj.bias", true),
    ("v_proj.bias", true),
    ("q_norm", true),
    ("k_norm", true),
];

impl Case {
    fn all() -> Vec<Self> {
        let cases: serde_json::Map<String, Value> = serde_json::from_str(CASES).unwrap();
        cases.into_iter().map(|(name, facts)| Self::new(name, &facts)).collect()
    }
    fn new(name: String, facts: &Value) -> Self {
        let size = |key: &str| facts["dims"][key].as_u64().unwrap() as usize;
        let biased = facts["dims"]["biased"].as_bool().unwrap();
        let spec: MixerSpec = serde_json::from_value(facts["spec"].clone()).unwrap();
        let dims = HeadDims {
            d_model: size("d_model"),
            q_heads: size("q_heads"),
            head_dim: size("head_dim"),
            qkv_bias: biased,
        };
        let theta = facts["rope_theta"].as_f64().unwrap();
        let inv_freq =
            (0..dims.head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / dims.head_dim as f64)).collect();
        let norm_eps = facts["norm_eps"].as_f64().unwrap() as f32;
        let file = SafeTensors::deserialize(TENSORS).unwrap();
        let layout = HeadLayout { spec, dims };
        let mut case =
            Self { name, file, layout, inv_freq, norm_eps, head: HeadTensors::default(), base: Vec::new() };
        for info in layout.tensors() {
            let tensor = format!("head.{}", info.name);
            assert_eq!(case.shape(&tensor), Some(info.shape), "{}.{tensor}", case.name);
            case.head.values.push(case.get(&tensor));
        }
        for (tensor, only_biased) in BASE_TENSORS {
            if biased || !only_biased {
                // What the script did not record is not read; NaN would show if it were.
                let recorded = case.shape(&format!("base.{tensor}")).is_some();
                let len = case.base_len(tensor);
                let values = if recorded { case.get(&format!("base.{tensor}")) } else { vec![f32::NAN; len] };
                assert_eq!(values.len(), len, "{}.base.{tensor}", case.name);
                case.base.push((tensor, values));
            }
        }
        case
    }
    fn base_len(&self, tensor: &str) -> usize {
        let HeadDims { d_model, q_heads, head_dim, .. } = self.layout.dims;
        let rows = if tensor.starts_with("q_proj") { q_heads * head_dim } else { head_dim };
        if tensor.ends_with("weight") { rows * d_model } else { rows }
    }
    /// `None` when the script did not record the tensor.
    fn shape(&self, tensor: &str) -> Option<Vec<usize>> {
        self.file.tensor(&format!("{}.{tensor}", self.name)).ok().map(|view| view.shape().to_vec())
    }
    fn get(&self, tensor: &str) -> Vec<f32> {
        let view = self.file.tensor(&format!("{}.{tensor}", self.name)).unwrap();
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    fn env(&self) -> HeadEnv<'_> {
        let find =
            |wanted: &str| self.base.iter().find(|(name, _)| *name == wanted).map(|(_, v)| v.as_slice());
        let base = BaseGroup {
            q_proj: find("q_proj.weight").unwrap(),
            k_proj: find("k_proj.weight").unwrap(),
            v_proj: find("v_proj.weight").unwrap(),
            q_bias: find("q_proj.bias"),
            k_bias: find("k_proj.bias"),
            v_bias: find("v_proj.bias"),
            q_norm: find("q_norm"),
            k_norm: find("k_norm"),
            norm_eps: self.norm_eps,
        };
        HeadEnv { layout: self.layout, weights: self.head.view(), base, inv_freq: &self.inv_freq }
    }
    fn check(&self, form: &str, tensor: &str, found: &[f32]) {
        let expected = self.get(tensor);
        let name = &self.name;
        assert_eq!(found.len(), expected.len(), "{name}.{tensor}: length");
        let limit = TOLERANCE * expected.iter().fold(0.0f32, |m, e| m.max(e.abs()));
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            // Written so that NaN fails.
            let close = (f - e).abs() <= limit;
            assert!(close, "{name}.{tensor}[{i}], {form}: found {f}, expected {e} within {limit}");
        }
    }
}

#[test]
fn outputs_match_pytorch() {
    let exec = Exec::new(2).unwrap();
    for case in Case::all() {
        let (d_model, x) = (case.layout.dims.d_model, case.get("x"));
        let (seq, d_out) = (x.len() / d_model, case.layout.dims.q_heads * case.layout.dims.head_dim);
        let mut out = vec![f32::NAN; seq * d_out];
        let whole = MatRef::dense(&x, seq, d_model);
        forward_train(&exec, &case.env(), whole, MatMut::dense(&mut out, seq, d_out));
        case.check("training form", "out", &out);

        for chunk in [seq, 7, 1] {
            let mut cache = case.layout.new_cache();
            let mut out = vec![f32::NAN; seq * d_out];
            for (x, out) in x.chunks(chunk * d_model).zip(out.chunks_mut(chunk * d_out)) {
                let rows = x.len() / d_model;
                let (x, out) = (MatRef::dense(x, rows, d_model), MatMut::dense(out, rows, d_out));
                forward(&exec, &case.env(), x, &mut cache, out);
            }
            case.check(&format!("{chunk} tokens at a time"), "out", &out);
        }
    }
}

#[test]
fn gradients_match_pytorch() {
    let exec = Exec::new(2).unwrap();
    for case in Case::all() {
        let (d_model, x, dout) = (case.layout.dims.d_model, case.get("x"), case.get("cot"));
        let (seq, d_out) = (x.len() / d_model, case.layout.dims.q_heads * case.layout.dims.head_dim);
        let x = MatRef::dense(&x, seq, d_model);
        let mut out = vec![f32::NAN; seq * d_out];
        let env = case.env();
        let saved = forward_train(&exec, &env, x, MatMut::dense(&mut out, seq, d_out));

        let mut dx = vec![0.0; seq * d_model];
        let mut grads = case.layout.zeros();
        // Only what PyTorch recorded: the mixer reads nothing else of the base.
        let wanted = |tensor: &str| {
            case.shape(&format!("grad.base.{tensor}")).map(|_| vec![0.0; case.base_len(tensor)])
        };
        let mut base_grads = BaseGroupGrads {
            q_proj: wanted("q_proj.weight"),
            k_proj: wanted("k_proj.weight"),
            v_proj: wanted("v_proj.weight"),
            q_bias: wanted("q_proj.bias"),
            k_bias: wanted("k_proj.bias"),
            v_bias: wanted("v_proj.bias"),
            q_norm: wanted("q_norm"),
            k_norm: wanted("k_norm"),
        };
        backward(
            &exec,
            &env,
            x,
            &saved,
            MatRef::dense(&dout, seq, d_out),
            Some(&mut grads),
            Some(MatMut::dense(&mut dx, seq, d_model)),
            Some(&mut base_grads),
        );
        case.check("backward", "grad.x", &dx);
        for (info, grad) in case.layout.tensors().iter().zip(&grads.values) {
            case.check("backward", &format!("grad.head.{}", info.name), grad);
        }
        let BaseGroupGrads { q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm } = base_grads;
        let found = [q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm];
        for ((tensor, _), grad) in BASE_TENSORS.iter().zip(found) {
            if let Some(grad) = grad {
                case.check("backward", &format!("grad.base.{tensor}"), &grad);
            }
        }
    }
}
