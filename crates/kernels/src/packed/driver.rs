//! Shares products out to threads by panels and row blocks, and finishes tiles: bias, residual, SwiGLU.
//! Knows shapes and outputs; the arithmetic of a tile is its kernel's.

#![allow(clippy::needless_range_loop)] // Plain loops over registers and lanes stay inside the instruction set; iterator closures may not.

use std::cell::RefCell;

use super::buffer::Lines;
use super::kernel::{Route, TILE_VALUES, TileAt};
use super::{Input, MATVEC_ROWS, PANEL, Packed};
#[cfg(target_arch = "x86_64")]
use super::{bf16, gated};
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, MatMut, Store};

/// Products that share one parallel region; more take another one.
const MAX_PRODUCTS: usize = 16;
/// Below this many bytes of weights (times rows, for more than a few) everything runs on the calling thread.
const MIN_PARALLEL_BYTES: usize = 48 * 1024;
/// Least bytes of weights (times rows) of a task.
const MIN_TASK_BYTES: usize = 24 * 1024;
/// Tasks per thread that a region is cut into, when they are not too small.
const TASKS_PER_THREAD: usize = 16;
/// The same where weights are read once: every task starts with a cold stream, and long streams run at memory speed.
const STREAMS_PER_THREAD: usize = 2;
/// Bytes of activations of a row block, which should stay in the second-level cache beside the panels.
const ROW_BLOCK_BYTES: usize = 512 * 1024;

/// One product `out = x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[out_features, in_features]`.
    pub weight: &'a Packed,
    /// One value per output feature.
    pub bias: Option<&'a [f32]>,
    /// `[rows of x, out_features]`.
    pub out: MatMut<'a>,
    /// Whether `out` is overwritten or added to.
    pub store: Store,
}

/// All products of the same input, in one parallel region. The result does not depend on the number of threads.
///
/// # Panics
/// When shapes do not fit, or `x` was set for other weights.
pub fn matmul(exec: &Exec, x: &Input, products: &mut [Product<'_>]) {
    for products in products.chunks_mut(MAX_PRODUCTS) {
        let mut work = Work::new(exec, x);
        for product in products {
            let out = &mut product.out;
            work.add(product.weight, None, product.bias, out.reborrow(), product.store);
        }
        work.run(exec);
    }
}

/// `out = silu(x · gateᵀ) ⊙ (x · upᵀ)` with `silu(z) = z · sigmoid(z)`, in one parallel region. `gate` and `up` have the
/// same shape; their element types may differ.
///
/// # Panics
/// When shapes do not fit, or `x` was set for other weights.
pub fn matmul_swiglu(exec: &Exec, x: &Input, gate: &Packed, up: &Packed, out: MatMut<'_>) {
    let mut work = Work::new(exec, x);
    work.add(gate, Some(up), None, out, Store::Overwrite);
    work.run(exec);
}

/// The product, or with `up` both, of a gated block of training: `finish` takes the tiles. Runs in one parallel region.
///
/// # Safety
/// `finish` may write tiles of `x.rows()` rows and `weight.rows()` columns, which are a multiple of 32.
///
/// # Panics
/// When shapes do not fit, or `x` was set for other weights.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn matmul_gated(
    exec: &Exec,
    x: &Input,
    weight: &Packed,
    up: Option<&Packed>,
    finish: gated::Finish,
) {
    let mut work = Work::new(exec, x);
    let target = work.target(weight, up);
    assert!(target.tile_rows == bf16::SPAN, "tiles of {} rows", target.tile_rows);
    work.push(Target { gated: Some(finish), ..target });
    work.run(exec);
}

/// One product with its output opened to several tasks, and how it is cut.
#[derive(Clone, Copy)]
struct Target<'a> {
    weight: &'a Packed,
    /// The second factor of SwiGLU.
    up: Option<&'a Packed>,
    bias: Option<&'a [f32]>,
    out: *mut f32,
    stride: usize,
    store: Store,
    /// Takes the tiles instead.
    #[cfg(target_arch = "x86_64")]
    gated: Option<gated::Finish>,
    route: Route,
    up_route: Route,
    /// Rows and panels per kernel call.
    tile_rows: usize,
    tile_panels: usize,
    /// Rows per row block and panels per task.
    rows: usize,
    panels: usize,
    row_blocks: usize,
    tasks: usize,
}

struct Work<'a> {
    x: &'a Input,
    exec: &'a Exec,
    targets: [Option<Target<'a>>; MAX_PRODUCTS],
    count: usize,
}
// SAFETY: tasks write through `Target::out` to disjoint parts: each (row block, panels) belongs to one task.
unsafe impl Sync for Work<'_> {}

thread_local! {
    /// Expanded panels of the task that runs on this thread; grows only.
    static SCRATCH: RefCell<Lines> = RefCell::default();
}

impl<'a> Work<'a> {
    fn new(exec: &'a Exec, x: &'a Input) -> Self {
        Self { x, exec, targets: [None; MAX_PRODUCTS], count: 0 }
    }

    fn add(
        &mut self,
        weight: &'a Packed,
        up: Option<&'a Packed>,
        bias: Option<&'a [f32]>,
        mut out: MatMut<'_>,
        store: Store,
    ) {
        let (m, n) = (self.x.rows(), weight.rows());
        assert!(out.rows() == m && out.cols() == n, "out [{}, {}] of [{m}, {n}]", out.rows(), out.cols());
        assert!(bias.is_none_or(|bias| bias.len() == n), "one bias per output feature, {n}");
        let target = self.target(weight, up);
        let (stride, out) = (out.row_stride(), out.data_mut().as_mut_ptr());
        self.push(Target { bias, out, stride, store, ..target });
    }

    fn push(&mut self, target: Target<'a>) {
        self.targets[self.count] = Some(target);
        self.count += 1;
    }

    /// A product that goes nowhere yet.
    fn target(&self, weight: &'a Packed, up: Option<&'a Packed>) -> Target<'a> {
        let (m, n) = (self.x.rows(), weight.rows());
        assert_eq!(weight.cols(), self.x.cols(), "{weight:?} times {:?}", self.x);
        assert!(
            up.is_none_or(|up| up.rows() == n && up.cols() == weight.cols()),
            "gate and up have one shape"
        );
        let isa = self.exec.isa();
        let route = Route::of(isa, weight.dtype(), m);
        let up_route = up.map_or(route, |up| Route::of(isa, up.dtype(), m));
        let (shape, up_shape) = (route.shape(isa), up_route.shape(isa));
        Target {
            weight,
            up,
            bias: None,
            out: std::ptr::null_mut(),
            stride: 0,
            store: Store::Overwrite,
            #[cfg(target_arch = "x86_64")]
            gated: None,
            route,
            up_route,
            tile_rows: shape.0.min(up_shape.0),
            tile_panels: shape.1.min(up_shape.1),
            rows: m,
            panels: weight.panels(),
            row_blocks: 1,
            tasks: 0,
        }
    }

    fn run(mut self, exec: &Exec) {
        let m = self.x.rows();
        // Weights are read once for a few rows; beyond that the work grows with the rows.
        let factor = m.div_ceil(MATVEC_ROWS);
        let bytes = |t: &Target<'_>| (t.weight.bytes() + t.up.map_or(0, Packed::bytes)) * factor;
        let total: usize = self.targets.iter().flatten().map(bytes).sum();
        let threads = if total < MIN_PARALLEL_BYTES { 1 } else { exec.threads() };
        let tasks_per_thread = if m <= MATVEC_ROWS { STREAMS_PER_THREAD } else { TASKS_PER_THREAD };
        let task_bytes = match threads {
            1 => usize::MAX,
            threads => (total / (threads * tasks_per_thread)).max(MIN_TASK_BYTES),
        };
        for target in self.targets.iter_mut().flatten() {
            target.split(m, task_bytes);
        }
        let tasks: usize = self.targets.iter().flatten().map(|target| target.tasks).sum();
        let work = &self;
        match threads {
            1 => (0..tasks).for_each(|task| work.task(task)),
            _ => exec.parallel_for(tasks, |task| work.task(task)),
        }
    }

    /// Runs one task: `task` counts through all products, their panel groups, their row blocks.
    fn task(&self, mut task: usize) {
        for target in self.targets.iter().flatten() {
            if task >= target.tasks {
                task -= target.tasks;
                continue;
            }
            let m = self.x.rows();
            let row = task % target.row_blocks * target.rows;
            let panel = task / target.row_blocks * target.panels;
            let rows = target.rows.min(m - row);
            let panels = target.panels.min(target.weight.panels() - panel);
            return target.compute(self.exec, self.x, TileAt { row, rows, panel, panels });
        }
    }
}

impl Target<'_> {
    /// Cuts the product into tasks of about `task_bytes` bytes of weights × row tiles.
    fn split(&mut self, m: usize, task_bytes: usize) {
        let panels = self.weight.panels();
        if m == 0 || panels == 0 {
            return;
        }
        let row_bytes = self.weight.cols().max(1) * self.route.form().bytes();
        let most_rows = (ROW_BLOCK_BYTES / row_bytes).max(self.tile_rows);
        self.row_blocks = m.div_ceil(most_rows);
        self.rows = m.div_ceil(self.row_blocks).next_multiple_of(self.tile_rows);
        self.row_blocks = m.div_ceil(self.rows);
        let factor = self.rows.div_ceil(MATVEC_ROWS);
        let panel_bytes = self.weight.panel_bytes() + self.up.map_or(0, Packed::panel_bytes);
        let group = (task_bytes / (panel_bytes * factor).max(1)).clamp(1, panels);
        self.panels = group.next_multiple_of(self.tile_panels);
        self.tasks = panels.div_ceil(self.panels) * self.row_blocks;
    }

    /// One block: all its tiles, panel group by panel group.
    fn compute(&self, exec: &Exec, x: &Input, block: TileAt) {
        let isa = exec.isa();
        let cols = self.weight.cols();
        // One of them configures the tiles for both.
        let (prepared, up_prepared) = match self.up {
            Some(_) if self.up_route != self.route => (self.route.prepare(), Some(self.up_route.prepare())),
            _ => (self.route.prepare(), None),
        };
        let up_prepared = up_prepared.as_ref().unwrap_or(&prepared);
        let mut tile = Tile([0.0; TILE_VALUES]);
        let mut up_tile = Tile([0.0; TILE_VALUES]);
        let sizes = [
            self.route.expanded_bytes(isa, cols),
            if self.up.is_some() { self.up_route.expanded_bytes(isa, cols) } else { 0 },
        ];
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.grow::<u8>((sizes[0] + sizes[1]) * self.tile_panels);
            let (scratch, up_scratch) =
                scratch.as_mut_slice::<u8>().split_at_mut(sizes[0] * self.tile_panels);
            for first in (block.panel..block.panel + block.panels).step_by(self.tile_panels) {
                let panels = self.tile_panels.min(block.panel + block.panels - first);
                for i in 0..panels {
                    if sizes[0] > 0 {
                        let scratch = &mut scratch[i * sizes[0]..][..sizes[0]];
                        self.route.expand(isa, self.weight, first + i, scratch);
                    }
                    if let Some(up) = self.up.filter(|_| sizes[1] > 0) {
                        let scratch = &mut up_scratch[i * sizes[1]..][..sizes[1]];
                        self.up_route.expand(isa, up, first + i, scratch);
                    }
                }
                let mut done = 0;
                let at = TileAt { panel: first, panels, ..block };
                if self.plain(at) {
                    // SAFETY: `plain` found all columns of the block in the output; no other task has it.
                    let out = unsafe { self.out.add(block.row * self.stride + first * PANEL) };
                    let out = (out, self.stride, self.store);
                    // SAFETY: as above.
                    done = unsafe { self.route.multiply_into(&prepared, x, self.weight, scratch, at, out) };
                }
                for row in (block.row + done..block.row + block.rows).step_by(self.tile_rows) {
                    let rows = self.tile_rows.min(block.row + block.rows - row);
                    let at = TileAt { row, rows, ..at };
                    self.route.multiply(&prepared, isa, x, self.weight, scratch, at, &mut tile.0);
                    if let Some(up) = self.up {
                        self.up_route.multiply(up_prepared, isa, x, up, up_scratch, at, &mut up_tile.0);
                    }
                    #[cfg(target_arch = "x86_64")]
                    if let Some(gated) = self.gated {
                        // SAFETY: `matmul_gated`'s caller promised room for all tiles, and this task alone has this one. AMX, or its model in
                        // tests, comes with AVX-512 and BF16.
                        unsafe { gated.tile(at, &tile.0, &up_tile.0) };
                        continue;
                    }
                    dispatch!(isa, |s| self.finish(s, at, &tile.0, &up_tile.0));
                }
            }
        });
    }

    /// Whether a tile goes to the output as it is, all of its columns existing there and none of them having a bias.
    fn plain(&self, at: TileAt) -> bool {
        let (first, end) = (at.panel * PANEL, (at.panel + at.panels) * PANEL);
        let no_bias = |bias: &[f32]| bias[first..end].iter().all(|&b| b == 0.0);
        #[cfg(target_arch = "x86_64")]
        if self.gated.is_some() {
            return false;
        }
        self.up.is_none() && end <= self.weight.rows() && self.bias.is_none_or(no_bias)
    }

    /// Writes a tile to the output.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, at: TileAt, tile: &[f32], up_tile: &[f32]) {
        let TileAt { row, rows, panel, panels } = at;
        let first = panel * PANEL;
        let n = (panels * PANEL).min(self.weight.rows() - first);
        for r in 0..rows {
            let tile = &tile[r * panels * PANEL..][..n];
            // SAFETY: `add` checked that `out` has these rows and columns; no other task has this block.
            let out =
                unsafe { std::slice::from_raw_parts_mut(self.out.add((row + r) * self.stride + first), n) };
            if self.up.is_some() {
                let up = &up_tile[r * panels * PANEL..][..n];
                for i in 0..n {
                    out[i] = tile[i] * simd::sigmoid(s, tile[i]) * up[i];
                }
                continue;
            }
            match (self.bias.map(|bias| &bias[first..first + n]), self.store) {
                (None, Store::Overwrite) => copy_panels(tile, out),
                (None, Store::Accumulate) => {
                    for i in 0..n {
                        out[i] += tile[i];
                    }
                }
                (Some(bias), Store::Overwrite) => {
                    for i in 0..n {
                        out[i] = tile[i] + bias[i];
                    }
                }
                (Some(bias), Store::Accumulate) => {
                    for i in 0..n {
                        out[i] += tile[i] + bias[i];
                    }
                }
            }
        }
    }
}

/// Copies panel by panel: a call of `memmove` for so few values would cost as much as their product.
#[inline(always)]
fn copy_panels(from: &[f32], to: &mut [f32]) {
    let (from, rest) = from.as_chunks::<PANEL>();
    let (to, rest_to) = to.as_chunks_mut::<PANEL>();
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
    for (to, from) in rest_to.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// A tile on the stack, aligned for whole-register stores.
#[repr(C, align(64))]
struct Tile([f32; TILE_VALUES]);
