//! Panels of F32, F16 and BF16 weights: layout, conversion, and the products that every CPU runs.
//! Knows one panel of 16 rows; knows nothing of threads and outputs.

use half::{bf16, f16};

use super::{PANEL, padded};
use crate::quant::Dtype;

/// Bytes of a panel: F32 `[cols][16]`, F16 and BF16 `[cols / 2][16][2]`, columns padded.
pub(super) fn panel_bytes(dtype: Dtype, cols: usize) -> usize {
    padded(cols) * PANEL * dtype.block().1
}

/// Where the value of (`row`, `col`) starts in a panel, in bytes.
fn offset(dtype: Dtype, row: usize, col: usize) -> usize {
    match dtype {
        Dtype::F32 => (col * PANEL + row) * 4,
        _ => ((col / 2 * PANEL + row) * 2 + col % 2) * 2,
    }
}

/// Interleaves up to 16 stored rows into a zeroed panel.
pub(super) fn pack_panel(dtype: Dtype, rows: &[&[u8]], panel: &mut [u8]) {
    let width = dtype.block().1;
    for (row, bytes) in rows.iter().enumerate() {
        for (col, value) in bytes.chunks_exact(width).enumerate() {
            panel[offset(dtype, row, col)..][..width].copy_from_slice(value);
        }
    }
}

/// The values of one row of a panel.
pub(super) fn row_f32(dtype: Dtype, panel: &[u8], row: usize, out: &mut [f32]) {
    let bytes = |col| &panel[offset(dtype, row, col)..];
    for (col, out) in out.iter_mut().enumerate() {
        *out = match (dtype, bytes(col)) {
            (Dtype::F32, &[a, b, c, d, ..]) => f32::from_le_bytes([a, b, c, d]),
            (Dtype::F16, &[a, b, ..]) => f16::from_le_bytes([a, b]).to_f32(),
            (Dtype::BF16, &[a, b, ..]) => bf16::from_le_bytes([a, b]).to_f32(),
            (dtype, _) => unreachable!("{} is no dense panel of this size", dtype.name()),
        };
    }
}

/// Rounds a row to a plain type, to nearest even, in the stored format.
pub(super) fn store_row(dtype: Dtype, values: &[f32], stored: &mut [u8]) {
    for (stored, &value) in stored.chunks_exact_mut(dtype.block().1).zip(values) {
        match dtype {
            Dtype::F32 => stored.copy_from_slice(&value.to_le_bytes()),
            Dtype::F16 => stored.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => stored.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => unreachable!("{} is not plain", dtype.name()),
        }
    }
}
