//! A few query rows against a range of pages of one KV head: every stored value is loaded once for all rows. Bound by
//! memory; ranges are merged afterwards.

#![allow(
    clippy::needless_range_loop,
    reason = "register tiles are indexed by row and panel; closures would lose the features"
)]

use super::format::{Format, MAX_STEP, even_half};
use super::lanes::Lanes;
use super::store::{Layout, PAGE, Slab, WIDE};

/// Rows of a register tile.
const TILE_ROWS: usize = 4;
/// Bytes ahead of the loads that are asked for, at least; whole panels of V.
const AHEAD: usize = 16384;

/// Panels of V that are asked for ahead.
const fn panels_ahead<F: Format>() -> usize {
    AHEAD.div_ceil(PAGE / 2 * F::BYTES)
}

/// The rows of one task and its partial softmax. All pointers are to buffers of the sizes given.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) layout: Layout,
    /// Number of rows: positions × query heads of the KV head.
    pub(super) rows: usize,
    pub(super) group: usize,
    /// Keys that the first position sees; each further one sees one more.
    pub(super) first_sees: usize,
    /// `[rows, head_dim]`, scaled by `scale · log2 e`.
    pub(super) q: *const f32,
    /// `[rows, 256]`.
    pub(super) scores: *mut f32,
    /// `[rows, 16 · panels]`.
    pub(super) acc: *mut f32,
    /// `[rows]` each.
    pub(super) max: *mut f32,
    pub(super) sum: *mut f32,
}

impl Rows {
    /// Starts an empty softmax.
    ///
    /// # Safety
    /// The buffers have the sizes given and are this task's alone.
    pub(super) unsafe fn clear(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            for i in 0..self.rows * self.layout.panels() * WIDE {
                *self.acc.add(i) = 0.0;
            }
            for row in 0..self.rows {
                *self.max.add(row) = f32::NEG_INFINITY;
                *self.sum.add(row) = 0.0;
            }
        }
    }

    /// Adds the keys of page `page`, of which `keys` are filled; asks for the head of the slab that comes `next`.
    ///
    /// # Safety
    /// The buffers have the sizes given and are this task's alone; the slab has the layout's format `F`.
    #[inline(always)]
    pub(super) unsafe fn page<S: Lanes, F: Format>(
        self,
        s: S,
        slab: Slab<'_>,
        next: Option<Slab<'_>>,
        page: usize,
        keys: usize,
    ) {
        // SAFETY: the caller's contract; row tiles stay within `rows`.
        unsafe {
            let (head_dim, panels) = (self.layout.head_dim, self.layout.panels());
            let mut row = 0;
            while row < self.rows {
                let n = (self.rows - row).min(if S::MANY_REGISTERS { TILE_ROWS } else { TILE_ROWS - 1 });
                let (q, scores) = (self.q.add(row * head_dim), self.scores.add(row * PAGE));
                match n {
                    1 => score::<S, F, 1>(s, slab.k, keys, head_dim, q, scores),
                    2 => score::<S, F, 2>(s, slab.k, keys, head_dim, q, scores),
                    3 => score::<S, F, 3>(s, slab.k, keys, head_dim, q, scores),
                    _ => score::<S, F, 4>(s, slab.k, keys, head_dim, q, scores),
                }
                row += n;
            }
            for row in 0..self.rows {
                let sees = (self.first_sees + row / self.group).saturating_sub(page * PAGE).min(keys);
                self.weigh(s, slab, row, sees, keys);
            }
            // The last of an odd number of keys apart: the slot beside it holds anything.
            let steps = keys / 2;
            let mut tail = Tail([0; MAX_STEP]);
            let mut row = 0;
            while row < self.rows {
                let n = (self.rows - row).min(if S::MANY_REGISTERS { TILE_ROWS } else { TILE_ROWS - 1 });
                let (p, acc) = (self.scores.add(row * PAGE), self.acc.add(row * panels * WIDE));
                for panel in 0..panels {
                    let size = PAGE / 2 * F::BYTES;
                    let v = slab.v[panel * size..].as_ptr();
                    let ahead = match panel + panels_ahead::<F>() {
                        soon if soon < panels => slab.v[soon * size..].as_ptr(),
                        later => next.map_or(v, |next| next.k.as_ptr().wrapping_add((later - panels) * size)),
                    };
                    let acc = acc.add(panel * WIDE);
                    mix_rows::<S, F>(s, n, (v, ahead), steps, p, acc, panels * WIDE);
                    if keys % 2 == 1 {
                        even_half::<F>(v.add(steps * F::BYTES), &mut tail.0);
                        let tail = tail.0.as_ptr();
                        mix_rows::<S, F>(s, n, (tail, tail), 1, p.add(2 * steps), acc, panels * WIDE);
                    }
                }
                row += n;
            }
        }
    }

    /// Turns one row's scores into weights relative to its new maximum and rescales what was there.
    ///
    /// # Safety
    /// As [`Rows::page`].
    #[inline(always)]
    unsafe fn weigh<S: Lanes>(&self, s: S, slab: Slab<'_>, row: usize, sees: usize, keys: usize) {
        // SAFETY: the caller's contract; blocks of 16 stay within a row's 256 scores and 256 scales.
        unsafe {
            let scores = self.scores.add(row * PAGE);
            let (scaled, blocks) = (!slab.k_scales.is_empty(), keys.div_ceil(WIDE));
            let mut best = s.splat16(f32::NEG_INFINITY);
            for block in 0..blocks {
                let at = block * WIDE;
                let mut x = s.load16(scores.add(at));
                if scaled {
                    x = s.mul16(x, s.load16(slab.k_scales.as_ptr().add(at)));
                }
                if sees < at + WIDE {
                    x = s.keep_first(x, sees.saturating_sub(at), f32::NEG_INFINITY);
                }
                s.store16(x, scores.add(at));
                best = s.max16(best, x);
            }
            let old = *self.max.add(row);
            let best = s.max_of(best);
            let max = if best > old { best } else { old };
            // A row of -inf scores has no weights; -inf - -inf would be NaN.
            let shift = s.splat16(if max == f32::NEG_INFINITY { f32::MIN } else { max });
            let mut sum = s.splat16(0.0);
            for block in 0..blocks {
                let at = block * WIDE;
                let mut p = s.exp2(s.sub16(s.load16(scores.add(at)), shift));
                sum = s.add16(sum, p);
                if scaled {
                    p = s.mul16(p, s.load16(slab.v_scales.as_ptr().add(at)));
                    if sees < at + WIDE {
                        // 0 · NaN of an unused slot's scale.
                        p = s.keep_first(p, sees.saturating_sub(at), 0.0);
                    }
                }
                s.store16(p, scores.add(at));
            }
            let sum = s.sum_of(sum);
            if max > old {
                let keep = (old - max).exp2();
                *self.max.add(row) = max;
                *self.sum.add(row) = *self.sum.add(row) * keep + sum;
                let width = self.layout.panels() * WIDE;
                let (acc, keep) = (self.acc.add(row * width), s.splat16(keep));
                for at in (0..width).step_by(WIDE) {
                    s.store16(s.mul16(s.load16(acc.add(at)), keep), acc.add(at));
                }
            } else {
                *self.sum.add(row) += sum;
            }
        }
    }
}

/// The step that [`even_half`] fills.
#[repr(C, align(64))]
struct Tail([u8; MAX_STEP]);

/// `scores[row, key] = q[row] · k[key]` for `R` rows and whole blocks of 16 keys.
///
/// # Safety
/// `k` holds the blocks of `keys` keys in format `F`; `q` is `[R, head_dim]`, `scores` `[R, 256]`.
#[inline(always)]
unsafe fn score<S: Lanes, F: Format, const R: usize>(
    s: S,
    k: &[u8],
    keys: usize,
    head_dim: usize,
    q: *const f32,
    scores: *mut f32,
) {
    let (steps, blocks) = (head_dim / 2, keys.div_ceil(WIDE));
    assert!(k.len() >= blocks * steps * F::BYTES);
    // SAFETY: the caller's contract and the check above.
    unsafe {
        let mut block = 0;
        if S::MANY_REGISTERS {
            while block + 2 <= blocks {
                score_blocks::<S, F, R, 2>(
                    s,
                    k.as_ptr().add(block * steps * F::BYTES),
                    head_dim,
                    q,
                    scores.add(block * WIDE),
                );
                block += 2;
            }
        }
        while block < blocks {
            score_blocks::<S, F, R, 1>(
                s,
                k.as_ptr().add(block * steps * F::BYTES),
                head_dim,
                q,
                scores.add(block * WIDE),
            );
            block += 1;
        }
    }
}

/// # Safety
/// As [`score`], for `B` blocks.
#[inline(always)]
unsafe fn score_blocks<S: Lanes, F: Format, const R: usize, const B: usize>(
    s: S,
    k: *const u8,
    head_dim: usize,
    q: *const f32,
    scores: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let (steps, zero) = (head_dim / 2, s.splat16(0.0));
        let mut acc = [[[zero; 2]; B]; R];
        for step in 0..steps {
            let mut x = [[zero; 2]; B];
            for b in 0..B {
                // In the order of the addresses, which the CPU's own prefetching follows.
                let soon = k.wrapping_add((step * B + b + panels_ahead::<F>() * (PAGE / 2)) * F::BYTES);
                s.prefetch(soon);
                x[b] = F::load(s, k.add((b * steps + step) * F::BYTES));
            }
            for r in 0..R {
                let c = F::coefficients(s, q.add(r * head_dim + 2 * step));
                for b in 0..B {
                    acc[r][b][0] = s.fma16(x[b][0], c[0], acc[r][b][0]);
                    acc[r][b][1] = s.fma16(x[b][1], c[1], acc[r][b][1]);
                }
            }
        }
        for r in 0..R {
            for b in 0..B {
                s.store16(F::fold(s, acc[r][b]), scores.add(r * PAGE + b * WIDE));
            }
        }
    }
}

/// [`mix`] for `n` rows, 1 to 4.
///
/// # Safety
/// As [`mix`].
#[inline(always)]
unsafe fn mix_rows<S: Lanes, F: Format>(
    s: S,
    n: usize,
    v: (*const u8, *const u8),
    steps: usize,
    p: *const f32,
    acc: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match n {
            1 => mix::<S, F, 1>(s, v, steps, p, acc, stride),
            2 => mix::<S, F, 2>(s, v, steps, p, acc, stride),
            3 => mix::<S, F, 3>(s, v, steps, p, acc, stride),
            _ => mix::<S, F, 4>(s, v, steps, p, acc, stride),
        }
    }
}

/// `acc[row] += Σ p[row, key] v[key]` for `R` rows and the 16 dims of a panel; asks for as many lines at `ahead`.
///
/// # Safety
/// `v` holds `steps` steps of format `F`; `p` is `[R, ≥ 2 · steps]` with stride 256, `acc` has rows of 16 values `stride`
/// apart.
#[inline(always)]
unsafe fn mix<S: Lanes, F: Format, const R: usize>(
    s: S,
    (v, ahead): (*const u8, *const u8),
    steps: usize,
    p: *const f32,
    acc: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let zero = s.splat16(0.0);
        let (mut a, mut b) = ([[zero; 2]; R], [[zero; 2]; R]);
        let mut step = 0;
        if S::MANY_REGISTERS {
            // Two chains per row hide the latency.
            while step + 2 <= steps {
                let line = v.add(step * F::BYTES);
                s.prefetch(ahead.wrapping_add(step * F::BYTES));
                s.prefetch(ahead.wrapping_add((step + 1) * F::BYTES));
                let (x, y) = (F::load(s, line), F::load(s, line.add(F::BYTES)));
                for r in 0..R {
                    let c = F::coefficients(s, p.add(r * PAGE + 2 * step));
                    a[r][0] = s.fma16(x[0], c[0], a[r][0]);
                    a[r][1] = s.fma16(x[1], c[1], a[r][1]);
                    let c = F::coefficients(s, p.add(r * PAGE + 2 * step + 2));
                    b[r][0] = s.fma16(y[0], c[0], b[r][0]);
                    b[r][1] = s.fma16(y[1], c[1], b[r][1]);
                }
                step += 2;
            }
        }
        while step < steps {
            let x = F::load(s, v.add(step * F::BYTES));
            for r in 0..R {
                let c = F::coefficients(s, p.add(r * PAGE + 2 * step));
                a[r][0] = s.fma16(x[0], c[0], a[r][0]);
                a[r][1] = s.fma16(x[1], c[1], a[r][1]);
            }
            step += 1;
        }
        for r in 0..R {
            let both = [s.add16(a[r][0], b[r][0]), s.add16(a[r][1], b[r][1])];
            let out = acc.add(r * stride);
            s.store16(s.add16(s.load16(out), F::fold(s, both)), out);
        }
    }
}
