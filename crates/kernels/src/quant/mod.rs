//! Element types as stored in checkpoints, and their conversion from and to f32.
//! Knows blocks of bytes; knows no file, no tensor and no matrix.

mod dequant;
mod quantize;
mod quantize_k;
#[cfg(test)]
mod tests;

pub use dequant::dequantize;
pub(crate) use dequant::{half_to_f32, scale_min};
pub use quantize::quantize;

/// Element types as stored.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    /// Every type, plain ones first.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Values per block (1 when not quantised) and bytes per block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// The name used by safetensors and llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// The type of that [`name`](Self::name), in any case.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(name))
    }

    /// Whether values are stored one by one (F32, F16, BF16), as safetensors can hold them.
    pub fn is_plain(self) -> bool {
        self.block().0 == 1
    }

    /// This type, or where its blocks do not divide rows of `cols` values the nearest that can hold them: a K type becomes one of similar size
    /// with blocks of 32, and what no blocks of 32 divide becomes F16.
    pub fn for_row_length(self, cols: usize) -> Self {
        let small = match self {
            Self::Q4K => Self::Q5_0,
            Self::Q5K => Self::Q5_1,
            Self::Q6K => Self::Q8_0,
            other => other,
        };
        match [self, small].into_iter().find(|dtype| cols.is_multiple_of(dtype.block().0)) {
            Some(dtype) => dtype,
            None => Self::F16,
        }
    }
}

/// Values and bytes per block.
///
/// # Panics
/// When `bytes` bytes are not exactly `values` values of `dtype` in whole blocks.
fn check(dtype: Dtype, values: usize, bytes: usize) -> (usize, usize) {
    let (block, block_bytes) = dtype.block();
    assert!(
        values.is_multiple_of(block) && bytes == values / block * block_bytes,
        "{bytes} bytes of {} for {values} values",
        dtype.name(),
    );
    (block, block_bytes)
}
