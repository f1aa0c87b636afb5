//! Which kernel multiplies a weight on an instruction set for a number of rows, behind one interface for the driver.
//! Knows panels and tiles; knows nothing of threads and outputs.

use super::buffer::{cast, cast_mut};
use super::input::Input;
use super::{MATVEC_ROWS, PANEL, Packed, dense_f32, padded, quant};
#[cfg(target_arch = "x86_64")]
use super::{amx, dense_bf16};
#[cfg(target_arch = "x86_64")]
use crate::IsaLevel;
use crate::quant::Dtype;
use crate::{Isa, Store};

/// Form of the activations that a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Bf16,
    Blocks,
}

impl Form {
    /// Bytes per value.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Blocks => 1,
        }
    }
}

/// Most values of a tile: rows × panels × 16 of any route.
pub(super) const TILE_VALUES: usize = 32 * 4 * PANEL;

/// The kernel for a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Dense panels as packed times f32, few rows.
    Vector(Dtype),
    /// f32 tiles; F16 and BF16 panels are widened first.
    Tile(Dtype),
    /// `vdpbf16ps` tiles on BF16 panels as packed; quantised panels are dequantised to BF16 first.
    #[cfg(target_arch = "x86_64")]
    Bf16(Dtype),
    /// AMX tiles on BF16 panels as packed; quantised panels are dequantised to BF16 first.
    #[cfg(target_arch = "x86_64")]
    Amx(Dtype),
    /// Quantised panels as packed, few rows.
    QuantVector(Dtype),
    /// Quantised panels, expanded.
    QuantTile(Dtype),
}

/// State of the calling thread that a route needs; released when dropped.
#[derive(Default)]
pub(super) struct Prepared {
    #[cfg(target_arch = "x86_64")]
    tiles: Option<amx::Configured>,
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
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn of(isa: Isa, dtype: Dtype, rows: usize) -> Self {
        match dtype {
            _ if dtype.is_plain() && rows <= MATVEC_ROWS => Self::Vector(dtype),
            #[cfg(target_arch = "x86_64")]
            _ if isa.level() >= IsaLevel::Amx
                && rows > MATVEC_ROWS
                && !matches!(dtype, Dtype::F32 | Dtype::F16) =>
            {
                Self::Amx(dtype)
            }
            // Also for quantised weights: activations of 8 bits would cost ten times the divergence and gain a tenth of the time (docs/log).
            #[cfg(target_arch = "x86_64")]
            _ if isa.level() >= IsaLevel::Avx512Bf16
                && rows > MATVEC_ROWS
                && !matches!(dtype, Dtype::F32 | Dtype::F16) =>
            {
                Self::Bf16(dtype)
            }
            _ if dtype.is_plain() => Self::Tile(dtype),
            _ if rows <= MATVEC_ROWS => Self::QuantVector(dtype),
            _ => Self::QuantTile(dtype),
        }
    }
    /// The activations it reads.
    pub(super) fn form(self) -> Form {
        match self {
            Self::Vector(_) | Self::Tile(_) => Form::F32,
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(_) | Self::Amx(_) => Form::Bf16,
            Self::QuantVector(_) | Self::QuantTile(_) => Form::Blocks,
        }
    }
    /// Most rows and panels per call.
    pub(super) fn shape(self, isa: Isa) -> (usize, usize) {
        match self {
            Self::Vector(_) | Self::QuantVector(_) => (MATVEC_ROWS, 1),
            Self::Tile(_) => dense_f32::tile_shape(isa),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(_) => dense_bf16::SHAPE,
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => amx::SHAPE,
            Self::QuantTile(dtype) => quant::tile_shape(isa, dtype),
        }
    }
    /// Bytes of scratch per panel, 0 when it reads panels as packed.
    pub(super) fn expanded_bytes(self, isa: Isa, cols: usize) -> usize {
        match self {
            Self::Tile(Dtype::F16 | Dtype::BF16) => padded(cols) * PANEL * size_of::<f32>(),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(dtype) | Self::Amx(dtype) if dtype != Dtype::BF16 => {
                padded(cols) * PANEL * size_of::<u16>()
            }
            Self::QuantTile(dtype) => quant::expanded_bytes(isa, dtype, cols),
            _ => 0,
        }
    }
    /// What a thread holds while it runs calls of this route.
    pub(super) fn prepare(self) -> Prepared {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => Prepared { tiles: Some(amx::Configured::new()) },
            _ => Prepared::default(),
        }
    }
    /// Unpacks one panel into its scratch.
    pub(super) fn expand(self, isa: Isa, weight: &Packed, panel: usize, scratch: &mut [u8]) {
        let (cols, panel) = (weight.cols(), weight.panel(panel));
        match self {
            Self::Tile(dtype) => dense_f32::widen(isa, dtype, cols, panel, cast_mut(scratch)),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(dtype) | Self::Amx(dtype) => {
                quant::expand_bf16(isa, dtype, cols, panel, cast_mut(scratch))
            }
            Self::QuantTile(dtype) => quant::expand(isa, dtype, cols, panel, scratch),
            _ => unreachable!("{self:?} expands nothing"),
        }
    }
    /// `tile[row][panel][16] = x · weightᵀ` over all columns. `expanded`: the scratch of these panels.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn multiply(
        self,
        prepared: &Prepared,
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
            Self::Vector(dtype) => {
                let (packed, (x, stride)) = (weight.panel(panel), x.f32_rows());
                dense_f32::matvec(isa, dtype, cols, packed, &x[row * stride..], stride, rows, tile);
            }
            Self::Tile(dtype) => {
                let packed = if dtype == Dtype::F32 { weight.panels_at(panel, panels) } else { expanded };
                let (x, stride) = x.f32_rows();
                dense_f32::tile(isa, cols, cast(packed), panels, &x[row * stride..], stride, rows, tile);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(dtype) => {
                let packed = if dtype == Dtype::BF16 { weight.panels_at(panel, panels) } else { expanded };
                let (x, stride) = x.bf16_rows();
                dense_bf16::tile(isa, cols, cast(packed), panels, &x[row * stride..], stride, rows, tile);
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx(dtype) => {
                let tiles = prepared.tiles.as_ref().expect("prepared for this route");
                amx::tile(tiles, amx_operands(dtype, x, weight, expanded, at), tile);
            }
            Self::QuantVector(dtype) => {
                quant::matvec(isa, dtype, cols, weight.panel(panel), x.blocks(), row, rows, tile);
            }
            Self::QuantTile(dtype) => {
                quant::tile(isa, dtype, cols, expanded, panels, x.blocks(), row, rows, tile);
            }
        }
    }
    /// [`multiply`](Self::multiply) of any number of rows straight into those of the output, adding to them or not, as far as the kernel
    /// can: the rows done, from the first on.
    ///
    /// # Safety
    /// `out` has `at.rows` rows, `stride` values apart, of `16 · at.panels` values that are the caller's alone.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // Only x86 has such a kernel.
    pub(super) unsafe fn multiply_into(
        self,
        prepared: &Prepared,
        x: &Input,
        weight: &Packed,
        expanded: &[u8],
        at: TileAt,
        (out, stride, store): (*mut f32, usize, Store),
    ) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(dtype) => {
                let tiles = prepared.tiles.as_ref().expect("prepared for this route");
                let out = amx::Out { first: out, stride, store };
                let at = TileAt { rows: amx::whole(at.rows), ..at };
                // SAFETY: whole tiles of rows; the caller's contract.
                unsafe { amx::tile_into(tiles, amx_operands(dtype, x, weight, expanded, at), out) }
                at.rows
            }
            _ => 0,
        }
    }
}

/// Rows and panels of a block for AMX.
#[cfg(target_arch = "x86_64")]
fn amx_operands<'a>(
    dtype: Dtype,
    x: &'a Input,
    weight: &'a Packed,
    expanded: &'a [u8],
    at: TileAt,
) -> amx::Operands<'a> {
    let TileAt { row, rows, panel, panels } = at;
    let packed = if dtype == Dtype::BF16 { weight.panels_at(panel, panels) } else { expanded };
    let (x, stride) = x.bf16_rows();
    amx::Operands { cols: weight.cols(), weights: cast(packed), panels, x: &x[row * stride..], stride, rows }
}
