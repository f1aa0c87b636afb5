//! The execution context every kernel takes: which instruction set, which threads.

use std::sync::Arc;

use rayon::prelude::*;

use crate::{Isa, KernelError};

/// Instruction set and thread pool. Cheap to clone; passed, never global. Its parallel methods may be nested.
#[derive(Clone, Debug)]
pub struct Exec {
    isa: Isa,
    /// `None`: everything runs on the calling thread.
    pool: Option<Arc<rayon::ThreadPool>>,
    threads: usize,
}

impl Exec {
    /// `threads` compute threads (0: as many as the CPU has) with the best instruction set (or `RECURFORMER_ISA`).
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        Self::with_isa(threads, Isa::detect()?)
    }
    /// The same with a given instruction set. Fails when the threads cannot be started.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self, KernelError> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        if threads == 1 {
            return Ok(Self { isa, pool: None, threads });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("kernel-{i}"))
            .build()
            .map_err(|error| KernelError::ThreadPool { threads, reason: error.to_string() })?;
        Ok(Self { isa, pool: Some(Arc::new(pool)), threads })
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
    /// Runs `f` inside the pool, so that rayon calls of it use these threads.
    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }
    /// Runs `f(0..n)` on the pool; returns when all are done.
    pub fn parallel_for(&self, n: usize, f: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if n > 1 => pool.install(|| (0..n).into_par_iter().for_each(&f)),
            _ => (0..n).for_each(f),
        }
    }
    /// Runs `f(i, chunk_i)` over consecutive chunks of `chunk` values (the last may be shorter). Panics when `chunk`
    /// is 0 and `data` is not empty.
    pub fn parallel_chunks(&self, data: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        if data.is_empty() {
            return;
        }
        assert!(chunk > 0, "chunks of 0 values");
        match &self.pool {
            Some(pool) if data.len() > chunk => {
                pool.install(|| data.par_chunks_mut(chunk).enumerate().for_each(|(i, chunk)| f(i, chunk)));
            }
            _ => data.chunks_mut(chunk).enumerate().for_each(|(i, chunk)| f(i, chunk)),
        }
    }
    /// Runs `f(i, item_i)` on the pool, handing over each item: the safe way to give every task its own slices.
    pub fn parallel_items<T: Send>(&self, items: Vec<T>, f: impl Fn(usize, T) + Sync) {
        match &self.pool {
            Some(pool) if items.len() > 1 => {
                pool.install(|| items.into_par_iter().enumerate().for_each(|(i, item)| f(i, item)));
            }
            _ => items.into_iter().enumerate().for_each(|(i, item)| f(i, item)),
        }
    }
    /// Computes `f(i, item_i)` on the pool, handing over each item, and returns the results in order.
    pub fn parallel_map_items<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        f: impl Fn(usize, T) -> R + Sync,
    ) -> Vec<R> {
        match &self.pool {
            Some(pool) if items.len() > 1 => {
                pool.install(|| items.into_par_iter().enumerate().map(|(i, item)| f(i, item)).collect())
            }
            _ => items.into_iter().enumerate().map(|(i, item)| f(i, item)).collect(),
        }
    }
    /// Computes `f(0..n)` on the pool and returns the results in order.
    pub fn parallel_map<R: Send>(&self, n: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        match &self.pool {
            Some(pool) if n > 1 => pool.install(|| (0..n).into_par_iter().map(&f).collect()),
            _ => (0..n).map(f).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn loops_visit_everything_once_and_nest() {
        for threads in [0, 1, 2, 3] {
            let exec = Exec::with_isa(threads, Isa::SCALAR).unwrap();
            assert!(exec.threads() >= 1);
            for n in [0, 1, 2, 65] {
                let count = AtomicUsize::new(0);
                exec.parallel_for(n, |_| {
                    exec.parallel_for(3, |_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert_eq!(count.into_inner(), 3 * n);
                assert_eq!(exec.parallel_map(n, |i| i * i), (0..n).map(|i| i * i).collect::<Vec<_>>());
                let items: Vec<usize> = (0..n).collect();
                assert!(exec.parallel_map_items(items, |i, item| i == item).into_iter().all(|same| same));
                let mut data = vec![0.0; n];
                exec.parallel_chunks(&mut data, 7, |i, chunk| chunk.fill(i as f32 + 1.0));
                assert!(data.iter().enumerate().all(|(j, &x)| x == (j / 7) as f32 + 1.0));
                let mut data = vec![0.0; n];
                exec.parallel_items(data.iter_mut().collect(), |i, x| *x = i as f32);
                assert!(data.iter().enumerate().all(|(j, &x)| x == j as f32));
            }
            assert_eq!(exec.single().threads(), 1);
        }
    }
}
