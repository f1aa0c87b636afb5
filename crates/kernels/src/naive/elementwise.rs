//! Naive f64 reference of `elementwise`.
