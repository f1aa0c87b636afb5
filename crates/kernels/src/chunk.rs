//! What the chunked recurrences share: decays inside a chunk in log space, and passing states from chunk to chunk.
//! Knows nothing of any one recurrence.

use crate::simd::{Simd, exp};

#[cfg(test)]
pub(crate) mod testing;

/// Tokens per chunk.
pub(crate) const CHUNK: usize = 64;
/// Scores are weighted in column blocks of this size, so that the causal half is cheap and still vectorises.
const LANES: usize = 16;
/// Log decays below this are taken as this: `exp` gives 0 either way, and differences stay finite for `-inf`.
const LOG_ZERO: f32 = -1e4;
/// Exponents below this give 0 instead of a subnormal number, which some CPUs multiply very slowly.
const LOG_TINY: f32 = -87.0;

/// `e^x` for `x ≤ 0`, 0 where it would be subnormal.
#[inline(always)]
pub(crate) fn decay_exp<S: Simd>(s: S, x: f32) -> f32 {
    let y = exp(s, x);
    if x < LOG_TINY { 0.0 } else { y }
}

/// One head's decays inside one chunk.
///
/// `c_t`, the sum of `log_a` up to and including token `t`, is kept as an unevaluated sum of two `f32`, so that
/// `c_t − c_s` has the relative accuracy of `f32` even after a very strong decay.
#[derive(Clone, Debug)]
pub(crate) struct Decay {
    high: [f32; CHUNK],
    low: [f32; CHUNK],
    /// `e^{c_t}`: from before the chunk to token `t`.
    pub from_start: [f32; CHUNK],
    /// `e^{c_last − c_t}`: from token `t` to the chunk's end.
    pub to_end: [f32; CHUNK],
    /// `e^{c_last}`: over the whole chunk.
    pub total: f32,
}

impl Decay {
    /// Decays of the tokens at `log_a[0]`, `log_a[stride]`, …, at most [`CHUNK`] of them.
    #[inline(always)]
    pub fn new<S: Simd>(s: S, log_a: &[f32], stride: usize) -> Self {
        let mut exact = [0.0f64; CHUNK];
        let mut sum = 0.0f64;
        let len = log_a.len().div_ceil(stride);
        assert!(len <= CHUNK, "a chunk of {len} tokens");
        for (exact, &log_a) in exact.iter_mut().zip(log_a.iter().step_by(stride)) {
            // Not `max`, which would hide a NaN.
            sum += f64::from(if log_a < LOG_ZERO { LOG_ZERO } else { log_a });
            *exact = sum;
        }
        exact[len..].fill(sum);
        let mut decay = Self {
            high: [0.0; CHUNK],
            low: [0.0; CHUNK],
            from_start: [0.0; CHUNK],
            to_end: [0.0; CHUNK],
            total: 0.0,
        };
        for (t, &exact) in exact.iter().enumerate() {
            decay.high[t] = exact as f32;
            decay.low[t] = (exact - f64::from(decay.high[t])) as f32;
            decay.from_start[t] = decay_exp(s, decay.high[t]);
            decay.to_end[t] = decay_exp(s, (sum - exact) as f32);
        }
        decay.total = decay_exp(s, sum as f32);
        decay
    }

    /// Visits the causal half of a row of scores in blocks: `f(start, weights)` with `weights[i] = e^{c_t − c_{start+i}}`
    /// for `start + i ≤ t`, else 0. Columns from [`Self::causal_width`] on are not visited.
    #[inline(always)]
    pub fn for_row<S: Simd>(&self, s: S, t: usize, mut f: impl FnMut(usize, &[f32; LANES])) {
        let (high, low) = (self.high[t], self.low[t]);
        let mut start = 0;
        while start <= t {
            let mut weights = [0.0; LANES];
            let (highs, lows) = (&self.high[start..start + LANES], &self.low[start..start + LANES]);
            for i in 0..LANES {
                let weight = decay_exp(s, (high - highs[i]) + (low - lows[i]));
                weights[i] = if start + i <= t { weight } else { 0.0 };
            }
            f(start, &weights);
            start += LANES;
        }
    }

    /// Columns that [`Self::for_row`] visits in row `t`.
    #[inline(always)]
    pub fn causal_width(t: usize) -> usize {
        (t / LANES + 1) * LANES
    }
}

/// Width of the blocks that [`Decay::for_row`] hands out.
pub(crate) const DECAY_LANES: usize = LANES;

/// One step of the pass over chunk states: `slot`, which holds what a chunk adds, receives `carry`, and `carry` moves
/// on to `total · carry + added`.
#[inline(always)]
pub(crate) fn pass_state<S: Simd>(s: S, total: f32, carry: &mut [f32], slot: &mut [f32]) {
    assert_eq!(carry.len(), slot.len());
    for (carry, slot) in carry.iter_mut().zip(slot) {
        let added = *slot;
        *slot = *carry;
        *carry = s.fma(total, *carry, added);
    }
}

/// `x[i] *= factor`.
#[inline(always)]
pub(crate) fn scale(factor: f32, x: &mut [f32]) {
    for x in x {
        *x *= factor;
    }
}

/// `out[i] = factor · x[i]`.
#[inline(always)]
pub(crate) fn scaled(factor: f32, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    for (out, &x) in out.iter_mut().zip(x) {
        *out = factor * x;
    }
}

/// Adds the gradient of the log decays to `dlog_a[0]`, `dlog_a[stride]`, …, given those of their inclusive sums:
/// every token's decay enters all later sums.
#[inline(always)]
pub(crate) fn add_suffix_sums(d_sums: &[f64], dlog_a: &mut [f32], stride: usize) {
    let mut sum = 0.0f64;
    for (t, d_sum) in d_sums.iter().enumerate().rev() {
        sum += d_sum;
        dlog_a[t * stride] += sum as f32;
    }
}

/// Panics, naming the slice, when a length does not fit the shape.
#[track_caller]
pub(crate) fn check_len(name: &str, found: usize, expected: usize) {
    assert_eq!(found, expected, "`{name}` has {found} values, expected {expected}");
}
