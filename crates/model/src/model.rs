//! The model: configuration, plan and parameters put together, with its forward and backward passes.

use crate::cache::Cache;
use crate::error::Result;
use crate::mixers::HeadTensors;
use crate::observe::{GradObserver, LayerObserver};
use crate::params::{Grads, ParamStore};
use crate::plan::HeadPlan;
use kernels::Exec;
use weights::{Checkpoint, ModelConfig};

/// Equal-length token sequences processed together from position 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// `sequences · seq_len` ids, sequence after sequence.
    pub tokens: Vec<u32>,
}

/// Which logits a cached forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// `[n, vocab]`.
    All,
    /// `[1, vocab]`, of the last token.
    Last,
    /// Empty.
    None,
}

/// Activations that a backward pass needs.
#[derive(Default)]
pub struct Tape {
    _private: (),
}

/// A base or hybrid model.
#[derive(Clone)]
pub struct Model {
    /// Normalised configuration.
    pub config: ModelConfig,
    /// Which group is what.
    pub plan: HeadPlan,
    /// All parameters by name: Hugging Face names, plus `model.layers.{l}.self_attn.recurrent.{g}.{tensor}` for the new tensors of
    /// converted groups. Projections of converted groups stay inside the original `q_proj`… tensors as well.
    pub params: ParamStore,
}

impl Model {
    /// Loads every tensor the plan needs; shapes are checked against the configuration, NaN is an error.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let _ = checkpoint;
        todo!()
    }
    /// The same weights under another plan. `heads(layer, group)` gives the tensors of each converted group (empty list for
    /// training-free local mixers). Untouched parameters are shared.
    pub fn with_plan(&self, plan: HeadPlan, heads: &mut dyn FnMut(usize, usize) -> Result<HeadTensors>) -> Result<Self> {
        let _ = (plan, heads);
        todo!()
    }
    /// The tensors of a converted group, cloned.
    pub fn head_tensors(&self, layer: usize, group: usize) -> Option<HeadTensors> {
        let _ = (layer, group);
        todo!()
    }
    /// An empty cache for this model.
    pub fn new_cache(&self) -> Cache {
        todo!()
    }
    /// Cache bytes after `context` tokens, without running anything.
    pub fn cache_bytes(&self, context: usize) -> usize {
        let _ = context;
        todo!()
    }
    /// Inference: appends `tokens` to the cached sequence (prefill chunk or single step). On error the cache is unchanged.
    pub fn forward(&self, exec: &Exec, tokens: &[u32], cache: &mut Cache, rows: LogitRows) -> Result<Vec<f32>> {
        let _ = (exec, tokens, cache, rows);
        todo!()
    }
    /// Whole sequences from position 0, with observers and, when `tape` is given, everything the backward pass needs. Returns the
    /// final normed hidden states `[sequences · seq_len, d_model]`.
    pub fn forward_batch(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        observer: &mut dyn LayerObserver,
        tape: Option<&mut Tape>,
    ) -> Result<Vec<f32>> {
        let _ = (exec, batch, observer, tape);
        todo!()
    }
    /// `[rows, vocab]` logits of final hidden states.
    pub fn logits(&self, exec: &Exec, hidden: &[f32]) -> Vec<f32> {
        let _ = (exec, hidden);
        todo!()
    }
    /// Backward of [`logits`](Self::logits) for some rows: adds to the output projection's gradient (when trainable) and returns the
    /// gradient of `hidden`.
    pub fn logits_backward(&self, exec: &Exec, hidden: &[f32], dlogits: &[f32], grads: &mut Grads) -> Vec<f32> {
        let _ = (exec, hidden, dlogits, grads);
        todo!()
    }
    /// Backward of [`forward_batch`](Self::forward_batch) from the gradient of the final normed hidden states; adds to `grads`. Stops as
    /// soon as neither a trainable parameter nor (with `observe_all`) an observer needs more.
    pub fn backward(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        tape: &Tape,
        dhidden: &[f32],
        grads: &mut Grads,
        observer: &mut dyn GradObserver,
        observe_all: bool,
    ) {
        let _ = (exec, batch, tape, dhidden, grads, observer, observe_all);
        todo!()
    }
}
