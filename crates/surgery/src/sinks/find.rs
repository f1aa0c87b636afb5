//! Absorbing positions of every head, in one pass per sequence. Knows the unchanged model; knows nothing of causes.

use super::massive::MassiveSums;
use super::measure::{masses, norm_ratios, strengths, uniform_masses};
use crate::error::Result;
use kernels::{Exec, MatRef};
use model::observe::AttnView;
use model::{LayerObserver, Model, ModelConfig, TokenBatch};

/// Least mean attention of an absorbing position.
pub const MIN_MASS: f64 = 0.2;
/// Least multiple of what uniform attention would give it.
pub const MIN_OVER_UNIFORM: f64 = 10.0;
/// Largest value norm of a waiver, as a share of the median.
pub const MAX_VALUE_RATIO: f64 = 0.5;

/// A position that absorbs attention in one head of one sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Absorbing {
    /// Where.
    pub position: usize,
    /// Mean attention from the queries in `[T/2, T)`.
    pub mass: f64,
    /// Δ, nats above the median key.
    pub strength: f64,
    /// Norm of its value as a share of the median norm.
    pub value_ratio: f64,
}

/// Absorbing positions of one sequence.
pub struct Found {
    /// By layer and query head, positions ascending.
    pub heads: Vec<Vec<Vec<Absorbing>>>,
    /// Final normed hidden states `[T, d_model]`.
    pub hidden: Vec<f32>,
}

impl Found {
    /// Every (layer, head) where `position` absorbs, in order.
    pub fn places(&self, position: usize) -> Vec<(usize, usize, Absorbing)> {
        let mut places = Vec::new();
        for (layer, heads) in self.heads.iter().enumerate() {
            for (head, found) in heads.iter().enumerate() {
                places.extend(found.iter().filter(|a| a.position == position).map(|a| (layer, head, *a)));
            }
        }
        places
    }

    /// Positions that absorb in at least one head, ascending.
    pub fn positions(&self) -> Vec<usize> {
        let mut positions: Vec<usize> =
            self.heads.iter().flatten().flatten().map(|absorbing| absorbing.position).collect();
        positions.sort_unstable();
        positions.dedup();
        positions
    }
}

/// Finds the absorbing positions of a sequence: mean attention from the queries in `[T/2, T)` at least [`MIN_MASS`] and
/// [`MIN_OVER_UNIFORM`] times that of uniform attention. `massive` sees the residual stream on the way.
///
/// # Errors
/// Those of the pass.
pub fn find(
    exec: &Exec,
    model: &Model,
    sequence: &[u32],
    massive: Option<&mut MassiveSums>,
) -> Result<Found> {
    let uniform = uniform_masses(sequence.len());
    let mut finder = Finder { exec, config: &model.config, uniform, heads: Vec::new(), massive };
    let hidden = model.forward_batch(exec, &TokenBatch::one(sequence), &mut finder, None)?;
    Ok(Found { heads: finder.heads, hidden })
}

struct Finder<'a> {
    exec: &'a Exec,
    config: &'a ModelConfig,
    uniform: Vec<f64>,
    heads: Vec<Vec<Vec<Absorbing>>>,
    massive: Option<&'a mut MassiveSums>,
}

impl LayerObserver for Finder<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let (d, group_size) = (self.config.head_dim, self.config.group_size());
        let (single, scale) = (self.exec.single(), 1.0 / (d as f32).sqrt());
        let ratios: Vec<Vec<f64>> =
            (0..self.config.kv_heads).map(|group| norm_ratios(view.v.columns(group * d, d))).collect();
        let heads = self.exec.parallel_map(self.config.heads, |head| {
            let group = head / group_size;
            let (q, k) = (view.q.columns(head * d, d), view.k.columns(group * d, d));
            let masses = masses(&single, q, k, scale);
            let absorbs = |j: &usize| masses[*j] >= MIN_MASS.max(MIN_OVER_UNIFORM * self.uniform[*j]);
            let positions: Vec<usize> = (0..masses.len()).filter(absorbs).collect();
            if positions.is_empty() {
                return Vec::new();
            }
            let strengths = strengths(&single, q, k, scale, &positions);
            let absorbing = positions.iter().zip(strengths).map(|(&position, strength)| Absorbing {
                position,
                mass: masses[position],
                strength,
                value_ratio: ratios[group][position],
            });
            absorbing.collect()
        });
        self.heads.push(heads);
    }

    fn residual(&mut self, layer: usize, _: usize, h: MatRef<'_>) {
        if let Some(massive) = &mut self.massive {
            massive.add(layer, h);
        }
    }
}
