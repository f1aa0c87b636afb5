//! Naive f64 reference of `loss`.
