//! One cache per sequence: per layer the growing keys/values of kept groups and the constant memory of converted groups.

use crate::error::Result;
use crate::mixers::HeadCache;

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
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) len: usize,
}

impl Cache {
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
        todo!()
    }
    /// Bytes that do not.
    pub fn constant_bytes(&self) -> usize {
        todo!()
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
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let _ = len;
        todo!()
    }
}
