//! Mamba-1's selective scan (arXiv 2312.00752, Algorithm 2).
//!
//! `h_t = exp(δ_t A) h_{t−1} + δ_t B_t u_t`, `y_t = C_t · h_t + D u_t`, per channel.

use crate::Exec;
use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{Simd, exp};

mod backward;
#[cfg(test)]
mod tests;

pub use backward::selective_scan_backward;

/// Sizes of one call.
#[derive(Clone, Copy, Debug)]
pub struct ScanShape {
    /// Tokens.
    pub seq: usize,
    /// Channels.
    pub d_inner: usize,
    /// State values per channel.
    pub d_state: usize,
}

/// Inputs, all dense row-major.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs<'a> {
    /// `[seq, d_inner]`.
    pub u: &'a [f32],
    /// `[seq, d_inner]`, > 0 (after softplus).
    pub delta: &'a [f32],
    /// `[d_inner, d_state]`, < 0.
    pub a: &'a [f32],
    /// `[seq, d_state]`.
    pub b: &'a [f32],
    /// `[seq, d_state]`.
    pub c: &'a [f32],
    /// `[d_inner]`.
    pub d: &'a [f32],
}

/// Gradients of [`ScanInputs`], same shapes; added to.
#[derive(Debug)]
pub struct ScanGrads<'a> {
    /// Of `u`.
    pub du: &'a mut [f32],
    /// Of `delta`.
    pub ddelta: &'a mut [f32],
    /// Of `a`.
    pub da: &'a mut [f32],
    /// Of `b`.
    pub db: &'a mut [f32],
    /// Of `c`.
    pub dc: &'a mut [f32],
    /// Of `d`.
    pub dd: &'a mut [f32],
}

/// Channels per tile, the vector dimension. Fixed, so that results do not depend on instruction set or threads.
const LANES: usize = 16;
/// One value per channel of a tile.
type Lanes = [f32; LANES];

impl ScanShape {
    fn tiles(self) -> usize {
        self.d_inner.div_ceil(LANES)
    }
    /// Panics when a length does not fit.
    #[track_caller]
    fn check(self, inputs: ScanInputs<'_>, y: usize) {
        let ScanShape { seq, d_inner, d_state } = self;
        assert!(d_inner > 0 && d_state > 0, "empty {self:?}");
        check_len("u", inputs.u.len(), seq * d_inner);
        check_len("delta", inputs.delta.len(), seq * d_inner);
        check_len("a", inputs.a.len(), d_inner * d_state);
        check_len("b", inputs.b.len(), seq * d_state);
        check_len("c", inputs.c.len(), seq * d_state);
        check_len("d", inputs.d.len(), d_inner);
        check_len("y", y, seq * d_inner);
    }
}

/// Up to [`LANES`] neighbouring channels.
#[derive(Clone, Copy)]
struct Tile {
    start: usize,
    width: usize,
}

impl Tile {
    fn new(shape: ScanShape, index: usize) -> Self {
        let start = index * LANES;
        Self { start, width: LANES.min(shape.d_inner - start) }
    }
    /// This tile's values of row `row` of a `[rows, row_len]` matrix, padded with zeros.
    #[inline(always)]
    fn load(self, matrix: &[f32], row: usize, row_len: usize) -> Lanes {
        let values = &matrix[row * row_len + self.start..][..self.width];
        // A constant length becomes one vector load.
        if let Ok(lanes) = values.try_into() {
            return lanes;
        }
        let mut lanes = [0.0; LANES];
        lanes[..self.width].copy_from_slice(values);
        lanes
    }
    /// This tile's rows of a `[d_inner, d_state]` matrix, transposed to `[d_state][lane]`.
    #[inline(always)]
    fn transposed(self, matrix: &[f32], d_state: usize) -> Vec<Lanes> {
        let mut out = vec![[0.0; LANES]; d_state];
        for (lane, row) in matrix[self.start * d_state..].chunks_exact(d_state).take(self.width).enumerate() {
            for (out, &value) in out.iter_mut().zip(row) {
                out[lane] = value;
            }
        }
        out
    }
    /// Hands each value of [`Self::transposed`] form to `f(entry of matrix, value)`.
    fn for_each_entry(self, lanes: &[Lanes], matrix: &mut [f32], f: impl Fn(&mut f32, f32)) {
        let d_state = lanes.len();
        let rows = matrix[self.start * d_state..].chunks_exact_mut(d_state);
        for (lane, row) in rows.take(self.width).enumerate() {
            for (entry, lanes) in row.iter_mut().zip(lanes) {
                f(entry, lanes[lane]);
            }
        }
    }
    /// Hands each value of `[seq][lane]` to `f(entry of matrix, value)` for a matrix `[seq, d_inner]`.
    fn for_each_value(self, lanes: &[Lanes], matrix: &mut [f32], d_inner: usize, f: impl Fn(&mut f32, f32)) {
        for (lanes, row) in lanes.iter().zip(matrix.chunks_exact_mut(d_inner)) {
            for (entry, &value) in row[self.start..].iter_mut().zip(&lanes[..self.width]) {
                f(entry, value);
            }
        }
    }
}

/// One token for one tile: moves `state` on and returns `C_t · h_t`. `rates` is `A`; `b` and `c` are the token's rows.
#[inline(always)]
fn advance<S: Simd>(
    s: S,
    u: &Lanes,
    delta: &Lanes,
    rates: &[Lanes],
    (b, c): (&[f32], &[f32]),
    state: &mut [Lanes],
) -> Lanes {
    let input: Lanes = std::array::from_fn(|lane| delta[lane] * u[lane]);
    let mut y = [0.0; LANES];
    for (((state, rates), &b), &c) in state.iter_mut().zip(rates).zip(b).zip(c) {
        for lane in 0..LANES {
            let decay = exp(s, delta[lane] * rates[lane]);
            state[lane] = s.fma(decay, state[lane], b * input[lane]);
            y[lane] = s.fma(c, state[lane], y[lane]);
        }
    }
    y
}

/// Sequence form, parallel over channels. `state` `[d_inner, d_state]` is read and replaced; `y` is `[seq, d_inner]`.
///
/// Panics when a length does not fit.
pub fn selective_scan(
    exec: &Exec,
    shape: ScanShape,
    inputs: ScanInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
) {
    let ScanShape { seq, d_inner, d_state } = shape;
    shape.check(inputs, y.len());
    check_len("state", state.len(), d_inner * d_state);
    for_each_tile(
        exec,
        shape,
        &mut (state, y),
        |(before, _), tile| {
            let mut state = tile.transposed(before, d_state);
            let mut y = vec![[0.0; LANES]; seq];
            dispatch!(exec.isa(), |s| {
                let rates = tile.transposed(inputs.a, d_state);
                let skip = tile.load(inputs.d, 0, d_inner);
                for (t, y) in y.iter_mut().enumerate() {
                    let (u, delta) = (tile.load(inputs.u, t, d_inner), tile.load(inputs.delta, t, d_inner));
                    let token = t * d_state..(t + 1) * d_state;
                    let (b, c) = (&inputs.b[token.clone()], &inputs.c[token]);
                    *y = advance(s, &u, &delta, &rates, (b, c), &mut state);
                    for lane in 0..LANES {
                        y[lane] = s.fma(skip[lane], u[lane], y[lane]);
                    }
                }
            });
            (state, y)
        },
        |(state, y), tile, (tile_state, tile_y)| {
            tile.for_each_entry(&tile_state, state, |entry, value| *entry = value);
            tile.for_each_value(&tile_y, y, d_inner, |entry, value| *entry = value);
        },
    );
}

/// Computes `work(target, tile)` on the pool and hands the results to `merge(target, tile, result)` in order. Only as many
/// results as there are threads exist at once, so that their memory stays warm.
fn for_each_tile<T: Sync, R: Send>(
    exec: &Exec,
    shape: ScanShape,
    target: &mut T,
    work: impl Fn(&T, Tile) -> R + Sync,
    mut merge: impl FnMut(&mut T, Tile, R),
) {
    let tiles: Vec<Tile> = (0..shape.tiles()).map(|index| Tile::new(shape, index)).collect();
    for tiles in tiles.chunks(exec.threads()) {
        let shared = &*target;
        let results = exec.parallel_map(tiles.len(), |i| work(shared, tiles[i]));
        for (tile, result) in tiles.iter().zip(results) {
            merge(target, *tile, result);
        }
    }
}

/// One-token form of [`selective_scan`] (`shape.seq == 1`). Panics when a length does not fit.
pub fn selective_scan_step(
    exec: &Exec,
    shape: ScanShape,
    inputs: ScanInputs<'_>,
    state: &mut [f32],
    y: &mut [f32],
) {
    let ScanShape { seq, d_inner, d_state } = shape;
    assert_eq!(seq, 1, "one step takes one token");
    shape.check(inputs, y.len());
    check_len("state", state.len(), d_inner * d_state);
    dispatch!(exec.isa(), |s| {
        let rows = state.chunks_exact_mut(d_state).zip(inputs.a.chunks_exact(d_state));
        for (channel, (state, rates)) in rows.enumerate() {
            let (u, delta) = (inputs.u[channel], inputs.delta[channel]);
            let input = delta * u;
            let mut products = [0.0; LANES];
            // Blocks of constant length become one vector.
            let (blocks, rest) = state.as_chunks_mut::<LANES>();
            let (rate_blocks, rate_rest) = rates.as_chunks::<LANES>();
            let (b_blocks, b_rest) = inputs.b.as_chunks::<LANES>();
            let (c_blocks, c_rest) = inputs.c.as_chunks::<LANES>();
            let whole = blocks.iter_mut().zip(rate_blocks).zip(b_blocks).zip(c_blocks);
            for (((state, rates), b), c) in whole {
                step_entries(s, delta, input, rates, (b, c), state, &mut products);
            }
            step_entries(s, delta, input, rate_rest, (b_rest, c_rest), rest, &mut products);
            y[channel] = s.fma(inputs.d[channel], u, lane_sum(s, &products));
        }
    });
}

/// One token for up to [`LANES`] state values of one channel; adds their parts of the output to `products`.
#[inline(always)]
fn step_entries<S: Simd>(
    s: S,
    delta: f32,
    input: f32,
    rates: &[f32],
    (b, c): (&[f32], &[f32]),
    state: &mut [f32],
    products: &mut Lanes,
) {
    let entries = state.iter_mut().zip(rates).zip(b).zip(c).zip(products);
    for ((((state, &rate), &b), &c), product) in entries {
        *state = s.fma(exp(s, delta * rate), *state, b * input);
        *product = s.fma(c, *state, *product);
    }
}

/// Sum of all lanes.
#[inline(always)]
fn lane_sum<S: Simd>(s: S, x: &Lanes) -> f32 {
    let mut vectors = x.chunks_exact(S::LANES);
    let mut sum = s.load(vectors.next().expect("a tile is at least one vector wide"));
    for vector in vectors {
        sum = s.add(sum, s.load(vector));
    }
    s.sum(sum)
}
