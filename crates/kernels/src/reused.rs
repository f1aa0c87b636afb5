//! Buffers for values that are all written before any is read: a thread keeps those it has done with, so that nobody clears them and
//! they are still in its cache. Knows sizes; knows nothing of what is in them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

/// Values that a thread keeps at most (32 MiB).
const KEPT: usize = 8 << 20;
/// Shorter buffers are not worth a search.
const SHORTEST: usize = 1024;

/// A buffer of open contents: what its last owner left, or NaN, so that who reads before writing is found out.
#[derive(Debug)]
pub struct Reused {
    /// At least `len`.
    values: Vec<f32>,
    len: usize,
}

/// Buffers that nobody owns, the one used last at the back.
#[derive(Default)]
struct Pool {
    buffers: VecDeque<Vec<f32>>,
    values: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

impl Pool {
    /// The last buffer that is long enough, and no more than a quarter too long.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = |buffer: &Vec<f32>| (len..=len + len / 4).contains(&buffer.len());
        let buffer = self.buffers.iter().rposition(fits).and_then(|i| self.buffers.remove(i))?;
        self.values -= buffer.len();
        Some(buffer)
    }

    fn give(&mut self, buffer: Vec<f32>) {
        self.values += buffer.len();
        self.buffers.push_back(buffer);
        while self.values > KEPT {
            let Some(oldest) = self.buffers.pop_front() else { break };
            self.values -= oldest.len();
        }
    }
}

impl Reused {
    /// A buffer of `len` values.
    pub fn new(len: usize) -> Self {
        let kept = if len < SHORTEST { None } else { POOL.with_borrow_mut(|pool| pool.take(len)) };
        Self { values: kept.unwrap_or_else(|| vec![f32::NAN; len]), len }
    }

    /// A buffer of zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(0.0);
        buffer
    }
}

impl Drop for Reused {
    fn drop(&mut self) {
        if self.values.len() >= SHORTEST {
            let values = std::mem::take(&mut self.values);
            // A thread that ends has no pool any more.
            let _ = POOL.try_with(|pool| pool.borrow_mut().give(values));
        }
    }
}

impl Deref for Reused {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Reused {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_to_who_asks_for_its_size() {
        let mut first = Reused::new(5000);
        assert!(first.iter().all(|x| x.is_nan()));
        first.fill(3.0);
        let at = first.as_ptr();
        drop(first);
        let far_too_long = Reused::new(2000);
        assert_ne!(far_too_long.as_ptr(), at);
        let same = Reused::new(4500);
        assert_eq!((same.as_ptr(), same.len()), (at, 4500));
        assert!(same.iter().all(|&x| x == 3.0));
        assert!(Reused::new(5000).iter().all(|x| x.is_nan()), "taken once only");
        drop(same);
        assert!(Reused::zeros(4500).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn a_thread_keeps_no_more_than_its_share() {
        let buffers: Vec<Reused> = (0..5).map(|_| Reused::new(KEPT / 4)).collect();
        drop(buffers);
        POOL.with_borrow(|pool| {
            assert_eq!((pool.buffers.len(), pool.values), (4, KEPT));
        });
        drop(Reused::new(KEPT + 1));
        POOL.with_borrow(|pool| assert!(pool.buffers.is_empty() && pool.values == 0));
    }
}
