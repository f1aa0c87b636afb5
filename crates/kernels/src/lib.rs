//! Arithmetic of the project: naive references, SIMD kernels, forward and backward, run-time dispatch.
//! Knows slices and shapes; knows nothing of models, files or plans.
//! Matrices are row-major `f32`; an activation is `[seq, features]` of one sequence.

pub mod attention;
pub mod conv;
pub mod elementwise;
pub mod exec;
pub mod gate;
pub mod gated_delta;
pub mod isa;
pub mod kv;
pub mod linear;
pub mod loss;
pub mod mat;
pub mod measure;
pub mod mlp;
pub mod naive;
pub mod optim;
pub mod packed;
pub mod quant;
pub mod rope;
pub mod scan;
pub mod ssd;

pub(crate) mod chunk;
pub(crate) mod simd;

mod gemm;
mod pool;
mod reused;
#[cfg(test)]
mod testing;

pub use exec::{Exec, Precision};
pub use gemm::{Store, Trans, gemm, mixed_gemm};
pub use isa::{Isa, IsaLevel};
pub use mat::{MatMut, MatRef};
pub use reused::Reused;

/// Values of one head that kernels of single tokens keep on the stack; longer heads take an allocation.
const STACK: usize = 256;

/// Why a kernel context could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// `RECURFORMER_ISA` names an instruction set this CPU lacks or nobody knows.
    #[error("instruction set `{requested}` is not available on this CPU (available: {available})")]
    IsaUnavailable {
        /// What was asked for.
        requested: String,
        /// What this CPU can run, comma-separated.
        available: String,
    },
    /// The thread pool could not be started.
    #[error("cannot start {threads} compute threads: {reason}")]
    ThreadPool {
        /// Threads asked for.
        threads: usize,
        /// The operating system's reason.
        reason: String,
    },
    /// bfloat16 was asked for where there are no such products.
    #[error("no products of bfloat16 with instruction set `{isa}`\nhint: use f32")]
    Precision {
        /// The instruction set in use.
        isa: &'static str,
    },
    /// A weight matrix could not be packed.
    #[error(transparent)]
    Pack(#[from] packed::PackError),
}
