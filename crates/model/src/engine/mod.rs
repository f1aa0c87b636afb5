//! Inference: packed weights, one cache per sequence, tokens in, logits out. Weights keep their stored type, or get another one, and
//! are packed once. Knows arithmetic order; knows nothing of training or of files.

mod build;
mod layer;
mod source;
mod windows;
mod workspace;

use crate::cache::{Cache, CacheShape};
use crate::error::{ModelError, Result};
use crate::mixers::HeadLayout;
use crate::model::{Model, TokenBatch, head_layout};
use crate::plan::HeadPlan;
use build::{Builder, Source};
use kernels::kv::KvType;
use kernels::packed::{Packed, Product, matmul};
use kernels::quant::Dtype;
use kernels::{Exec, MatMut, MatRef, Precision, Store};
use layer::{Layer, Pass};
use smallvec::SmallVec;
use source::Files;
use std::sync::{Arc, Mutex, PoisonError};
use weights::{Checkpoint, ModelConfig};
use workspace::Workspace;

/// Default of [`Engine::chunk`]: enough for the products' best speed, few enough for the CPU's caches.
const CHUNK: usize = 512;

/// Which logits a forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// `[n, vocab]`.
    All,
    /// `[1, vocab]`, of the last token.
    Last,
    /// Empty.
    None,
}

/// How an [`Engine`] keeps weights and caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Type of all large matrices; each as it is stored when absent. Rows that a K type cannot hold get its nearest type of blocks of 32, the embedding
    /// has at least 8 bits, and the few rows of a recurrent head's rates stay f32.
    pub weights: Option<Dtype>,
    /// Type of the attention cache.
    pub kv_type: KvType,
}

impl EngineOptions {
    /// f32 weights and caches: nothing is rounded that was not when it was stored.
    pub const EXACT: Self = Self { weights: Some(Dtype::F32), kv_type: KvType::F32 };
}

impl Default for EngineOptions {
    /// Weights as stored, f16 caches.
    fn default() -> Self {
        Self { weights: None, kv_type: KvType::F16 }
    }
}

/// A base or hybrid model made for inference. Forward passes take it shared; concurrent ones each get buffers of their own.
pub struct Engine {
    /// Normalised configuration.
    pub config: ModelConfig,
    /// Which group is what.
    pub plan: HeadPlan,
    /// Most tokens of one sequence, the configuration's `max_context` unless raised by the caller.
    pub context_limit: usize,
    /// Most tokens of one sequence that go through the layers together, at least 1. Up to 4 take the path that generating takes.
    pub chunk: usize,
    /// Those that are left out are absent.
    layers: Vec<Option<Layer>>,
    embed: Packed,
    /// The output projection; the embedding when absent.
    output: Option<Packed>,
    norm: Vec<f32>,
    inv_freq: Vec<f64>,
    head: Option<HeadLayout>,
    cache: Arc<CacheShape>,
    idle: Mutex<Vec<Workspace>>,
}

impl Engine {
    /// Packs a checkpoint's tensors as they are stored, or in another type, without an f32 copy of the model.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load(exec: &Exec, checkpoint: &Checkpoint, options: EngineOptions) -> Result<Self> {
        let (config, plan) = crate::model::check_checkpoint(checkpoint)?;
        let engine = Self::build(exec, &config, plan, &Files(checkpoint.tensors.as_ref()), options)?;
        checkpoint.tensors.release();
        Ok(engine)
    }

    /// Packs a model's f32 parameters.
    ///
    /// # Errors
    /// [`ModelError::Param`] for a parameter that is not finite.
    pub fn from_model(exec: &Exec, model: &Model, options: EngineOptions) -> Result<Self> {
        let mut engine = Self::build(exec, &model.config, model.plan.clone(), &model.params, options)?;
        engine.context_limit = model.context_limit;
        Ok(engine)
    }

    fn build(
        exec: &Exec,
        config: &ModelConfig,
        plan: HeadPlan,
        source: &dyn Source,
        options: EngineOptions,
    ) -> Result<Self> {
        let head = head_layout(config, &plan);
        let builder = Builder { exec, source, config, plan: &plan, head, wanted: options.weights };
        let output = match config.tie_embeddings {
            true => None,
            false => Some(builder.table("lm_head.weight")?),
        };
        Ok(Self {
            layers: (0..config.layers)
                .map(|l| (!plan.is_skipped(l)).then(|| builder.layer(l)).transpose())
                .collect::<Result<_>>()?,
            embed: builder.table("model.embed_tokens.weight")?,
            output,
            norm: source.values("model.norm.weight")?,
            inv_freq: config.rope_inv_freq(),
            cache: Arc::new(CacheShape::new(config, &plan, head, options.kv_type)),
            context_limit: config.max_context,
            chunk: CHUNK,
            config: config.clone(),
            plan,
            head,
            idle: Mutex::default(),
        })
    }

    /// Bytes of packed weights: what decoding a token reads at least.
    pub fn weight_bytes(&self) -> usize {
        let tables = self.embed.bytes() + self.output.as_ref().map_or(0, Packed::bytes);
        tables + self.layers.iter().flatten().map(Layer::bytes).sum::<usize>()
    }

    /// Type of the attention cache.
    pub fn kv_type(&self) -> KvType {
        self.cache.kv_type
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.cache.clone())
    }

    /// Cache bytes after `context` tokens, without running anything.
    pub fn cache_bytes(&self, context: usize) -> usize {
        self.cache.kv_bytes(context) + self.cache.constant_bytes()
    }

    /// Appends `tokens` to the cached sequence, any number of them. On error the cache is unchanged. No tokens give no logits.
    ///
    /// # Errors
    /// [`ModelError::Token`], [`ModelError::Context`], and [`ModelError::Cache`] for a cache of a model with another shape, plan or cache type.
    pub fn forward(
        &self,
        exec: &Exec,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
    ) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.forward_into(exec, tokens, cache, rows, &mut logits)?;
        Ok(logits)
    }

    /// [`forward`](Self::forward) into a buffer that is reused from call to call.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); `logits` is then empty.
    pub fn forward_into(
        &self,
        exec: &Exec,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        logits.clear();
        self.check_append(tokens, cache)?;
        let mut ws = self.workspace();
        let chunks = tokens.chunks(self.chunk);
        let last = chunks.len().saturating_sub(1);
        for (i, chunk) in chunks.enumerate() {
            self.append(exec, chunk, &[chunk.len()], &mut [&mut *cache], &mut ws, &mut |_, _, _| {});
            let d_model = self.config.d_model;
            let skipped = match rows {
                LogitRows::All => 0,
                LogitRows::Last if i == last => chunk.len() - 1,
                _ => continue,
            };
            self.project_out(exec, skipped * d_model, &mut ws, logits);
        }
        self.give_back(ws);
        Ok(())
    }

    /// Final hidden states after the norm, `[n, d_model]`, of `tokens` appended to the cached sequence; [`logits`](Self::logits) takes any rows of
    /// them.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden(&self, exec: &Exec, tokens: &[u32], cache: &mut Cache) -> Result<Vec<f32>> {
        self.check_append(tokens, cache)?;
        let mut ws = self.workspace();
        let mut hidden = Vec::with_capacity(tokens.len() * self.config.d_model);
        for chunk in tokens.chunks(self.chunk) {
            self.append(exec, chunk, &[chunk.len()], &mut [&mut *cache], &mut ws, &mut |_, _, _| {});
            hidden.extend(self.final_norm(exec, &ws));
        }
        self.give_back(ws);
        Ok(hidden)
    }

    /// `[n, vocab]` logits of final hidden states `[n, d_model]`.
    pub fn logits(&self, exec: &Exec, hidden: &[f32]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.logits_into(exec, hidden, &mut logits);
        logits
    }

    /// [`logits`](Self::logits) into a buffer that is reused from call to call.
    pub fn logits_into(&self, exec: &Exec, hidden: &[f32], logits: &mut Vec<f32>) {
        let mut ws = self.workspace();
        let rows = hidden.len() / self.config.d_model;
        let table = self.table();
        ws.input.set(exec, MatRef::dense(hidden, rows, self.config.d_model), &[table]);
        logits.clear();
        table_product(exec, &ws, table, rows, logits);
        self.give_back(ws);
    }

    /// One decoding step of several sequences: appends `tokens[i]` to the sequence of `caches[i]`, which may have any lengths, and returns the
    /// logits that follow, `[n, vocab]`. Weights are read once for all sequences. Row `i` is what [`forward`](Self::forward) gives for its sequence,
    /// up to the order of sums and, for bf16 weights, the rounding of activations, which depend on the number of rows. On error no cache has
    /// changed. No sequences give no logits.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), for any of the sequences.
    ///
    /// # Panics
    /// When there are not as many tokens as caches.
    pub fn decode_batch(&self, exec: &Exec, tokens: &[u32], caches: &mut [&mut Cache]) -> Result<Vec<f32>> {
        assert_eq!(tokens.len(), caches.len(), "one token for each sequence");
        for (token, cache) in tokens.chunks(1).zip(caches.iter()) {
            self.check_append(token, cache)?;
        }
        let mut logits = Vec::new();
        if !tokens.is_empty() {
            let mut ws = self.workspace();
            let lens = SmallVec::<[usize; 8]>::from_elem(1, tokens.len());
            self.append(exec, tokens, &lens, caches, &mut ws, &mut |_, _, _| {});
            self.project_out(exec, 0, &mut ws, &mut logits);
            self.give_back(ws);
        }
        Ok(logits)
    }

    /// Whole sequences from position 0: calls `show(layer, x, outputs)` after the heads of every layer that is not left out with the layer's input after the norm
    /// `[rows, d_model]` and the head outputs in head order `[rows, heads · head_dim]`, sequence after sequence. Returns the final hidden
    /// states after the norm, `[rows, d_model]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn observe(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        show: &mut dyn FnMut(usize, MatRef<'_>, MatRef<'_>),
    ) -> Result<Vec<f32>> {
        let lens: Vec<usize> = batch.ranges().map(|range| range.len()).filter(|&len| len > 0).collect();
        let mut caches: Vec<Cache> = lens.iter().map(|_| self.new_cache()).collect();
        for (tokens, cache) in batch.iter().filter(|tokens| !tokens.is_empty()).zip(&caches) {
            self.check_append(tokens, cache)?;
        }
        if lens.is_empty() {
            return Ok(Vec::new());
        }
        let mut ws = self.workspace();
        self.append(exec, batch.tokens(), &lens, &mut caches.iter_mut().collect::<Vec<_>>(), &mut ws, show);
        let hidden = self.final_norm(exec, &ws);
        self.give_back(ws);
        Ok(hidden)
    }

    fn check_append(&self, tokens: &[u32], cache: &Cache) -> Result<()> {
        if self.cache != cache.shape {
            return Err(ModelError::Cache("made for a model of another shape, plan or cache type".into()));
        }
        let (vocab, end) = (self.config.vocab, cache.len.saturating_add(tokens.len()));
        if end > self.context_limit {
            return Err(ModelError::Context { requested: end, limit: self.context_limit });
        }
        match tokens.iter().position(|&t| t as usize >= vocab) {
            Some(i) => Err(ModelError::Token { token: tokens[i], position: cache.len + i, vocab }),
            None => Ok(()),
        }
    }

    /// Appends `lens[i]` tokens, at least one, to the sequence of `caches[i]` (`tokens` holds them sequence after sequence); the residual stream
    /// after the last layer is left in `ws.h`. Everything was checked.
    fn append(
        &self,
        exec: &Exec,
        tokens: &[u32],
        lens: &[usize],
        caches: &mut [&mut Cache],
        ws: &mut Workspace,
        show: &mut dyn FnMut(usize, MatRef<'_>, MatRef<'_>),
    ) {
        let d_model = self.config.d_model;
        ws.h.resize(tokens.len() * d_model, 0.0);
        for (&token, row) in tokens.iter().zip(ws.h.chunks_exact_mut(d_model)) {
            self.embed.row_f32(token as usize, row);
        }
        ws.positions.clear();
        ws.starts.clear();
        ws.starts.push(0);
        for (cache, len) in caches.iter().zip(lens) {
            ws.positions.extend(cache.len..cache.len + len);
            ws.starts.push(ws.positions.len());
        }
        ws.rope.set_positions(exec, &ws.positions);
        if tokens.len() > caches.len() {
            let stores = caches.iter_mut().zip(lens).flat_map(|(cache, &rows)| {
                cache.layers.iter_mut().filter_map(move |layer| layer.kv.as_mut().map(|kv| (kv, rows)))
            });
            exec.parallel_items(stores.collect(), |_, (store, rows)| store.reserve(rows));
        }
        // As for kept groups: whoever caches in 16 bits or fewer has these products rounded to bfloat16 as well.
        let precision = match self.cache.kv_type {
            KvType::F32 => Precision::F32,
            _ => exec.fastest_precision(),
        };
        let pass = Pass {
            exec,
            precision,
            config: &self.config,
            head: self.head,
            inv_freq: &self.inv_freq,
            kv_type: self.cache.kv_type,
        };
        for (l, layer) in self.layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            let mut memories: SmallVec<[_; 4]> =
                caches.iter_mut().map(|cache| &mut cache.layers[l]).collect();
            layer.mix(&pass, ws, &mut memories);
            show(
                l,
                ws.input.f32(),
                MatRef::dense(&ws.heads, tokens.len(), self.config.heads * self.config.head_dim),
            );
            layer.finish(&pass, ws);
        }
        for (cache, len) in caches.iter_mut().zip(lens) {
            cache.len += len;
        }
    }

    /// The residual stream after the final norm.
    fn final_norm(&self, exec: &Exec, ws: &Workspace) -> Vec<f32> {
        let mut hidden = vec![0.0; ws.h.len()];
        kernels::elementwise::rms_norm(exec, &ws.h, &self.norm, self.config.rms_eps, &mut hidden);
        hidden
    }

    fn table(&self) -> &Packed {
        self.output.as_ref().unwrap_or(&self.embed)
    }

    /// Appends the logits of `ws.h` from value `start` on.
    fn project_out(&self, exec: &Exec, start: usize, ws: &mut Workspace, logits: &mut Vec<f32>) {
        let (d_model, table) = (self.config.d_model, self.table());
        let rows = (ws.h.len() - start) / d_model;
        let h = MatRef::dense(&ws.h[start..], rows, d_model);
        ws.input.set_rms_norm(exec, h, &self.norm, self.config.rms_eps, &[table]);
        table_product(exec, ws, table, rows, logits);
    }

    fn workspace(&self) -> Workspace {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.pop().unwrap_or_else(|| Workspace::new(&self.inv_freq))
    }

    fn give_back(&self, ws: Workspace) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(ws);
    }
}

/// Appends `ws.input · tableᵀ`.
fn table_product(exec: &Exec, ws: &Workspace, table: &Packed, rows: usize, logits: &mut Vec<f32>) {
    let (vocab, start) = (table.rows(), logits.len());
    logits.resize(start + rows * vocab, 0.0);
    let out = MatMut::dense(&mut logits[start..], rows, vocab);
    matmul(exec, &ws.input, &mut [Product { weight: table, bias: None, out, store: Store::Overwrite }]);
}
