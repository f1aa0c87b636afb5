//! Quantised panels: packing, decoding, products with 8-bit activations.
//! Knows one panel of 16 rows; knows nothing of threads and outputs.

use crate::Isa;
use crate::quant::Dtype;

/// Activations in 8-bit blocks of 32 columns; row `r` starts at `r * stride` (codes) and `r * blocks` (the others).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks<'a> {
    /// `[rows][stride]`.
    pub codes: &'a [i8],
    /// Values per row of `codes` including padding (zeros): a multiple of 64.
    pub stride: usize,
    /// `[rows][blocks]`: value = code · scale.
    pub scales: &'a [f32],
    /// `[rows][blocks]`: sum of the block's codes.
    pub sums: &'a [i32],
    /// Blocks of 32 columns per row.
    pub blocks: usize,
}

/// Bytes of one panel of 16 rows (the driver rounds it up to whole cache lines).
pub(super) fn panel_bytes(_dtype: Dtype, _cols: usize) -> usize {
    todo!()
}

/// Packs up to 16 rows, each in the stored format; missing rows are zeros. `panel` is zeroed and cache-line aligned.
pub(super) fn pack_panel(_dtype: Dtype, _cols: usize, _rows: &[&[u8]], _panel: &mut [u8]) {
    todo!()
}

/// Dequantises one row of a panel, bit for bit as [`dequantize`](crate::quant::dequantize).
pub(super) fn row_f32(_dtype: Dtype, _cols: usize, _panel: &[u8], _row: usize, _out: &mut [f32]) {
    todo!()
}

/// Quantises one row of activations (a multiple of 32 values) into blocks of 32.
pub(super) fn quantize_activations(
    _isa: Isa,
    _x: &[f32],
    _codes: &mut [i8],
    _scales: &mut [f32],
    _sums: &mut [i32],
) {
    todo!()
}

/// `rows` (1 to 4) rows of activations from `row` on, times one packed panel, into `tile` `[rows][16]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn matvec(
    _isa: Isa,
    _dtype: Dtype,
    _cols: usize,
    _panel: &[u8],
    _x: Blocks<'_>,
    _row: usize,
    _rows: usize,
    _tile: &mut [f32],
) {
    todo!()
}

/// Most rows and panels that one call of [`tile`] takes.
pub(super) fn tile_shape(_isa: Isa, _dtype: Dtype) -> (usize, usize) {
    todo!()
}

/// Bytes of one panel after [`expand`], a multiple of 64.
pub(super) fn expanded_bytes(_isa: Isa, _dtype: Dtype, _cols: usize) -> usize {
    todo!()
}

/// Unpacks a panel once for all row tiles of a task, in whatever layout [`tile`] likes. `scratch` is cache-line aligned
/// and holds garbage.
pub(super) fn expand(_isa: Isa, _dtype: Dtype, _cols: usize, _panel: &[u8], _scratch: &mut [u8]) {
    todo!()
}

/// `rows` rows of activations from `row` on, times `panels` expanded panels lying one after another, into `tile`
/// `[rows][panels][16]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn tile(
    _isa: Isa,
    _dtype: Dtype,
    _cols: usize,
    _expanded: &[u8],
    _panels: usize,
    _x: Blocks<'_>,
    _row: usize,
    _rows: usize,
    _tile: &mut [f32],
) {
    todo!()
}

/// Dequantises a panel to a dense bf16 panel `[padded cols / 2][16][2]` for AMX. `scratch` holds garbage; the padding
/// columns must become zeros.
pub(super) fn expand_bf16(_isa: Isa, _dtype: Dtype, _cols: usize, _panel: &[u8], _scratch: &mut [u16]) {
    todo!()
}

/// Quantises a row of f32 values into the stored format.
pub(super) fn quantize_row(_dtype: Dtype, _values: &[f32], _stored: &mut [u8]) {
    todo!()
}
