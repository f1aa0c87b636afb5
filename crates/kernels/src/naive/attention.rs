//! Naive f64 reference of `attention`.
