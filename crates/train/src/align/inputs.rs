//! Collects what the base's attention blocks saw and did, and hands it on in groups of layers.

use kernels::packed::Shared;
use kernels::{Exec, MatRef};
use model::mixers::LayerInput;

/// Inputs and head outputs of one layer for a whole batch.
#[derive(Default)]
pub(super) struct LayerInputs {
    pub layer: usize,
    pub seq_len: usize,
    d_model: usize,
    width: usize,
    /// `[sequences · seq, d_model]`.
    x: Vec<f32>,
    /// Of each sequence's `x`, for all groups of the layer.
    shared: Vec<Option<Shared>>,
    /// `[sequences · seq, heads · head_dim]`.
    out: Vec<f32>,
}

impl LayerInputs {
    fn fill(&mut self, exec: &Exec, layer: usize, seq_len: usize, x: MatRef<'_>, out: MatRef<'_>) {
        (self.layer, self.seq_len, self.d_model, self.width) = (layer, seq_len, x.cols(), out.cols());
        copy(x, &mut self.x);
        copy(out, &mut self.out);
        let sequences = 0..x.rows() / seq_len;
        self.shared = sequences.map(|s| Shared::new(exec, x.rows_at(s * seq_len, seq_len))).collect();
    }

    /// Layer input of one sequence, `[seq, d_model]`.
    pub fn x(&self, sequence: usize) -> LayerInput<'_> {
        let len = self.seq_len * self.d_model;
        let values = &self.x[sequence * len..(sequence + 1) * len];
        LayerInput {
            values: MatRef::dense(values, self.seq_len, self.d_model),
            shared: self.shared[sequence].as_ref(),
        }
    }

    /// Head outputs of one sequence, `[seq, heads · head_dim]`.
    pub fn out(&self, sequence: usize) -> MatRef<'_> {
        let len = self.seq_len * self.width;
        MatRef::dense(&self.out[sequence * len..(sequence + 1) * len], self.seq_len, self.width)
    }
}

fn copy(from: MatRef<'_>, to: &mut Vec<f32>) {
    to.clear();
    (0..from.rows()).for_each(|t| to.extend_from_slice(from.row(t)));
}

/// Copies each layer's inputs and calls `run` when `layers_at_once` layers are there. A layer's few groups would leave threads idle at
/// its end; several layers' groups together keep them busy, for the price of the copies.
pub(super) struct Collector<'f> {
    exec: &'f Exec,
    seq_len: usize,
    layers_at_once: usize,
    pending: Vec<LayerInputs>,
    spare: Vec<LayerInputs>,
    run: &'f mut dyn FnMut(&[LayerInputs]),
}

impl<'f> Collector<'f> {
    pub fn new(
        exec: &'f Exec,
        seq_len: usize,
        layers_at_once: usize,
        run: &'f mut dyn FnMut(&[LayerInputs]),
    ) -> Self {
        Self { exec, seq_len, layers_at_once, pending: Vec::new(), spare: Vec::new(), run }
    }

    /// Takes a layer's input and head outputs, all sequences one after another.
    pub fn push(&mut self, layer: usize, x: MatRef<'_>, out: MatRef<'_>) {
        let mut inputs = self.spare.pop().unwrap_or_default();
        inputs.fill(self.exec, layer, self.seq_len, x, out);
        self.pending.push(inputs);
        if self.pending.len() >= self.layers_at_once {
            self.flush();
        }
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
