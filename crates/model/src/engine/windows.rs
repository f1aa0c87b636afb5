//! Local windows of a layer's converted groups: rotated queries and keys of all of them, and attention of whole chunks.

use super::layer::{Block, Layer, Pass, norm_heads};
use super::workspace::Workspace;
use crate::cache::LayerCache;
use crate::mixers::{self, HeadLayout};
use crate::plan::Dropped;
use kernels::kv::{AttendJob, KvStore, KvType, Window};
use kernels::{MatMut, MatRef};
use smallvec::SmallVec;

/// Rows per task of copies.
const ROWS_PER_TASK: usize = 64;

/// Keys and values that a chunk's windows see, one store per sequence; kept from layer to layer.
#[derive(Debug, Default)]
pub(super) struct WindowStores {
    stores: Vec<KvStore>,
    /// Keys and values on their way between a window and its store.
    held: [Vec<f32>; 2],
}

impl WindowStores {
    /// At least `count` empty stores of this shape, first.
    fn prepare(&mut self, count: usize, kv_type: KvType, kv_heads: usize, head_dim: usize) {
        let fits = |s: &KvStore| (s.kv_type(), s.kv_heads(), s.head_dim()) == (kv_type, kv_heads, head_dim);
        self.stores.sort_by_key(|store| !fits(store));
        let found = self.stores.iter().take_while(|store| fits(store)).count();
        let missing = (found..count).map(|_| KvStore::new(kv_type, kv_heads, head_dim));
        self.stores.splice(0..0, missing);
        self.stores[..count].iter_mut().for_each(KvStore::clear);
    }
}

/// Which columns of a row of [`Workspace::rotated`] are whose: queries of all groups, keys of all groups, values of all groups.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    groups: usize,
    per_group: usize,
    head_dim: usize,
}

impl Columns {
    pub fn new(layout: &HeadLayout, groups: usize) -> Self {
        Self { groups, per_group: layout.d_inner(), head_dim: layout.dims.head_dim }
    }
    /// Of a row.
    pub fn stride(self) -> usize {
        self.v(self.groups)
    }
    /// First column of group `i`'s queries.
    pub fn q(self, i: usize) -> usize {
        i * self.per_group
    }
    /// First column of group `i`'s keys.
    pub fn k(self, i: usize) -> usize {
        self.q(self.groups) + i * self.head_dim
    }
    fn v(self, i: usize) -> usize {
        self.k(self.groups) + i * self.head_dim
    }
}

impl Layer {
    /// Queries and keys of all windows after norm and RoPE, and their values, into `ws.rotated`.
    pub(super) fn rotate_windows(&self, pass: &Pass<'_>, columns: Columns, ws: &mut Workspace) {
        let Pass { exec, config, .. } = *pass;
        let (rows, stride) = (ws.positions.len(), columns.stride());
        ws.rotated.resize(rows * stride, 0.0);
        let projected = &ws.projected;
        let copy = |task: usize, to: &mut [f32]| {
            for (i, group) in self.converted.iter().enumerate() {
                let [.., q, k, v] = group.blocks[..] else { panic!("a window has queries, keys and values") };
                for (block, start) in [(q, columns.q(i)), (k, columns.k(i)), (v, columns.v(i))] {
                    let Block { segment, column, width } = block;
                    let source = self.segments[segment].weight.rows();
                    let from = projected[segment][task * ROWS_PER_TASK * source..].chunks_exact(source);
                    for (to, from) in to.chunks_exact_mut(stride).zip(from) {
                        to[start..start + width].copy_from_slice(&from[column..column + width]);
                    }
                }
            }
        };
        match rows {
            1 => copy(0, &mut ws.rotated),
            _ => exec.parallel_chunks(&mut ws.rotated, ROWS_PER_TASK * stride, copy),
        }
        let (queries, turned) = (columns.q(self.converted.len()), columns.v(0));
        for (norm, start, width) in [(&self.q_norm, 0, queries), (&self.k_norm, queries, turned - queries)] {
            if let Some(norm) = norm {
                let values = &mut ws.rotated[start..];
                norm_heads(exec, values, (rows, width, stride), norm, config.rms_eps, &mut ws.normed);
            }
        }
        ws.rope.rotate(exec, MatMut::new(&mut ws.rotated, rows, turned, stride), config.head_dim);
    }

    /// What the windows of whole chunks see into the groups' columns of `ws.heads`; the chunks' keys and values into the windows. Where dropped tokens
    /// are weighed, log denominators into `ws.window_lse`.
    pub(super) fn attend_windows(
        &self,
        pass: &Pass<'_>,
        layout: &HeadLayout,
        columns: Columns,
        ws: &mut Workspace,
        memories: &mut [&mut LayerCache],
    ) {
        let Pass { exec, config, .. } = *pass;
        let (head_dim, groups, stride) = (config.head_dim, self.converted.len(), columns.stride());
        let width = config.heads * head_dim;
        if layout.spec.dropped == Dropped::Averaged {
            return self.attend_averaged(pass, layout, columns, ws, memories);
        }
        let kv_type = if pass.kv_type == KvType::F32 { KvType::F32 } else { KvType::F16 };
        let WindowStores { stores, held: [keys, values] } = {
            ws.windows.prepare(memories.len(), kv_type, groups, head_dim);
            &mut ws.windows
        };
        let rotated = |s: usize, start: usize, cols: usize| {
            let rows = ws.starts[s]..ws.starts[s + 1];
            MatRef::new(&ws.rotated[rows.start * stride + start..], rows.len(), cols, stride)
        };
        let kv_width = groups * head_dim;
        for (s, (memory, store)) in memories.iter_mut().zip(&mut *stores).enumerate() {
            let caches = || memory.heads.iter().flatten();
            let len = caches().next().expect("a cache for every converted group").window_len();
            for buffer in [&mut *keys, &mut *values] {
                buffer.resize(len * kv_width, 0.0);
            }
            if len > 0 {
                for (i, cache) in caches().enumerate() {
                    let at = i * head_dim;
                    cache.window_into(
                        MatMut::new(&mut keys[at..], len, head_dim, kv_width),
                        MatMut::new(&mut values[at..], len, head_dim, kv_width),
                    );
                }
            }
            store.append(exec, MatRef::dense(keys, len, kv_width), MatRef::dense(values, len, kv_width));
            store.append(exec, rotated(s, columns.k(0), kv_width), rotated(s, columns.v(0), kv_width));
            for (i, cache) in memory.heads.iter_mut().flatten().enumerate() {
                cache.remember(rotated(s, columns.k(i), head_dim), rotated(s, columns.v(i), head_dim));
            }
        }
        let out_columns: SmallVec<[usize; 8]> =
            self.converted.iter().map(|group| group.group * layout.d_inner()).collect();
        let window = Some(Window { tokens: layout.spec.window, sinks: layout.spec.sinks });
        let mut jobs: SmallVec<[AttendJob<'_>; 4]> = SmallVec::new();
        let mut heads = ws.heads.as_mut_slice();
        let lse_width = if layout.weighs() { groups * config.group_size() } else { 0 };
        ws.window_lse.resize(ws.positions.len() * lse_width, 0.0);
        let mut log_denominators = ws.window_lse.as_mut_slice();
        for (s, store) in stores[..memories.len()].iter().enumerate() {
            let seq = ws.starts[s + 1] - ws.starts[s];
            let out = heads.split_off_mut(..seq * width).expect("rows of all sequences");
            let lse = log_denominators.split_off_mut(..seq * lse_width).expect("rows of all sequences");
            jobs.push(AttendJob {
                store,
                q: rotated(s, 0, columns.k(0)),
                out: MatMut::dense(out, seq, width),
                out_columns: &out_columns,
                window,
                lse: layout.weighs().then_some(lse),
            });
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        kernels::kv::attend(exec, config.group_size(), scale, &mut jobs, &mut ws.attend);
    }

    /// [`Layer::attend_windows`] with compensation tokens, a group after another.
    fn attend_averaged(
        &self,
        pass: &Pass<'_>,
        layout: &HeadLayout,
        columns: Columns,
        ws: &mut Workspace,
        memories: &mut [&mut LayerCache],
    ) {
        let (head_dim, per_group, stride) = (pass.config.head_dim, layout.d_inner(), columns.stride());
        let width = pass.config.heads * head_dim;
        for (s, memory) in memories.iter_mut().enumerate() {
            let rows = ws.starts[s]..ws.starts[s + 1];
            let rotated = |start: usize, cols: usize| {
                MatRef::new(&ws.rotated[rows.start * stride + start..], rows.len(), cols, stride)
            };
            let caches = memory.heads.iter_mut().flatten();
            for (i, (group, cache)) in self.converted.iter().zip(caches).enumerate() {
                let env = self.head_env(pass, *layout, group);
                let qkv = [
                    rotated(columns.q(i), per_group),
                    rotated(columns.k(i), head_dim),
                    rotated(columns.v(i), head_dim),
                ];
                let out = &mut ws.heads[rows.start * width + group.group * per_group..];
                let out = MatMut::new(out, rows.len(), per_group, width);
                mixers::attend_projected(pass.exec, &env, qkv, cache, out);
            }
        }
    }
}
