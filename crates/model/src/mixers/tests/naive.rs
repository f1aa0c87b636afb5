//! A whole head in f64, token by token, straight from the module documentation; shares no code with the mixers.

use crate::mixers::HeadLayout;
use crate::plan::{Dropped, RecurrentKind};

/// All variables of a head; an empty base vector is an absent one.
#[derive(Clone)]
pub struct Naive {
    pub layout: HeadLayout,
    pub tensors: Vec<Vec<f64>>,
    /// q, k, v projections, q, k, v biases, q and k norm.
    pub base: [Vec<f64>; 8],
    pub norm_eps: f64,
    pub inv_freq: Vec<f64>,
    /// `[T, M]`.
    pub x: Vec<f64>,
}

type Rows = Vec<Vec<f64>>;

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn linear(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let rows = weight.chunks(x.len());
    rows.enumerate().map(|(i, w)| dot(x, w) + bias.get(i).copied().unwrap_or(0.0)).collect()
}

fn conv(x: &Rows, weight: &[f64], bias: &[f64]) -> Rows {
    let taps = weight.len() / x[0].len();
    let value = |t: usize, c: usize| {
        let mut sum = bias.get(c).copied().unwrap_or(0.0);
        for back in 0..taps.min(t + 1) {
            sum += weight[c * taps + taps - 1 - back] * x[t - back][c];
        }
        sum
    };
    (0..x.len()).map(|t| (0..x[0].len()).map(|c| value(t, c)).collect()).collect()
}

impl Naive {
    fn heads(&self) -> usize {
        self.layout.dims.q_heads
    }
    fn dim(&self) -> usize {
        self.layout.dims.head_dim
    }
    fn tensor(&self, name: &str) -> &[f64] {
        match self.layout.tensors().iter().position(|t| t.name == name) {
            Some(i) => &self.tensors[i],
            None => &[],
        }
    }
    fn x_rows(&self) -> Rows {
        self.x.chunks(self.layout.dims.d_model).map(<[f64]>::to_vec).collect()
    }
    fn own_projections(&self) -> bool {
        matches!(self.layout.spec.recurrent, RecurrentKind::Mamba2 | RecurrentKind::GatedDelta)
    }
    /// q, k or v of every token: the head's own or the base's.
    fn projected(&self, which: usize) -> Rows {
        let (weight, bias) = if self.own_projections() {
            let letter = ["q", "k", "v"][which];
            (self.tensor(&format!("{letter}_proj.weight")), self.tensor(&format!("{letter}_proj.bias")))
        } else {
            (&self.base[which][..], &self.base[3 + which][..])
        };
        self.x_rows().iter().map(|x| linear(x, weight, bias)).collect()
    }

    /// `[T, G·D]`.
    pub fn output(&self) -> Vec<f64> {
        let (mut out, lse) = self.local();
        let recurrent = match self.layout.spec.recurrent {
            RecurrentKind::None => vec![vec![0.0; self.heads() * self.dim()]; out.len()],
            RecurrentKind::Mamba => self.mamba(),
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => self.gated(self.recurrence()),
        };
        for (t, (out, recurrent)) in out.iter_mut().zip(recurrent).enumerate() {
            for (c, (o, r)) in out.iter_mut().zip(recurrent).enumerate() {
                *o = match self.layout.spec.dropped {
                    Dropped::Weighed => {
                        let keep = self.keep(t, c / self.dim(), lse[t][c / self.dim()]);
                        keep * *o + (1.0 - keep) * r
                    }
                    _ => *o + r,
                };
            }
        }
        out.concat()
    }

    fn norm_rope(&self, head: &[f64], norm: &[f64], position: usize) -> Vec<f64> {
        let mean = dot(head, head) / head.len() as f64;
        let normed: Vec<f64> = match norm {
            [] => head.to_vec(),
            _ => head.iter().zip(norm).map(|(x, w)| x / (mean + self.norm_eps).sqrt() * w).collect(),
        };
        let half = head.len() / 2;
        let mut out = vec![0.0; head.len()];
        for i in 0..half {
            let (sin, cos) = (position as f64 * self.inv_freq[i]).sin_cos();
            out[i] = normed[i] * cos - normed[i + half] * sin;
            out[i + half] = normed[i + half] * cos + normed[i] * sin;
        }
        out
    }

    /// `x W_farᵀ`, `[T, G]`.
    pub fn far_logits(&self) -> Rows {
        self.x_rows().iter().map(|x| linear(x, self.tensor("far_proj.weight"), &[])).collect()
    }

    /// The window's share of a head's softmax at token `t`.
    pub fn keep(&self, t: usize, head: usize, lse: f64) -> f64 {
        let spec = self.layout.spec;
        let dropped = (0..=t).filter(|r| t - r >= spec.window && *r >= spec.sinks).count();
        let far = self.far_logits()[t][head] + self.tensor("far_proj.bias")[head];
        match dropped {
            0 => 1.0,
            _ => sigmoid(lse - far - self.tensor("far_count")[head] * (dropped as f64).ln()),
        }
    }

    /// The local branch `[T, G·D]` and its log denominators `[T, G]`.
    pub fn local(&self) -> (Rows, Rows) {
        let (heads, dim, spec) = (self.heads(), self.dim(), self.layout.spec);
        let x = self.x_rows();
        if spec.window == 0 {
            return (vec![vec![0.0; heads * dim]; x.len()], vec![vec![f64::NEG_INFINITY; heads]; x.len()]);
        }
        let (q, k, v) = (self.projected(0), self.projected(1), self.projected(2));
        let k: Rows = k.iter().enumerate().map(|(t, k)| self.norm_rope(k, &self.base[7], t)).collect();
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for t in 0..x.len() {
            let (mut row, mut lse_row) = (Vec::new(), Vec::new());
            for head in q[t].chunks(dim) {
                let q = self.norm_rope(head, &self.base[6], t);
                let visible: Vec<usize> =
                    (0..=t).filter(|&r| t - r < spec.window || r < spec.sinks).collect();
                let scores: Vec<f64> =
                    visible.iter().map(|&r| (dot(&q, &k[r]) / (dim as f64).sqrt()).exp()).collect();
                let dropped: Vec<usize> = (0..=t).filter(|r| !visible.contains(r)).collect();
                let mean = |rows: &Rows, c: usize| -> f64 {
                    dropped.iter().map(|&r| rows[r][c]).sum::<f64>() / dropped.len() as f64
                };
                let averaged = spec.dropped == Dropped::Averaged && !dropped.is_empty();
                let weight = if averaged {
                    let mean_k: Vec<f64> = (0..dim).map(|c| mean(&k, c)).collect();
                    dropped.len() as f64 * (dot(&q, &mean_k) / (dim as f64).sqrt()).exp()
                } else {
                    0.0
                };
                let total: f64 = scores.iter().sum::<f64>() + weight;
                lse_row.push(total.ln());
                row.extend((0..dim).map(|c| {
                    let seen: f64 = visible.iter().zip(&scores).map(|(&r, s)| s * v[r][c]).sum();
                    (seen + if averaged { weight * mean(&v, c) } else { 0.0 }) / total
                }));
            }
            out.push(row);
            lse.push(lse_row);
        }
        (out, lse)
    }

    /// `mamba2` or `gated-delta` before gain and gate.
    pub fn recurrence(&self) -> Rows {
        let (heads, dim) = (self.heads(), self.dim());
        let unit = |rows: Rows| -> Rows {
            let head = |h: &[f64]| -> Vec<f64> {
                let norm = (dot(h, h) + 1e-6).sqrt();
                h.iter().map(|x| x / norm).collect()
            };
            rows.iter().map(|row| row.chunks(dim).flat_map(head).collect()).collect()
        };
        let q = unit(conv(&self.projected(0), self.tensor("q_conv.weight"), &[]));
        let k = unit(conv(&self.projected(1), self.tensor("k_conv.weight"), &[]));
        let v = conv(&self.projected(2), self.tensor("v_conv.weight"), &[]);
        let delta_rule = self.layout.spec.recurrent == RecurrentKind::GatedDelta;
        let mut state = vec![vec![0.0; dim * dim]; heads];
        let mut out = Vec::new();
        for (t, x) in self.x_rows().iter().enumerate() {
            let dt: Vec<f64> = linear(x, self.tensor("dt_proj.weight"), self.tensor("dt_proj.bias"))
                .into_iter()
                .map(softplus)
                .collect();
            let mut row = Vec::new();
            for head in 0..heads {
                let s = &mut state[head];
                let mut bonus = 0.0;
                let mut write = v[t].clone();
                if delta_rule {
                    let beta = linear(x, self.tensor("beta_proj.weight"), self.tensor("beta_proj.bias"));
                    s.iter_mut().for_each(|s| *s *= (-dt[0]).exp());
                    for (j, w) in write.iter_mut().enumerate() {
                        let read: f64 = (0..dim).map(|i| s[i * dim + j] * k[t][i]).sum();
                        *w = sigmoid(beta[0]) * (*w - read);
                    }
                } else {
                    let logit = linear(x, self.tensor("in_scale.weight"), self.tensor("in_scale.bias"));
                    let b = dt[head] * logit[head].min(30.0).exp();
                    s.iter_mut().for_each(|s| *s *= (-dt[head]).exp());
                    write.iter_mut().for_each(|w| *w *= b);
                    bonus = self.tensor("d_skip")[head];
                }
                for i in 0..dim {
                    for j in 0..dim {
                        s[i * dim + j] += k[t][i] * write[j];
                    }
                }
                for j in 0..dim {
                    let read: f64 = (0..dim).map(|i| s[i * dim + j] * q[t][head * dim + i]).sum();
                    row.push(read + bonus * v[t][j]);
                }
            }
            out.push(row);
        }
        out
    }

    fn gated(&self, mut y: Rows) -> Rows {
        let gain = self.tensor("out_gain");
        for (y, x) in y.iter_mut().zip(self.x_rows()) {
            let z = linear(&x, self.tensor("gate_proj.weight"), &[]);
            for c in 0..y.len() {
                y[c] *= gain[c] * 2.0 * sigmoid(z[c]);
            }
        }
        y
    }

    fn mamba(&self) -> Rows {
        let inner = self.heads() * self.dim();
        let d_state = self.layout.spec.d_state;
        let projected: Rows =
            self.x_rows().iter().map(|x| linear(x, self.tensor("in_proj.weight"), &[])).collect();
        let u: Rows = projected.iter().map(|p| p[..inner].to_vec()).collect();
        let mut u = conv(&u, self.tensor("conv.weight"), self.tensor("conv.bias"));
        u.iter_mut().flatten().for_each(|u| *u *= sigmoid(*u));
        let mut state = vec![0.0; inner * d_state];
        let mut out = Vec::new();
        for (u, p) in u.iter().zip(&projected) {
            let selected = linear(u, self.tensor("x_proj.weight"), &[]);
            let rank = selected.len() - 2 * d_state;
            let (b, c) = selected[rank..].split_at(d_state);
            let delta = linear(&selected[..rank], self.tensor("dt_proj.weight"), self.tensor("dt_proj.bias"));
            let mut row = Vec::new();
            for i in 0..inner {
                let delta = softplus(delta[i]);
                let mut y = self.tensor("D")[i] * u[i];
                for n in 0..d_state {
                    let a = -self.tensor("A_log")[i * d_state + n].exp();
                    let h = &mut state[i * d_state + n];
                    *h = (delta * a).exp() * *h + delta * b[n] * u[i];
                    y += c[n] * *h;
                }
                let z = p[inner + i];
                row.push(y * z * sigmoid(z));
            }
            out.push(row);
        }
        out
    }
}
