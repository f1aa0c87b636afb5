//! Products of activations with weights that were repacked once at load: panels of 16 output features.
//! Knows matrices, element types and threads; knows nothing of models and files.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(all(test, target_arch = "x86_64"))]
mod amx_model;
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) use amx_model::Model;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16;
pub(crate) mod buffer;
mod dense;
#[cfg(target_arch = "x86_64")]
mod dense_bf16;
mod dense_f32;
mod dense_lanes;
mod driver;
#[cfg(target_arch = "x86_64")]
pub(crate) mod gated;
mod input;
mod kernel;
mod product;
mod quant;
#[cfg(target_arch = "x86_64")]
mod split;

#[cfg(test)]
mod tests;

use std::fmt;

use crate::quant::{Dtype, dequantize};
use crate::{Exec, IsaLevel, KernelError, MatRef, Trans};
use buffer::{LINE, Lines};

pub use driver::{Product, matmul, matmul_swiglu};
pub use input::Input;
pub use product::{Shared, Uses};
pub(crate) use product::{linear_backward, pays, product, product_with};
#[cfg(target_arch = "x86_64")]
pub(crate) use split::{pays as split_pays, product as split_product};

/// Output features of a panel.
pub(crate) const PANEL: usize = 16;
/// Columns to which dense panels and activations are padded with zeros: one AMX tile, so that no kernel has a tail.
pub(crate) const PAD: usize = 32;
/// Up to this many rows of activations the product reads the packed bytes directly; it is bound by memory.
pub(crate) const MATVEC_ROWS: usize = 4;

/// Below this many values another thread costs more than it gains.
const MIN_PARALLEL_VALUES: usize = 32 * 1024;

/// Why a weight matrix could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The element type stores blocks that do not divide a row.
    #[error(
        "{dtype} stores blocks of {block} values, but rows have {cols}\nhint: keep this matrix in F16 or BF16"
    )]
    Blocks {
        /// Element type.
        dtype: &'static str,
        /// Values per block.
        block: usize,
        /// Values per row.
        cols: usize,
    },
    /// A part's rows have another length than the matrix.
    #[error("part {part} has rows of {found} values, the matrix has {expected}")]
    Cols {
        /// Index of the part.
        part: usize,
        /// Values per row of the matrix.
        expected: usize,
        /// Values per row of the part.
        found: usize,
    },
    /// A part's bytes are no whole number of rows.
    #[error("part {part} has {bytes} bytes, no multiple of its {row_bytes} bytes per row")]
    Bytes {
        /// Index of the part.
        part: usize,
        /// Bytes given.
        bytes: usize,
        /// Bytes of a row.
        row_bytes: usize,
    },
    /// A row was asked for that the part does not have.
    #[error("part {part} has {rows} rows, row {id} was asked for")]
    Row {
        /// Index of the part.
        part: usize,
        /// The row asked for.
        id: usize,
        /// Rows of the part.
        rows: usize,
    },
    /// A value is NaN or infinite, or does not fit the element type.
    #[error(
        "part {part}, row {id}: value {col} is not finite as {dtype}\nhint: the file is damaged, or needs a wider element type"
    )]
    NonFinite {
        /// Index of the part.
        part: usize,
        /// Row of the part.
        id: usize,
        /// Column.
        col: usize,
        /// Element type it was to be stored as.
        dtype: &'static str,
    },
}

/// Stored rows, and which of them in which order.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Element type of `bytes`.
    pub dtype: Dtype,
    /// All rows, one after another, in the stored format.
    pub bytes: &'a [u8],
    /// Values per row.
    pub cols: usize,
    /// The rows to take, in this order.
    pub ids: &'a [u32],
}

/// A weight matrix `[rows = out_features, cols = in_features]` in panels of 16 rows.
pub struct Packed {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// Distance between the starts of two panels, a multiple of the cache line.
    panel_bytes: usize,
    data: Lines,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed {{ {} [{}, {}] }}", self.dtype.name(), self.rows, self.cols)
    }
}

/// Columns after padding.
pub(crate) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(PAD)
}

impl Packed {
    /// The rows of all parts one after another, stored as `dtype`; rows of another type are dequantised and rounded or
    /// quantised one by one. Parts may be empty. Runs in parallel.
    ///
    /// # Errors
    /// [`PackError`] when `cols` is no multiple of a block, a part has other columns or not those rows, or a plain part
    /// (F32, F16, BF16) holds NaN, infinity or a value too large for `dtype`.
    pub fn pack(exec: &Exec, dtype: Dtype, cols: usize, parts: &[Rows<'_>]) -> Result<Packed, KernelError> {
        Ok(pack(exec, dtype, cols, parts)?)
    }
    /// No rows, no memory: for [`set_bf16`](Self::set_bf16).
    pub fn empty() -> Packed {
        Packed { dtype: Dtype::BF16, rows: 0, cols: 0, panel_bytes: 0, data: Lines::default() }
    }
    /// Becomes `op(b)ᵀ` rounded to BF16, for products with `op(b)` `[cols, rows]` on the right; memory only grows. A linear layer's
    /// weight `[out_features, in_features]` is `Trans::Yes`.
    ///
    /// # Panics
    /// On an instruction set without bfloat16.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // Only x86 gets past the assertion.
    pub fn set_bf16(&mut self, exec: &Exec, b: MatRef<'_>, tb: Trans) {
        let (k, n) = tb.shape(b);
        self.reserve_bf16(exec, n, k);
        let panel_bytes = self.panel_bytes;
        let used = panel_bytes / size_of::<u16>() * n.div_ceil(PANEL);
        #[cfg(target_arch = "x86_64")]
        if used > 0 {
            let panels = &mut self.data.as_mut_slice::<u16>()[..used];
            let single = exec.single();
            let exec = if n * k < MIN_PARALLEL_VALUES { &single } else { exec };
            let (stride, together) =
                (panel_bytes / size_of::<u16>(), bf16::together(tb == Trans::No, n, exec.threads()) / PANEL);
            exec.parallel_chunks(panels, together * stride, |task, out| {
                // SAFETY: an `Isa` of this level exists only after detection.
                unsafe { bf16::panels(b, tb, task * together, out, stride) }
            });
        }
    }
    /// Becomes BF16 `[rows, cols]` of open contents.
    fn reserve_bf16(&mut self, exec: &Exec, rows: usize, cols: usize) {
        assert!(exec.isa().level() >= IsaLevel::Avx512Bf16, "{} has no bfloat16", exec.isa());
        let panel_bytes = dense::panel_bytes(Dtype::BF16, cols).next_multiple_of(LINE);
        self.data.grow::<u8>(panel_bytes * rows.div_ceil(PANEL));
        (self.dtype, self.rows, self.cols, self.panel_bytes) = (Dtype::BF16, rows, cols, panel_bytes);
    }
    /// [`set_bf16`](Self::set_bf16) that leaves the writing to the caller: the first panel, and the values between two, `padded(cols) · 16` or more.
    #[cfg(target_arch = "x86_64")]
    fn bf16_out(&mut self, exec: &Exec, rows: usize, cols: usize) -> (*mut u16, usize) {
        self.reserve_bf16(exec, rows, cols);
        (self.data.as_mut_slice().as_mut_ptr(), self.panel_bytes / size_of::<u16>())
    }
    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Element type in memory.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Bytes in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.panel_bytes * self.panels()
    }
    /// Dequantises one row (an embedding lookup).
    ///
    /// # Panics
    /// When there is no such row, or `out` is not one row long.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "one row of {self:?}");
        let panel = self.panel(row / PANEL);
        match self.dtype.is_plain() {
            true => dense::row_f32(self.dtype, panel, row % PANEL, out),
            false => quant::row_f32(self.dtype, self.cols, panel, row % PANEL, out),
        }
    }
    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }
    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }
    /// The bytes of one panel.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        self.panels_at(panel, 1)
    }
    /// The bytes of some panels.
    pub(crate) fn panels_at(&self, first: usize, panels: usize) -> &[u8] {
        &self.data.as_slice::<u8>()[first * self.panel_bytes..][..panels * self.panel_bytes]
    }
}

fn pack(exec: &Exec, dtype: Dtype, cols: usize, parts: &[Rows<'_>]) -> Result<Packed, PackError> {
    let row_bytes = |dtype: Dtype| -> Result<usize, PackError> {
        let (block, bytes) = dtype.block();
        match cols.is_multiple_of(block) {
            true => Ok(cols / block * bytes),
            false => Err(PackError::Blocks { dtype: dtype.name(), block, cols }),
        }
    };
    let target_bytes = row_bytes(dtype)?;
    let mut sources = Vec::with_capacity(parts.iter().map(|part| part.ids.len()).sum());
    for (index, part) in parts.iter().enumerate() {
        if part.ids.is_empty() {
            continue;
        }
        if part.cols != cols {
            return Err(PackError::Cols { part: index, expected: cols, found: part.cols });
        }
        let row_bytes = row_bytes(part.dtype)?;
        if cols > 0 && !part.bytes.len().is_multiple_of(row_bytes) {
            return Err(PackError::Bytes { part: index, bytes: part.bytes.len(), row_bytes });
        }
        for &id in part.ids {
            let id = id as usize;
            let bytes = part.bytes.get(id * row_bytes..(id + 1) * row_bytes).ok_or_else(|| {
                PackError::Row { part: index, id, rows: part.bytes.len() / row_bytes.max(1) }
            })?;
            sources.push(Source { part: index, id, dtype: part.dtype, bytes });
        }
    }
    let rows = sources.len();
    let panel_bytes = match dtype.is_plain() {
        true => dense::panel_bytes(dtype, cols),
        false => quant::panel_bytes(dtype, cols),
    }
    .next_multiple_of(LINE);
    let mut data = Lines::zeroed(panel_bytes * rows.div_ceil(PANEL));
    let panels = if panel_bytes == 0 {
        Vec::new()
    } else {
        data.as_mut_slice::<u8>().chunks_mut(panel_bytes).zip(sources.chunks(PANEL)).collect()
    };
    let results = exec.parallel_map_items(panels, |_, (panel, sources)| {
        let mut values = vec![0.0; cols];
        let mut converted = vec![0u8; target_bytes * sources.len()];
        let mut stored: Vec<&[u8]> = Vec::with_capacity(PANEL);
        for (source, converted) in sources.iter().zip(converted.chunks_exact_mut(target_bytes)) {
            stored.push(source.convert(dtype, &mut values, converted)?);
        }
        match dtype.is_plain() {
            true => dense::pack_panel(dtype, &stored, panel),
            false => quant::pack_panel(dtype, cols, &stored, panel),
        }
        Ok(())
    });
    results.into_iter().collect::<Result<(), PackError>>()?;
    Ok(Packed { dtype, rows, cols, panel_bytes, data })
}

/// One stored row.
struct Source<'a> {
    part: usize,
    id: usize,
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    /// The row stored as `dtype`: as it is, or converted into `converted`.
    fn convert<'b>(
        &self,
        dtype: Dtype,
        values: &mut [f32],
        converted: &'b mut [u8],
    ) -> Result<&'b [u8], PackError>
    where
        'a: 'b,
    {
        let non_finite = |col, dtype: Dtype| PackError::NonFinite {
            part: self.part,
            id: self.id,
            col,
            dtype: dtype.name(),
        };
        if self.dtype.is_plain() {
            dequantize(self.dtype, self.bytes, values);
            if let Some(col) = values.iter().position(|v| !v.is_finite()) {
                return Err(non_finite(col, self.dtype));
            }
        }
        if self.dtype == dtype {
            return Ok(self.bytes);
        }
        if !self.dtype.is_plain() {
            dequantize(self.dtype, self.bytes, values);
        }
        if dtype.is_plain() {
            dense::store_row(dtype, values, converted);
            dequantize(dtype, converted, values);
            if let Some(col) = values.iter().position(|v| !v.is_finite()) {
                return Err(non_finite(col, dtype));
            }
        } else {
            crate::quant::quantize(dtype, values, converted);
        }
        Ok(converted)
    }
}
