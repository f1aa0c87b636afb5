//! Changed passes against plain f64 loops: other positions, a token that sees only itself, keys and values that are cut off.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Share, base, configs, exec, hybrid, plan, relative_error, specs, tokens};
use recurformer_model::{
    Cut, CutPart, Intervention, LayerObserver, Model, ModelError, NoObserver, TokenBatch, observe::AttnView,
};
use std::collections::HashMap;

/// f32 rounding (6e-8) through a few layers stays two orders below.
const TOLERANCE: f64 = 5e-5;
/// Every change changes the outputs by far more than rounding.
const CHANGED: f64 = 0.02;

const TOKENS: usize = 67;

type Rows = Vec<Vec<f64>>;

/// The whole model in f64, every score formed; shares no arithmetic with the crate.
struct Naive<'a> {
    model: &'a Model,
    params: HashMap<&'a str, Vec<f64>>,
}

impl<'a> Naive<'a> {
    fn new(model: &'a Model) -> Self {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        let params = model.params.iter().map(|(_, p)| (p.name.as_str(), wide(p.data()))).collect();
        Self { model, params }
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let weight = &self.params[format!("{name}.weight").as_str()];
        let bias = self.params.get(format!("{name}.bias").as_str());
        let row = |x: &Vec<f64>| {
            let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            let rows = weight.chunks(x.len()).enumerate();
            rows.map(|(i, w)| dot(w) + bias.map_or(0.0, |bias| bias[i])).collect()
        };
        x.iter().map(row).collect()
    }

    /// RMSNorm of every `width` values.
    fn norm(&self, x: &Rows, name: &str, width: usize) -> Rows {
        let (weight, eps) = (&self.params[name], f64::from(self.model.config.rms_eps));
        let part = |x: &[f64]| {
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
            x.iter().zip(weight).map(|(x, w)| x / scale * w).collect::<Vec<_>>()
        };
        x.iter().map(|row| row.chunks(width).flat_map(part).collect()).collect()
    }

    fn turned(&self, layer: usize, what: &str, x: &Rows, positions: &[usize]) -> Rows {
        let (d, name) = (self.model.config.head_dim, format!("model.layers.{layer}.self_attn.{what}"));
        let mut x = self.linear(x, &format!("{name}_proj"));
        if self.model.config.qk_norm {
            x = self.norm(&x, &format!("{name}_norm.weight"), d);
        }
        for (row, &position) in x.iter_mut().zip(positions) {
            for head in row.chunks_mut(d) {
                for (i, f) in self.model.inv_freq().iter().enumerate() {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    let (a, b) = (head[i], head[i + d / 2]);
                    head[i] = a * cos - b * sin;
                    head[i + d / 2] = b * cos + a * sin;
                }
            }
        }
        x
    }

    /// Head outputs of a layer: the definition of an intervention.
    fn attention(&self, layer: usize, x: &Rows, change: &Intervention) -> Rows {
        let config = &self.model.config;
        let (d, seq) = (config.head_dim, x.len());
        let positions = change.positions.clone().unwrap_or_else(|| (0..seq).collect());
        let (q, k) = (self.turned(layer, "q", x, &positions), self.turned(layer, "k", x, &positions));
        let v = self.linear(x, &format!("model.layers.{layer}.self_attn.v_proj"));
        let mut out = vec![vec![0.0; config.heads * d]; seq];
        for (i, out) in out.iter_mut().enumerate() {
            for head in 0..config.heads {
                let kv = head / config.group_size() * d;
                let cut = |part, j| {
                    change.cut.as_ref().is_some_and(|c| {
                        c.part == part && c.position == j && i > j && c.heads.contains(&(layer, head))
                    })
                };
                let sees = |&j: &usize| !cut(CutPart::Key, j) && (change.alone != Some(i) || j == i);
                let keys: Vec<usize> = (0..=i).filter(sees).collect();
                let score = |j: usize| (0..d).map(|c| q[i][head * d + c] * k[j][kv + c]).sum::<f64>();
                let weights: Vec<f64> = keys.iter().map(|&j| (score(j) / (d as f64).sqrt()).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (&j, weight) in keys.iter().zip(weights).filter(|(j, _)| !cut(CutPart::Value, **j)) {
                    for c in 0..d {
                        out[head * d + c] += weight / total * v[j][kv + c];
                    }
                }
            }
        }
        out
    }

    fn forward(&self, tokens: &[u32], change: &Intervention) -> Vec<f32> {
        let d_model = self.model.config.d_model;
        let table = &self.params["model.embed_tokens.weight"];
        let mut h: Rows = tokens.iter().map(|&t| table[t as usize * d_model..][..d_model].to_vec()).collect();
        let add = |h: &mut Rows, y: Rows| {
            h.iter_mut().flatten().zip(y.into_iter().flatten()).for_each(|(h, y)| *h += y);
        };
        for layer in 0..self.model.config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let x = self.norm(&h, &name("input_layernorm.weight"), d_model);
            let out = self.attention(layer, &x, change);
            add(&mut h, self.linear(&out, &name("self_attn.o_proj")));
            let x = self.norm(&h, &name("post_attention_layernorm.weight"), d_model);
            let (mut gate, up) =
                (self.linear(&x, &name("mlp.gate_proj")), self.linear(&x, &name("mlp.up_proj")));
            for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
                *gate = *gate / (1.0 + (-*gate).exp()) * up;
            }
            add(&mut h, self.linear(&gate, &name("mlp.down_proj")));
        }
        let out = self.norm(&h, "model.norm.weight", d_model);
        out.into_iter().flatten().map(|x| x as f32).collect()
    }
}

fn swapped(a: usize, b: usize) -> Vec<usize> {
    let mut positions: Vec<usize> = (0..TOKENS).collect();
    positions.swap(a, b);
    positions
}

fn changes() -> Vec<(&'static str, Intervention)> {
    let cut = |position, part, heads: &[(usize, usize)]| Intervention {
        cut: Some(Cut { position, part, heads: heads.to_vec() }),
        ..Intervention::default()
    };
    let everything = Intervention {
        positions: Some(swapped(3, 40)),
        alone: Some(50),
        cut: Some(Cut { position: 2, part: CutPart::Key, heads: vec![(0, 0), (1, 2)] }),
    };
    vec![
        ("positions", Intervention { positions: Some(swapped(0, 9)), ..Intervention::default() }),
        ("alone", Intervention { alone: Some(20), ..Intervention::default() }),
        ("first key", cut(0, CutPart::Key, &[(0, 0), (0, 1), (1, 2)])),
        ("later key", cut(30, CutPart::Key, &[(0, 2), (1, 1)])),
        ("first value", cut(0, CutPart::Value, &[(0, 1), (1, 0), (1, 2)])),
        ("later value", cut(30, CutPart::Value, &[(0, 0), (0, 2)])),
        ("everything", everything),
    ]
}

#[test]
fn changed_passes_are_the_definition() {
    let exec = exec();
    for config in configs() {
        let (model, tokens) = (base(&config, 1), tokens(TOKENS, 5));
        let naive = Naive::new(&model);
        let batch = TokenBatch::one(&tokens);
        let plain = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
        assert!(relative_error(&plain, &naive.forward(&tokens, &Intervention::default())) < TOLERANCE);
        for (name, change) in changes() {
            let name = format!("{} {name}", config.family.model_type());
            let found = model.forward_changed(&exec, &tokens, &change, &mut NoObserver).unwrap();
            let error = relative_error(&found, &naive.forward(&tokens, &change));
            assert!(error < TOLERANCE, "{name}: {error:e}");
            let effect = relative_error(&found, &plain);
            assert!(effect > CHANGED, "{name} changes nothing: {effect:e}");
            // Nothing reaches back before the first row that is changed.
            let first = [change.alone, change.cut.map(|cut| cut.position + 1)];
            let first = first.into_iter().flatten().min().filter(|_| change.positions.is_none()).unwrap_or(0);
            assert_eq!(found[..first * config.d_model], plain[..first * config.d_model], "{name}");
        }
    }
}

#[test]
fn no_change_changes_no_bit() {
    let exec = exec();
    for config in configs() {
        let (model, tokens) = (base(&config, 1), tokens(TOKENS, 5));
        let plain = model.forward_batch(&exec, &TokenBatch::one(&tokens), &mut NoObserver, None).unwrap();
        let own_positions =
            Intervention { positions: Some((0..TOKENS).collect()), ..Intervention::default() };
        for change in [Intervention::default(), own_positions] {
            let found = model.forward_changed(&exec, &tokens, &change, &mut NoObserver).unwrap();
            assert_eq!(found, plain);
        }
        // RoPE sees differences of positions only.
        let shifted =
            Intervention { positions: Some((100..100 + TOKENS).collect()), ..Intervention::default() };
        let found = model.forward_changed(&exec, &tokens, &shifted, &mut NoObserver).unwrap();
        assert!(relative_error(&found, &plain) < TOLERANCE);
    }
}

#[test]
fn what_cannot_be_changed_is_an_error() {
    let (exec, config) = (exec(), &configs()[0]);
    let model = base(config, 1);
    let cut = |position, head| Intervention {
        cut: Some(Cut { position, part: CutPart::Key, heads: vec![head] }),
        ..Intervention::default()
    };
    let positions = |p: &[usize]| Intervention { positions: Some(p.to_vec()), ..Intervention::default() };
    for (change, needle) in [
        (positions(&[0, 1]), "2 position codes for 3 tokens"),
        (positions(&[0, 1, 200]), "201 tokens exceed the model's context of 200"),
        (Intervention { alone: Some(3), ..Intervention::default() }, "position 3 of 3 tokens"),
        (cut(3, (0, 0)), "position 3 of 3 tokens"),
        (cut(0, (3, 0)), "layer 3 head 0 of 3 layers with 4 heads"),
        (cut(0, (0, 4)), "layer 0 head 4"),
    ] {
        let error = model.forward_changed(&exec, &[1, 2, 3], &change, &mut NoObserver).unwrap_err();
        assert!(error.to_string().contains(needle), "{error}");
    }
    let hybrid = hybrid(&model, plan(config, specs(config.head_dim)[0], Share::Some), 2);
    let error =
        hybrid.forward_changed(&exec, &[1, 2], &Intervention::default(), &mut NoObserver).unwrap_err();
    assert!(matches!(error, ModelError::Intervention(_)), "{error}");
}

/// Observers see every layer's residual stream, sequence by sequence; the last one is what the final norm reads.
#[test]
fn observers_see_the_residual_stream() {
    #[derive(Default)]
    struct Residuals(Vec<(usize, usize, Vec<f32>)>);
    impl LayerObserver for Residuals {
        fn attention(&mut self, _: AttnView<'_>) {}
        fn residual(&mut self, layer: usize, sequence: usize, h: kernels::MatRef<'_>) {
            self.0.push((layer, sequence, h.to_dense()));
        }
    }
    let (exec, config) = (exec(), &configs()[1]);
    let (model, mut seen) = (base(config, 1), Residuals::default());
    let batch: TokenBatch = [&[1, 2, 3][..], &[4, 5]].into_iter().collect();
    let mut tape = recurformer_model::Tape::default();
    let hidden = model.forward_batch(&exec, &batch, &mut seen, Some(&mut tape)).unwrap();
    let places: Vec<(usize, usize)> = seen.0.iter().map(|(layer, s, _)| (*layer, *s)).collect();
    assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1)]);
    let last: Vec<f32> = seen.0[2..].iter().flat_map(|(_, _, h)| h.clone()).collect();
    let norm = model.params.data(model.params.id("model.norm.weight").unwrap());
    let mut expected = vec![0.0; last.len()];
    kernels::elementwise::rms_norm(&exec, &last, norm, config.rms_eps, &mut expected);
    assert_eq!(hidden, expected);
}
