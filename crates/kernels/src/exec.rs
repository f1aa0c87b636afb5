//! The execution context every kernel takes: which instruction set, which threads.

use crate::{Isa, KernelError};

/// Instruction set and thread pool. Cheap to clone; passed, never global.
#[derive(Clone)]
pub struct Exec {
    isa: Isa,
    pool: Option<std::sync::Arc<rayon::ThreadPool>>,
    threads: usize,
}

impl Exec {
    /// `threads` compute threads (0: as many as the CPU has) with the best instruction set (or `RECURFORMER_ISA`).
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        let _ = threads;
        todo!()
    }
    /// The same with a given instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self, KernelError> {
        let _ = (threads, isa);
        todo!()
    }
    /// This instruction set, calling thread only: for use inside a parallel region.
    pub fn single(&self) -> Self {
        Self { isa: self.isa, pool: None, threads: 1 }
    }
    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// Number of compute threads.
    pub fn threads(&self) -> usize {
        self.threads
    }
    /// Runs `f(0..n)` on the pool; returns when all are done.
    pub fn parallel_for(&self, n: usize, f: impl Fn(usize) + Sync) {
        let _ = (n, f, &self.pool);
        todo!()
    }
    /// Runs `f(i, chunk_i)` over consecutive chunks of `chunk` values (the last may be shorter).
    pub fn parallel_chunks(&self, data: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let _ = (data, chunk, f);
        todo!()
    }
    /// Computes `f(0..n)` on the pool and returns the results in order.
    pub fn parallel_map<R: Send>(&self, n: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let _ = (n, f);
        todo!()
    }
}
