//! Naive f64 reference of `optim`.
