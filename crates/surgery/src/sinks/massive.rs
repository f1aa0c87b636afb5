//! Massive activations: a few dimensions of the residual stream that a few tokens drive to values thousands of times the usual.
//! Source: arXiv 2402.17762.

use super::measure::median;
use kernels::MatRef;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Least magnitude of a massive activation.
pub const MIN_VALUE: f32 = 100.0;
/// Least multiple of the median magnitude of its layer and sequence.
pub const MIN_RATIO: f64 = 1000.0;
/// Dimensions listed of a layer.
const MAX_DIMENSIONS: usize = 8;
/// Places listed of a dimension.
const MAX_PLACES: usize = 64;

/// The residual stream after one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerActivations {
    /// The layer.
    pub layer: usize,
    /// Median magnitude, mean over the sequences.
    pub median: f64,
    /// Dimensions with massive activations, the largest first, at most 8; without any, the one of the largest value.
    pub dimensions: Vec<Dimension>,
}

/// One dimension of the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dimension {
    /// Its index.
    pub dimension: usize,
    /// Largest magnitude.
    pub max: f64,
    /// The same as a multiple of the median magnitude of its sequence.
    pub ratio: f64,
    /// Whether it is massive: at least 100, and at least 1000 times the median.
    pub massive: bool,
    /// Where it is massive, at most 64 `[sequence, position]`; else where it is largest.
    pub places: Vec<(usize, usize)>,
}

impl Dimension {
    /// Its positions over all sequences, each once, ascending.
    pub fn positions(&self) -> Vec<usize> {
        let mut positions: Vec<usize> = self.places.iter().map(|place| place.1).collect();
        positions.sort_unstable();
        positions.dedup();
        positions
    }
}

/// Collects the residual stream of sequence after sequence, each layer once.
pub struct MassiveSums {
    layers: Vec<LayerSums>,
}

#[derive(Clone, Default)]
struct LayerSums {
    sequences: usize,
    medians: f64,
    massive: BTreeMap<usize, Dimension>,
    largest: Option<Dimension>,
}

impl MassiveSums {
    /// Nothing yet, of `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self { layers: vec![LayerSums::default(); layers] }
    }

    /// Adds the next sequence's residual stream `[T, d_model]` after `layer`.
    pub fn add(&mut self, layer: usize, h: MatRef<'_>) {
        let mut magnitudes: Vec<f32> = h.to_dense().iter().map(|x| x.abs()).collect();
        if magnitudes.is_empty() {
            return;
        }
        let median = median(&mut magnitudes);
        let sums = &mut self.layers[layer];
        let sequence = sums.sequences;
        sums.sequences += 1;
        sums.medians += median;
        let limit = f64::from(MIN_VALUE).max(MIN_RATIO * median);
        for t in 0..h.rows() {
            for (dimension, &x) in h.row(t).iter().enumerate() {
                let x = f64::from(x.abs());
                let massive = x >= limit;
                if !massive && sums.largest.as_ref().is_some_and(|largest| largest.max >= x) {
                    continue;
                }
                let places = vec![(sequence, t)];
                let ratio = x / median.max(1e-30);
                let new = Dimension { dimension, max: x, ratio, massive, places };
                if massive {
                    sums.massive.entry(dimension).and_modify(|old| old.join(&new)).or_insert(new);
                } else {
                    sums.largest = Some(new);
                }
            }
        }
    }

    /// All layers.
    pub fn finish(self) -> Vec<LayerActivations> {
        let layers = self.layers.into_iter().enumerate();
        layers
            .map(|(layer, sums)| {
                let mut dimensions: Vec<Dimension> = sums.massive.into_values().collect();
                dimensions.sort_by(|a, b| b.max.total_cmp(&a.max));
                dimensions.truncate(MAX_DIMENSIONS);
                if dimensions.is_empty() {
                    dimensions.extend(sums.largest);
                }
                let median = sums.medians / sums.sequences.max(1) as f64;
                LayerActivations { layer, median, dimensions }
            })
            .collect()
    }
}

impl Dimension {
    fn join(&mut self, new: &Self) {
        if new.max > self.max {
            (self.max, self.ratio) = (new.max, new.ratio);
        }
        if self.places.len() < MAX_PLACES {
            self.places.extend(&new.places);
        }
    }
}
