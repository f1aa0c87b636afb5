//! Naive f64 reference of `gemm`.
