//! Pages of cached keys and values: layout, append, fork, truncate. Knows nothing of attention.

use smallvec::{SmallVec, smallvec};
use std::sync::Arc;

use super::KvType;
use super::rounding::{quantize, to_bf16, to_f16};
use crate::isa::dispatch;
use crate::{Exec, MatRef, STACK};

/// Positions of a page.
pub(super) const PAGE: usize = 256;
/// Outputs of a panel: keys of a K block, dims of a V panel.
pub(super) const WIDE: usize = 16;
/// Below this many appended values (K and V) waking another thread costs more than it gains.
const MIN_PARALLEL_VALUES: usize = 32 * 1024;

/// One cache line of a page.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Sizes of a page. Per KV head a slab: K, V, then (Q8) the keys' scales of K and of V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) kind: KvType,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Layout {
    /// 16-dim panels of V.
    pub(super) fn panels(self) -> usize {
        self.head_dim.div_ceil(WIDE)
    }
    /// Bytes of one stored value.
    pub(super) fn value_bytes(self) -> usize {
        match self.kind {
            KvType::F32 => 4,
            KvType::F16 | KvType::Bf16 => 2,
            KvType::Q8 => 1,
        }
    }
    fn k_values(self) -> usize {
        PAGE * self.head_dim
    }
    fn v_values(self) -> usize {
        PAGE * self.panels() * WIDE
    }
    /// Offsets of V and of the scales in a slab, and the slab's size, in bytes.
    fn slab(self) -> (usize, usize, usize) {
        let v = self.k_values() * self.value_bytes();
        let scales = v + self.v_values() * self.value_bytes();
        let scale_bytes = if self.kind == KvType::Q8 { 2 * PAGE * size_of::<f32>() } else { 0 };
        (v, scales, scales + scale_bytes)
    }
    fn page_bytes(self) -> usize {
        self.kv_heads * self.slab().2
    }
    /// Consecutive values of the reduced index that lie side by side.
    fn pair(self) -> usize {
        if self.kind == KvType::F32 { 1 } else { 2 }
    }
    /// Where value `d` of key `key` of a page lies among the slab's K values.
    fn k_index(self, key: usize, d: usize) -> usize {
        let pair = self.pair();
        key / WIDE * (self.head_dim * WIDE) + d / pair * (WIDE * pair) + key % WIDE * pair + d % pair
    }
    /// The same among the slab's V values.
    fn v_index(self, key: usize, d: usize) -> usize {
        let pair = self.pair();
        d / WIDE * (PAGE * WIDE) + key / pair * (WIDE * pair) + d % WIDE * pair + key % pair
    }
}

/// 256 positions of all KV heads.
#[derive(Clone)]
struct Page(Box<[Line]>);

impl Page {
    fn zeroed(layout: Layout) -> Self {
        let lines = Box::new_zeroed_slice(layout.page_bytes() / size_of::<Line>());
        // SAFETY: a line of zero bytes is a valid line.
        Self(unsafe { lines.assume_init() })
    }
    fn bytes(&self) -> &[u8] {
        // SAFETY: lines are plain bytes without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(&*self.0)) }
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: lines are plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), size_of_val(&*self.0)) }
    }
}

/// Plain numbers that any bytes are a valid value of.
///
/// # Safety
/// The type has no padding and no invalid bit pattern.
unsafe trait Plain: Copy + Default {}
// SAFETY: primitive numbers.
unsafe impl Plain for f32 {}
// SAFETY: primitive numbers.
unsafe impl Plain for u16 {}
// SAFETY: primitive numbers.
unsafe impl Plain for i8 {}

/// Aligned bytes as numbers.
fn values<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: `T` is plain by its trait's contract.
    let (head, values, tail) = unsafe { bytes.align_to::<T>() };
    assert!(head.is_empty() && tail.is_empty(), "a slab is not aligned");
    values
}

fn values_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: `T` is plain by its trait's contract.
    let (head, values, tail) = unsafe { bytes.align_to_mut::<T>() };
    assert!(head.is_empty() && tail.is_empty(), "a slab is not aligned");
    values
}

/// One KV head's part of a page.
#[derive(Clone, Copy)]
pub(super) struct Slab<'a> {
    /// Blocks of 16 keys: `[head_dim / pair][16 keys][pair]`.
    pub(super) k: &'a [u8],
    /// Panels of 16 dims: `[256 / pair keys][16 dims][pair]`.
    pub(super) v: &'a [u8],
    /// Scale of each key's K; empty unless Q8.
    pub(super) k_scales: &'a [f32],
    /// Scale of each key's V; empty unless Q8.
    pub(super) v_scales: &'a [f32],
}

/// Keys and values of one attention layer, in pages of 256 positions. A clone is a fork: it shares the pages until
/// either side writes to one.
#[derive(Clone)]
pub struct KvStore {
    layout: Layout,
    pages: Vec<Arc<Page>>,
    len: usize,
}

impl std::fmt::Debug for KvStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvStore").field("layout", &self.layout).field("len", &self.len).finish()
    }
}

impl KvStore {
    /// An empty cache of `kv_heads` heads of `head_dim` values. Panics when `head_dim` is odd or either is 0.
    pub fn new(kv_type: KvType, kv_heads: usize, head_dim: usize) -> Self {
        assert!(
            kv_heads > 0 && head_dim > 0 && head_dim.is_multiple_of(2),
            "kv: {kv_heads} heads of {head_dim}"
        );
        Self { layout: Layout { kind: kv_type, kv_heads, head_dim }, pages: Vec::new(), len: 0 }
    }
    /// Cached positions.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// How values are stored.
    pub fn kv_type(&self) -> KvType {
        self.layout.kind
    }
    /// Number of KV heads.
    pub fn kv_heads(&self) -> usize {
        self.layout.kv_heads
    }
    /// Values per head.
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }
    /// Bytes of the pages held; a page shared with a fork counts in both.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.layout.page_bytes()
    }
    /// Bytes of the pages that `len` positions need.
    pub fn bytes_for(kv_type: KvType, kv_heads: usize, head_dim: usize, len: usize) -> usize {
        len.div_ceil(PAGE) * Layout { kind: kv_type, kv_heads, head_dim }.page_bytes()
    }
    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
    /// One head's part of page `page`.
    pub(super) fn slab(&self, page: usize, kv_head: usize) -> Slab<'_> {
        let (v, scales, size) = self.layout.slab();
        let bytes = &self.pages[page].bytes()[kv_head * size..][..size];
        let (k, rest) = bytes.split_at(v);
        let (v, scales) = rest.split_at(scales - v);
        let scales = values::<f32>(scales);
        let (k_scales, v_scales) = scales.split_at(scales.len() / 2);
        Slab { k, v, k_scales, v_scales }
    }

    /// Makes the pages that `rows` more positions need. Appending does so by itself; fresh memory is slow to get, and several
    /// stores can ask for it at once.
    pub fn reserve(&mut self, rows: usize) {
        while self.pages.len() * PAGE < self.len + rows {
            self.pages.push(Arc::new(Page::zeroed(self.layout)));
        }
    }

    /// Appends `k` and `v` `[t, kv_heads · head_dim]`, keys already rotated. F16 saturates at ±65504; Q8 stores one
    /// scale per key and head. Pages that a fork shares are copied first. Panics when the shapes do not fit.
    pub fn append(&mut self, exec: &Exec, k: MatRef<'_>, v: MatRef<'_>) {
        let Layout { kv_heads, head_dim, .. } = self.layout;
        let (layout, rows, width) = (self.layout, k.rows(), kv_heads * head_dim);
        assert!(v.rows() == rows && k.cols() == width && v.cols() == width, "kv: appended shapes");
        if rows == 0 {
            return;
        }
        let (start, end) = (self.len, self.len + rows);
        self.reserve(rows);
        let (first_page, slab_bytes) = (start / PAGE, layout.slab().2);
        let write = |page: usize, kv_head: usize, slab: &mut [u8]| {
            let from = start.max(page * PAGE);
            let to = end.min((page + 1) * PAGE);
            let (k, v) = (k.rows_at(from - start, to - from), v.rows_at(from - start, to - from));
            let (k, v) = (k.columns(kv_head * head_dim, head_dim), v.columns(kv_head * head_dim, head_dim));
            write_slab(exec, layout, slab, from % PAGE, k, v);
        };
        let pages = self.pages[first_page..end.div_ceil(PAGE)].iter_mut().enumerate();
        if 2 * rows * width < MIN_PARALLEL_VALUES || exec.threads() == 1 {
            for (i, page) in pages {
                let page = Arc::make_mut(page).bytes_mut();
                for (kv_head, slab) in page.chunks_exact_mut(slab_bytes).enumerate() {
                    write(first_page + i, kv_head, slab);
                }
            }
        } else {
            let slabs: Vec<(usize, usize, &mut [u8])> = pages
                .flat_map(|(i, page)| {
                    let slabs = Arc::make_mut(page).bytes_mut().chunks_exact_mut(slab_bytes).enumerate();
                    slabs.map(move |(kv_head, slab)| (first_page + i, kv_head, slab))
                })
                .collect();
            exec.parallel_items(slabs, |_, (page, kv_head, slab)| write(page, kv_head, slab));
        }
        self.len = end;
    }

    /// Forgets every position and keeps the pages for what comes next.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets the positions from `len` on and frees their pages. Panics when fewer are cached.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "kv: truncate to {len} of {}", self.len);
        self.pages.truncate(len.div_ceil(PAGE));
        self.len = len;
    }

    /// The stored key and value of one position and head, as attention sees them. Panics when out of range.
    pub fn read(&self, position: usize, kv_head: usize, k: &mut [f32], v: &mut [f32]) {
        let layout = self.layout;
        assert!(
            position < self.len && kv_head < layout.kv_heads,
            "kv: no position {position}, head {kv_head}"
        );
        assert!(k.len() == layout.head_dim && v.len() == layout.head_dim, "kv: read lengths");
        let (slab, key) = (self.slab(position / PAGE, kv_head), position % PAGE);
        let value = |bytes: &[u8], scales: &[f32], i: usize| match layout.kind {
            KvType::F32 => values::<f32>(bytes)[i],
            KvType::F16 => half::f16::from_bits(values::<u16>(bytes)[i]).to_f32(),
            KvType::Bf16 => half::bf16::from_bits(values::<u16>(bytes)[i]).to_f32(),
            KvType::Q8 => f32::from(values::<i8>(bytes)[i]) * scales[key],
        };
        for (d, (k, v)) in k.iter_mut().zip(v).enumerate() {
            *k = value(slab.k, slab.k_scales, layout.k_index(key, d));
            *v = value(slab.v, slab.v_scales, layout.v_index(key, d));
        }
    }

    /// Pages that both hold.
    #[cfg(test)]
    pub(super) fn shared_pages(&self, other: &Self) -> usize {
        self.pages.iter().zip(&other.pages).filter(|(a, b)| Arc::ptr_eq(a, b)).count()
    }

    /// Overwrites every slot that holds no position with NaN (Q8: NaN scales); copies a shared last page.
    #[cfg(test)]
    pub(super) fn poison(&mut self) {
        let layout = self.layout;
        let (v_at, scales_at, slab_bytes) = layout.slab();
        let used = self.len % PAGE;
        if used == 0 {
            return;
        }
        let Some(page) = self.pages.last_mut() else { return };
        for slab in Arc::make_mut(page).bytes_mut().chunks_exact_mut(slab_bytes) {
            let (k, rest) = slab.split_at_mut(v_at);
            let (v, scales) = rest.split_at_mut(scales_at - v_at);
            for key in used..PAGE {
                for d in 0..layout.panels() * WIDE {
                    let set = |bytes: &mut [u8], i: usize| match layout.kind {
                        KvType::F32 => values_mut::<f32>(bytes)[i] = f32::NAN,
                        KvType::F16 | KvType::Bf16 => values_mut::<u16>(bytes)[i] = 0x7fff,
                        KvType::Q8 => values_mut::<i8>(bytes)[i] = i8::MIN,
                    };
                    set(v, layout.v_index(key, d));
                    if d < layout.head_dim {
                        set(k, layout.k_index(key, d));
                    }
                }
                if layout.kind == KvType::Q8 {
                    let scales = values_mut::<f32>(scales);
                    scales[key] = f32::NAN;
                    scales[PAGE + key] = f32::NAN;
                }
            }
        }
    }
}

/// Writes the keys `first..` of one slab.
fn write_slab(exec: &Exec, layout: Layout, slab: &mut [u8], first: usize, k: MatRef<'_>, v: MatRef<'_>) {
    let (v_at, scales_at, _) = layout.slab();
    let (k_bytes, rest) = slab.split_at_mut(v_at);
    let (v_bytes, scales) = rest.split_at_mut(scales_at - v_at);
    match layout.kind {
        KvType::F32 => dispatch!(exec.isa(), {
            let (k_out, v_out) = (values_mut::<f32>(k_bytes), values_mut::<f32>(v_bytes));
            for t in 0..k.rows() {
                place::<_, 1>(layout, k_out, v_out, first + t, k.row(t), v.row(t));
            }
        }),
        KvType::F16 => dispatch!(exec.isa(), write_converted(layout, k_bytes, v_bytes, first, k, v, to_f16)),
        KvType::Bf16 => {
            dispatch!(exec.isa(), write_converted(layout, k_bytes, v_bytes, first, k, v, to_bf16))
        }
        KvType::Q8 => dispatch!(exec.isa(), {
            let (k_out, v_out) = (values_mut::<i8>(k_bytes), values_mut::<i8>(v_bytes));
            let (k_scales, v_scales) = values_mut::<f32>(scales).split_at_mut(PAGE);
            let mut codes: SmallVec<[i8; 2 * STACK]> = smallvec![0i8; 2 * layout.head_dim];
            let (k_codes, v_codes) = codes.split_at_mut(layout.head_dim);
            for t in 0..k.rows() {
                k_scales[first + t] = quantize(k.row(t), k_codes);
                v_scales[first + t] = quantize(v.row(t), v_codes);
                place::<_, 2>(layout, k_out, v_out, first + t, k_codes, v_codes);
            }
        }),
    }
}

/// Rounds rows to 16 bits and writes them.
#[inline(always)]
fn write_converted(
    layout: Layout,
    k_bytes: &mut [u8],
    v_bytes: &mut [u8],
    first: usize,
    k: MatRef<'_>,
    v: MatRef<'_>,
    convert: impl Fn(f32) -> u16,
) {
    let (k_out, v_out) = (values_mut::<u16>(k_bytes), values_mut::<u16>(v_bytes));
    let mut row: SmallVec<[u16; 2 * STACK]> = smallvec![0u16; 2 * layout.head_dim];
    let (k_row, v_row) = row.split_at_mut(layout.head_dim);
    for t in 0..k.rows() {
        for (out, &x) in k_row.iter_mut().zip(k.row(t)) {
            *out = convert(x);
        }
        for (out, &x) in v_row.iter_mut().zip(v.row(t)) {
            *out = convert(x);
        }
        place::<_, 2>(layout, k_out, v_out, first + t, k_row, v_row);
    }
}

/// Puts one key and value in their places; `PAIR` is the layout's.
#[inline(always)]
fn place<T: Plain, const PAIR: usize>(
    layout: Layout,
    k_out: &mut [T],
    v_out: &mut [T],
    key: usize,
    k: &[T],
    v: &[T],
) {
    let block = &mut k_out[key / WIDE * (layout.head_dim * WIDE)..][..layout.head_dim * WIDE];
    let at = key % WIDE * PAIR;
    for (line, k) in block.chunks_exact_mut(WIDE * PAIR).zip(k.chunks_exact(PAIR)) {
        line[at..at + PAIR].copy_from_slice(k);
    }
    for (panel, v) in v_out.chunks_exact_mut(PAGE * WIDE).zip(v.chunks(WIDE)) {
        let line = &mut panel[key / PAIR * (WIDE * PAIR)..][..WIDE * PAIR];
        for (pair, &v) in line.chunks_exact_mut(PAIR).zip(v) {
            pair[key % PAIR] = v;
        }
    }
}
