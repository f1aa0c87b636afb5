//! The model's own text: sampled once, cached by model and settings.

use super::{Document, SelfOptions};
use crate::error::{Result, TrainError};
use kernels::Exec;
use model::{LogitRows, Model, Progress, Sampler, SamplerOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use weights::files::atomic_write;

/// `source` of sampled documents.
const SOURCE: &str = "self";

/// Text sampled from `model` itself (temperature 1, seeded, several sequences at a time), cached in the user's cache folder by model hash.
///
/// Every document starts after the model's beginning-of-sequence token, or after a random token where it has none, and goes on past
/// end-of-text tokens, so that all have `options.tokens` tokens.
///
/// # Errors
/// [`TrainError::Argument`] for empty options, [`TrainError::Model`] when a document exceeds the context, [`TrainError::Interrupted`];
/// [`TrainError::Weights`] when the cache folder cannot be written.
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
    progress.start("sampling text from the model", (documents * tokens) as u64, "tokens");
    let mut sampled: Vec<Vec<u32>> = Vec::with_capacity(documents);
    while sampled.len() < documents {
        if progress.cancelled() {
            return Err(TrainError::Interrupted);
        }
        let n = exec.threads().min(documents - sampled.len());
        let first = sampled.len();
        let single = exec.single();
        for result in exec.parallel_map(n, |i| sample(&single, model, tokens, seed, (first + i) as u64)) {
            sampled.push(result?);
        }
        progress.advance((n * tokens) as u64, "");
    }
    progress.finish();
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

fn sample(exec: &Exec, model: &Model, tokens: usize, seed: u64, index: u64) -> Result<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let random = rng.random_range(0..model.config.vocab as u32);
    let first = model.config.bos_token_id.unwrap_or(random);
    let mut sampler = Sampler::new(SamplerOptions {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: rng.random(),
    })?;
    let mut cache = model.new_cache();
    let mut out = Vec::with_capacity(tokens);
    let mut token = first;
    for _ in 0..tokens {
        let logits = model.forward(exec, &[token], &mut cache, LogitRows::Last)?;
        token = sampler.sample(&logits, &out)?;
        out.push(token);
    }
    Ok(out)
}

/// SHA-256 over names, shapes and values of all parameters.
fn model_digest(model: &Model) -> String {
    let mut digest = Sha256::new();
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
