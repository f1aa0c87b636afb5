//! Speed and memory of a model at several depths.

use crate::error::{EvalError, Result};
use kernels::Exec;
use model::{Engine, LogitRows, Progress};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What [`bench()`] measures.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Contexts at which decoding is timed, in tokens.
    pub depths: Vec<usize>,
    /// Decode steps timed at each depth; the median counts.
    pub decode_steps: usize,
    /// Tokens per prefill chunk.
    pub chunk: usize,
    /// Seed of the random tokens.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { depths: vec![512, 2048], decode_steps: 16, chunk: 512, seed: 0 }
    }
}

/// Speed at one depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchResult {
    /// Tokens in the cache when decoding was timed.
    pub depth: usize,
    /// Tokens per second from an empty cache to `depth`.
    pub prefill_tok_s: f64,
    /// 1 / median seconds of a decode step at this depth.
    pub decode_tok_s: f64,
    /// Cache bytes at this depth.
    pub cache_bytes: usize,
}

/// Times prefill (in chunks, from an empty cache) and decoding at every depth, on random tokens. One warm-up chunk and step come first.
pub fn bench(
    exec: &Exec,
    model: &Engine,
    options: &BenchOptions,
    progress: &mut dyn Progress,
) -> Result<Vec<BenchResult>> {
    if options.chunk == 0
        || options.decode_steps == 0
        || options.depths.is_empty()
        || options.depths.contains(&0)
    {
        return Err(EvalError::Argument(
            "bench needs at least one depth, and depths, chunk and decode steps of at least 1".into(),
        ));
    }
    let mut depths = options.depths.clone();
    depths.sort_unstable();
    depths.dedup();
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let vocab = model.config.vocab as u32;
    let deepest = depths.last().copied().unwrap_or(0);
    let tokens: Vec<u32> = (0..deepest + options.decode_steps).map(|_| rng.random_range(0..vocab)).collect();

    let mut warm = model.new_cache();
    model.forward(exec, &tokens[..tokens.len().min(options.chunk)], &mut warm, LogitRows::Last)?;
    drop(warm);

    progress.start("bench", (deepest + depths.len() * options.decode_steps) as u64, "tok");
    let (mut cache, mut logits) = (model.new_cache(), Vec::new());
    let mut seconds = 0.0;
    let mut results = Vec::with_capacity(depths.len());
    for &depth in &depths {
        while cache.len() < depth {
            if progress.cancelled() {
                return Err(EvalError::Interrupted);
            }
            let start = cache.len();
            let end = (start + options.chunk).min(depth);
            let rows = if end == depth { LogitRows::Last } else { LogitRows::None };
            let clock = Instant::now();
            model.forward_into(exec, &tokens[start..end], &mut cache, rows, &mut logits)?;
            seconds += clock.elapsed().as_secs_f64();
            progress.advance((end - start) as u64, "prefill");
        }
        let cache_bytes = cache.bytes();
        let mut fork = cache.clone();
        model.forward(exec, &tokens[depth - 1..depth], &mut fork, LogitRows::Last)?;
        fork.restore(&cache);
        let mut steps = Vec::with_capacity(options.decode_steps);
        for step in 0..options.decode_steps {
            let clock = Instant::now();
            let token = &tokens[depth + step..depth + step + 1];
            model.forward_into(exec, token, &mut fork, LogitRows::Last, &mut logits)?;
            steps.push(clock.elapsed().as_secs_f64());
            progress.advance(1, "decode");
        }
        steps.sort_by(f64::total_cmp);
        let median = steps[steps.len() / 2];
        results.push(BenchResult {
            depth,
            prefill_tok_s: depth as f64 / seconds,
            decode_tok_s: 1.0 / median,
            cache_bytes,
        });
    }
    progress.finish();
    Ok(results)
}
