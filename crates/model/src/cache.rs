//! One cache per sequence: per layer the growing keys/values of kept groups and the constant memory of converted groups.
//! Knows sizes and positions; knows nothing of weights.

use crate::error::{ModelError, Result};
use crate::mixers::{HeadCache, HeadLayout};
use std::sync::Arc;

/// What a cache must look like to belong to a model: two models with equal shapes have interchangeable caches.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    /// Values per kept group and token, keys and values each.
    pub head_dim: usize,
    /// Per layer and group: whether it is converted.
    pub converted: Vec<Vec<bool>>,
    /// Layout of converted groups, when there are any.
    pub layout: Option<HeadLayout>,
}

impl CacheShape {
    /// Kept groups of all layers.
    fn kept(&self) -> usize {
        self.converted.iter().flatten().filter(|c| !**c).count()
    }
    /// Bytes that grow with the context, after `len` tokens.
    pub fn kv_bytes(&self, len: usize) -> usize {
        2 * size_of::<f32>() * self.kept() * self.head_dim * len
    }
    /// Bytes that do not grow.
    pub fn constant_bytes(&self) -> usize {
        let converted = self.converted.iter().flatten().filter(|c| **c).count();
        self.layout.as_ref().map_or(0, |layout| converted * layout.cache_bytes())
    }
}

/// Memory of one layer.
#[derive(Clone, Debug)]
pub struct LayerCache {
    /// Keys of kept groups after RoPE, `[len, kept · head_dim]`.
    pub k: Vec<f32>,
    /// Values of kept groups, `[len, kept · head_dim]`.
    pub v: Vec<f32>,
    /// Constant memory per group; `None` for kept groups.
    pub heads: Vec<Option<HeadCache>>,
}

/// All memory of one sequence. Forking is `clone`.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) shape: Arc<CacheShape>,
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) len: usize,
}

impl Cache {
    pub(crate) fn new(shape: Arc<CacheShape>) -> Self {
        let layers = shape
            .converted
            .iter()
            .map(|groups| LayerCache {
                k: Vec::new(),
                v: Vec::new(),
                heads: groups
                    .iter()
                    .map(|&c| if c { shape.layout.as_ref().map(HeadLayout::new_cache) } else { None })
                    .collect(),
            })
            .collect();
        Self { shape, layers, len: 0 }
    }
    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether no token was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes that grow with the context.
    pub fn kv_bytes(&self) -> usize {
        self.layers.iter().map(|l| size_of_val(l.k.as_slice()) + size_of_val(l.v.as_slice())).sum()
    }
    /// Bytes that do not.
    pub fn constant_bytes(&self) -> usize {
        self.shape.constant_bytes()
    }
    /// Sum of both.
    pub fn bytes(&self) -> usize {
        self.kv_bytes() + self.constant_bytes()
    }
    /// Goes back to `snapshot`, an earlier clone of this cache.
    pub fn restore(&mut self, snapshot: &Cache) {
        self.clone_from(snapshot);
    }
    /// Forgets all tokens from position `len` on. An error when any group is recurrent or local (its memory cannot be
    /// rewound; restore a snapshot instead), except to 0 or to the current length. Nothing changes on error.
    ///
    /// # Errors
    /// [`ModelError::Cache`] as said, and when `len` is beyond the tokens seen.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            return Err(ModelError::Cache(format!("cannot truncate {} tokens to {len}", self.len)));
        }
        if len == self.len {
            return Ok(());
        }
        if len == 0 {
            *self = Self::new(self.shape.clone());
            return Ok(());
        }
        if self.layers.iter().any(|l| l.heads.iter().any(Option::is_some)) {
            return Err(ModelError::Cache(format!(
                "cannot go back from {} tokens to {len}: converted groups keep no history\n\
                 hint: clone the cache at that point and restore the clone",
                self.len
            )));
        }
        for (layer, groups) in self.layers.iter_mut().zip(&self.shape.converted) {
            let width = groups.len() * self.shape.head_dim;
            layer.k.truncate(len * width);
            layer.v.truncate(len * width);
        }
        self.len = len;
        Ok(())
    }
}

/// Appends `rows` to a growing buffer. Growth is by an eighth, not by doubling: a long context's memory is mostly used.
pub(crate) fn append(buffer: &mut Vec<f32>, rows: &[f32]) {
    if buffer.capacity() - buffer.len() < rows.len() {
        buffer.reserve_exact(rows.len().max(buffer.len() / 8));
    }
    buffer.extend_from_slice(rows);
}
