//! Naive f64 references of every kernel: the definition the fast paths are tested against.

pub mod attention;
pub mod conv;
pub mod elementwise;
pub mod gate;
pub mod gated_delta;
pub mod gemm;
pub mod kv;
pub mod loss;
pub mod optim;
pub mod packed;
pub mod rope;
pub mod scan;
pub mod ssd;
