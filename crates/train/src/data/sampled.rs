//! The model's own text: sampled once, cached by model and settings.

use super::{Document, SelfOptions};
use crate::error::{Result, TrainError};
use kernels::Exec;
use model::{Cache, Engine, EngineOptions, Model, ModelError, Progress, Sampler, SamplerOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use weights::files::atomic_write;

#[cfg(test)]
mod tests;

/// `source` of sampled documents.
const SOURCE: &str = "self";

/// Changes with the way of sampling, so that text sampled in another way is not taken for this one's.
const METHOD: &str = "fresh start after an end token";

/// Most documents sampled together: a pass reads all weights, so the more share it the better.
const MAX_BATCH: usize = 64;
/// Documents sampled together however large their caches: as many rows as the kernels for few rows take.
const MIN_BATCH: usize = 8;
/// Bytes that the caches of documents sampled together may take.
const CACHE_BYTES: usize = 1 << 30;

/// Text sampled from `model` itself (temperature 1, seeded, several sequences in one pass), cached in the user's cache folder by model hash.
///
/// Every document starts after the model's beginning-of-sequence token, or after a random token where it has none. One that comes to an
/// end token goes on with a fresh start, so that all have `options.tokens` tokens, none of them an end token; the start tokens are left out,
/// too. A document's draws follow from `options.seed` and its number alone, not from the other documents.
///
/// # Errors
/// [`TrainError::Argument`] for empty options, [`TrainError::Model`] when a document exceeds the context, [`TrainError::Interrupted`],
/// which leaves nothing behind; [`TrainError::File`] or [`TrainError::Weights`] when the cache folder cannot be written.
pub fn self_sampled(
    exec: &Exec,
    model: &Model,
    options: &SelfOptions,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let dir = weights::fetch::Cache::user()?.path().join("self");
    std::fs::create_dir_all(&dir)
        .map_err(|e| TrainError::File { path: dir.clone(), reason: e.to_string() })?;
    self_sampled_in(exec, model, options, &dir, progress)
}

/// The cached file.
#[derive(Serialize, Deserialize)]
struct Cached {
    documents: Vec<Vec<u32>>,
}

/// The same with a given cache folder.
pub(super) fn self_sampled_in(
    exec: &Exec,
    model: &Model,
    options: &SelfOptions,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let SelfOptions { documents, tokens, seed } = *options;
    if documents == 0 || tokens < 2 {
        return Err(TrainError::Argument(format!("cannot sample {documents} documents of {tokens} tokens")));
    }
    let path = dir.join(format!("{}-{documents}x{tokens}-{seed}.json", &model_digest(model)[..32]));
    if let Some(cached) = read_cached(&path, model.config.vocab, options) {
        return Ok(cached.into_iter().map(document).collect());
    }
    let engine = Engine::from_model(exec, model, EngineOptions::EXACT)?;
    let sampled = sample(exec, &engine, options, batch_size(engine.cache_bytes(tokens)), progress)?;
    let json = serde_json::to_string(&Cached { documents: sampled.clone() })
        .map_err(|e| TrainError::File { path: path.clone(), reason: e.to_string() })?;
    atomic_write(&path, json.as_bytes())?;
    Ok(sampled.into_iter().map(document).collect())
}

fn document(tokens: Vec<u32>) -> Document {
    Document { source: SOURCE.into(), tokens }
}

/// The cached documents, unless the file is missing or is not what was asked for (then it is made again).
fn read_cached(path: &Path, vocab: usize, options: &SelfOptions) -> Option<Vec<Vec<u32>>> {
    let Cached { documents } = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let fits = documents.len() == options.documents
        && documents.iter().all(|d| d.len() == options.tokens && d.iter().all(|&t| (t as usize) < vocab));
    fits.then_some(documents)
}

/// Documents to sample together, from the bytes of one's cache.
fn batch_size(cache_bytes: usize) -> usize {
    match CACHE_BYTES / cache_bytes.max(1) {
        // Matrix products of a few rows more than the kernels for few rows take are slower per row.
        n if n < 2 * MIN_BATCH => MIN_BATCH,
        n => n.min(MAX_BATCH),
    }
}

/// Documents by number, up to `batch` of them at a time: the next one takes the place of one that is full.
pub(super) fn sample(
    exec: &Exec,
    model: &Engine,
    options: &SelfOptions,
    batch: usize,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    let SelfOptions { documents, tokens, seed } = *options;
    // Known before the first of many steps.
    if tokens > model.context_limit {
        return Err(ModelError::Context { requested: tokens, limit: model.context_limit }.into());
    }
    progress.start("sampling text from the model", (documents * tokens) as u64, "tokens");
    let mut finished = vec![Vec::new(); documents];
    let mut waiting = 0..documents;
    let mut active: Vec<Growing> = Vec::new();
    loop {
        for index in waiting.by_ref().take(batch.max(1) - active.len()) {
            active.push(Growing::new(model, seed, index)?);
        }
        if active.is_empty() {
            break;
        }
        if progress.cancelled() {
            return Err(TrainError::Interrupted);
        }
        let inputs: Vec<u32> = active.iter().map(|document| document.next_input).collect();
        let mut caches: Vec<&mut Cache> = active.iter_mut().map(|document| &mut document.cache).collect();
        let logits = model.decode_batch(exec, &inputs, &mut caches)?;
        let rows: Vec<_> = active.iter_mut().zip(logits.chunks(model.config.vocab)).collect();
        let grown = exec.parallel_map_items(rows, |_, (document, logits)| document.grow(model, logits));
        let mut new = 0;
        for grown in grown {
            new += u64::from(grown?);
        }
        for document in active.extract_if(.., |document| document.tokens.len() == tokens) {
            finished[document.index] = document.tokens;
        }
        progress.advance(new, "");
    }
    progress.finish();
    Ok(finished)
}

/// A document that is being sampled.
struct Growing {
    index: usize,
    tokens: Vec<u32>,
    cache: Cache,
    next_input: u32,
    rng: ChaCha8Rng,
    sampler: Sampler,
}

impl Growing {
    fn new(model: &Engine, seed: u64, index: usize) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        let sampler =
            Sampler::new(SamplerOptions { temperature: 1.0, seed: rng.random(), ..Default::default() })?;
        let next_input = start_token(model, &mut rng);
        Ok(Self { index, tokens: Vec::new(), cache: model.new_cache(), next_input, rng, sampler })
    }

    /// Takes the next token from `logits`; says whether the document became longer, which an end token does not make it.
    fn grow(&mut self, model: &Engine, logits: &[f32]) -> Result<bool> {
        let ends = &model.config.eos_token_ids;
        let token = if self.cache.len() == 1 {
            // A fresh start that ended at once would be no progress.
            let mut logits = logits.to_vec();
            for &end in ends {
                // A configuration may name an end token that the vocabulary lacks.
                if let Some(logit) = logits.get_mut(end as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            self.sampler.sample(&logits, &[])?
        } else {
            self.sampler.sample(logits, &[])?
        };
        let ended = ends.contains(&token);
        if ended {
            self.cache = model.new_cache();
            self.next_input = start_token(model, &mut self.rng);
        } else {
            self.tokens.push(token);
            self.next_input = token;
        }
        Ok(!ended)
    }
}

/// What a document starts after.
fn start_token(model: &Engine, rng: &mut ChaCha8Rng) -> u32 {
    model.config.bos_token_id.unwrap_or_else(|| rng.random_range(0..model.config.vocab as u32))
}

/// SHA-256 over the way of sampling, the configuration, the plan, and names, shapes and values of all parameters.
fn model_digest(model: &Model) -> String {
    let mut digest = Sha256::new();
    digest.update(METHOD);
    digest.update(format!("{:?}", model.config));
    digest.update(model.plan.to_json());
    let mut bytes = Vec::new();
    for (_, param) in model.params.iter() {
        digest.update(format!("{} {:?}", param.name, param.shape));
        for values in param.data().chunks(1 << 16) {
            bytes.clear();
            values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
            digest.update(&bytes);
        }
    }
    digest.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
