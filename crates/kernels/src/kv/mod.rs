//! The KV cache of one attention layer and causal attention over it, for decoding and for prefill.
//! Knows stored types, pages and query groups; knows nothing of models.

mod store;
#[cfg(test)]
mod tests;

pub use store::KvStore;

use crate::{Exec, MatMut, MatRef};

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
}

/// Buffers of [`attend`], kept between calls; they only grow.
#[derive(Debug, Default)]
pub struct AttendScratch {}

impl AttendScratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Causal attention of every job: `out[i, h] = Σ_j softmax_j(scale · q[i,h]·k[j]) v[j]` over the store's positions up
/// to the query's own. The result depends neither on the number of threads nor on the other jobs. Panics when shapes do
/// not fit. Source: arXiv 2205.14135.
pub fn attend(
    exec: &Exec,
    group_size: usize,
    scale: f32,
    jobs: &mut [AttendJob<'_>],
    scratch: &mut AttendScratch,
) {
    let _ = (exec, scratch);
    for job in jobs {
        let (kv_heads, head_dim) = (job.store.kv_heads(), job.store.head_dim());
        let (t, len) = (job.q.rows(), job.store.len());
        assert!(t <= len && job.out.rows() == t, "attend: rows");
        assert_eq!(job.q.cols(), kv_heads * group_size * head_dim, "attend: q columns");
        assert_eq!(job.out_columns.len(), kv_heads, "attend: out columns");
        let (mut k, mut v) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        for kv_head in 0..kv_heads {
            for h in 0..group_size {
                for i in 0..t {
                    let q = &job.q.row(i)[(kv_head * group_size + h) * head_dim..][..head_dim];
                    let (mut max, mut sum, mut acc) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; head_dim]);
                    for j in 0..=len - t + i {
                        job.store.read(j, kv_head, &mut k, &mut v);
                        let score: f32 = q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>() * scale;
                        let next = max.max(score);
                        let (keep, p) = ((max - next).exp(), (score - next).exp());
                        max = next;
                        sum = sum * keep + p;
                        acc.iter_mut().zip(&v).for_each(|(acc, v)| *acc = *acc * keep + p * v);
                    }
                    let out = &mut job.out.row_mut(i)[job.out_columns[kv_head] + h * head_dim..][..head_dim];
                    out.iter_mut().zip(&acc).for_each(|(out, acc)| *out = acc / sum);
                }
            }
        }
    }
}
