//! Naive f64 reference of `ssd`.
