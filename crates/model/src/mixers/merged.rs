//! RazorAttention's compensation token (arXiv 2407.15891, equations 4 and 5): what a window no longer shows, as one more key and value.
//!
//! Before the query at `p` is answered, its `N` dropped tokens (behind the window, no sinks) are averaged to `k̂` and `v̂`, and the pair
//! takes part in the softmax with weight `N · exp(scale · q·k̂)`. Keys are averaged as the cache holds them, after norm and RoPE, as
//! in the paper's algorithm 1: the score of the mean is then the mean of the dropped tokens' own scores, and the weight a lower
//! bound of theirs (Jensen). A mean of unrotated keys would need a position that no token had. The paper averages once, when a
//! prompt is compressed; here every step does, so that results do not depend on how a prompt is cut.

use kernels::elementwise::dot;

/// Tokens that the query at `position` no longer sees.
pub(super) fn dropped_at(window: usize, sinks: usize, position: usize) -> usize {
    (position + 1).saturating_sub(window + sinks)
}

/// Sums of the dropped keys (after norm and RoPE) and values of one sequence, `[D]` each.
#[derive(Clone, Debug)]
pub(super) struct DroppedSums {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// `N`, `k̂` and `v̂` for every query of a chunk.
pub(super) struct Means {
    head_dim: usize,
    counts: Vec<usize>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl DroppedSums {
    pub fn new(head_dim: usize) -> Self {
        Self { k: vec![0.0; head_dim], v: vec![0.0; head_dim] }
    }

    /// Bytes of the sums of a group.
    pub const fn bytes_for(head_dim: usize) -> usize {
        2 * head_dim * size_of::<f32>()
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.k.as_slice()) + size_of_val(self.v.as_slice())
    }

    /// Keys and values, to add to.
    pub fn parts(&mut self) -> [&mut [f32]; 2] {
        [&mut self.k, &mut self.v]
    }

    /// Adds one token that leaves the window.
    fn add(&mut self, k: &[f32], v: &[f32]) {
        for (sums, values) in [(&mut self.k, k), (&mut self.v, v)] {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }

    /// Writes the means over `count` tokens, at least 1.
    pub fn means_into(&self, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        keys.clear();
        values.clear();
        self.append_means(count, keys, values);
    }

    /// Appends the means over `count` tokens, at least 1.
    fn append_means(&self, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let share = 1.0 / count as f32;
        keys.extend(self.k.iter().map(|sum| share * sum));
        values.extend(self.v.iter().map(|sum| share * sum));
    }

    /// Goes on over the queries at `seen..seen + seq`. `keys` and `values` are those of the `held` last tokens that may be seen before
    /// `seen` in order, followed by the chunk's.
    pub fn advance(
        &mut self,
        (window, sinks): (usize, usize),
        (seen, seq): (usize, usize),
        held: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Means {
        let head_dim = self.k.len();
        let mut means = Means {
            head_dim,
            counts: Vec::with_capacity(seq),
            k: Vec::with_capacity(seq * head_dim),
            v: Vec::with_capacity(seq * head_dim),
        };
        for position in seen..seen + seq {
            let count = dropped_at(window, sinks, position);
            if count > 0 {
                let at = (held + position - window - seen) * head_dim;
                self.add(&keys[at..at + head_dim], &values[at..at + head_dim]);
            }
            self.append_means(count.max(1), &mut means.k, &mut means.v);
            means.counts.push(count);
        }
        means
    }
}

impl Means {
    fn of(&self, t: usize) -> (&[f32], &[f32]) {
        let range = t * self.head_dim..(t + 1) * self.head_dim;
        (&self.k[range.clone()], &self.v[range])
    }

    /// The compensation token's log weight for a query.
    fn score(&self, t: usize, scale: f32, q: &[f32]) -> f32 {
        (f64::from(scale) * dot(q, self.of(t).0) + (self.counts[t] as f64).ln()) as f32
    }

    /// Adds the compensation tokens to one head's attention at row `t`: `out` `[D]` and its log denominator become those over all tokens.
    pub fn merge(&self, t: usize, scale: f32, q: &[f32], out: &mut [f32], lse: &mut f32) {
        if self.counts[t] == 0 {
            return;
        }
        let score = self.score(t, scale, q);
        let total = lse.max(score) + (-(*lse - score).abs()).exp().ln_1p();
        let (seen, merged) = ((*lse - total).exp(), (score - total).exp());
        for (out, v) in out.iter_mut().zip(self.of(t).1) {
            *out = seen * *out + merged * v;
        }
        *lse = total;
    }

    /// Gradients through the compensation tokens of a whole sequence, given queries `[T, G·D]`, the merged outputs, their log denominators
    /// `[T, G]` and the gradient of the outputs. Adds to `dq`, and to `dk` and `dv` of the dropped tokens. What flows through the tokens that
    /// a query sees is the attention's own backward pass with the merged outputs and denominators.
    pub fn backward(
        &self,
        (window, scale): (usize, f32),
        (q, out, lse, dout): (&[f32], &[f32], &[f32], &[f32]),
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let head_dim = self.head_dim;
        let q_heads = lse.len() / self.counts.len();
        let (mut later_k, mut later_v) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        for (t, &count) in self.counts.iter().enumerate().rev().filter(|(_, count)| **count > 0) {
            let (mean_k, mean_v) = self.of(t);
            let share = 1.0 / count as f32;
            for head in 0..q_heads {
                let at = (t * q_heads + head) * head_dim..(t * q_heads + head + 1) * head_dim;
                let (q, out, dout) = (&q[at.clone()], &out[at.clone()], &dout[at.clone()]);
                let weight = (self.score(t, scale, q) - lse[t * q_heads + head]).exp();
                let d_score = weight * (dot(dout, mean_v) - dot(dout, out)) as f32 * scale;
                for c in 0..head_dim {
                    dq[at.start + c] += d_score * mean_k[c];
                    later_k[c] += share * d_score * q[c];
                    later_v[c] += share * weight * dout[c];
                }
            }
            // The token that left the window at `t` is part of this mean and of all later ones.
            let left = (t - window) * head_dim;
            for c in 0..head_dim {
                dk[left + c] += later_k[c];
                dv[left + c] += later_v[c];
            }
        }
    }
}
