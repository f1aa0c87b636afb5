//! The constant memory of one converted group: conv tails, recurrent state, and the ring of the local window.
//! Knows positions and slots, nothing of what is stored.

use super::HeadLayout;
use super::merged::{DroppedSums, dropped_at};
use crate::plan::Dropped;
use half::f16;
use half::slice::HalfFloatSliceExt;
use kernels::attention::WindowRows;
use kernels::kv::KvType;
use kernels::{MatMut, MatRef};
use std::ops::Range;

/// Constant memory of one converted group in one sequence: conv tails and recurrent state (f32), ring of `window + sinks` keys (after RoPE)
/// and values (f32, or f16 beside any smaller attention cache), sums of the dropped ones (f32) where they are averaged, and the number of
/// tokens seen.
#[derive(Clone, Debug)]
pub struct HeadCache {
    pub(super) seen: usize,
    /// q, k, v tails, or Mamba's one, or none.
    pub(super) tails: Vec<Vec<f32>>,
    pub(super) state: Vec<f32>,
    pub(super) ring: Ring,
    /// Where dropped tokens are averaged.
    pub(super) dropped: Option<DroppedSums>,
}

impl HeadCache {
    pub(super) fn new(layout: &HeadLayout, kv_type: KvType) -> Self {
        Self {
            seen: 0,
            tails: layout.tail_lens().into_iter().map(|n| vec![0.0; n]).collect(),
            state: vec![0.0; layout.state_len()],
            ring: Ring::new(layout.spec.window, layout.spec.sinks, layout.dims.head_dim, kv_type),
            dropped: match layout.spec.dropped {
                Dropped::Forgotten | Dropped::Weighed => None,
                Dropped::Averaged => Some(DroppedSums::new(layout.dims.head_dim)),
            },
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
    /// Keys and values that the window holds.
    pub fn window_len(&self) -> usize {
        self.ring.len(self.seen)
    }
    /// Writes the window's keys and values to the rows of `keys` and `values`, in the order of their positions: sinks first.
    pub fn window_into(&self, mut keys: MatMut<'_>, mut values: MatMut<'_>) {
        for (row, position) in self.ring.positions(self.seen).enumerate() {
            self.ring.read(position, keys.row_mut(row), values.row_mut(row));
        }
    }
    /// Puts the keys (after RoPE) and values of the tokens that follow into the window.
    pub fn remember(&mut self, k: MatRef<'_>, v: MatRef<'_>) {
        self.ring.push(self.seen, k, v);
    }
    /// Bytes held, the same at any length; equal to [`HeadLayout::cache_bytes`].
    pub fn bytes(&self) -> usize {
        let tails: usize = self.tails.iter().map(Vec::len).sum();
        let dropped = self.dropped.as_ref().map_or(0, DroppedSums::bytes);
        (tails + self.state.len()) * size_of::<f32>() + self.ring.k.bytes() + self.ring.v.bytes() + dropped
    }

    /// Adds the token that the next one pushes out of the window to the sums, where there are any; returns how many were dropped then.
    pub(super) fn drop_next(&mut self) -> usize {
        let Some(sums) = &mut self.dropped else { return 0 };
        let count = dropped_at(self.ring.window, self.ring.sinks, self.seen);
        if count > 0 {
            self.ring.add_to(self.seen - self.ring.window, sums);
        }
        count
    }
}

/// Keys and values of the first `sinks` tokens and of the last `window` tokens after those. Token `p < sinks` lives in entry `p`, any other
/// in entry `sinks + (p − sinks) mod window`, so nothing is stored twice.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    window: usize,
    sinks: usize,
    width: usize,
    k: Entries,
    v: Entries,
}

/// Stored keys or values.
#[derive(Clone, Debug)]
enum Entries {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Entries {
    fn new(len: usize, kv_type: KvType) -> Self {
        match kv_type {
            KvType::F32 => Self::F32(vec![0.0; len]),
            _ => Self::F16(vec![f16::ZERO; len]),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()),
            Self::F16(values) => size_of_val(values.as_slice()),
        }
    }

    fn write(&mut self, at: usize, row: &[f32]) {
        match self {
            Self::F32(values) => values[at..at + row.len()].copy_from_slice(row),
            Self::F16(values) => values[at..at + row.len()].convert_from_f32_slice(row),
        }
    }

    fn read(&self, at: usize, out: &mut [f32]) {
        match self {
            Self::F32(values) => out.copy_from_slice(&values[at..at + out.len()]),
            Self::F16(values) => values[at..at + out.len()].convert_to_f32_slice(out),
        }
    }

    fn add_to(&self, range: Range<usize>, sums: &mut [f32]) {
        match self {
            Self::F32(values) => sums.iter_mut().zip(&values[range]).for_each(|(sum, x)| *sum += x),
            Self::F16(values) => sums.iter_mut().zip(&values[range]).for_each(|(sum, x)| *sum += x.to_f32()),
        }
    }

    fn rows(&self, len: usize) -> WindowRows<'_> {
        match self {
            Self::F32(values) => WindowRows::F32(&values[..len]),
            Self::F16(values) => WindowRows::F16(&values[..len]),
        }
    }

    fn append_to(&self, range: Range<usize>, out: &mut Vec<f32>) {
        match self {
            Self::F32(values) => out.extend_from_slice(&values[range]),
            Self::F16(values) => {
                let start = out.len();
                out.resize(start + range.len(), 0.0);
                values[range].convert_to_f32_slice(&mut out[start..]);
            }
        }
    }
}

impl Ring {
    /// Room for `window + sinks` entries of `width` values; none when `window` is 0.
    pub fn new(window: usize, sinks: usize, width: usize, kv_type: KvType) -> Self {
        let len = if window == 0 { 0 } else { (window + sinks) * width };
        Self { window, sinks, width, k: Entries::new(len, kv_type), v: Entries::new(len, kv_type) }
    }

    /// Keys and values held after `seen` tokens, in the order of their entries, which is not that of their positions.
    pub fn held(&self, seen: usize) -> [WindowRows<'_>; 2] {
        let len = self.len(seen) * self.width;
        [self.k.rows(len), self.v.rows(len)]
    }

    fn slot(&self, position: usize) -> usize {
        if position < self.sinks { position } else { self.sinks + (position - self.sinks) % self.window }
    }

    /// Positions held after `seen` tokens, increasing.
    pub fn positions(&self, seen: usize) -> impl Iterator<Item = usize> + use<> {
        let sinks = self.sinks.min(seen);
        (0..sinks).chain(seen.saturating_sub(self.window).max(sinks)..seen)
    }

    /// How many positions are held after `seen` tokens.
    pub fn len(&self, seen: usize) -> usize {
        seen.min(self.window + self.sinks)
    }

    /// Key and value of a position that is held.
    fn read(&self, position: usize, key: &mut [f32], value: &mut [f32]) {
        let at = self.slot(position) * self.width;
        self.k.read(at, key);
        self.v.read(at, value);
    }

    /// Adds key and value of a position that is held.
    fn add_to(&self, position: usize, sums: &mut DroppedSums) {
        let at = self.slot(position) * self.width;
        let [k, v] = sums.parts();
        self.k.add_to(at..at + self.width, k);
        self.v.add_to(at..at + self.width, v);
    }

    /// Keys and values of `positions(seen)` followed by `k` and `v`.
    pub fn followed_by(&self, seen: usize, k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let capacity = (self.window + self.sinks) * self.width + k.len();
        let (mut keys, mut values) = (Vec::with_capacity(capacity), Vec::with_capacity(capacity));
        for position in self.positions(seen) {
            let at = self.slot(position) * self.width;
            self.k.append_to(at..at + self.width, &mut keys);
            self.v.append_to(at..at + self.width, &mut values);
        }
        keys.extend_from_slice(k);
        values.extend_from_slice(v);
        (keys, values)
    }

    /// Remembers what is needed of tokens `seen..`, whose keys and values are given.
    pub fn push(&mut self, seen: usize, k: MatRef<'_>, v: MatRef<'_>) {
        let end = seen + k.rows();
        for (t, position) in (seen..end).enumerate() {
            if position >= self.sinks && position + self.window < end {
                continue;
            }
            let to = self.slot(position) * self.width;
            self.k.write(to, k.row(t));
            self.v.write(to, v.row(t));
        }
    }
}
