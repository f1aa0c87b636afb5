//! Element types as stored in checkpoints, and their conversion from and to f32.
//! Knows blocks of bytes; knows no file, no tensor and no matrix.

mod dequant;

pub use dequant::dequantize;

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

    /// Whether values are stored one by one (F32, F16, BF16), as safetensors can hold them.
    pub fn is_plain(self) -> bool {
        self.block().0 == 1
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
