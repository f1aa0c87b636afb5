//! The constant memory of one converted group: conv tails, recurrent state, and the ring of the local window.
//! Knows positions and slots, nothing of what is stored.

use super::HeadLayout;

/// Constant memory of one converted group in one sequence: conv tails, recurrent state (f32), ring of `window + sinks` keys (after RoPE)
/// and values, and the number of tokens seen.
#[derive(Clone, Debug)]
pub struct HeadCache {
    pub(super) seen: usize,
    /// q, k, v tails, or Mamba's one, or none.
    pub(super) tails: Vec<Vec<f32>>,
    pub(super) state: Vec<f32>,
    pub(super) ring: Ring,
}

impl HeadCache {
    pub(super) fn new(layout: &HeadLayout) -> Self {
        Self {
            seen: 0,
            tails: layout.tail_lens().into_iter().map(|n| vec![0.0; n]).collect(),
            state: vec![0.0; layout.state_len()],
            ring: Ring::new(layout.spec.window, layout.spec.sinks, layout.dims.head_dim),
        }
    }
    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.seen
    }
    /// Whether no token was seen.
    pub fn is_empty(&self) -> bool {
        self.seen == 0
    }
    /// Bytes held, the same at any length; equal to [`HeadLayout::cache_bytes`].
    pub fn bytes(&self) -> usize {
        let tails: usize = self.tails.iter().map(Vec::len).sum();
        (tails + self.state.len() + self.ring.k.len() + self.ring.v.len()) * size_of::<f32>()
    }
}

/// Keys and values of the first `sinks` tokens and of the last `window` tokens after those. Token `p < sinks` lives in entry `p`, any other
/// in entry `sinks + (p − sinks) mod window`, so nothing is stored twice.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    window: usize,
    sinks: usize,
    width: usize,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Ring {
    /// Room for `window + sinks` entries of `width` values; none when `window` is 0.
    pub fn new(window: usize, sinks: usize, width: usize) -> Self {
        let entries = if window == 0 { 0 } else { window + sinks };
        Self { window, sinks, width, k: vec![0.0; entries * width], v: vec![0.0; entries * width] }
    }

    fn slot(&self, position: usize) -> usize {
        if position < self.sinks { position } else { self.sinks + (position - self.sinks) % self.window }
    }

    /// Positions held after `seen` tokens, increasing.
    pub fn positions(&self, seen: usize) -> impl Iterator<Item = usize> + use<> {
        let sinks = self.sinks.min(seen);
        (0..sinks).chain(seen.saturating_sub(self.window).max(sinks)..seen)
    }

    /// Keys and values of `positions(seen)` followed by `k` and `v`.
    pub fn followed_by(&self, seen: usize, k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let capacity = self.k.len() + k.len();
        let (mut keys, mut values) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        for position in self.positions(seen) {
            let at = self.slot(position) * self.width;
            keys.extend_from_slice(&self.k[at..at + self.width]);
            values.extend_from_slice(&self.v[at..at + self.width]);
        }
        keys.extend_from_slice(k);
        values.extend_from_slice(v);
        (keys, values)
    }

    /// Remembers what is needed of tokens `seen..`, whose keys and values are given.
    pub fn push(&mut self, seen: usize, k: &[f32], v: &[f32]) {
        let tokens = k.len() / self.width;
        let end = seen + tokens;
        for (t, position) in (seen..end).enumerate() {
            if position >= self.sinks && position + self.window < end {
                continue;
            }
            let (from, to) = (t * self.width, self.slot(position) * self.width);
            self.k[to..to + self.width].copy_from_slice(&k[from..from + self.width]);
            self.v[to..to + self.width].copy_from_slice(&v[from..from + self.width]);
        }
    }
}
