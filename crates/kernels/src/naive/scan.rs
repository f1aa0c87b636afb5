//! Naive f64 reference of `scan`.
