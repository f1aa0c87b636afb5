//! Which kernel multiplies a weight on an instruction set for a number of rows, behind one interface for the driver.
//! Knows panels and tiles; knows nothing of threads and outputs.

use super::input::Input;
use super::{MATVEC_ROWS, PANEL, Packed, dense, quant};
use crate::Isa;
use crate::quant::Dtype;

/// Form of the activations that a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    Bf16,
    Blocks,
}

/// Most values of a tile: rows × panels × 16 of any route.
pub(super) const TILE_VALUES: usize = 32 * 4 * PANEL;

/// The kernel for a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Plain Rust.
    Portable(Dtype),
    /// Quantised panels as packed, few rows.
    QuantVector(Dtype),
    /// Quantised panels, expanded.
    QuantTile(Dtype),
}

/// Rows and panels that one call multiplies.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileAt {
    /// First row of activations.
    pub row: usize,
    /// Rows, at most the shape's.
    pub rows: usize,
    /// First panel.
    pub panel: usize,
    /// Panels, at most the shape's.
    pub panels: usize,
}

impl Route {
    /// The kernel of this element type for `rows` rows of activations.
    pub(super) fn of(_isa: Isa, dtype: Dtype, rows: usize) -> Self {
        match dtype.is_plain() {
            true => Self::Portable(dtype),
            false if rows <= MATVEC_ROWS => Self::QuantVector(dtype),
            false => Self::QuantTile(dtype),
        }
    }
    /// The activations it reads.
    pub(super) fn form(self) -> Form {
        match self {
            Self::Portable(_) => Form::F32,
            Self::QuantVector(_) | Self::QuantTile(_) => Form::Blocks,
        }
    }
    /// Most rows and panels per call.
    pub(super) fn shape(self, isa: Isa) -> (usize, usize) {
        match self {
            Self::Portable(_) => (4, 1),
            Self::QuantVector(_) => (MATVEC_ROWS, 1),
            Self::QuantTile(dtype) => quant::tile_shape(isa, dtype),
        }
    }
    /// Bytes of scratch per panel, 0 when it reads panels as packed.
    pub(super) fn expanded_bytes(self, isa: Isa, cols: usize) -> usize {
        match self {
            Self::QuantTile(dtype) => quant::expanded_bytes(isa, dtype, cols),
            _ => 0,
        }
    }
    /// Unpacks one panel into its scratch.
    pub(super) fn expand(self, isa: Isa, weight: &Packed, panel: usize, scratch: &mut [u8]) {
        match self {
            Self::QuantTile(dtype) => quant::expand(isa, dtype, weight.cols(), weight.panel(panel), scratch),
            _ => unreachable!("{self:?} expands nothing"),
        }
    }
    /// `tile[row][panel][16] = x · weightᵀ` over all columns. `expanded`: the scratch of these panels.
    pub(super) fn multiply(
        self,
        isa: Isa,
        x: &Input,
        weight: &Packed,
        expanded: &[u8],
        at: TileAt,
        tile: &mut [f32],
    ) {
        let TileAt { row, rows, panel, panels } = at;
        let cols = weight.cols();
        match self {
            Self::Portable(dtype) => {
                let (x, stride) = x.f32_rows();
                dense::multiply(
                    dtype,
                    weight.panel(panel),
                    &x[row * stride..],
                    stride,
                    cols,
                    rows,
                    tile,
                    PANEL,
                );
            }
            Self::QuantVector(dtype) => {
                quant::matvec(isa, dtype, cols, weight.panel(panel), x.blocks(), row, rows, tile);
            }
            Self::QuantTile(dtype) => {
                quant::tile(isa, dtype, cols, expanded, panels, x.blocks(), row, rows, tile);
            }
        }
    }
}
