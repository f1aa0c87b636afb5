//! Naive f64 reference of `rope`.
