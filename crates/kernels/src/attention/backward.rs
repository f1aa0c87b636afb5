//! The backward pass: weights are recomputed tile by tile from the saved log denominators.
//!
//! Tasks are (KV head, segment of query blocks); each sums `dk` and `dv` of the keys that its queries see into its own buffer, and the buffers are
//! added in a fixed order, so that the result does not depend on the number of threads.

#[cfg(target_arch = "x86_64")]
mod amx;

use super::forward::stacked;
use super::mask::{TILE, Visible, positions_per_block};
use super::sinks::FewSinks;
use super::{AttnMask, AttnSaved, AttnShape};
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, MatRef, Reused, Store, Trans, mixed_gemm};
use std::borrow::Cow;
use std::ops::Range;

/// Tasks wanted in all; bounds the memory of the `dk` and `dv` buffers.
const TASKS: usize = 16;
/// The same under a local mask, where the keys of neighbouring tasks overlap by the window.
const LOCAL_TASKS: usize = 4;

/// The share of one task: query blocks of a KV head. Under a causal mask every `segments`-th, because later ones see more keys; under a local one
/// neighbours, which see the same keys.
struct Share<'a> {
    kv_head: usize,
    /// First position of each block, with its `dq` rows `[group · head_dim]`.
    blocks: Vec<(usize, Vec<&'a mut [f32]>)>,
}

/// Gradients of some of one KV head's keys and values, `[keys, head_dim]` each.
struct KvGradient {
    /// Key rows that the buffers hold, one range after another, in order and apart.
    ranges: Vec<Range<usize>>,
    dk: Reused,
    dv: Reused,
}

/// What queries see: the keys of tiles, and few sinks apart from them.
#[derive(Clone, Copy)]
struct Masks<'a> {
    tiles: AttnMask<'a>,
    /// The whole mask, where it has few sinks.
    few_sinks: Option<AttnMask<'a>>,
}

pub(super) fn attention_backward(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    saved: AttnSaved<'_>,
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let AttnShape { q_heads, kv_heads, head_dim, .. } = shape;
    let (group, step) = (shape.group(), positions_per_block(shape.group()));
    let (q_len, kv_len) = (saved.q.rows(), saved.k.rows());
    if q_len == 0 || kv_len == 0 {
        return;
    }
    let blocks = q_len.div_ceil(step);
    let tasks = match mask {
        AttnMask::Causal { .. } => TASKS,
        AttnMask::Local { .. } => LOCAL_TASKS,
    };
    let (windows, few) = mask.without_few_sinks();
    let masks = Masks { tiles: windows, few_sinks: few.then_some(mask) };
    // The last query sees every sink that any does.
    let few_sinks = masks.few_sinks.map_or(0, |mask| mask.visible(q_len - 1, kv_len).sinks.end);
    let segments = (tasks / kv_heads).clamp(1, blocks);
    let mut shares: Vec<Share<'_>> =
        (0..kv_heads * segments).map(|i| Share { kv_head: i / segments, blocks: Vec::new() }).collect();
    for (b, rows) in dq.chunks_mut(step * q_heads * head_dim).enumerate() {
        let segment = match mask {
            AttnMask::Causal { .. } => b % segments,
            AttnMask::Local { .. } => b / blocks.div_ceil(segments),
        };
        let at = |kv_head: usize| kv_head * segments + segment;
        (0..kv_heads).for_each(|kv_head| shares[at(kv_head)].blocks.push((b * step, Vec::new())));
        for row in rows.chunks_mut(q_heads * head_dim) {
            for (kv_head, part) in row.chunks_mut(group * head_dim).enumerate() {
                if let Some((_, dq)) = shares[at(kv_head)].blocks.last_mut() {
                    dq.push(part);
                }
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    let rounded: Option<Vec<amx::Keys>> = amx::applies(exec, head_dim).then(|| {
        exec.parallel_map(kv_heads, |kv_head| {
            let column = kv_head * head_dim;
            amx::Keys::new(exec, saved.k.columns(column, head_dim), saved.v.columns(column, head_dim))
        })
    });
    let gradients = exec.parallel_map_items(shares, |_, share| {
        let exec = &exec.single();
        let column = share.kv_head * head_dim;
        let [k, v] = [saved.k, saved.v].map(|mat| mat.columns(column, head_dim).rows_at(0, few_sinks));
        let mut sinks = FewSinks::new(k, v);
        #[cfg(target_arch = "x86_64")]
        if let Some(rounded) = &rounded {
            let Share { kv_head, blocks } = share;
            let block = |first, count| Block::new(exec, shape, masks, &saved, kv_head, first, count);
            let blocks = blocks.into_iter().map(|(first, dq)| (block(first, dq.len()), dq)).collect();
            return (amx::run(exec, &rounded[kv_head], &mut sinks, blocks), sinks);
        }
        (share.run(exec, shape, masks, &saved, &mut sinks), sinks)
    });
    exec.parallel_items(vec![(dk, true), (dv, false)], |_, (out, keys)| {
        for (i, (gradient, sinks)) in gradients.iter().enumerate() {
            let column = i / segments * head_dim;
            let (part, of_sinks) =
                if keys { (&gradient.dk, &sinks.d_keys) } else { (&gradient.dv, &sinks.d_values) };
            let rows = gradient.ranges.iter().cloned().flatten().zip(part.chunks(head_dim));
            for (row, part) in rows.chain(of_sinks.chunks(head_dim).enumerate()) {
                let row = &mut out[row * kv_heads * head_dim + column..][..head_dim];
                row.iter_mut().zip(part).for_each(|(x, y)| *x += y);
            }
        }
    });
}

impl Share<'_> {
    fn run(
        self,
        exec: &Exec,
        shape: AttnShape,
        masks: Masks<'_>,
        saved: &AttnSaved<'_>,
        sinks: &mut FewSinks,
    ) -> KvGradient {
        let kv_len = saved.k.rows();
        let tiles =
            self.blocks.iter().flat_map(|(first, dq)| masks.tiles.tiles(*first..first + dq.len(), kv_len));
        let mut sums = KvGradient::new(tiles, shape.head_dim);
        let rows = positions_per_block(shape.group()) * shape.group();
        let mut scratch = [Reused::new(rows * TILE), Reused::new(rows * TILE)];
        for (first, dq) in self.blocks {
            let block = Block::new(exec, shape, masks, saved, self.kv_head, first, dq.len());
            block.run(exec, saved, &mut scratch, &mut sums, sinks, dq);
        }
        sums
    }
}

impl KvGradient {
    /// Zeros for every key of `tiles` (first row, rows).
    fn new(tiles: impl Iterator<Item = (usize, usize)>, head_dim: usize) -> Self {
        let mut tiles: Vec<Range<usize>> = tiles.map(|(start, rows)| start..start + rows).collect();
        tiles.sort_by_key(|tile| tile.start);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for tile in tiles {
            match ranges.last_mut().filter(|last| tile.start <= last.end) {
                Some(last) => last.end = last.end.max(tile.end),
                None => ranges.push(tile),
            }
        }
        let values = ranges.iter().map(Range::len).sum::<usize>() * head_dim;
        Self { ranges, dk: Reused::zeros(values), dv: Reused::zeros(values) }
    }

    /// Where a key row is in the buffers; the rest of its tile follows.
    fn row(&self, key: usize) -> usize {
        let mut before = 0;
        for range in &self.ranges {
            if range.contains(&key) {
                return before + key - range.start;
            }
            before += range.len();
        }
        panic!("attention: key row {key} is in no tile of the task");
    }
}

/// One query block of one KV head: rows are positions × the group's heads.
struct Block<'a> {
    shape: AttnShape,
    kv_head: usize,
    rows: usize,
    tiles: Vec<(usize, usize)>,
    visible: Vec<Visible>,
    /// Of each position: how many of the few sinks the window has left.
    few_sinks: Vec<usize>,
    q: Cow<'a, [f32]>,
    dout: Cow<'a, [f32]>,
    lse: Vec<f32>,
    /// `Σ dout · out` per row, the mean of the weights' gradients under the weights, less the gradient of the log denominator.
    delta: Vec<f32>,
}

impl<'a> Block<'a> {
    fn new(
        exec: &Exec,
        shape: AttnShape,
        masks: Masks<'_>,
        saved: &AttnSaved<'a>,
        kv_head: usize,
        first: usize,
        count: usize,
    ) -> Self {
        let (group, kv_len) = (shape.group(), saved.k.rows());
        let dout = stacked(shape, saved.dout, kv_head, first, count);
        let out = stacked(shape, saved.out, kv_head, first, count);
        let pairs = || dout.chunks_exact(shape.head_dim).zip(out.chunks_exact(shape.head_dim));
        let mut delta = dispatch!(exec.isa(), |s| {
            let mut delta = Vec::with_capacity(count * group);
            for (dout, out) in pairs() {
                delta.push(simd::dot(s, dout, out));
            }
            delta
        });
        let of_rows = |values| {
            let values = MatRef::dense(values, saved.q.rows(), shape.q_heads);
            (first..first + count).flat_map(move |i| &values.row(i)[kv_head * group..][..group])
        };
        if let Some(dlse) = saved.dlse {
            delta.iter_mut().zip(of_rows(dlse)).for_each(|(delta, dlse)| *delta -= dlse);
        }
        let few_sinks = |i| masks.few_sinks.map_or(0, |mask| mask.visible(i, kv_len).sinks.end);
        Self {
            shape,
            kv_head,
            rows: count * group,
            tiles: masks.tiles.tiles(first..first + count, kv_len),
            visible: (first..first + count).map(|i| masks.tiles.visible(i, kv_len)).collect(),
            few_sinks: (first..first + count).map(few_sinks).collect(),
            q: stacked(shape, saved.q, kv_head, first, count),
            dout,
            lse: of_rows(saved.lse).copied().collect(),
            delta,
        }
    }

    fn run(
        &self,
        exec: &Exec,
        saved: &AttnSaved<'_>,
        [weights, scores]: &mut [Reused; 2],
        sums: &mut KvGradient,
        sinks: &mut FewSinks,
        dq: Vec<&mut [f32]>,
    ) {
        let AttnShape { head_dim, scale, .. } = self.shape;
        let (rows, column) = (self.rows, self.kv_head * head_dim);
        let (k, v) = (saved.k.columns(column, head_dim), saved.v.columns(column, head_dim));
        let (q, dout) = (MatRef::dense(&self.q, rows, head_dim), MatRef::dense(&self.dout, rows, head_dim));
        let mut dq_sum = Reused::zeros(rows * head_dim);
        for &(start, cols) in &self.tiles {
            let (k, v) = (k.rows_at(start, cols), v.rows_at(start, cols));
            let at = sums.row(start) * head_dim;
            let at = at..at + cols * head_dim;
            let tile = MatMut::new(weights, rows, cols, TILE);
            mixed_gemm(exec, tile, q, Trans::No, k, Trans::Yes, scale, Store::Overwrite);
            let tile = MatMut::new(scores, rows, cols, TILE);
            mixed_gemm(exec, tile, dout, Trans::No, v, Trans::Yes, 1.0, Store::Overwrite);
            dispatch!(exec.isa(), |s| self.weigh(s, start, cols, weights, scores));
            let (p, ds) = (MatRef::new(weights, rows, cols, TILE), MatRef::new(scores, rows, cols, TILE));
            let dv = MatMut::dense(&mut sums.dv[at.clone()], cols, head_dim);
            mixed_gemm(exec, dv, p, Trans::Yes, dout, Trans::No, 1.0, Store::Accumulate);
            let dk = MatMut::dense(&mut sums.dk[at], cols, head_dim);
            mixed_gemm(exec, dk, ds, Trans::Yes, q, Trans::No, 1.0, Store::Accumulate);
            let dq = MatMut::dense(&mut dq_sum, rows, head_dim);
            mixed_gemm(exec, dq, ds, Trans::No, k, Trans::No, 1.0, Store::Accumulate);
        }
        self.add_few_sinks(exec, sinks, &mut dq_sum);
        let width = self.shape.group() * head_dim;
        for (dq, sum) in dq.into_iter().zip(dq_sum.chunks_exact(width)) {
            dq.iter_mut().zip(sum).for_each(|(x, y)| *x += y);
        }
    }

    /// Adds what few sinks give to `dq` `[rows, head_dim]` and to their own gradients.
    fn add_few_sinks(&self, exec: &Exec, sinks: &mut FewSinks, dq: &mut [f32]) {
        let AttnShape { head_dim, scale, .. } = self.shape;
        if self.few_sinks.last().is_none_or(|&few| few == 0) {
            return;
        }
        dispatch!(exec.isa(), |s| {
            let rows = self.q.chunks_exact(head_dim).zip(self.dout.chunks_exact(head_dim));
            for (row, ((q, dout), dq)) in rows.zip(dq.chunks_exact_mut(head_dim)).enumerate() {
                let seen = self.few_sinks[row / self.shape.group()];
                sinks.add(s, scale, seen, [q, dout], [self.lse[row], self.delta[row]], dq);
            }
        });
    }

    /// Scores become weights `p`, gradients of weights become gradients of scores `scale · p · (dp − delta)`; unseen
    /// keys get zeros.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, start: usize, cols: usize, weights: &mut [f32], scores: &mut [f32]) {
        let AttnShape { scale, .. } = self.shape;
        for row in 0..self.rows {
            let [sinks, recent] = self.visible[row / self.shape.group()].in_tile(start, cols);
            let weights = &mut weights[row * TILE..][..cols];
            let scores = &mut scores[row * TILE..][..cols];
            let (lse, delta) = (self.lse[row], self.delta[row]);
            for unseen in [sinks.end..recent.start, recent.end..cols] {
                weights[unseen.clone()].fill(0.0);
                scores[unseen].fill(0.0);
            }
            for seen in [sinks, recent] {
                for (p, ds) in weights[seen.clone()].iter_mut().zip(&mut scores[seen]) {
                    *p = simd::exp(s, *p - lse);
                    *ds = scale * *p * (*ds - delta);
                }
            }
        }
    }
}
