//! Instruction sets: detection, the `RECURFORMER_ISA` override, and the list the tests run over.

use crate::KernelError;

/// An instruction set that some kernel is compiled for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, any CPU.
    Scalar,
    /// 128-bit NEON (aarch64 baseline).
    Neon,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// The name used by `RECURFORMER_ISA` and `doctor`.
    pub fn name(self) -> &'static str {
        todo!()
    }
    /// Every instruction set this CPU can run, slowest first; tests run on each of them.
    pub fn available() -> Vec<Isa> {
        todo!()
    }
    /// The best one, or the one `RECURFORMER_ISA` names.
    pub fn detect() -> Result<Isa, KernelError> {
        todo!()
    }
}
