//! `heads.json`: reading with checks, writing whole.

use super::HeadsReport;
use crate::error::Result;
use crate::report_file::{self, Checked};
use model::plan::PlanModel;
use std::path::Path;

/// The format version written and accepted.
pub(super) const VERSION: u32 = 1;

impl HeadsReport {
    /// How alike what comes into each layer and what leaves it are, when the file says so of all layers.
    pub fn similarity(&self) -> Option<Vec<f64>> {
        self.layers.iter().map(|layer| layer.similarity).collect()
    }

    /// Reads and checks a `heads.json`.
    ///
    /// # Errors
    /// [`Weights`](crate::SurgeryError::Weights) when it cannot be read, [`File`](crate::SurgeryError::File) when it is malformed, of
    /// another version, or its counts do not fit the model it names.
    pub fn read(path: &Path) -> Result<Self> {
        report_file::read(path, ("heads.json", VERSION), Self::check)
    }

    /// Writes it atomically, as indented JSON.
    ///
    /// # Errors
    /// [`File`](crate::SurgeryError::File) when a value is not finite, [`Weights`](crate::SurgeryError::Weights) when the file cannot be
    /// written.
    pub fn write(&self, path: &Path) -> Result<()> {
        report_file::write(path, self, Self::check)
    }

    fn check(&self) -> Checked {
        let model = &self.model;
        if *model != PlanModel::of(&self.config) {
            return Err(format!("`model` ({model}) and `config` ({}) disagree", PlanModel::of(&self.config)));
        }
        // Bounded sizes: what is computed from them later cannot overflow.
        self.config.validate().map_err(|e| format!("`config`: {e}"))?;
        let outside = |s: &&super::FoundSink| s.layer >= model.layers || s.head >= model.heads;
        if let Some(sink) = self.found_sinks.iter().find(outside) {
            return Err(format!("a sink in layer {} head {}, the model has {model}", sink.layer, sink.head));
        }
        if self.layers.len() != model.layers {
            return Err(format!("{} layers listed, expected {}", self.layers.len(), model.layers));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let found = (layer.heads.len(), layer.groups.len());
            if found != (model.heads, model.kv_heads) {
                return Err(format!(
                    "layer {index} lists {} heads and {} groups, expected {} and {}",
                    found.0, found.1, model.heads, model.kv_heads
                ));
            }
            let stats = layer.heads.iter().chain(layer.groups.iter().map(|g| &g.stats));
            for s in stats {
                let values = [
                    s.recency_ratio_16,
                    s.recency_ratio_64,
                    s.recency_ratio_128,
                    s.sink_mass,
                    s.mean_distance,
                    s.entropy,
                    s.prev_token_mass,
                ];
                if values.iter().chain(&s.mass_by_distance).any(|v| !v.is_finite()) {
                    return Err(format!("layer {index} holds a statistic that is not finite"));
                }
            }
            for (name, scores) in &layer.head_scores {
                if scores.len() != model.heads || scores.iter().any(|score| !score.is_finite()) {
                    return Err(format!(
                        "layer {index}: `{name}` is not a number for each of {} heads",
                        model.heads
                    ));
                }
            }
            for (group, stats) in layer.groups.iter().enumerate() {
                if let Some((name, score)) = stats.scores.iter().find(|(_, score)| !score.is_finite()) {
                    return Err(format!("layer {index} group {group}: score `{name}` is {score}"));
                }
            }
        }
        Ok(())
    }

    /// Records a criterion's numbers `[layer][head]`.
    pub(super) fn set_head_scores(&mut self, name: &str, scores: &[Vec<f64>]) {
        for (layer, scores) in self.layers.iter_mut().zip(scores) {
            layer.head_scores.insert(name.to_string(), scores.clone());
        }
    }

    /// Records the scores `[layer][group]` of a criterion.
    pub(super) fn set_scores(&mut self, name: &str, scores: &[Vec<f64>]) {
        for (layer, scores) in self.layers.iter_mut().zip(scores) {
            for (group, &score) in layer.groups.iter_mut().zip(scores) {
                group.scores.insert(name.to_string(), score);
            }
        }
    }
}
