//! The forward pass in bfloat16: keys and values are rounded once into the cache's layout, and the cache's kernel for prompts does the rest.
//! It multiplies the same rounded values as the general pass, many more of them per tile.

use super::{AttnMask, AttnShape};
use crate::kv::{AttendJob, AttendScratch, KvStore, KvType, Window, attend};
use crate::{Exec, MatMut, MatRef, Precision};
use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<AttendScratch> = RefCell::default();
}

/// What the mask leaves of a store whose last positions the queries are; `None` where it cannot be said so.
fn window(mask: AttnMask<'_>, q_len: usize, kv_len: usize) -> Option<Option<Window>> {
    let last = |q_pos0: usize| q_pos0.checked_add(q_len) == Some(kv_len);
    match mask {
        AttnMask::Causal { q_pos0 } => last(q_pos0).then_some(None),
        AttnMask::Local { q_pos0, kv_pos, window, sinks } => {
            // Strictly increasing positions that end with their number less one are all of them.
            let whole = kv_pos.last().is_some_and(|&end| end + 1 == kv_len);
            let window = Window { tokens: window.min(kv_len), sinks: sinks.min(kv_len) };
            (window.tokens > 0 && whole && last(q_pos0)).then_some(Some(window))
        }
    }
}

/// [`super::attention`] where the context multiplies in bfloat16 and the mask is of whole sequences; otherwise gives `out` and `lse` back.
pub(super) fn attention<'o, 'l>(
    exec: &Exec,
    shape: AttnShape,
    mask: AttnMask<'_>,
    [q, k, v]: [MatRef<'_>; 3],
    (out, lse): (MatMut<'o>, Option<&'l mut [f32]>),
) -> Result<(), (MatMut<'o>, Option<&'l mut [f32]>)> {
    let AttnShape { kv_heads, head_dim, scale, .. } = shape;
    let fits = exec.precision() == Precision::Bf16 && head_dim.is_multiple_of(2) && q.rows() > 0;
    let Some(window) = window(mask, q.rows(), k.rows()).filter(|_| fits) else { return Err((out, lse)) };
    let mut store = KvStore::new(KvType::Bf16, kv_heads, head_dim);
    store.append(exec, k, v);
    let out_columns: Vec<usize> = (0..kv_heads).map(|head| head * shape.group() * head_dim).collect();
    let job = AttendJob { store: &store, q, out, out_columns: &out_columns, window, lse };
    SCRATCH.with_borrow_mut(|scratch| attend(exec, shape.group(), scale, &mut [job], scratch));
    Ok(())
}
