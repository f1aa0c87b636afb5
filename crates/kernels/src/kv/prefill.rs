//! Many query rows of one KV head: register tiles on the cache's panels, online softmax, causal.

use super::Window;
use super::attend::natural_log;
use super::buffers::Buffers;
use super::dot::{Dot, MAX_ROWS};
use super::format::{Format, MAX_STEP, even_half};
use super::lanes::Lanes;
use super::store::{KvStore, Layout, PAGE, WIDE};
use crate::MatRef;

/// Keys of a tile: their K and V in 16 bits stay in a 48 KiB first-level cache, beside a tile's rows of scores. Tiles start at
/// multiples of it, so that a row's result does not depend on the call's other rows.
const TILE: usize = 128;

/// One task: consecutive positions of one KV head.
pub(super) struct Block<'a> {
    pub(super) store: &'a KvStore,
    pub(super) kv_head: usize,
    pub(super) group: usize,
    /// The job's queries.
    pub(super) q: MatRef<'a>,
    /// The task's rows of `q`.
    pub(super) first: usize,
    pub(super) count: usize,
    /// `scale · log2 e`
    pub(super) scale: f32,
    /// Where the output of row `first` of `q`, head 0 of the group, begins, and the distance of two rows.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Likewise for the log denominators; null where they are not wanted.
    pub(super) lse: *mut f32,
    pub(super) lse_stride: usize,
    pub(super) window: Option<Window>,
}

/// Columns of a tile that one row sees: all before `end` but those `hidden`.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    end: usize,
    hidden: (usize, usize),
}

impl Seen {
    /// The first column that is seen; `end` when none is.
    fn first(self) -> usize {
        if self.hidden.0 == 0 { self.hidden.1.min(self.end) } else { 0 }
    }

    /// The same without the first `columns`, of which none is seen.
    fn after(self, columns: usize) -> Self {
        let less = |at: usize| at.saturating_sub(columns);
        Self { end: less(self.end), hidden: (less(self.hidden.0), less(self.hidden.1)) }
    }
}

impl Block<'_> {
    /// First position that a query at `position` sees after the sinks.
    fn start(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window.tokens))
    }

    /// What a query at `position` sees of the `keys` positions from `k0` on.
    fn seen(&self, position: usize, k0: usize, keys: usize) -> Seen {
        let end = (position + 1).saturating_sub(k0).min(keys);
        let Some(Window { sinks, .. }) = self.window else { return Seen { end, hidden: (0, 0) } };
        let sinks = sinks.saturating_sub(k0).min(end);
        let start = self.start(position).saturating_sub(k0).max(sinks);
        if start >= end { Seen { end: sinks, hidden: (0, 0) } } else { Seen { end, hidden: (sinks, start) } }
    }
}

/// Panels in use: pointer and distance of two panels in words.
type Panels = (*const u32, usize);

/// # Safety
/// The store's format is `F`; the task's part of the output is writable and nobody else's.
#[inline(always)]
pub(super) unsafe fn block<D: Dot, F: Format>(d: D, task: &Block<'_>, buffers: &mut Buffers) {
    let s = d.lanes();
    let layout = task.store.layout();
    let Layout { head_dim, .. } = layout;
    let (panels, group, rows) = (layout.panels(), task.group, task.count * task.group);
    let (width, padded) = (panels * WIDE, rows.next_multiple_of(D::ROWS));
    // Position of the task's first row, and how many keys its last row sees.
    let position = task.store.len() - task.q.rows() + task.first;
    let end = position + task.count;
    let direct = F::DIRECT == Some(D::PAIR);
    let q_stride = width / D::PAIR;
    let (p_stride, v_stride) = (TILE / D::PAIR, TILE / D::PAIR * WIDE);
    let q = buffers.q.words::<u32>(padded * q_stride);
    let scores = buffers.scores.words::<f32>((D::ROWS * TILE).max(width));
    let p = buffers.p.words::<u32>(D::ROWS * p_stride);
    let acc = buffers.acc.words::<f32>(padded * width);
    let max = buffers.max.words::<f32>(padded + WIDE);
    let sum = buffers.sum.words::<f32>(padded + WIDE);
    let k_copy = buffers.k.words::<u32>(if direct { 0 } else { TILE * head_dim / D::PAIR });
    let v_copy =
        buffers.v.words::<u32>(if direct && D::STEPS == 1 { panels * WIDE } else { panels * v_stride });
    // SAFETY: the buffers have the sizes just asked for; the slabs' sizes follow the layout; see each step.
    unsafe {
        load_queries(d, task, (q, q_stride), scores, padded);
        for i in 0..padded * width {
            *acc.add(i) = 0.0;
        }
        for row in 0..padded + WIDE {
            *max.add(row) = f32::NEG_INFINITY;
            *sum.add(row) = 0.0;
        }
        for k0 in (0..end).step_by(TILE) {
            let keys = (end - k0).min(TILE);
            if task.window.is_some_and(|w| w.sinks <= k0) && task.start(position) >= k0 + keys {
                continue;
            }
            let slab = task.store.slab(k0 / PAGE, task.kv_head);
            let at = k0 % PAGE;
            let (k, v) = (
                slab.k[at / WIDE * (head_dim / 2) * F::BYTES..].as_ptr(),
                slab.v[at / 2 * F::BYTES..].as_ptr(),
            );
            // The last of an odd number of keys, without the slot beside it.
            let mut tail: Option<Panels> = None;
            let (k, v): (Panels, Panels) = if direct {
                let mut values: Panels = (v.cast(), PAGE / D::PAIR * WIDE);
                if D::STEPS > 1 && !keys.is_multiple_of(D::STEPS * D::PAIR) {
                    copy_values::<D, F>(d, layout, v, keys, v_copy);
                    values = (v_copy, v_stride);
                } else if D::PAIR == 2 && keys % 2 == 1 {
                    let mut step = Step([0; MAX_STEP]);
                    for panel in 0..panels {
                        even_half::<F>(v.add((panel * (PAGE / 2) + keys / 2) * F::BYTES), &mut step.0);
                        v_copy.add(panel * WIDE).cast::<[u8; 64]>().write_unaligned(first_line(&step.0));
                    }
                    tail = Some((v_copy, WIDE));
                }
                ((k.cast(), WIDE * head_dim / D::PAIR), values)
            } else {
                copy_keys::<D, F>(d, layout, k, keys, k_copy);
                copy_values::<D, F>(d, layout, v, keys, v_copy);
                ((k_copy, WIDE * head_dim / D::PAIR), (v_copy, v_stride))
            };
            let scales = match slab.k_scales.is_empty() {
                true => None,
                false => Some((slab.k_scales[at..].as_ptr(), slab.v_scales[at..].as_ptr())),
            };
            for r0 in (0..padded).step_by(D::ROWS) {
                let mut seen = [Seen::default(); MAX_ROWS];
                let (mut most, mut least) = (0, keys);
                for (r, seen) in seen.iter_mut().enumerate().take(D::ROWS) {
                    let row = (r0 + r).min(rows - 1);
                    *seen = task.seen(position + row / group, k0, keys);
                    most = most.max(seen.end);
                    least = least.min(seen.first());
                }
                if most == 0 {
                    continue;
                }
                let whole = (D::STEPS * D::PAIR).max(WIDE);
                // Blocks that no row sees are left out, in whole operations.
                let start = least / whole * whole;
                let (k, scores, p) =
                    ((k.0.add(start * head_dim / D::PAIR), k.1), scores.add(start), p.add(start / D::PAIR));
                let v = (v.0.add(start / D::PAIR * WIDE), v.1);
                let (most, keys) = (most - start, keys - start);
                seen.iter_mut().for_each(|seen| *seen = seen.after(start));
                let scales = scales.map(|(k, v)| (k.add(start), v.add(start)));
                let blocks = most.div_ceil(WIDE);
                let queries = (q.add(r0 * q_stride).cast_const(), q_stride);
                d.tiles(head_dim / D::PAIR, blocks, queries, k, (scores, TILE), None);
                // Weights of whole operations: those beyond the last key become 0.
                let blocks = blocks.next_multiple_of((D::STEPS * D::PAIR).div_ceil(WIDE));
                let keep = weigh(d, scores, blocks, &seen, scales, (max.add(r0), sum.add(r0)), (p, p_stride));
                let out = (acc.add(r0 * width), width);
                let mut steps = most.div_ceil(D::PAIR);
                if let Some(tail) = tail.filter(|_| steps > keys / 2) {
                    steps -= 1;
                    d.tiles(steps, panels, (p, p_stride), v, out, Some(&keep));
                    d.tiles(1, panels, (p.add(steps), p_stride), tail, out, Some(&[1.0; MAX_ROWS]));
                } else {
                    d.tiles(steps, panels, (p, p_stride), v, out, Some(&keep));
                }
            }
        }
        for row in 0..rows {
            let sum = *sum.add(row);
            if !task.lse.is_null() {
                *task.lse.add(row / group * task.lse_stride + row % group) = natural_log(*max.add(row), sum);
            }
            let inverse = s.splat16(if sum == 0.0 { 0.0 } else { 1.0 / sum });
            let (acc, out) =
                (acc.add(row * width), task.out.add(row / group * task.out_stride + row % group * head_dim));
            let whole = head_dim / WIDE * WIDE;
            for at in (0..whole).step_by(WIDE) {
                s.store16(s.mul16(s.load16(acc.add(at)), inverse), out.add(at));
            }
            for at in whole..head_dim {
                *out.add(at) = *acc.add(at) * if sum == 0.0 { 0.0 } else { 1.0 / sum };
            }
        }
    }
}

#[repr(C, align(64))]
struct Step([u8; MAX_STEP]);

#[inline(always)]
fn first_line(step: &[u8; MAX_STEP]) -> [u8; 64] {
    let mut line = [0; 64];
    line.copy_from_slice(&step[..64]);
    line
}

/// Scales the task's queries, positions stacked and heads within, and stores them as coefficients; rows beyond and
/// columns beyond `head_dim` are 0. `row` is scratch of a whole row.
///
/// # Safety
/// `q` has `padded` rows of the stride given, `row` a stride of values.
#[inline(always)]
unsafe fn load_queries<D: Dot>(
    d: D,
    task: &Block<'_>,
    (q, stride): (*mut u32, usize),
    row: *mut f32,
    padded: usize,
) {
    let (s, head_dim, width) = (d.lanes(), task.store.head_dim(), stride * D::PAIR);
    let scale = s.splat16(task.scale);
    // SAFETY: the caller's contract.
    unsafe {
        for i in 0..padded {
            for at in 0..width {
                *row.add(at) = 0.0;
            }
            if i < task.count * task.group {
                let from = (task.kv_head * task.group + i % task.group) * head_dim;
                let from = &task.q.row(task.first + i / task.group)[from..][..head_dim];
                std::ptr::copy_nonoverlapping(from.as_ptr(), row, head_dim);
            }
            for at in (0..width).step_by(WIDE) {
                let x = s.mul16(s.load16(row.add(at)), scale);
                d.store_coefficients(x, q.add(i * stride + at / D::PAIR));
            }
        }
    }
}

/// A stored step as lines.
///
/// # Safety
/// The step is readable at `from`, its lines are writable at `to`.
#[inline(always)]
unsafe fn copy_step<D: Dot, F: Format>(d: D, from: *const u8, to: *mut u32) {
    // SAFETY: the caller's contract.
    unsafe {
        if F::DIRECT == Some(D::PAIR) {
            std::ptr::copy_nonoverlapping(from, to.cast(), F::BYTES);
        } else {
            d.store_step::<F>(F::load(d.lanes(), from), to);
        }
    }
}

/// Widens or narrows a tile of keys to lines.
///
/// # Safety
/// `k` points to the tile's first block in a slab of format `F`; the copy holds a tile.
#[inline(always)]
unsafe fn copy_keys<D: Dot, F: Format>(d: D, layout: Layout, k: *const u8, keys: usize, copy: *mut u32) {
    let words = 2 / D::PAIR * WIDE;
    for step in 0..keys.div_ceil(WIDE) * (layout.head_dim / 2) {
        // SAFETY: the caller's contract.
        unsafe { copy_step::<D, F>(d, k.add(step * F::BYTES), copy.add(step * words)) }
    }
}

/// Widens or narrows a tile of values to lines; the slot beside the last of an odd number of keys becomes 0, and so do the lines
/// up to a whole operation.
///
/// # Safety
/// `v` points to the tile's first pair in a slab of format `F`; the copy holds a tile.
#[inline(always)]
unsafe fn copy_values<D: Dot, F: Format>(d: D, layout: Layout, v: *const u8, keys: usize, copy: *mut u32) {
    let words = 2 / D::PAIR * WIDE;
    // SAFETY: the caller's contract.
    unsafe {
        for panel in 0..layout.panels() {
            let v = v.add(panel * (PAGE / 2) * F::BYTES);
            let copy = copy.add(panel * (TILE / D::PAIR * WIDE));
            for step in 0..keys / 2 {
                copy_step::<D, F>(d, v.add(step * F::BYTES), copy.add(step * words));
            }
            if keys % 2 == 1 {
                let mut tail = Step([0; MAX_STEP]);
                even_half::<F>(v.add(keys / 2 * F::BYTES), &mut tail.0);
                copy_step::<D, F>(d, tail.0.as_ptr(), copy.add(keys / 2 * words));
            }
            let used = keys.div_ceil(2) * words;
            for word in used..used.next_multiple_of(D::STEPS * WIDE) {
                *copy.add(word) = 0;
            }
        }
    }
}

/// Turns a tile's rows of scores into weights `p` relative to their new maxima, of which row `r` sees `seen[r]`; returns what the earlier sums are to be multiplied by.
///
/// # Safety
/// `scores` is `[ROWS, 128]`, `p` has `ROWS` rows of a tile's coefficients, `max` and `sum` have 16 values, the scales
/// `16 · blocks`.
#[inline(always)]
unsafe fn weigh<D: Dot>(
    d: D,
    scores: *mut f32,
    blocks: usize,
    seen: &[Seen; MAX_ROWS],
    scales: Option<(*const f32, *const f32)>,
    (max, sum): (*mut f32, *mut f32),
    (p, p_stride): (*mut u32, usize),
) -> [f32; MAX_ROWS] {
    let s = d.lanes();
    let (mut rows, mut keeps, mut shifts) =
        ([s.splat16(0.0); MAX_ROWS], [0.0f32; MAX_ROWS], [0.0f32; MAX_ROWS]);
    // SAFETY: the caller's contract.
    unsafe {
        for r in 0..D::ROWS {
            let scores = scores.add(r * TILE);
            let mut most = s.splat16(f32::NEG_INFINITY);
            let Seen { end, hidden } = seen[r];
            if scales.is_none() && end == TILE && hidden.0 == hidden.1 {
                let mut other = most;
                for block in 0..TILE / WIDE / 2 {
                    most = s.max16(most, s.load16(scores.add(2 * block * WIDE)));
                    other = s.max16(other, s.load16(scores.add((2 * block + 1) * WIDE)));
                }
                most = s.max16(most, other);
            } else {
                for block in 0..blocks {
                    let at = block * WIDE;
                    let mut x = s.load16(scores.add(at));
                    if let Some((k_scales, _)) = scales {
                        x = s.mul16(x, s.load16(k_scales.add(at)));
                    }
                    if end < at + WIDE {
                        x = s.keep_first(x, end.saturating_sub(at), f32::NEG_INFINITY);
                    }
                    if hidden.0 < at + WIDE && hidden.1 > at {
                        let (from, to) = (hidden.0.saturating_sub(at), hidden.1 - at);
                        x = s.fill_lanes(x, from, to, f32::NEG_INFINITY);
                    }
                    s.store16(x, scores.add(at));
                    most = s.max16(most, x);
                }
            }
            rows[r] = most;
        }
        let old = s.load16(max);
        let new = s.max16(old, s.max_lanes(&rows, D::ROWS));
        s.store16(new, max);
        // A row of -inf scores has no weights; -inf - -inf would be NaN.
        let shift = s.max16(s.splat16(f32::MIN), new);
        s.store16(shift, shifts.as_mut_ptr());
        let keep = s.exp2(s.sub16(old, shift));
        s.store16(keep, keeps.as_mut_ptr());
        for r in 0..D::ROWS {
            let (scores, p) = (scores.add(r * TILE), p.add(r * p_stride));
            let (shift, mut total) = (s.splat16(shifts[r]), s.splat16(0.0));
            let pairs = if scales.is_none() { blocks / 2 } else { 0 };
            for pair in 0..pairs {
                let at = 2 * pair * WIDE;
                let x = d.exp2(s.sub16(s.load16(scores.add(at)), shift));
                let y = d.exp2(s.sub16(s.load16(scores.add(at + WIDE)), shift));
                total = s.add16(total, s.add16(x, y));
                d.store_pair(x, y, p.add(at / D::PAIR));
            }
            for block in 2 * pairs..blocks {
                let at = block * WIDE;
                let mut x = d.exp2(s.sub16(s.load16(scores.add(at)), shift));
                total = s.add16(total, x);
                if let Some((_, v_scales)) = scales {
                    x = s.mul16(x, s.load16(v_scales.add(at)));
                    if seen[r].end < at + WIDE {
                        // 0 · NaN of an unused slot's scale.
                        x = s.keep_first(x, seen[r].end.saturating_sub(at), 0.0);
                    }
                }
                d.store_coefficients(x, p.add(at / D::PAIR));
            }
            rows[r] = total;
        }
        s.store16(s.fma16(s.load16(sum), keep, s.sum_lanes(&rows, D::ROWS)), sum);
    }
    keeps
}
