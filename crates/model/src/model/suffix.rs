//! What a change of one layer's head outputs does to the end of the model: the layers below are not run again.

use super::Model;
use super::batch::{Forward, LayerTape, Scratch};
use super::tokens::TokenBatch;
use crate::error::Result;
use crate::observe::{LayerObserver, NoObserver};
use kernels::{Exec, MatMut, MatRef, Store, Trans, mixed_gemm};
use std::ops::Range;

/// What [`Model::forward_from`] starts from: `layers · rows · d_model` values of a pass.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Residual stream between attention and MLP of every layer, `[rows, d_model]`; none for an empty batch.
    mid: Vec<Vec<f32>>,
    /// Final normed hidden states, `[rows, d_model]`.
    pub hidden: Vec<f32>,
}

impl Model {
    /// [`forward_batch`](Self::forward_batch) that keeps where [`forward_from`](Self::forward_from) starts.
    ///
    /// # Errors
    /// As `forward_batch`.
    pub fn forward_trace(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        observer: &mut dyn LayerObserver,
    ) -> Result<Trace> {
        self.check_tokens(batch.tokens(), 0, batch.longest())?;
        let mut h = self.embed(batch.tokens());
        let mut trace = Trace { mid: Vec::new(), hidden: Vec::new() };
        if h.is_empty() {
            return Ok(trace);
        }
        let pass = Forward { exec, batch, record: false, gates: None, edits: None };
        let (mut memory, mut scratch) = (LayerTape::default(), Scratch::default());
        for layer in 0..self.config.layers {
            self.attention_block(&pass, layer, &mut h, &mut memory, &mut scratch, observer);
            trace.mid.push(h.clone());
            self.mlp(exec, layer, &mut h, &mut scratch.mlp, &mut memory.mlp);
        }
        self.norm(exec, &h, self.layout.norm, &mut trace.hidden);
        Ok(trace)
    }

    /// Final normed hidden states `[rows, d_model]` of the pass over `batch` that `trace` is from, when `delta` `[rows, columns]` is added to these
    /// columns of the head outputs of `layer`. Only this layer's MLP and the layers above are run. A change of zeros gives the pass's own bits.
    ///
    /// # Panics
    /// When `trace` is of another batch, or `delta` has another size.
    pub fn forward_from(
        &self,
        exec: &Exec,
        batch: &TokenBatch,
        trace: &Trace,
        layer: usize,
        columns: Range<usize>,
        delta: MatRef<'_>,
    ) -> Vec<f32> {
        let (d_model, width) = (self.config.d_model, self.config.heads * self.config.head_dim);
        let size = (batch.rows(), columns.len());
        assert_eq!((delta.rows(), delta.cols()), size, "change of the head outputs");
        let Some(mid) = trace.mid.get(layer) else { return Vec::new() };
        assert_eq!(mid.len(), batch.rows() * d_model, "trace of a batch of {} rows", batch.rows());
        let mut h = mid.clone();
        let out_proj = MatRef::dense(self.params.data(self.layout.layers[layer].o), d_model, width);
        let target = MatMut::dense(&mut h, batch.rows(), d_model);
        let out_proj = out_proj.columns(columns.start, columns.len());
        mixed_gemm(exec, target, delta, Trans::No, out_proj, Trans::Yes, 1.0, Store::Accumulate);
        let pass = Forward { exec, batch, record: false, gates: None, edits: None };
        let (mut memory, mut scratch) = (LayerTape::default(), Scratch::default());
        self.mlp(exec, layer, &mut h, &mut scratch.mlp, &mut memory.mlp);
        for layer in layer + 1..self.config.layers {
            self.attention_block(&pass, layer, &mut h, &mut memory, &mut scratch, &mut NoObserver);
            self.mlp(exec, layer, &mut h, &mut scratch.mlp, &mut memory.mlp);
        }
        let mut hidden = Vec::new();
        self.norm(exec, &h, self.layout.norm, &mut hidden);
        hidden
    }
}
