//! Stored bytes of a tensor as they lie in the file, and where each Hugging Face row is among them.
//! Knows element types; converts nothing.

use crate::error::{Result, WeightsError};
use kernels::quant::Dtype;

#[cfg(test)]
mod tests;

/// Where the rows of the Hugging Face tensor lie among the stored ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// Every row at its own place.
    HuggingFace,
    /// llama.cpp's order of the q and k rows of llama models: within each head the rows `(half, j)`, `half` in 0..2 and
    /// `j` in 0..head_dim/2, are stored as `(j, half)` (`LlamaModel.permute` of its converter).
    Interleaved {
        /// Rows per head; even, and a divisor of the number of rows.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that holds Hugging Face row `row`.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::HuggingFace => row,
            Self::Interleaved { head_dim } => {
                let (head, row) = (row / head_dim, row % head_dim);
                let (half, j) = (row / (head_dim / 2), row % (head_dim / 2));
                head * head_dim + 2 * j + half
            }
        }
    }

    /// The Hugging Face row that is stored as row `stored`: the inverse of [`stored_row`](Self::stored_row).
    pub fn hugging_face_row(self, stored: usize) -> usize {
        match self {
            Self::HuggingFace => stored,
            Self::Interleaved { head_dim } => {
                let (head, row) = (stored / head_dim, stored % head_dim);
                head * head_dim + row % 2 * (head_dim / 2) + row / 2
            }
        }
    }
}

/// A tensor's stored bytes, borrowed from the mapped file. Values are not looked at: see [`check_finite`](Self::check_finite).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredTensor<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Product of all dimensions but the last; 1 for a vector.
    pub rows: usize,
    /// Values per row, whole blocks of `dtype`.
    pub cols: usize,
    /// `rows` rows of [`row_bytes`](Self::row_bytes) bytes, in stored order. Not aligned to anything.
    pub bytes: &'a [u8],
    /// Which stored row is which.
    pub row_order: RowOrder,
}

impl<'a> StoredTensor<'a> {
    /// `shape` is row-major; `bytes` were checked to be exactly its size.
    pub(crate) fn new(dtype: Dtype, shape: &[usize], bytes: &'a [u8], row_order: RowOrder) -> Self {
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape[..shape.len().saturating_sub(1)].iter().product();
        Self { dtype, rows, cols, bytes, row_order }
    }

    /// Bytes per row.
    pub fn row_bytes(&self) -> usize {
        let (block, block_bytes) = self.dtype.block();
        self.cols / block * block_bytes
    }

    /// The bytes of Hugging Face row `row`. Panics when there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (at, bytes) = (self.row_order.stored_row(row), self.row_bytes());
        &self.bytes[at * bytes..(at + 1) * bytes]
    }

    /// For every Hugging Face row in order, the stored row that holds it; `0..rows` when nothing is permuted.
    ///
    /// # Panics
    /// When there are more than 2³² rows.
    pub fn row_ids(&self) -> Vec<u32> {
        let rows = u32::try_from(self.rows).expect("rows are bounded by the configuration");
        (0..rows).map(|row| self.row_order.stored_row(row as usize) as u32).collect()
    }

    /// Refuses NaN and infinity: looks at every value of plain types, and at the f16 scales of quantised ones, which decide
    /// (a finite scale times bounded codes is finite in f32). Much cheaper than dequantising; one pass over the bytes.
    ///
    /// # Errors
    /// [`WeightsError::NonFinite`] with `name` and the flat stored index of the value, or of the first of the block.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        match first_not_finite(self.dtype, self.bytes) {
            None => Ok(()),
            Some(index) => Err(WeightsError::NonFinite { name: name.to_string(), index }),
        }
    }
}

/// Index of the first value of `bytes`, whole blocks of `dtype`, that is NaN or infinite, or of the first of its block.
pub(crate) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    match dtype {
        Dtype::F32 => first(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7F80_0000 == 0x7F80_0000),
        Dtype::F16 => first(bytes, half_is_not_finite),
        Dtype::BF16 => first(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
        quantised => {
            let (block, block_bytes) = quantised.block();
            let scales = scale_offsets(quantised);
            let bad = |b: &[u8]| scales.iter().any(|&at| half_is_not_finite([b[at], b[at + 1]]));
            bytes.chunks_exact(block_bytes).position(bad).map(|at| at * block)
        }
    }
}

/// Where a block of `dtype` holds its f16 scales and minima.
fn scale_offsets(dtype: Dtype) -> &'static [usize] {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => &[],
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[0, 2],
        Dtype::Q6K => &[208],
    }
}

fn half_is_not_finite(bytes: [u8; 2]) -> bool {
    u16::from_le_bytes(bytes) & 0x7C00 == 0x7C00
}

/// Index of the first value that is `bad`. Whole pieces are scanned without an exit, which compilers vectorise.
fn first<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const PIECE: usize = 4096;
    let (values, _) = bytes.as_chunks::<N>();
    let piece = values.chunks(PIECE).position(|piece| piece.iter().fold(false, |any, &v| any | bad(v)))?;
    values[piece * PIECE..].iter().position(|&v| bad(v)).map(|at| piece * PIECE + at)
}
