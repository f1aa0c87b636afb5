//! Collects what the base's attention blocks saw and did, and hands it on in groups of layers.

use kernels::elementwise::copy;
use kernels::packed::Uses;
use kernels::{Exec, MatRef};
use model::mixers::LayerInput;
use model::{RoundedSequences, TokenBatch};
use std::ops::Range;

/// Inputs and head outputs of one layer for a whole batch.
#[derive(Default)]
pub(super) struct LayerInputs {
    pub layer: usize,
    /// Rows of every sequence.
    ranges: Vec<Range<usize>>,
    d_model: usize,
    width: usize,
    /// `[rows, d_model]`.
    x: Vec<f32>,
    /// `x`, for all groups of the layer.
    shared: RoundedSequences,
    /// `[rows, heads · head_dim]`.
    out: Vec<f32>,
}

impl LayerInputs {
    fn fill(&mut self, exec: &Exec, layer: usize, batch: &TokenBatch, x: MatRef<'_>, out: MatRef<'_>) {
        (self.layer, self.d_model, self.width) = (layer, x.cols(), out.cols());
        copy(exec, x, &mut self.x);
        copy(exec, out, &mut self.out);
        self.ranges = batch.ranges().collect();
        self.shared.set(exec, x, batch, Uses::Both);
    }

    pub fn sequences(&self) -> usize {
        self.ranges.len()
    }

    /// The first of the longest sequences.
    pub fn longest(&self) -> usize {
        (0..self.sequences()).rev().max_by_key(|&s| self.ranges[s].len()).unwrap_or(0)
    }

    /// Layer input of one sequence, `[seq, d_model]`.
    pub fn x(&self, sequence: usize) -> LayerInput<'_> {
        LayerInput {
            values: rows(&self.x, &self.ranges[sequence], self.d_model),
            shared: self.shared.get(sequence),
        }
    }

    /// Head outputs of one sequence, `[seq, heads · head_dim]`.
    pub fn out(&self, sequence: usize) -> MatRef<'_> {
        rows(&self.out, &self.ranges[sequence], self.width)
    }
}

fn rows<'a>(values: &'a [f32], rows: &Range<usize>, width: usize) -> MatRef<'a> {
    MatRef::dense(&values[rows.start * width..rows.end * width], rows.len(), width)
}

/// Copies each layer's inputs and calls `run` when `layers_at_once` layers are there. A layer's few groups would leave threads idle at
/// its end; several layers' groups together keep them busy, for the price of the copies.
pub(super) struct Collector<'f> {
    exec: &'f Exec,
    batch: &'f TokenBatch,
    layers_at_once: usize,
    pending: Vec<LayerInputs>,
    spare: Vec<LayerInputs>,
    run: &'f mut dyn FnMut(&[LayerInputs]),
}

impl<'f> Collector<'f> {
    pub fn new(
        exec: &'f Exec,
        batch: &'f TokenBatch,
        layers_at_once: usize,
        run: &'f mut dyn FnMut(&[LayerInputs]),
    ) -> Self {
        Self { exec, batch, layers_at_once, pending: Vec::new(), spare: Vec::new(), run }
    }

    /// Takes a layer's input and head outputs, all sequences one after another.
    pub fn push(&mut self, layer: usize, x: MatRef<'_>, out: MatRef<'_>) {
        let mut inputs = self.spare.pop().unwrap_or_default();
        inputs.fill(self.exec, layer, self.batch, x, out);
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
