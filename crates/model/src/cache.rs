//! One cache per sequence: per layer the growing keys/values of kept groups and the constant memory of converted groups.
//! Knows sizes and positions; knows nothing of weights.

use crate::error::{ModelError, Result};
use crate::mixers::{HeadCache, HeadLayout};
use crate::plan::HeadPlan;
use kernels::kv::{KvStore, KvType};
use std::sync::Arc;
use weights::ModelConfig;

/// What a cache must look like to belong to a model: two models with equal shapes have interchangeable caches.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    /// How keys and values of kept groups are stored.
    pub kv_type: KvType,
    /// Values per kept group and token, keys and values each.
    pub head_dim: usize,
    /// Per layer and group: whether it is converted. A layer that is left out has no groups here.
    pub converted: Vec<Vec<bool>>,
    /// Layout of converted groups, when there are any.
    pub layout: Option<HeadLayout>,
}

impl CacheShape {
    pub fn new(config: &ModelConfig, plan: &HeadPlan, layout: Option<HeadLayout>, kv_type: KvType) -> Self {
        let converted = (0..config.layers)
            .map(|l| match plan.is_skipped(l) {
                true => Vec::new(),
                false => (0..config.kv_heads).map(|g| plan.is_converted(l, g)).collect(),
            })
            .collect();
        Self { kv_type, head_dim: config.head_dim, converted, layout }
    }
    /// Bytes that grow with the context, after `len` tokens.
    pub fn kv_bytes(&self, len: usize) -> usize {
        let per_layer = |groups: &Vec<bool>| match groups.iter().filter(|c| !**c).count() {
            0 => 0,
            kept => KvStore::bytes_for(self.kv_type, kept, self.head_dim, len),
        };
        self.converted.iter().map(per_layer).sum()
    }
    /// Bytes that do not grow.
    pub fn constant_bytes(&self) -> usize {
        let converted = self.converted.iter().flatten().filter(|c| **c).count();
        self.layout.as_ref().map_or(0, |layout| converted * layout.cache_bytes(self.kv_type))
    }
}

/// Memory of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerCache {
    /// Keys (after RoPE) and values of kept groups; `None` when all are converted.
    pub kv: Option<KvStore>,
    /// Constant memory per group; `None` for kept groups.
    pub heads: Vec<Option<HeadCache>>,
}

/// All memory of one sequence. Forking is `clone`, which shares full pages of keys and values until either side writes.
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
                kv: match groups.iter().filter(|c| !**c).count() {
                    0 => None,
                    kept => Some(KvStore::new(shape.kv_type, kept, shape.head_dim)),
                },
                heads: groups
                    .iter()
                    .map(|&c| if c { shape.layout.map(|l| l.new_cache_beside(shape.kv_type)) } else { None })
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
        self.layers.iter().filter_map(|l| l.kv.as_ref()).map(KvStore::bytes).sum()
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
        self.layers.iter_mut().filter_map(|l| l.kv.as_mut()).for_each(|kv| kv.truncate(len));
        self.len = len;
        Ok(())
    }
}
