//! Splits the jobs of a call into tasks, runs them in one parallel region, merges what was split.

use super::buffers::{self, Buffers};
use super::decode::Rows;
use super::dot::Float;
use super::format::{Bf16, F16, F32, Format, Q8};
use super::store::{KvStore, PAGE, WIDE};
use super::{AttendJob, KvType, prefill};
use crate::isa::dispatch;
use crate::{Exec, Isa};

/// Up to this many query rows the keys of a KV head are split among tasks.
const MAX_DECODE_ROWS: usize = 4;
/// Ranges of pages of all KV heads of a job together, at least; fixed, so that results do not depend on the threads.
const DECODE_TASKS: usize = 24;
/// Query rows (positions × heads of the group) of a prefill task: what a converted tile of keys is used for.
const BLOCK_ROWS: usize = 768;
/// Prefill tasks of a job, at least, as long as they keep two register tiles.
const PREFILL_TASKS: usize = 6;
/// Below this many multiply-adds waking another thread costs more than it gains.
const MIN_PARALLEL_WORK: usize = 48 * 1024;

/// Part of a job.
#[derive(Clone, Copy, Debug)]
struct Task {
    job: usize,
    kv_head: usize,
    /// Pages of a decoding job, else rows.
    first: usize,
    end: usize,
    /// Where a decoding task's partial softmax begins.
    partial: usize,
}

/// Where a job's output lies.
#[derive(Clone, Copy, Debug)]
struct Out {
    data: *mut f32,
    row_stride: usize,
    /// `[rows, kv_heads · group]`; null where it is not wanted.
    lse: *mut f32,
}

/// Buffers of [`attend`], kept between calls; they only grow.
#[derive(Debug, Default)]
pub struct AttendScratch {
    tasks: Vec<Task>,
    outs: Vec<Out>,
    /// Per decoding task: `[rows, 16 · panels]` sums, `[rows]` maxima, `[rows]` denominators.
    partials: Vec<f32>,
}

// SAFETY: the pointers are used only during a call, which borrows what they point to.
unsafe impl Send for AttendScratch {}
// SAFETY: as above; a shared scratch does nothing.
unsafe impl Sync for AttendScratch {}

impl AttendScratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }
}

/// What the tasks of a call share.
struct Call<'a> {
    isa: Isa,
    group: usize,
    /// `scale · log2 e`: the softmax is taken to base 2.
    scale: f32,
    jobs: &'a [AttendJob<'a>],
    outs: &'a [Out],
    partials: *mut f32,
}

// SAFETY: tasks write to disjoint parts of the outputs and partials, see `attend`.
unsafe impl Sync for Call<'_> {}

/// Causal attention of every job: `out[i, h] = Σ_j softmax_j(scale · q[i,h]·k[j]) v[j]` over the store's positions up
/// to the query's own, or those of them that the job's [window](super::Window) shows. A row's result depends neither on the number of threads nor on the other jobs. 16-bit caches are
/// multiplied as bfloat16 pairs where the CPU has them and a job has more than 4 rows or a window, everything else in `f32`. Panics
/// when shapes do not fit or output columns overlap. Source: arXiv 2205.14135.
pub fn attend(
    exec: &Exec,
    group_size: usize,
    scale: f32,
    jobs: &mut [AttendJob<'_>],
    scratch: &mut AttendScratch,
) {
    let AttendScratch { tasks, outs, partials } = scratch;
    tasks.clear();
    outs.clear();
    let mut work = 0;
    for job in jobs.iter_mut() {
        check(job, group_size);
        let row_stride = job.out.row_stride();
        let lse = job.lse.as_deref_mut().map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
        outs.push(Out { data: job.out.data_mut().as_mut_ptr(), row_stride, lse });
        let seen = job.window.map_or(usize::MAX, |window| window.tokens + window.sinks);
        work += job.q.rows() * job.q.cols() * job.store.len().min(seen);
    }
    let jobs: &[AttendJob<'_>] = jobs;
    let wanted = plan(jobs, group_size, tasks);
    if partials.len() < wanted {
        partials.resize(wanted, 0.0);
    }
    let partials = partials.as_mut_ptr();
    let scale = scale * std::f32::consts::LOG2_E;
    let call = Call { isa: exec.isa(), group: group_size, scale, jobs, outs, partials };
    let tasks = &*tasks;
    // SAFETY: `check` found the shapes to fit and the output columns of a job's KV heads disjoint; each job owns its output;
    // `plan` gave every task its own head and rows or its own partial.
    let run = |i: usize| buffers::with(|buffers| unsafe { call.run(tasks[i], buffers) });
    if work < MIN_PARALLEL_WORK {
        (0..tasks.len()).for_each(run);
    } else {
        exec.parallel_for(tasks.len(), run);
    }
    // SAFETY: as above; the tasks are done.
    unsafe { call.merge(tasks) };
}

fn check(job: &AttendJob<'_>, group: usize) {
    let (kv_heads, head_dim) = (job.store.kv_heads(), job.store.head_dim());
    let (rows, width) = (job.q.rows(), group * head_dim);
    assert!(job.window.is_none_or(|window| window.tokens > 0), "attend: a window of no tokens");
    assert!(group > 0, "attend: no query heads");
    assert!(rows <= job.store.len(), "attend: {rows} queries, {} positions", job.store.len());
    assert_eq!(job.q.cols(), kv_heads * width, "attend: q columns");
    assert_eq!(job.out.rows(), rows, "attend: out rows");
    let wanted = job.lse.as_ref().map(|lse| lse.len());
    assert!(wanted.is_none_or(|len| len == rows * kv_heads * group), "attend: lse");
    assert_eq!(job.out_columns.len(), kv_heads, "attend: one output column per KV head");
    for (i, &column) in job.out_columns.iter().enumerate() {
        let fits = column.checked_add(width).is_some_and(|end| end <= job.out.cols());
        assert!(fits, "attend: out columns {column}+{width} of {}", job.out.cols());
        let apart = job.out_columns[..i].iter().all(|other| other.abs_diff(column) >= width);
        assert!(apart, "attend: out columns overlap at {column}");
    }
}

/// Whether a job is for the decoding kernel: few rows, and all keys to read.
fn splits_keys(job: &AttendJob<'_>) -> bool {
    job.q.rows() <= MAX_DECODE_ROWS && job.window.is_none()
}

/// Values of a decoding task's partial softmax.
fn partial_values(store: &KvStore, rows: usize) -> usize {
    (rows * (store.layout().panels() * WIDE + 2)).next_multiple_of(WIDE)
}

/// Lists the tasks, prefill first and there the longest first; returns how many partial values they need.
fn plan(jobs: &[AttendJob<'_>], group: usize, tasks: &mut Vec<Task>) -> usize {
    for (index, job) in jobs.iter().enumerate() {
        let (rows, kv_heads) = (job.q.rows(), job.store.kv_heads());
        if splits_keys(job) {
            continue;
        }
        let least = (2 * super::dot::MAX_ROWS).div_ceil(group);
        let wanted = (rows * kv_heads).div_ceil(PREFILL_TASKS);
        let step = wanted.clamp(least, (BLOCK_ROWS / group).max(least));
        for block in (0..rows.div_ceil(step)).rev() {
            let (first, end) = (block * step, rows.min((block + 1) * step));
            for kv_head in 0..kv_heads {
                tasks.push(Task { job: index, kv_head, first, end, partial: 0 });
            }
        }
    }
    let mut partial = 0;
    for (index, job) in jobs.iter().enumerate() {
        let (rows, kv_heads) = (job.q.rows(), job.store.kv_heads());
        if rows == 0 || !splits_keys(job) {
            continue;
        }
        let pages = job.store.len().div_ceil(PAGE);
        let step = pages.div_ceil(DECODE_TASKS.div_ceil(kv_heads));
        for kv_head in 0..kv_heads {
            for first in (0..pages).step_by(step) {
                tasks.push(Task { job: index, kv_head, first, end: pages.min(first + step), partial });
                partial += partial_values(job.store, rows * group);
            }
        }
    }
    partial
}

impl Call<'_> {
    /// Where the log denominators of a row of queries and a KV head begin.
    fn lse_at(&self, job: &AttendJob<'_>, row: usize, kv_head: usize) -> usize {
        (row * job.store.kv_heads() + kv_head) * self.group
    }

    /// # Safety
    /// The task's outputs or partial are this call's alone and fit, see [`attend`].
    unsafe fn run(&self, task: Task, buffers: &mut Buffers) {
        // SAFETY: the caller's contract; the format is the store's.
        unsafe {
            match self.jobs[task.job].store.kv_type() {
                KvType::F32 => self.run_format::<F32>(task, buffers),
                KvType::F16 => self.run_format::<F16>(task, buffers),
                KvType::Bf16 => self.run_format::<Bf16>(task, buffers),
                KvType::Q8 => self.run_format::<Q8>(task, buffers),
            }
        }
    }

    /// # Safety
    /// As [`Call::run`]; the store's format is `F`.
    unsafe fn run_format<F: Format>(&self, task: Task, buffers: &mut Buffers) {
        let job = &self.jobs[task.job];
        if splits_keys(job) {
            // SAFETY: the caller's contract.
            return unsafe { self.decode::<F>(task, buffers) };
        }
        let out = self.outs[task.job];
        // SAFETY: `check` found row `first` and this column within the output.
        let first = unsafe { out.data.add(task.first * out.row_stride + job.out_columns[task.kv_head]) };
        let block = prefill::Block {
            store: job.store,
            kv_head: task.kv_head,
            group: self.group,
            q: job.q,
            first: task.first,
            count: task.end - task.first,
            scale: self.scale,
            out: first,
            out_stride: out.row_stride,
            lse: match out.lse.is_null() {
                true => out.lse,
                // SAFETY: `check` found the row and the head's columns within it.
                false => unsafe { out.lse.add(self.lse_at(job, task.first, task.kv_head)) },
            },
            lse_stride: self.group * job.store.kv_heads(),
            window: job.window,
        };
        #[cfg(target_arch = "x86_64")]
        if self.isa.level() >= crate::IsaLevel::Avx512Bf16 && job.store.kv_type() != KvType::F32 {
            if self.isa.level() >= crate::IsaLevel::Amx && super::amx::fits(job.store.head_dim()) {
                // SAFETY: as below.
                return unsafe { super::amx::block::<F>(&block, buffers) };
            }
            // SAFETY: an `Isa` of this or a higher level exists only after detection of these features; the caller's contract.
            return unsafe { bf16_block::<F>(&block, buffers) };
        }
        // SAFETY: the caller's contract.
        dispatch!(self.isa, |s| unsafe { prefill::block::<_, F>(Float(s), &block, buffers) });
    }

    /// # Safety
    /// As [`Call::run_format`].
    unsafe fn decode<F: Format>(&self, task: Task, buffers: &mut Buffers) {
        let job = &self.jobs[task.job];
        let (store, positions) = (job.store, job.q.rows());
        let layout = store.layout();
        let (head_dim, rows) = (layout.head_dim, positions * self.group);
        let q = buffers.q.words::<f32>(rows * head_dim);
        let scores = buffers.scores.words::<f32>(rows * PAGE);
        // SAFETY: the buffers have the sizes just asked for, the partial the one `plan` gave it.
        unsafe {
            for i in 0..positions {
                let from = &job.q.row(i)[task.kv_head * self.group * head_dim..][..self.group * head_dim];
                for (at, &x) in from.iter().enumerate() {
                    *q.add(i * self.group * head_dim + at) = x * self.scale;
                }
            }
            let acc = self.partials.add(task.partial);
            let max = acc.add(rows * layout.panels() * WIDE);
            let rows = Rows {
                layout,
                rows,
                group: self.group,
                first_sees: store.len() + 1 - positions,
                q,
                scores,
                acc,
                max,
                sum: max.add(rows),
            };
            rows.clear();
            for page in task.first..task.end {
                let slab = store.slab(page, task.kv_head);
                let keys = (store.len() - page * PAGE).min(PAGE);
                let next = (page + 1 < task.end).then(|| store.slab(page + 1, task.kv_head));
                dispatch!(self.isa, |s| rows.page::<_, F>(s, slab, next, page, keys));
            }
        }
    }

    /// Merges the partial softmaxes of the decoding tasks and writes their outputs.
    ///
    /// # Safety
    /// As [`Call::run`], for all tasks, which are done.
    unsafe fn merge(&self, tasks: &[Task]) {
        let mut at = 0;
        while at < tasks.len() {
            let Task { job: index, kv_head, .. } = tasks[at];
            let same = tasks[at..].iter().take_while(|task| task.job == index && task.kv_head == kv_head);
            let parts = &tasks[at..at + same.count()];
            at += parts.len();
            let job = &self.jobs[index];
            if !splits_keys(job) {
                continue;
            }
            let (out, head_dim) = (self.outs[index], job.store.head_dim());
            let (rows, width) = (job.q.rows() * self.group, job.store.layout().panels() * WIDE);
            for row in 0..rows {
                let column = job.out_columns[kv_head] + row % self.group * head_dim;
                // SAFETY: the caller's contract; the partials have the layout of `decode`.
                unsafe {
                    let data = out.data.add(row / self.group * out.row_stride + column);
                    let data = std::slice::from_raw_parts_mut(data, head_dim);
                    let lse = dispatch!(self.isa, merge_row(self.partials, parts, rows, width, row, data));
                    if !out.lse.is_null() {
                        *out.lse.add(self.lse_at(job, row / self.group, kv_head) + row % self.group) = lse;
                    }
                }
            }
        }
    }
}

/// Writes a row's output and returns the log of its denominator.
///
/// # Safety
/// `parts` are tasks of one job and head with partials of `rows` rows of `width` sums.
#[inline(always)]
unsafe fn merge_row(
    partials: *const f32,
    parts: &[Task],
    rows: usize,
    width: usize,
    row: usize,
    out: &mut [f32],
) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let max_at = rows * width + row;
        let mut max = f32::NEG_INFINITY;
        for part in parts {
            let x = *partials.add(part.partial + max_at);
            max = if x > max { x } else { max };
        }
        let mut sum = 0.0;
        out.fill(0.0);
        // A row of -inf scores has no weights; -inf - -inf would be NaN.
        let max = if max == f32::NEG_INFINITY { f32::MIN } else { max };
        for part in parts {
            let weight = (*partials.add(part.partial + max_at) - max).exp2();
            sum += weight * *partials.add(part.partial + max_at + rows);
            let acc = std::slice::from_raw_parts(partials.add(part.partial + row * width), out.len());
            for (out, &acc) in out.iter_mut().zip(acc) {
                *out += weight * acc;
            }
        }
        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        for out in out.iter_mut() {
            *out *= inverse;
        }
        natural_log(max, sum)
    }
}

/// The log of a denominator `sum · 2^max`.
pub(super) fn natural_log(max: f32, sum: f32) -> f32 {
    if sum == 0.0 { f32::NEG_INFINITY } else { (max + sum.log2()) * std::f32::consts::LN_2 }
}

/// # Safety
/// As [`prefill::block`]; the CPU has these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn bf16_block<F: Format>(block: &prefill::Block<'_>, buffers: &mut Buffers) {
    // SAFETY: the caller's contract.
    unsafe { prefill::block::<_, F>(super::dot::Bf16Pairs::new(), block, buffers) }
}
