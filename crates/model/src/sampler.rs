//! Choosing the next token from a row of logits.

use crate::error::Result;

/// Sampling parameters; the defaults are greedy decoding.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0: greedy.
    pub temperature: f32,
    /// Keep the `k` best; 0: all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches this; 1: all.
    pub top_p: f32,
    /// Drop tokens below this share of the best one's probability; 0: none.
    pub min_p: f32,
    /// Divides (multiplies when negative) the logits of tokens already seen; 1: off.
    pub repetition_penalty: f32,
    /// Seed of the draw.
    pub seed: u64,
}

/// A seeded sampler.
pub struct Sampler {
    _private: (),
}

impl Sampler {
    /// Validates the options.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        let _ = options;
        todo!()
    }
    /// Draws a token from `logits` `[vocab]`; `seen` are the tokens so far (prompt and generation).
    pub fn sample(&mut self, logits: &[f32], seen: &[u32]) -> u32 {
        let _ = (logits, seen);
        todo!()
    }
}
