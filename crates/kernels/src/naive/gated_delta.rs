//! Naive f64 reference of `gated_delta`.
