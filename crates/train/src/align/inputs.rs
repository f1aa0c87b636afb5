//! Collects what the base's attention blocks saw and did, and hands it on in groups of layers.

use kernels::MatRef;
use model::LayerObserver;
use model::observe::AttnView;

/// Inputs and head outputs of one layer for a whole batch.
#[derive(Default)]
pub(super) struct LayerInputs {
    pub layer: usize,
    pub seq_len: usize,
    d_model: usize,
    width: usize,
    /// `[sequences · seq, d_model]`.
    x: Vec<f32>,
    /// `[sequences · seq, heads · head_dim]`.
    out: Vec<f32>,
}

impl LayerInputs {
    fn clear(&mut self, view: &AttnView<'_>) {
        self.layer = view.layer;
        (self.seq_len, self.d_model, self.width) = (view.x.rows(), view.x.cols(), view.out.cols());
        self.x.clear();
        self.out.clear();
    }

    fn push(&mut self, view: &AttnView<'_>) {
        for t in 0..view.x.rows() {
            self.x.extend_from_slice(view.x.row(t));
            self.out.extend_from_slice(view.out.row(t));
        }
    }

    /// Layer input of one sequence, `[seq, d_model]`.
    pub fn x(&self, sequence: usize) -> MatRef<'_> {
        let len = self.seq_len * self.d_model;
        MatRef::dense(&self.x[sequence * len..(sequence + 1) * len], self.seq_len, self.d_model)
    }

    /// Head outputs of one sequence, `[seq, heads · head_dim]`.
    pub fn out(&self, sequence: usize) -> MatRef<'_> {
        let len = self.seq_len * self.width;
        MatRef::dense(&self.out[sequence * len..(sequence + 1) * len], self.seq_len, self.width)
    }
}

/// Copies each layer's inputs and calls `run` when `layers_at_once` layers are there. A layer's few groups would leave threads idle at
/// its end; several layers' groups together keep them busy, for the price of the copies.
pub(super) struct Collector<'f> {
    sequences: usize,
    layers: usize,
    layers_at_once: usize,
    pending: Vec<LayerInputs>,
    spare: Vec<LayerInputs>,
    run: &'f mut dyn FnMut(&[LayerInputs]),
}

impl<'f> Collector<'f> {
    pub fn new(
        layers: usize,
        sequences: usize,
        layers_at_once: usize,
        run: &'f mut dyn FnMut(&[LayerInputs]),
    ) -> Self {
        Self { sequences, layers, layers_at_once, pending: Vec::new(), spare: Vec::new(), run }
    }

    /// Runs what is left after the pass.
    pub fn finish(mut self) {
        self.flush();
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            (self.run)(&self.pending);
            self.spare.append(&mut self.pending);
        }
    }
}

impl LayerObserver for Collector<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        if view.sequence == 0 {
            let mut inputs = self.spare.pop().unwrap_or_default();
            inputs.clear(&view);
            self.pending.push(inputs);
        }
        if let Some(inputs) = self.pending.last_mut() {
            assert_eq!(inputs.layer, view.layer, "sequences of a layer come one after the other");
            inputs.push(&view);
        }
        if view.sequence + 1 == self.sequences && self.pending.len() >= self.layers_at_once {
            self.flush();
        }
    }

    fn last_layer(&self) -> Option<usize> {
        self.layers.checked_sub(1)
    }
}
