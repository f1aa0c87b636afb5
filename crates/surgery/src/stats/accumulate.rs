//! Streaming sums of one head: blocks of queries against all keys before them, each row reduced as soon as its scores exist.

use super::{FIRST_QUERY, HeadStats, NO_OP_LIVE_MASS};
use crate::exp::{EXP_MIN, exp_nonpositive};
use crate::scores::each_query;
use kernels::{Exec, MatRef};

/// Recency windows measured, in tokens; powers of two, so that each is a run of whole distance buckets.
pub const WINDOWS: [usize; 3] = [16, 64, 128];

/// Lanes of a partial sum; the compiler keeps them in vector registers.
const LANES: usize = 16;

/// Sums over the queries of one head.
#[derive(Clone, Debug)]
pub struct HeadAccumulator {
    ratio: [f64; 3],
    ratio_queries: [usize; 3],
    queries: usize,
    sink_mass: f64,
    entropy: f64,
    prev_token_mass: f64,
    /// Queries that see a live key; only they have a distance.
    live_queries: usize,
    distance: f64,
    by_distance: Vec<f64>,
}

/// Sums over a run of live keys, with `e = exp(score − max)`.
#[derive(Clone, Copy, Default)]
struct Run {
    /// Σ e.
    mass: f64,
    /// Σ e · (score − max).
    score: f64,
    /// Σ e · distance.
    distance: f64,
}

impl HeadAccumulator {
    /// Empty sums for sequences of up to `context` tokens.
    pub fn new(context: usize) -> Self {
        Self {
            ratio: [0.0; 3],
            ratio_queries: [0; 3],
            queries: 0,
            sink_mass: 0.0,
            entropy: 0.0,
            prev_token_mass: 0.0,
            live_queries: 0,
            distance: 0.0,
            by_distance: vec![0.0; bucket(context.saturating_sub(1)) + 1],
        }
    }

    /// Queries that count for each of [`WINDOWS`].
    pub fn ratio_queries(&self) -> [usize; 3] {
        self.ratio_queries
    }

    /// Adds one sequence. `q`, `k`: `[T, head_dim]` after RoPE; `sinks`: sorted positions.
    pub fn add(&mut self, exec: &Exec, q: MatRef<'_>, k: MatRef<'_>, scale: f32, sinks: &[usize]) {
        let seq = q.rows();
        let mut exps = vec![0.0f32; seq];
        let first_query = FIRST_QUERY.min(seq / 2);
        // Earlier queries count for nothing.
        each_query(exec, (q, k), scale, first_query.min(WINDOWS[0]), |i, scores| {
            self.add_query(scores, &mut exps[..=i], i >= first_query, sinks);
        });
    }

    /// Adds the query at position `i = scores.len() − 1`; to the recency ratios only, unless `all`.
    fn add_query(&mut self, scores: &[f32], exps: &mut [f32], all: bool, sinks: &[usize]) {
        let i = scores.len() - 1;
        let sinks = &sinks[..sinks.partition_point(|&s| s <= i)];
        // Live keys are scaled by their own maximum, so that a strong sink cannot drown them.
        let live_max = max_without(scores, sinks);
        let has_live = live_max > f32::NEG_INFINITY;
        let max = if has_live { live_max } else { max_without(scores, &[]) };
        for (e, &score) in exps.iter_mut().zip(scores) {
            *e = exp_nonpositive(score - max);
        }
        for &sink in sinks {
            exps[sink] = 0.0;
        }
        let mut mass = [0.0f64; BUCKETS];
        let mut live = Run::default();
        for (b, mass) in mass[..=bucket(i)].iter_mut().enumerate() {
            let (near, far) = bucket_range(b);
            let (low, high) = (i.saturating_sub(far), i - near);
            let run = run_sums(&exps[low..=high], &scores[low..=high], max, (i - low) as f32);
            *mass = run.mass;
            live.mass += run.mass;
            live.score += run.score;
            live.distance += run.distance;
        }

        for (slot, &window) in WINDOWS.iter().enumerate() {
            // The window is i−window+1..=i.
            let holds_sink = sinks.last().is_some_and(|&sink| sink + window > i);
            if has_live && i >= window && !holds_sink {
                self.ratio[slot] += mass[..=bucket(window - 1)].iter().sum::<f64>() / live.mass;
                self.ratio_queries[slot] += 1;
            }
        }
        if !all {
            return;
        }
        // With scores relative to `max`: log Z, the share of the sinks and of the live keys, and −Σ a ln a = log Z − Σ a·score.
        let relative = |j: usize| f64::from(scores[j]) - f64::from(max);
        let top = sinks.iter().map(|&j| relative(j)).fold(0.0f64, f64::max);
        let sink_sum: f64 = sinks.iter().map(|&j| (relative(j) - top).exp()).sum();
        let live_factor = (-top).exp();
        let z = live.mass * live_factor + sink_sum;
        let log_z = top + z.ln();
        let sink_score: f64 = sinks.iter().map(|&j| (relative(j) - top).exp() * relative(j)).sum();
        self.queries += 1;
        self.sink_mass += sink_sum / z;
        self.entropy += log_z - (live.score * live_factor + sink_score) / z;
        if i > 0 {
            self.prev_token_mass += (relative(i - 1) - log_z).exp();
        }
        if has_live {
            self.live_queries += 1;
            self.distance += live.distance / live.mass;
            for (sum, mass) in self.by_distance.iter_mut().zip(mass) {
                *sum += mass / live.mass;
            }
        }
    }

    /// The means so far.
    pub fn stats(&self) -> HeadStats {
        let mean = |sum: f64, queries: usize| if queries == 0 { 0.0 } else { sum / queries as f64 };
        let ratio = |slot: usize| match self.ratio_queries[slot] {
            0 => 1.0,
            queries => self.ratio[slot] / queries as f64,
        };
        let sink_mass = mean(self.sink_mass, self.queries);
        HeadStats {
            recency_ratio_16: ratio(0),
            recency_ratio_64: ratio(1),
            recency_ratio_128: ratio(2),
            sink_mass,
            mean_distance: mean(self.distance, self.live_queries),
            entropy: mean(self.entropy, self.queries),
            prev_token_mass: mean(self.prev_token_mass, self.queries),
            no_op: 1.0 - sink_mass < NO_OP_LIVE_MASS,
            mass_by_distance: self.by_distance.iter().map(|&sum| mean(sum, self.live_queries)).collect(),
        }
    }
}

/// More buckets than any distance needs.
const BUCKETS: usize = usize::BITS as usize + 1;

/// Bucket of a distance: 0 for 0, else one more than the position of the highest bit.
pub fn bucket(distance: usize) -> usize {
    (usize::BITS - distance.leading_zeros()) as usize
}

/// First and last distance of a bucket.
pub fn bucket_range(bucket: usize) -> (usize, usize) {
    match bucket {
        0 => (0, 0),
        b => (1 << (b - 1), (1 << (b - 1)) * 2 - 1),
    }
}

/// The largest score outside `sinks` (sorted), `-inf` when there is none.
fn max_without(scores: &[f32], sinks: &[usize]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    let mut start = 0;
    for end in sinks.iter().copied().chain([scores.len()]) {
        max = max.max(lane_max(&scores[start..end]));
        start = end + 1;
    }
    max
}

fn lane_max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// Sums over a run whose first key lies `far` tokens back.
fn run_sums(exps: &[f32], scores: &[f32], max: f32, far: f32) -> Run {
    let (mut mass, mut score, mut offset) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let mut base = 0.0f32;
    let whole = exps.len() / LANES * LANES;
    for (exps, scores) in exps[..whole].chunks_exact(LANES).zip(scores[..whole].chunks_exact(LANES)) {
        for lane in 0..LANES {
            let e = exps[lane];
            mass[lane] += e;
            score[lane] += e * (scores[lane] - max).max(EXP_MIN);
            offset[lane] += e * (base + lane as f32);
        }
        base += LANES as f32;
    }
    for (lane, (&e, &s)) in exps[whole..].iter().zip(&scores[whole..]).enumerate() {
        mass[lane] += e;
        score[lane] += e * (s - max).max(EXP_MIN);
        offset[lane] += e * (base + lane as f32);
    }
    let sum = |lanes: [f32; LANES]| lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
    let mass = sum(mass);
    Run { mass, score: sum(score), distance: mass * f64::from(far) - sum(offset) }
}
