//! Naive f64 reference of `conv`.
