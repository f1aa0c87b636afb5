//! Which key rows a query row, and a block of query rows, can see.

use std::ops::Range;

use super::{AttnMask, sinks};

/// Key rows per tile.
pub(super) const TILE: usize = 128;
/// Stacked query rows (positions × query heads of the group) per block.
const BLOCK_ROWS: usize = 192;

/// Positions per query block when each KV head has `group` query heads.
pub(super) fn positions_per_block(group: usize) -> usize {
    (BLOCK_ROWS / group).clamp(8, 64)
}

/// The visible keys of one query: two disjoint ranges of key rows, ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Visible {
    /// Sinks that the window has left.
    pub(super) sinks: Range<usize>,
    /// The window.
    pub(super) recent: Range<usize>,
}

impl Visible {
    /// Columns of the tile that starts at key row `start` and has `cols` columns: the sinks, which start at column 0,
    /// and the recent keys after them.
    pub(super) fn in_tile(&self, start: usize, cols: usize) -> [Range<usize>; 2] {
        [&self.sinks, &self.recent].map(|range| {
            let low = range.start.clamp(start, start + cols) - start;
            let high = range.end.clamp(start, start + cols) - start;
            low..high.max(low)
        })
    }
}

impl AttnMask<'_> {
    /// The mask without its sinks, and `true`, where [`sinks`] takes them because they are few; otherwise the mask as it is.
    pub(super) fn without_few_sinks(self) -> (Self, bool) {
        match self {
            Self::Local { q_pos0, kv_pos, window, sinks: 1..=sinks::FEW } => {
                (Self::Local { q_pos0, kv_pos, window, sinks: 0 }, true)
            }
            _ => (self, false),
        }
    }

    /// What query row `i` sees of `kv_len` keys.
    pub(super) fn visible(&self, i: usize, kv_len: usize) -> Visible {
        match *self {
            AttnMask::Causal { q_pos0 } => Visible { sinks: 0..0, recent: 0..(q_pos0 + i + 1).min(kv_len) },
            AttnMask::Local { q_pos0, kv_pos, window, sinks } => {
                let position = q_pos0 + i;
                let end = kv_pos.partition_point(|&r| r <= position);
                let start = kv_pos.partition_point(|&r| r.saturating_add(window) <= position).min(end);
                let left = kv_pos.partition_point(|&r| r < sinks).min(start);
                Visible { sinks: 0..left, recent: start..end }
            }
        }
    }

    /// Tiles that together hold every key that query rows `rows` see, in order: `(first key row, key rows)`.
    pub(super) fn tiles(&self, rows: Range<usize>, kv_len: usize) -> Vec<(usize, usize)> {
        if rows.is_empty() {
            return Vec::new();
        }
        // Both range ends grow with the query's position, so the first and the last row bound all others.
        let (first, last) = (self.visible(rows.start, kv_len), self.visible(rows.end - 1, kv_len));
        let recent = first.recent.start..last.recent.end;
        let sinks = 0..last.sinks.end.min(recent.start);
        let split = |range: Range<usize>| {
            range.clone().step_by(TILE).map(move |start| (start, (range.end - start).min(TILE)))
        };
        split(sinks).chain(split(recent)).collect()
    }
}
