//! The KV cache of one attention layer and causal attention over it, for decoding and for prefill.
//! Knows stored types, pages and query groups; knows nothing of models.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attend;
mod buffers;
mod decode;
mod dot;
mod format;
pub(crate) mod lanes;
mod prefill;
mod rounding;
mod store;
#[cfg(test)]
mod tests;

pub use attend::{AttendScratch, attend};
pub use store::KvStore;

use crate::{MatMut, MatRef};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit codes with one f32 scale per key and head.
    Q8,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }
    /// The type of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What a query sees of a store besides itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Last positions, the query's own included; at least 1.
    pub tokens: usize,
    /// First positions, always seen.
    pub sinks: usize,
}

/// One sequence's queries, which are the last `q.rows()` positions of its store.
#[derive(Debug)]
pub struct AttendJob<'a> {
    /// Keys and values, those of the queries' own positions appended.
    pub store: &'a KvStore,
    /// `[t, kv_heads · group_size · head_dim]`, rotated, unscaled; query head `h` reads KV head `h / group_size`.
    pub q: MatRef<'a>,
    /// `[t, …]`; columns that belong to no KV head are left alone.
    pub out: MatMut<'a>,
    /// First output column of each KV head's `group_size · head_dim` outputs.
    pub out_columns: &'a [usize],
    /// Restricts what the queries see; none: every position up to their own.
    pub window: Option<Window>,
    /// Receives the log of each softmax denominator, `[t, kv_heads · group_size]`, where it is wanted.
    pub lse: Option<&'a mut [f32]>,
}
