//! Aligned buffers of a compute thread, kept between calls; they only grow.

use std::cell::RefCell;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Aligned bytes without a type.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// Room for `n` values of a 4-byte number type, contents open but initialised.
    pub(super) fn words<T: Copy>(&mut self, n: usize) -> *mut T {
        assert!(size_of::<T>() == 4 && align_of::<T>() == 4, "not a word");
        let lines = n.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        self.0.as_mut_ptr().cast()
    }
}

/// What one task needs; see `decode` and `prefill` for the shapes.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) q: Buffer,
    pub(super) scores: Buffer,
    pub(super) p: Buffer,
    pub(super) acc: Buffer,
    pub(super) max: Buffer,
    pub(super) sum: Buffer,
    pub(super) k: Buffer,
    pub(super) v: Buffer,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Runs `f` with this thread's buffers. Must not be nested.
pub(super) fn with<R>(f: impl FnOnce(&mut Buffers) -> R) -> R {
    BUFFERS.with_borrow_mut(f)
}
