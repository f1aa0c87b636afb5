//! The generation loop: prompt in, tokens out, one cache. Knows token ids, stop ids and a sampler; text is the caller's.

use crate::cache::Cache;
use crate::engine::{Engine, LogitRows};
use crate::error::Result;
use crate::sampler::Sampler;
use kernels::Exec;

/// Tokens of the prompt processed at a time.
const PREFILL_CHUNK: usize = 512;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced an end token.
    EndOfText,
    /// The caller's callback asked to stop.
    Stopped,
    /// The requested number of tokens was produced.
    Length,
}

/// Limits of one generation.
#[derive(Clone, Copy, Debug)]
pub struct GenerateLimits<'a> {
    /// Most tokens to produce.
    pub max_new: usize,
    /// Token ids that end the generation (not passed to the callback).
    pub stop_ids: &'a [u32],
}

/// Appends `prompt` to `cache`, then samples until a limit; `on_token` sees each new token and returns whether to go on. `history` holds the
/// tokens already in the cache (for the repetition penalty) and grows by the prompt and by every token that was fed to the model. The cache ends after
/// the last token fed; a final end token is not fed. An empty prompt needs a non-empty cache and is an error.
pub fn generate(
    exec: &Exec,
    engine: &Engine,
    cache: &mut Cache,
    history: &mut Vec<u32>,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: GenerateLimits<'_>,
    mut on_token: impl FnMut(u32) -> bool,
) -> Result<Finish> {
    if prompt.is_empty() {
        return Err(crate::ModelError::Sampler("the prompt is empty; give at least one token".into()));
    }
    // Checked before anything runs, so that a long prompt fails at once.
    if cache.len() + prompt.len() > engine.context_limit {
        return Err(crate::ModelError::Context {
            requested: cache.len() + prompt.len(),
            limit: engine.context_limit,
        });
    }
    let mut logits = Vec::new();
    for (start, chunk) in (0..).step_by(PREFILL_CHUNK).zip(prompt.chunks(PREFILL_CHUNK)) {
        let last = start + chunk.len() == prompt.len();
        let rows = if last { LogitRows::Last } else { LogitRows::None };
        engine.forward_into(exec, chunk, cache, rows, &mut logits)?;
        history.extend_from_slice(chunk);
    }
    for produced in 0..limits.max_new {
        let token = sampler.sample(&logits, history)?;
        if limits.stop_ids.contains(&token) {
            return Ok(Finish::EndOfText);
        }
        let go_on = on_token(token);
        if produced + 1 == limits.max_new || !go_on {
            history.push(token);
            engine.forward_into(exec, &[token], cache, LogitRows::None, &mut logits)?;
            return Ok(if go_on { Finish::Length } else { Finish::Stopped });
        }
        engine.forward_into(exec, &[token], cache, LogitRows::Last, &mut logits)?;
        history.push(token);
    }
    Ok(Finish::Length)
}
