//! The backward pass on AMX tiles: 64 keys at a time against those rows of a query block that see any of them. Scores, weights and both
//! gradients of such a part stay in the caches, and are rounded to bfloat16 where they are computed, in the forms that the products read.
//! Knows tiles and masks; the order of blocks and the sums over them are `backward`'s.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::super::mask::Visible;
use super::super::sinks::FewSinks;
use super::{Block, KvGradient};
use crate::kv::lanes::Lanes;
use crate::packed::amx::{Configured, Operands, Out, panels_into};
use crate::packed::buffer::Lines;
use crate::packed::{PAD, PANEL, bf16};
use crate::simd::Avx512;
use crate::{Exec, IsaLevel, MatRef, Precision, Reused, Store, Trans};

/// Keys of a unit: a row's view of one is a word of bits.
const UNIT: usize = 64;
/// Floats of a register.
const LANES: usize = 16;

/// Whether this pass takes heads of such a size.
pub(super) fn applies(exec: &Exec, head_dim: usize) -> bool {
    exec.precision() == Precision::Bf16
        && exec.isa().level() >= IsaLevel::Amx
        && head_dim > 0
        && head_dim.is_multiple_of(PAD)
}

/// One KV head's keys and values, rounded, unit after unit, zeros beyond the last row.
pub(super) struct Keys {
    /// Key rows.
    len: usize,
    head_dim: usize,
    /// Panels of 16 keys, for queries times keys.
    keys: Lines,
    /// The same of values, for output gradients times values.
    values: Lines,
    /// Panels of 16 dims of keys, for score gradients times keys.
    dims: Lines,
}

impl Keys {
    /// Rounds `k` and `v` `[keys, head_dim]`.
    ///
    /// # Panics
    /// On a CPU without bfloat16.
    pub(super) fn new(exec: &Exec, k: MatRef<'_>, v: MatRef<'_>) -> Self {
        assert!(exec.isa().level() >= IsaLevel::Avx512Bf16, "{} has no bfloat16", exec.isa());
        let (len, head_dim) = (k.rows(), k.cols());
        let (unit, padded) = (UNIT * head_dim, len.next_multiple_of(UNIT) * head_dim);
        let [mut keys, mut values, mut dims] =
            std::array::from_fn(|_| Lines::zeroed(padded * size_of::<u16>()));
        for first in (0..len).step_by(UNIT) {
            let rows = UNIT.min(len - first);
            let (k, v) = (k.rows_at(first, rows), v.rows_at(first, rows));
            let at = first * head_dim;
            let whole = at..at + rows.next_multiple_of(PANEL) * head_dim;
            // SAFETY: the CPU has bfloat16, checked above.
            unsafe {
                bf16::panels(k, Trans::Yes, 0, &mut keys.as_mut_slice()[whole.clone()], head_dim * PANEL);
                bf16::panels(v, Trans::Yes, 0, &mut values.as_mut_slice()[whole], head_dim * PANEL);
                bf16::panels(k, Trans::No, 0, &mut dims.as_mut_slice()[at..at + unit], UNIT * PANEL);
            }
        }
        Self { len, head_dim, keys, values, dims }
    }

    /// The units that hold every key that a block of queries sees, by index, in order.
    fn seen(&self, visible: &[Visible]) -> Vec<usize> {
        let (Some(first), Some(last)) = (visible.first(), visible.last()) else { return Vec::new() };
        let units = |keys: Range<usize>| {
            if keys.is_empty() { 0..0 } else { keys.start / UNIT..keys.end.div_ceil(UNIT) }
        };
        // Both ranges' ends grow with the query's position.
        let recent = units(first.recent.start..last.recent.end);
        let apart = if recent.is_empty() { usize::MAX } else { recent.start * UNIT };
        units(0..last.sinks.end.min(apart)).chain(recent).collect()
    }

    /// A unit's part of a form.
    fn part<'a>(&self, form: &'a Lines, unit: usize) -> &'a [u16] {
        let values = UNIT * self.head_dim;
        &form.as_slice::<u16>()[unit * values..][..values]
    }
}

/// Buffers of a thread, kept between calls; memory only grows.
#[derive(Default)]
struct Scratch {
    /// Queries and output gradients of a block, `[rows, head_dim]`.
    q_rows: Lines,
    dout_rows: Lines,
    /// The same transposed, `[head_dim, rows]`.
    q_columns: Lines,
    dout_columns: Lines,
    /// Of a unit, `[rows, UNIT]`: scores, gradients of weights.
    scores: Lines,
    d_weights: Lines,
    /// Weights and gradients of scores as panels of 16 keys, of the rows that see the unit.
    weights_panels: Lines,
    d_scores_panels: Lines,
    /// Gradients of scores, `[rows, UNIT]`.
    d_scores: Lines,
    /// Gradients of queries, `[rows, head_dim]`.
    dq: Lines,
    /// Gradients of keys and values, `[head_dim, span]`.
    dk: Lines,
    dv: Lines,
    /// What each row sees of a unit.
    bits: Vec<u64>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Room for `count` values.
fn room<T: crate::packed::buffer::Element>(lines: &mut Lines, count: usize) -> &mut [T] {
    lines.grow::<T>(count);
    &mut lines.as_mut_slice()[..count]
}

/// Where a task's sums over keys have the columns of each unit that it uses.
struct Columns {
    /// The units, in order.
    units: Vec<usize>,
    /// Values between two rows: an odd number of cache lines, so that rows do not share cache sets.
    span: usize,
}

impl Columns {
    fn new(mut units: Vec<usize>) -> Self {
        units.sort_unstable();
        units.dedup();
        let span = ((units.len() * UNIT / PANEL) | 1) * PANEL;
        Self { units, span }
    }

    /// A unit's first column.
    fn of(&self, unit: usize) -> usize {
        self.units.binary_search(&unit).expect("a unit of the task") * UNIT
    }
}

/// Runs the query blocks of one task, `(block, its dq rows)`; returns the sums over keys.
pub(super) fn run(
    exec: &Exec,
    keys: &Keys,
    sinks: &mut FewSinks,
    blocks: Vec<(Block<'_>, Vec<&mut [f32]>)>,
) -> KvGradient {
    let seen: Vec<Vec<usize>> = blocks.iter().map(|(block, _)| keys.seen(&block.visible)).collect();
    let columns = Columns::new(seen.iter().flatten().copied().collect());
    SCRATCH.with_borrow_mut(|scratch| {
        let values = keys.head_dim * columns.span;
        room::<f32>(&mut scratch.dk, values).fill(0.0);
        room::<f32>(&mut scratch.dv, values).fill(0.0);
        let configured = Configured::new();
        for ((block, dq), units) in blocks.into_iter().zip(seen) {
            // SAFETY: `applies` found the instruction set, AMX or in tests its model on AVX-512 with BF16.
            unsafe { block_backward(&configured, keys, &columns, &units, &block, scratch) };
            block.add_few_sinks(exec, sinks, scratch.dq.as_mut_slice());
            let width = block.shape.group() * keys.head_dim;
            let sums = scratch.dq.as_slice::<f32>().chunks_exact(width);
            for (dq, sum) in dq.into_iter().zip(sums) {
                dq.iter_mut().zip(sum).for_each(|(x, y)| *x += y);
            }
        }
        // SAFETY: as above.
        unsafe { gradient(keys, &columns, scratch) }
    })
}

/// # Safety
/// The CPU has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn block_backward(
    configured: &Configured,
    keys: &Keys,
    columns: &Columns,
    units: &[usize],
    block: &Block<'_>,
    scratch: &mut Scratch,
) {
    let (head_dim, rows, group) = (keys.head_dim, block.rows, block.shape.group());
    let padded = rows.next_multiple_of(PAD);
    let dims = head_dim / PANEL;
    let Scratch { q_rows, dout_rows, q_columns, dout_columns, scores, d_weights, .. } = scratch;
    let Scratch { weights_panels, d_scores_panels, d_scores, dq, dk, dv, bits, .. } = scratch;
    for (values, as_rows, as_columns) in
        [(&block.q, &mut *q_rows, &mut *q_columns), (&block.dout, &mut *dout_rows, &mut *dout_columns)]
    {
        let values = MatRef::dense(values, rows, head_dim);
        let as_rows = room::<u16>(as_rows, padded * head_dim);
        let as_columns = room::<u16>(as_columns, head_dim * padded);
        // SAFETY: the caller's contract; columns are written inside `padded` values of `head_dim` rows.
        unsafe {
            bf16::rows(values, Trans::No, 1.0, 0, &mut as_rows[..rows * head_dim], head_dim);
            for first in (0..padded).step_by(PAD) {
                bf16::columns(values, first, as_columns.as_mut_ptr(), padded);
            }
        }
        as_rows[rows * head_dim..].fill(0);
    }
    let (q_rows, dout_rows) = (q_rows.as_slice::<u16>(), dout_rows.as_slice::<u16>());
    let (q_columns, dout_columns) = (q_columns.as_slice::<u16>(), dout_columns.as_slice::<u16>());
    let scores = room::<f32>(scores, padded * UNIT);
    let d_weights = room::<f32>(d_weights, padded * UNIT);
    let weights_panels = room::<u16>(weights_panels, padded * UNIT);
    let d_scores_panels = room::<u16>(d_scores_panels, padded * UNIT);
    let d_scores = room::<u16>(d_scores, padded * UNIT);
    let dq = room::<f32>(dq, padded * head_dim);
    dq.fill(0.0);
    let (dk, dv) = (dk.as_mut_slice::<f32>(), dv.as_mut_slice::<f32>());
    let panels = UNIT / PANEL;
    for &unit in units {
        let seen = |position: usize| seen_bits(&block.visible[position], unit);
        let positions = block.visible.len();
        let Some(first) = (0..positions).find(|&position| seen(position) != 0) else { continue };
        let last = (first..positions).rev().find(|&position| seen(position) != 0).unwrap_or(first);
        let (low, high) = (first * group / PAD * PAD, ((last + 1) * group).next_multiple_of(PAD));
        bits.clear();
        bits.resize(padded, 0);
        for position in first..=last {
            bits[position * group..(position + 1) * group].fill(seen(position));
        }
        let all = high - low;
        let column = columns.of(unit);
        // SAFETY: the caller's contract; outputs have room for whole tiles: rows `low..high` of `UNIT` or `head_dim` values, `head_dim` rows of
        // `span` values from the unit's column on.
        unsafe {
            let product = |x: &[u16],
                           stride: usize,
                           shape: [usize; 3],
                           weights: &[u16],
                           out: *mut f32,
                           out_stride,
                           store| {
                let [rows, cols, panels] = shape;
                let operands = Operands { cols, weights, panels, x, stride, rows };
                panels_into(configured, operands, Out { first: out, stride: out_stride, store });
            };
            let of_keys = [all, head_dim, panels];
            let (k, v) = (keys.part(&keys.keys, unit), keys.part(&keys.values, unit));
            let at = scores.as_mut_ptr().add(low * UNIT);
            product(&q_rows[low * head_dim..], head_dim, of_keys, k, at, UNIT, Store::Overwrite);
            let at = d_weights.as_mut_ptr().add(low * UNIT);
            product(&dout_rows[low * head_dim..], head_dim, of_keys, v, at, UNIT, Store::Overwrite);
            weigh(block, low..high, bits, [scores, d_weights], [weights_panels, d_scores_panels, d_scores]);
            let of_dims = [head_dim, all, panels];
            let at = dv.as_mut_ptr().add(column);
            product(
                &dout_columns[low..],
                padded,
                of_dims,
                weights_panels,
                at,
                columns.span,
                Store::Accumulate,
            );
            let at = dk.as_mut_ptr().add(column);
            product(&q_columns[low..], padded, of_dims, d_scores_panels, at, columns.span, Store::Accumulate);
            let (at, k) = (dq.as_mut_ptr().add(low * head_dim), keys.part(&keys.dims, unit));
            let of_rows = [all, UNIT, dims];
            product(&d_scores[low * UNIT..], UNIT, of_rows, k, at, head_dim, Store::Accumulate);
        }
    }
}

/// The keys of a unit that a query sees, one bit each.
fn seen_bits(visible: &Visible, unit: usize) -> u64 {
    let bits = |keys: Range<usize>| match keys.len() {
        0 => 0,
        len => (u64::MAX >> (UNIT - len)) << keys.start,
    };
    let [sinks, recent] = visible.in_tile(unit * UNIT, UNIT);
    bits(sinks) | bits(recent)
}

/// Weights `p` from scores and `scale · p · (dp − delta)` from gradients of weights, both rounded, of `rows`; what is not seen becomes 0.
///
/// # Safety
/// The CPU has AVX-512 with BF16; all buffers hold `rows` (even ends) of [`UNIT`] values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn weigh(
    block: &Block<'_>,
    rows: Range<usize>,
    bits: &[u64],
    [scores, d_weights]: [&[f32]; 2],
    [weights_panels, d_scores_panels, d_scores]: [&mut [u16]; 3],
) {
    let scale = block.shape.scale;
    let (to_base_2, scale) = (_mm512_set1_ps(scale * std::f32::consts::LOG2_E), _mm512_set1_ps(scale));
    let (panels, panel_values) = (UNIT / PANEL, rows.len() * PANEL);
    assert!(bits.len() >= rows.end && scores.len() >= rows.end * UNIT && d_weights.len() >= rows.end * UNIT);
    assert!(weights_panels.len() >= panels * panel_values && d_scores_panels.len() >= panels * panel_values);
    assert!(d_scores.len() >= rows.end * UNIT);
    // SAFETY: the caller's contract; every access is inside the lengths just checked.
    unsafe {
        let s = Avx512::new();
        for row in rows.clone().step_by(2) {
            let of_row = |row: usize| match block.lse.get(row) {
                Some(lse) => (lse * std::f32::consts::LOG2_E, block.delta[row]),
                None => (0.0, 0.0),
            };
            let stats = [of_row(row), of_row(row + 1)];
            for panel in 0..panels {
                let (mut p, mut ds) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
                for (i, &(lse, delta)) in stats.iter().enumerate() {
                    let seen = (bits[row + i] >> (panel * LANES)) as u16;
                    if seen == 0 {
                        continue;
                    }
                    let at = (row + i) * UNIT + panel * LANES;
                    let (score, dp) = (
                        _mm512_loadu_ps(scores.as_ptr().add(at)),
                        _mm512_loadu_ps(d_weights.as_ptr().add(at)),
                    );
                    let weight = s.exp2(_mm512_fmsub_ps(score, to_base_2, _mm512_set1_ps(lse)));
                    p[i] = _mm512_maskz_mov_ps(seen, weight);
                    let above_mean = _mm512_sub_ps(dp, _mm512_set1_ps(delta));
                    ds[i] = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(weight, scale), above_mean);
                }
                let pairs = |rows: [__m512; 2]| {
                    bf16::interleaved(bf16::as_integers(_mm512_cvtne2ps_pbh(rows[1], rows[0])))
                };
                let pair = panel * panel_values + (row - rows.start) * LANES;
                _mm512_storeu_si512(weights_panels.as_mut_ptr().add(pair).cast(), pairs(p));
                _mm512_storeu_si512(d_scores_panels.as_mut_ptr().add(pair).cast(), pairs(ds));
                for (i, ds) in ds.into_iter().enumerate() {
                    let at = (row + i) * UNIT + panel * LANES;
                    let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(ds));
                    _mm256_storeu_si256(d_scores.as_mut_ptr().add(at).cast(), rounded);
                }
            }
        }
    }
}

/// The sums over keys as rows.
///
/// # Safety
/// The CPU has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn gradient(keys: &Keys, columns: &Columns, scratch: &Scratch) -> KvGradient {
    let head_dim = keys.head_dim;
    let ends = |&unit: &usize| unit * UNIT..((unit + 1) * UNIT).min(keys.len);
    let ranges: Vec<Range<usize>> = columns.units.iter().map(ends).collect();
    let values = ranges.iter().map(Range::len).sum::<usize>() * head_dim;
    let (mut dk, mut dv) = (Reused::new(values), Reused::new(values));
    for (from, to) in [(&scratch.dk, &mut dk), (&scratch.dv, &mut dv)] {
        let from = from.as_slice::<f32>();
        let mut rows = &mut to[..];
        for (range, column) in ranges.iter().zip((0..).step_by(UNIT)) {
            let (part, rest) = rows.split_at_mut(range.len() * head_dim);
            rows = rest;
            for (block, part) in part.chunks_mut(LANES * head_dim).enumerate() {
                let count = part.len() / head_dim;
                for dim in (0..head_dim).step_by(LANES) {
                    let mut values = [_mm512_setzero_si512(); LANES];
                    for (i, value) in values.iter_mut().enumerate() {
                        let at = (dim + i) * columns.span + column + block * LANES;
                        // SAFETY: a unit has whole blocks of 16 columns.
                        *value = unsafe { _mm512_loadu_si512(from[at..at + LANES].as_ptr().cast()) };
                    }
                    let transposed = bf16::transpose(values);
                    for (i, &value) in transposed.iter().enumerate().take(count) {
                        let to = &mut part[i * head_dim + dim..][..LANES];
                        // SAFETY: sixteen values.
                        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) };
                    }
                }
            }
        }
    }
    KvGradient { ranges, dk, dv }
}
