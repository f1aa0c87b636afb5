//! The forward pass: query blocks against key tiles with an online softmax. Few queries (decoding) split the keys among
//! tasks instead and merge the partial softmaxes in order.

use super::mask::{TILE, Visible, positions_per_block};
use super::{AttnMask, AttnShape};
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, MatRef, Reused, Store, Trans, mixed_gemm};
use std::borrow::Cow;

/// Up to this many query rows the keys of one block are split among tasks.
const MAX_DECODE_ROWS: usize = 8;
/// Tiles per task then; fixed, so that results do not depend on the number of threads.
const TILES_PER_SPLIT: usize = 4;
/// Below this many multiply-adds waking another thread costs more than it gains.
const MIN_PARALLEL_WORK: usize = 64 * 1024;

/// One query block of one KV head, with its rows of the output.
struct Block<'a> {
    kv_head: usize,
    first: usize,
    tiles: Vec<(usize, usize)>,
    /// Per position: the group's `group · head_dim` outputs.
    out: Vec<&'a mut [f32]>,
    /// Per position: the group's log denominators; empty when they are not wanted.
    lse: Vec<&'a mut [f32]>,
}

/// A softmax-weighted sum in progress: rows are positions × the group's heads.
struct Partial {
    acc: Reused,
    max: Vec<f32>,
    sum: Vec<f32>,
}

pub(super) fn attention(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    [q, k, v]: [MatRef<'_>; 3],
    out: MatMut<'_>,
    lse: Option<&mut [f32]>,
) {
    let blocks = blocks(shape, mask, q.rows(), k.rows(), out, lse);
    let split = if q.rows() <= MAX_DECODE_ROWS { TILES_PER_SPLIT } else { usize::MAX };
    let items: Vec<(usize, usize)> = blocks
        .iter()
        .enumerate()
        .flat_map(|(b, block)| (0..block.tiles.len().div_ceil(split).max(1)).map(move |part| (b, part)))
        .collect();
    let keys: usize = blocks.iter().map(|b| b.out.len() * b.tiles.iter().map(|t| t.1).sum::<usize>()).sum();
    let serial = exec.single();
    let exec = if keys * shape.group() * shape.head_dim < MIN_PARALLEL_WORK { &serial } else { exec };
    let run = |block: &Block<'_>, part: usize| {
        let (first, last) = (part.saturating_mul(split), (part + 1).saturating_mul(split));
        let tiles = &block.tiles[first.min(block.tiles.len())..last.min(block.tiles.len())];
        let rows = (block.first, block.out.len());
        Partial::of(&serial, shape, mask, [q, k, v], block.kv_head, rows, tiles)
    };
    if items.len() == blocks.len() {
        exec.parallel_items(blocks, |_, block| {
            let partial = run(&block, 0);
            partial.finish(shape, block);
        });
        return;
    }
    let mut partials = exec.parallel_map(items.len(), |i| run(&blocks[items[i].0], items[i].1)).into_iter();
    let mut parts = items.iter().map(|item| item.0).peekable();
    for (b, block) in blocks.into_iter().enumerate() {
        let mut total: Option<Partial> = None;
        while parts.next_if_eq(&b).is_some() {
            let Some(part) = partials.next() else { break };
            match &mut total {
                None => total = Some(part),
                Some(total) => total.merge(part),
            }
        }
        if let Some(total) = total {
            total.finish(shape, block);
        }
    }
}

/// Shares the output rows out to query blocks, block-major, KV heads within.
fn blocks<'a>(
    shape: AttnShape,
    mask: AttnMask<'_>,
    q_len: usize,
    kv_len: usize,
    out: MatMut<'a>,
    lse: Option<&'a mut [f32]>,
) -> Vec<Block<'a>> {
    let AttnShape { kv_heads, head_dim, .. } = shape;
    let (group, step) = (shape.group(), positions_per_block(shape.group()));
    let mut blocks = Vec::new();
    for first in (0..q_len).step_by(step) {
        let tiles = mask.tiles(first..(first + step).min(q_len), kv_len);
        for kv_head in 0..kv_heads {
            blocks.push(Block { kv_head, first, tiles: tiles.clone(), out: Vec::new(), lse: Vec::new() });
        }
    }
    for (i, row) in out.into_rows().into_iter().enumerate() {
        for (kv_head, part) in row.chunks_mut(group * head_dim).enumerate() {
            blocks[i / step * kv_heads + kv_head].out.push(part);
        }
    }
    for (i, row) in lse.into_iter().flat_map(|lse| lse.chunks_mut(shape.q_heads)).enumerate() {
        for (kv_head, part) in row.chunks_mut(group).enumerate() {
            blocks[i / step * kv_heads + kv_head].lse.push(part);
        }
    }
    blocks
}

/// The columns of one KV head's query group, positions stacked: `[rows · group, head_dim]`, row-major and dense; copied where they are not so
/// already.
pub(super) fn stacked<'a>(
    shape: AttnShape,
    mat: MatRef<'a>,
    kv_head: usize,
    first: usize,
    rows: usize,
) -> Cow<'a, [f32]> {
    let width = shape.group() * shape.head_dim;
    mat.rows_at(first, rows).columns(kv_head * width, width).dense_values()
}

impl Partial {
    /// Attention of `rows = (first, count)` positions over `tiles`.
    fn of(
        exec: &Exec,
        shape: AttnShape,
        mask: AttnMask<'_>,
        [q, k, v]: [MatRef<'_>; 3],
        kv_head: usize,
        (first, count): (usize, usize),
        tiles: &[(usize, usize)],
    ) -> Self {
        let AttnShape { head_dim, scale, .. } = shape;
        let rows = count * shape.group();
        let packed = stacked(shape, q, kv_head, first, count);
        let q = MatRef::dense(&packed, rows, head_dim);
        let (k, v) = (k.columns(kv_head * head_dim, head_dim), v.columns(kv_head * head_dim, head_dim));
        let visible: Vec<Visible> = (first..first + count).map(|i| mask.visible(i, k.rows())).collect();
        let mut partial = Self {
            acc: Reused::zeros(rows * head_dim),
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
        };
        let mut scores = Reused::new(rows * TILE);
        for &(start, cols) in tiles {
            let (k, v) = (k.rows_at(start, cols), v.rows_at(start, cols));
            let tile = MatMut::new(&mut scores, rows, cols, TILE);
            mixed_gemm(exec, tile, q, Trans::No, k, Trans::Yes, scale, Store::Overwrite);
            dispatch!(exec.isa(), |s| {
                for (i, visible) in visible.iter().enumerate() {
                    let seen = visible.in_tile(start, cols);
                    for row in i * shape.group()..(i + 1) * shape.group() {
                        partial.absorb(s, row, &seen, &mut scores[row * TILE..][..cols], head_dim);
                    }
                }
            });
            let weights = MatRef::new(&scores, rows, cols, TILE);
            let acc = MatMut::dense(&mut partial.acc, rows, head_dim);
            mixed_gemm(exec, acc, weights, Trans::No, v, Trans::No, 1.0, Store::Accumulate);
        }
        partial
    }

    /// Turns one row's scores into weights relative to the new maximum and rescales what was there.
    #[inline(always)]
    fn absorb<S: Simd>(
        &mut self,
        s: S,
        row: usize,
        seen: &[std::ops::Range<usize>; 2],
        scores: &mut [f32],
        head_dim: usize,
    ) {
        let old = self.max[row];
        let mut max = old;
        for range in seen {
            let best = simd::max(&scores[range.clone()]);
            max = if best > max { best } else { max };
        }
        let [sinks, recent] = seen;
        scores[sinks.end..recent.start].fill(0.0);
        scores[recent.end..].fill(0.0);
        let mut sum = 0.0;
        for range in seen {
            let scores = &mut scores[range.clone()];
            // A row of -inf scores has no weights; -inf - -inf would be NaN.
            let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
            scores.iter_mut().for_each(|score| *score = simd::exp(s, *score - shift));
            sum += simd::sum(s, scores);
        }
        if max > old {
            let keep = simd::exp(s, old - max);
            self.max[row] = max;
            self.sum[row] = self.sum[row] * keep + sum;
            self.acc[row * head_dim..][..head_dim].iter_mut().for_each(|x| *x *= keep);
        } else {
            self.sum[row] += sum;
        }
    }

    /// Adds the keys that `other` saw.
    fn merge(&mut self, other: Self) {
        let head_dim = self.acc.len() / self.max.len().max(1);
        for row in 0..self.max.len() {
            let max = self.max[row].max(other.max[row]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (mine, theirs) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            self.max[row] = max;
            self.sum[row] = self.sum[row] * mine + other.sum[row] * theirs;
            let at = row * head_dim..(row + 1) * head_dim;
            for (x, &y) in self.acc[at.clone()].iter_mut().zip(&other.acc[at]) {
                *x = *x * mine + y * theirs;
            }
        }
    }

    /// Divides by the denominators and writes the block's rows.
    fn finish(&self, shape: AttnShape, block: Block<'_>) {
        let (group, head_dim) = (shape.group(), shape.head_dim);
        for (i, out) in block.out.into_iter().enumerate() {
            for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let row = i * group + h;
                let inv = if self.sum[row] > 0.0 { 1.0 / self.sum[row] } else { 0.0 };
                for (out, &acc) in out.iter_mut().zip(&self.acc[row * head_dim..]) {
                    *out = acc * inv;
                }
            }
        }
        for (i, lse) in block.lse.into_iter().enumerate() {
            for (h, lse) in lse.iter_mut().enumerate() {
                let row = i * group + h;
                // ln 0 = -inf for a query that saw no key.
                *lse =
                    if self.sum[row] > 0.0 { self.max[row] + self.sum[row].ln() } else { f32::NEG_INFINITY };
            }
        }
    }
}
