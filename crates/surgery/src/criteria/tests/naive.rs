//! A base model in plain f64 loops whose head outputs can be replaced; shares no arithmetic with the engine.

use super::Scores;
use model::{Model, ModelConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// One row per token.
type Rows = Vec<Vec<f64>>;

/// Step of the central differences, in units of the change Δ.
const STEP: f64 = 1e-4;

pub struct Naive {
    config: ModelConfig,
    params: HashMap<String, Vec<f64>>,
    ids: Vec<usize>,
}

/// Queries, keys and values of one layer.
struct Qkv {
    q: Rows,
    k: Rows,
    v: Rows,
}

impl Naive {
    pub fn new(model: &Model, ids: &[u32]) -> Self {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        Self {
            config: model.config.clone(),
            params: model.params.iter().map(|(_, p)| (p.name.clone(), wide(p.data()))).collect(),
            ids: ids.iter().map(|&id| id as usize).collect(),
        }
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let weight = &self.params[name];
        let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
        x.iter().map(|x| weight.chunks(x.len()).map(|w| dot(x, w)).collect()).collect()
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let eps = f64::from(self.config.rms_eps);
        let norm = |x: &Vec<f64>| {
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
            x.iter().zip(&self.params[name]).map(|(x, w)| x / scale * w).collect()
        };
        x.iter().map(norm).collect()
    }

    fn rope(&self, mut x: Rows) -> Rows {
        let d = self.config.head_dim;
        for (t, row) in x.iter_mut().enumerate() {
            for head in row.chunks_mut(d) {
                for i in 0..d / 2 {
                    let angle = t as f64 * self.config.rope_theta.powf(-2.0 * i as f64 / d as f64);
                    let (a, b) = (head[i], head[i + d / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + d / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
        x
    }

    /// Head outputs where query `i` sees key `j` if `sees(i, j)`.
    fn attention(&self, qkv: &Qkv, sees: impl Fn(usize, usize) -> bool) -> Rows {
        let ModelConfig { head_dim: d, heads, .. } = self.config;
        let group_size = self.config.group_size();
        let mut out = vec![vec![0.0; heads * d]; qkv.q.len()];
        for (i, out) in out.iter_mut().enumerate() {
            for head in 0..heads {
                let (q, kv) = (&qkv.q[i][head * d..(head + 1) * d], head / group_size * d);
                let keys: Vec<usize> = (0..=i).filter(|&j| sees(i, j)).collect();
                let weights: Vec<f64> = keys
                    .iter()
                    .map(|&j| q.iter().zip(&qkv.k[j][kv..kv + d]).map(|(q, k)| q * k).sum::<f64>())
                    .map(|score| (score / (d as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for (j, weight) in keys.into_iter().zip(weights) {
                    for c in 0..d {
                        out[head * d + c] += weight / total * qkv.v[j][kv + c];
                    }
                }
            }
        }
        out
    }

    /// Log-probabilities `[T, vocab]`; `hook` may change the head outputs of each layer.
    fn forward(&self, hook: impl FnMut(usize, &Qkv, &mut Rows)) -> Rows {
        let mut logits = self.linear(&self.hidden(hook), "lm_head.weight");
        for row in &mut logits {
            let log_z = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            row.iter_mut().for_each(|x| *x -= log_z);
        }
        logits
    }

    /// Final normed hidden states `[T, d_model]`.
    fn hidden(&self, mut hook: impl FnMut(usize, &Qkv, &mut Rows)) -> Rows {
        let d_model = self.config.d_model;
        let embedding = &self.params["model.embed_tokens.weight"];
        let mut x: Rows =
            self.ids.iter().map(|&id| embedding[id * d_model..(id + 1) * d_model].to_vec()).collect();
        let add = |x: &mut Rows, y: Rows| {
            x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
        };
        for layer in 0..self.config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let h = self.norm(&x, &name("input_layernorm"));
            let qkv = Qkv {
                q: self.rope(self.linear(&h, &name("self_attn.q_proj"))),
                k: self.rope(self.linear(&h, &name("self_attn.k_proj"))),
                v: self.linear(&h, &name("self_attn.v_proj")),
            };
            let mut out = self.attention(&qkv, |_, _| true);
            hook(layer, &qkv, &mut out);
            add(&mut x, self.linear(&out, &name("self_attn.o_proj")));
            let h = self.norm(&x, &name("post_attention_layernorm"));
            let mut gated = self.linear(&h, &name("mlp.gate_proj"));
            let up = self.linear(&h, &name("mlp.up_proj"));
            for (g, u) in gated.iter_mut().flatten().zip(up.iter().flatten()) {
                *g = *g / (1.0 + (-*g).exp()) * u;
            }
            add(&mut x, self.linear(&gated, &name("mlp.down_proj")));
        }
        self.norm(&x, "model.norm.weight")
    }

    /// Windowed minus full head outputs of every layer; the windows show the first position and `sinks`.
    fn window_delta(&self, window: usize, sinks: &[usize]) -> Vec<Rows> {
        let mut deltas = Vec::new();
        self.forward(|_, qkv, full| {
            let mut delta = self.attention(qkv, |i, j| i - j < window || j == 0 || sinks.contains(&j));
            delta.iter_mut().flatten().zip(full.iter().flatten()).for_each(|(d, f)| *d -= f);
            deltas.push(delta);
        });
        deltas
    }

    fn by_group(&self, mut f: impl FnMut(usize, std::ops::Range<usize>) -> f64) -> Scores {
        let width = self.config.group_size() * self.config.head_dim;
        (0..self.config.layers)
            .map(|layer| (0..self.config.kv_heads).map(|g| f(layer, g * width..(g + 1) * width)).collect())
            .collect()
    }

    pub fn window_error(&self, window: usize, sinks: &[usize]) -> Scores {
        let deltas = self.window_delta(window, sinks);
        self.by_group(|layer, columns| {
            let only = |row: &Vec<f64>| {
                (0..row.len()).map(|c| if columns.contains(&c) { row[c] } else { 0.0 }).collect()
            };
            let delta: Rows = deltas[layer].iter().map(only).collect();
            let change = self.linear(&delta, &format!("model.layers.{layer}.self_attn.o_proj.weight"));
            -change.iter().flatten().map(|x| x * x).sum::<f64>() / self.ids.len() as f64
        })
    }

    /// F_g from directional derivatives along each token's Δ, labels drawn as the engine draws them.
    pub fn window_fisher(&self, window: usize, seed: u64) -> Scores {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let labels: Vec<usize> = self
            .forward(|_, _, _| {})
            .iter()
            .map(|row| {
                let mut rest: f64 = rng.random();
                row.iter()
                    .position(|log_p| {
                        rest -= log_p.exp();
                        rest < 0.0
                    })
                    .unwrap_or(row.len() - 1)
            })
            .collect();
        let deltas = self.window_delta(window, &[]);
        let nll = |layer: usize, columns: &std::ops::Range<usize>, t: usize, step: f64| {
            let log_p = self.forward(|at, _, out| {
                if at == layer {
                    columns.clone().for_each(|c| out[t][c] += step * deltas[layer][t][c]);
                }
            });
            -log_p.iter().zip(&labels).map(|(row, &label)| row[label]).sum::<f64>()
        };
        self.by_group(|layer, columns| {
            let squares = (0..self.ids.len()).map(|t| {
                let slope = (nll(layer, &columns, t, STEP) - nll(layer, &columns, t, -STEP)) / (2.0 * STEP);
                slope * slope
            });
            squares.sum::<f64>() / (2.0 * self.ids.len() as f64)
        })
    }

    /// KL(base ‖ base with one group windowed) per token.
    pub fn window_kl(&self, window: usize) -> Scores {
        let deltas = self.window_delta(window, &[]);
        let base = self.forward(|_, _, _| {});
        self.by_group(|layer, columns| {
            let changed = self.forward(|at, _, out| {
                if at == layer {
                    for (out, delta) in out.iter_mut().zip(&deltas[layer]) {
                        columns.clone().for_each(|c| out[c] += delta[c]);
                    }
                }
            });
            let pairs = base.iter().flatten().zip(changed.iter().flatten());
            pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / self.ids.len() as f64
        })
    }

    /// The retrieval score of every query head from whole attention rows, `[layer][head]`; one needle, `said` and `asked` first positions.
    pub fn retrieval(&self, said: usize, asked: usize, len: usize) -> Scores {
        let ModelConfig { head_dim: d, heads, .. } = self.config;
        let mut scores = vec![vec![0.0; heads]; self.config.layers];
        self.forward(|layer, qkv, _| {
            for (head, sum) in scores[layer].iter_mut().enumerate() {
                let kv = head / self.config.group_size() * d;
                for step in 0..len {
                    let i = asked + step - 1;
                    let attention: Vec<f64> = (0..=i)
                        .map(|j| (0..d).map(|c| qkv.q[i][head * d + c] * qkv.k[j][kv + c]).sum::<f64>())
                        .collect();
                    let top = (0..=i).max_by(|&a, &b| attention[a].total_cmp(&attention[b])).unwrap();
                    if top >= said && top < said + len && self.ids[top] == self.ids[i + 1] {
                        *sum += 1.0 / len as f64;
                    }
                }
            }
        });
        scores
    }

    /// Mean log-probability of `answers` (positions in the prompt), each given everything before it.
    fn metric(&self, log_p: &Rows, answers: &[usize]) -> f64 {
        answers.iter().map(|&at| log_p[at - 1][self.ids[at]]).sum::<f64>() / answers.len() as f64
    }

    /// The indirect effect of every group, whole passes; `other`: the same prompt with another needle.
    pub fn indirect_effects(&self, other: &Self, answers: &[usize]) -> Scores {
        let mut outputs = Vec::new();
        let corrupted = other.forward(|_, _, out| outputs.push(out.clone()));
        let known = self.metric(&self.forward(|_, _, _| {}), answers);
        let gap = known - self.metric(&corrupted, answers);
        self.by_group(|layer, columns| {
            let patched = self.forward(|at, _, out| {
                if at == layer {
                    for (out, other) in out.iter_mut().zip(&outputs[layer]) {
                        columns.clone().for_each(|c| out[c] = other[c]);
                    }
                }
            });
            (known - self.metric(&patched, answers)) / gap
        })
    }

    /// Mean squared distance of the hidden states that generate `answers` between this model and the one mixed by `alpha`, plus `l1` times the
    /// mean gate.
    pub fn duo_loss(
        &self,
        alpha: &Scores,
        (window, sinks): (usize, usize),
        l1: f64,
        answers: &[usize],
    ) -> f64 {
        let full = self.hidden(|_, _, _| {});
        let width = self.config.group_size() * self.config.head_dim;
        let mixed = self.hidden(|layer, qkv, out| {
            let streaming = self.attention(qkv, |i, j| i - j < window || j < sinks);
            for (out, streaming) in out.iter_mut().zip(&streaming) {
                for (c, (out, streaming)) in out.iter_mut().zip(streaming).enumerate() {
                    let alpha = alpha[layer][c / width];
                    *out = alpha * *out + (1.0 - alpha) * streaming;
                }
            }
        });
        let squares = answers.iter().flat_map(|&at| full[at - 1].iter().zip(&mixed[at - 1]));
        let sum: f64 = squares.map(|(a, b)| (a - b) * (a - b)).sum();
        let gates: Vec<f64> = alpha.iter().flatten().copied().collect();
        sum / (answers.len() * self.config.d_model) as f64
            + l1 * gates.iter().sum::<f64>() / gates.len() as f64
    }
}
