//! Hooks that analysis, alignment and criteria use to look into a pass without changing it.

use kernels::MatRef;

/// What an attention block saw and did in one sequence of a forward pass (all rows of one sequence).
pub struct AttnView<'a> {
    /// Layer index.
    pub layer: usize,
    /// Sequence index within the batch.
    pub sequence: usize,
    /// Block input after the norm, `[seq, d_model]`.
    pub x: MatRef<'a>,
    /// Queries after norm and RoPE in head order, `[seq, heads · head_dim]`; columns of converted groups are meaningless.
    pub q: MatRef<'a>,
    /// Keys after norm and RoPE, `[seq, kv_heads · head_dim]`; likewise.
    pub k: MatRef<'a>,
    /// Values, `[seq, kv_heads · head_dim]`; likewise.
    pub v: MatRef<'a>,
    /// Head outputs before W_O in head order, `[seq, heads · head_dim]`.
    pub out: MatRef<'a>,
}

/// Called during a forward pass, per layer and sequence.
pub trait LayerObserver {
    /// Sees the attention block of one layer.
    fn attention(&mut self, view: AttnView<'_>);
    /// Whether [`attention`](Self::attention) is to be called for `layer`; the pass saves work for layers nobody looks at
    /// (default: always).
    fn wants(&self, layer: usize) -> bool {
        let _ = layer;
        true
    }
    /// Sees the residual stream `[seq, d_model]` that one layer leaves to the next, of every layer (default: looks away).
    fn residual(&mut self, layer: usize, sequence: usize, h: MatRef<'_>) {
        let _ = (layer, sequence, h);
    }
}

/// Called once per layer and sequence during a backward pass, from the last layer to the first.
pub trait GradObserver {
    /// Sees the gradient of the head outputs before W_O, `[seq, heads · head_dim]`.
    fn head_outputs(&mut self, layer: usize, sequence: usize, grad: MatRef<'_>);
}

/// Observes nothing.
pub struct NoObserver;

impl LayerObserver for NoObserver {
    fn attention(&mut self, _: AttnView<'_>) {}
    fn wants(&self, _: usize) -> bool {
        false
    }
}

impl GradObserver for NoObserver {
    fn head_outputs(&mut self, _: usize, _: usize, _: MatRef<'_>) {}
}
