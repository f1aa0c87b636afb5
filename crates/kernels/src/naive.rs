//! Naive f64 references of every kernel: the definition the fast paths are tested against.
