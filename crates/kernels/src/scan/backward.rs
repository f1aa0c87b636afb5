//! Gradient of the selective scan: keeps states at chunk starts, recomputes and walks back one chunk at a time.

use super::{LANES, Lanes, ScanGrads, ScanInputs, ScanShape, Tile, advance, for_each_tile, lane_sum};
use crate::Exec;
use crate::chunk::check_len;
use crate::isa::dispatch;
use crate::simd::{Simd, exp};

/// Tokens recomputed at once: with 16 state values their states and decays take 32 KiB, a level-1 cache.
const STEPS: usize = 16;

/// Gradient of [`super::selective_scan`] from `initial_state` (zeros when `None`), given the gradients of `y` and, when
/// given, of the final state. Adds to `grads` and, when given, to `d_initial_state`. Keeps states only at the starts
/// of chunks of 16 tokens; parallel over channels.
///
/// Panics when a length does not fit.
pub fn selective_scan_backward(
    exec: &Exec,
    shape: ScanShape,
    inputs: ScanInputs<'_>,
    initial_state: Option<&[f32]>,
    dy: &[f32],
    d_final_state: Option<&[f32]>,
    grads: ScanGrads<'_>,
    d_initial_state: Option<&mut [f32]>,
) {
    let ScanShape { d_inner, d_state, .. } = shape;
    shape.check(inputs, dy.len());
    check_len("du", grads.du.len(), inputs.u.len());
    check_len("ddelta", grads.ddelta.len(), inputs.delta.len());
    check_len("da", grads.da.len(), inputs.a.len());
    check_len("db", grads.db.len(), inputs.b.len());
    check_len("dc", grads.dc.len(), inputs.c.len());
    check_len("dd", grads.dd.len(), inputs.d.len());
    for (name, state) in [("initial_state", initial_state), ("d_final_state", d_final_state)] {
        if let Some(state) = state {
            check_len(name, state.len(), d_inner * d_state);
        }
    }
    if let Some(d_initial_state) = &d_initial_state {
        check_len("d_initial_state", d_initial_state.len(), d_inner * d_state);
    }
    let mut targets = (grads, d_initial_state);
    for_each_tile(
        exec,
        shape,
        &mut targets,
        |_, tile| {
            let or_zeros = |state: Option<&[f32]>| match state {
                Some(state) => tile.transposed(state, d_state),
                None => vec![[0.0; LANES]; d_state],
            };
            let (state, d_state_out) = (or_zeros(initial_state), or_zeros(d_final_state));
            let mut grads = TileGrads::new(shape, d_state_out);
            dispatch!(exec.isa(), |s| backward(s, tile, shape, inputs, state, dy, &mut grads));
            grads
        },
        |(grads, d_initial_state), tile, tile_grads| {
            let add = |entry: &mut f32, value: f32| *entry += value;
            tile.for_each_value(&tile_grads.du, grads.du, d_inner, add);
            tile.for_each_value(&tile_grads.ddelta, grads.ddelta, d_inner, add);
            tile.for_each_value(&[tile_grads.dd], grads.dd, d_inner, add);
            tile.for_each_entry(&tile_grads.da, grads.da, add);
            if let Some(d_initial_state) = d_initial_state {
                tile.for_each_entry(&tile_grads.d_state, d_initial_state, add);
            }
            grads.db.iter_mut().zip(&tile_grads.db).for_each(|(db, value)| *db += value);
            grads.dc.iter_mut().zip(&tile_grads.dc).for_each(|(dc, value)| *dc += value);
        },
    );
}

/// One tile's gradients, `[..][lane]`; `db` and `dc` `[seq, d_state]` are its share of the sum over channels.
struct TileGrads {
    du: Vec<Lanes>,
    ddelta: Vec<Lanes>,
    da: Vec<Lanes>,
    dd: Lanes,
    db: Vec<f32>,
    dc: Vec<f32>,
    /// Of the state after the tokens not yet walked back.
    d_state: Vec<Lanes>,
}

impl TileGrads {
    fn new(shape: ScanShape, d_state_out: Vec<Lanes>) -> Self {
        let ScanShape { seq, d_state, .. } = shape;
        Self {
            du: vec![[0.0; LANES]; seq],
            ddelta: vec![[0.0; LANES]; seq],
            da: vec![[0.0; LANES]; d_state],
            dd: [0.0; LANES],
            db: vec![0.0; seq * d_state],
            dc: vec![0.0; seq * d_state],
            d_state: d_state_out,
        }
    }
}

#[inline(always)]
fn backward<S: Simd>(
    s: S,
    tile: Tile,
    shape: ScanShape,
    inputs: ScanInputs<'_>,
    mut state: Vec<Lanes>,
    dy: &[f32],
    grads: &mut TileGrads,
) {
    let ScanShape { seq, d_inner, d_state } = shape;
    let rates = tile.transposed(inputs.a, d_state);
    let skip = tile.load(inputs.d, 0, d_inner);
    let chunks = seq.div_ceil(STEPS);
    let mut starts = Vec::with_capacity(chunks * d_state);
    for t in 0..seq {
        if t % STEPS == 0 {
            starts.extend_from_slice(&state);
        }
        let (u, delta) = (tile.load(inputs.u, t, d_inner), tile.load(inputs.delta, t, d_inner));
        let token = t * d_state..(t + 1) * d_state;
        advance(s, &u, &delta, &rates, (&inputs.b[token.clone()], &inputs.c[token]), &mut state);
    }
    // States before each token of the chunk, and its decays.
    let mut states = vec![[0.0; LANES]; (STEPS + 1) * d_state];
    let mut decays = vec![[0.0; LANES]; STEPS * d_state];
    for chunk in (0..chunks).rev() {
        states[..d_state].copy_from_slice(&starts[chunk * d_state..(chunk + 1) * d_state]);
        let tokens = chunk * STEPS..seq.min((chunk + 1) * STEPS);
        for (step, t) in tokens.clone().enumerate() {
            let (u, delta) = (tile.load(inputs.u, t, d_inner), tile.load(inputs.delta, t, d_inner));
            let input: Lanes = std::array::from_fn(|lane| delta[lane] * u[lane]);
            let b = &inputs.b[t * d_state..(t + 1) * d_state];
            let (before, after) = states[step * d_state..(step + 2) * d_state].split_at_mut(d_state);
            let decays = &mut decays[step * d_state..(step + 1) * d_state];
            for ((((before, after), decay), rates), &b) in
                before.iter().zip(after).zip(decays).zip(&rates).zip(b)
            {
                for lane in 0..LANES {
                    decay[lane] = exp(s, delta[lane] * rates[lane]);
                    after[lane] = s.fma(decay[lane], before[lane], b * input[lane]);
                }
            }
        }
        for (step, t) in tokens.enumerate().rev() {
            let token = t * d_state..(t + 1) * d_state;
            let step = Step {
                u: tile.load(inputs.u, t, d_inner),
                delta: tile.load(inputs.delta, t, d_inner),
                dy: tile.load(dy, t, d_inner),
                before: &states[step * d_state..(step + 1) * d_state],
                after: &states[(step + 1) * d_state..(step + 2) * d_state],
                decays: &decays[step * d_state..(step + 1) * d_state],
                rates: &rates,
                b: &inputs.b[token.clone()],
                c: &inputs.c[token],
            };
            step.backward(s, t, &skip, grads);
        }
    }
}

/// One token of one tile.
struct Step<'a> {
    u: Lanes,
    delta: Lanes,
    dy: Lanes,
    before: &'a [Lanes],
    after: &'a [Lanes],
    decays: &'a [Lanes],
    rates: &'a [Lanes],
    b: &'a [f32],
    c: &'a [f32],
}

impl Step<'_> {
    #[inline(always)]
    fn backward<S: Simd>(&self, s: S, t: usize, skip: &Lanes, grads: &mut TileGrads) {
        let Self { u, delta, dy, .. } = self;
        let d_state = self.b.len();
        let token = t * d_state..(t + 1) * d_state;
        let input: Lanes = std::array::from_fn(|lane| delta[lane] * u[lane]);
        // Gradients of `δ u`, the input that all state values share, and of δ through the decays.
        let (mut d_input, mut d_delta) = ([0.0; LANES], [0.0; LANES]);
        let states = self.before.iter().zip(self.after).zip(self.decays).zip(self.rates);
        let tokens = self.b.iter().zip(self.c).zip(&mut grads.db[token.clone()]).zip(&mut grads.dc[token]);
        let sums = grads.da.iter_mut().zip(&mut grads.d_state);
        for (((((before, after), decay), rates), (((&b, &c), db), dc)), (da, d_state)) in
            states.zip(tokens).zip(sums)
        {
            let (mut read, mut written) = ([0.0; LANES], [0.0; LANES]);
            for lane in 0..LANES {
                read[lane] = dy[lane] * after[lane];
                let d = s.fma(c, dy[lane], d_state[lane]);
                written[lane] = d * input[lane];
                d_input[lane] = s.fma(d, b, d_input[lane]);
                let d_before = d * decay[lane];
                let d_exponent = d_before * before[lane];
                d_delta[lane] = s.fma(d_exponent, rates[lane], d_delta[lane]);
                da[lane] = s.fma(d_exponent, delta[lane], da[lane]);
                d_state[lane] = d_before;
            }
            *dc = lane_sum(s, &read);
            *db = lane_sum(s, &written);
        }
        for lane in 0..LANES {
            grads.dd[lane] = s.fma(dy[lane], u[lane], grads.dd[lane]);
            grads.du[t][lane] = s.fma(dy[lane], skip[lane], d_input[lane] * delta[lane]);
            grads.ddelta[t][lane] = s.fma(d_input[lane], u[lane], d_delta[lane]);
        }
    }
}
