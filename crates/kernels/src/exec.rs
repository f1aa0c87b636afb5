//! The execution context every kernel takes: which instruction set, which threads.

use std::sync::Arc;

use crate::pool::Pool;
use crate::{Isa, IsaLevel, KernelError};

/// How [`mixed_gemm`](crate::mixed_gemm) multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In f32.
    #[default]
    F32,
    /// Factors rounded to bfloat16, sums in f32.
    Bf16,
}

/// Instruction set, precision of large products, and thread pool. Cheap to clone; passed, never global.
///
/// The calling thread takes part in its parallel regions. A pool (shared by the clones) runs one region at a time: a
/// parallel method called inside a task, or while another thread's region runs, does all its work on the thread that
/// called it. A panic in a task is passed on to the caller once the tasks of the region have ended.
#[derive(Clone, Debug)]
pub struct Exec {
    isa: Isa,
    precision: Precision,
    /// `None`: everything runs on the calling thread.
    pool: Option<Arc<Pool>>,
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
            return Ok(Self { isa, precision: Precision::F32, pool: None, threads });
        }
        let pool = Pool::new(threads).map_err(|reason| KernelError::ThreadPool { threads, reason })?;
        Ok(Self { isa, precision: Precision::F32, pool: Some(Arc::new(pool)), threads })
    }
    /// The same with another precision of large products, sharing the pool.
    ///
    /// # Errors
    /// [`KernelError::Precision`] when the instruction set has no products of bfloat16.
    pub fn with_precision(&self, precision: Precision) -> Result<Self, KernelError> {
        if precision == Precision::Bf16 && self.isa.level() < IsaLevel::Avx512Bf16 {
            return Err(KernelError::Precision { isa: self.isa.level().name() });
        }
        Ok(Self { precision, ..self.clone() })
    }
    /// The fastest precision of this instruction set.
    pub fn fastest_precision(&self) -> Precision {
        match self.isa.level() >= IsaLevel::Avx512Bf16 {
            true => Precision::Bf16,
            false => Precision::F32,
        }
    }
    /// This instruction set and precision, calling thread only: for use inside a parallel region.
    pub fn single(&self) -> Self {
        Self { isa: self.isa, precision: self.precision, pool: None, threads: 1 }
    }
    /// Precision of large products.
    pub fn precision(&self) -> Precision {
        self.precision
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
        match &self.pool {
            Some(pool) if n > 1 => pool.run(n, &f),
            _ => (0..n).for_each(f),
        }
    }
    /// Runs `f(i, chunk_i)` over consecutive chunks of `chunk` values (the last may be shorter). Panics when `chunk`
    /// is 0 and `data` is not empty.
    pub fn parallel_chunks<T: Send>(&self, data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        if data.is_empty() {
            return;
        }
        assert!(chunk > 0, "chunks of 0 values");
        let len = data.len();
        let start = SharedPtr(data.as_mut_ptr());
        self.parallel_for(len.div_ceil(chunk), |i| {
            let first = i * chunk;
            // SAFETY: `first < len` as `i < len.div_ceil(chunk)`, and the end is cut to `len`, so the chunk lies in
            // `data`, which this call borrows exclusively until every task has ended; chunks of different `i` do not
            // overlap, and each `i` runs once. `T: Send` lets another thread have them.
            let chunk =
                unsafe { std::slice::from_raw_parts_mut(start.get().add(first), chunk.min(len - first)) };
            f(i, chunk);
        });
    }
    /// Runs `f(i, item_i)` on the pool, handing over each item: the safe way to give every task its own slices.
    pub fn parallel_items<T: Send>(&self, items: Vec<T>, f: impl Fn(usize, T) + Sync) {
        let mut slots: Vec<Option<T>> = items.into_iter().map(Some).collect();
        self.parallel_chunks(&mut slots, 1, |i, slot| {
            // Each slot is visited once.
            if let Some(item) = slot[0].take() {
                f(i, item);
            }
        });
    }
    /// Computes `f(i, item_i)` on the pool, handing over each item, and returns the results in order.
    pub fn parallel_map_items<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        f: impl Fn(usize, T) -> R + Sync,
    ) -> Vec<R> {
        let mut slots: Vec<(Option<T>, Option<R>)> =
            items.into_iter().map(|item| (Some(item), None)).collect();
        self.parallel_chunks(&mut slots, 1, |i, slot| {
            let (item, result) = &mut slot[0];
            *result = item.take().map(|item| f(i, item));
        });
        slots.into_iter().filter_map(|(_, result)| result).collect()
    }
    /// Computes `f(0..n)` on the pool and returns the results in order.
    pub fn parallel_map<R: Send>(&self, n: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let mut results: Vec<Option<R>> = (0..n).map(|_| None).collect();
        self.parallel_chunks(&mut results, 1, |i, result| result[0] = Some(f(i)));
        results.into_iter().flatten().collect()
    }
}

/// The start of a slice whose disjoint parts go to different tasks.
struct SharedPtr<T>(*mut T);

// SAFETY: only `parallel_chunks` makes one, from an exclusive borrow that outlives the tasks; it says why its uses are
// disjoint. `T: Send` because the tasks may run on other threads.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests;
