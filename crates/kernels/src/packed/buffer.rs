//! Bytes aligned to cache lines, seen as the element type that a panel or an activation holds.
//! Knows alignment; knows no layout.

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; LINE]);

/// Bytes of a cache line, to which panels and rows of activations are aligned.
pub(crate) const LINE: usize = 64;

/// A buffer that starts on a cache line and whose length is a whole number of them.
#[derive(Default)]
pub(crate) struct Lines(Vec<Line>);

/// Types of which every bit pattern is a value and that have no padding.
///
/// # Safety
/// Only such types may implement it, with an alignment of at most [`LINE`].
pub(crate) unsafe trait Element: Copy {}
// SAFETY: plain integers and floats.
unsafe impl Element for u8 {}
// SAFETY: as above.
unsafe impl Element for i8 {}
// SAFETY: as above.
unsafe impl Element for u16 {}
// SAFETY: as above.
unsafe impl Element for i32 {}
// SAFETY: as above.
unsafe impl Element for f32 {}

impl Lines {
    /// At least `bytes` zero bytes.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        Self(vec![Line([0; LINE]); bytes.div_ceil(LINE)])
    }
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.0.len() * LINE
    }
    /// Makes room for at least `count` values; never shrinks, content is kept, new bytes are zero.
    pub(crate) fn grow<T: Element>(&mut self, count: usize) {
        let lines = (count * size_of::<T>()).div_ceil(LINE);
        if lines > self.0.len() {
            self.0.resize(lines, Line([0; LINE]));
        }
    }
    /// Everything as values of `T`.
    pub(crate) fn as_slice<T: Element>(&self) -> &[T] {
        // SAFETY: `Line`s are initialised bytes without padding, any bit pattern is a `T`, alignment 64 suffices.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.bytes() / size_of::<T>()) }
    }
    /// Everything as mutable values of `T`.
    pub(crate) fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.bytes() / size_of::<T>()) }
    }
}

/// Bytes of a [`Lines`] as values of `T`. Panics when they do not start on one.
pub(crate) fn cast<T: Element>(bytes: &[u8]) -> &[T] {
    let start = bytes.as_ptr().cast::<T>();
    assert!(start.is_aligned(), "unaligned panel");
    // SAFETY: initialised bytes, any pattern is a `T`, aligned by the assertion.
    unsafe { std::slice::from_raw_parts(start, bytes.len() / size_of::<T>()) }
}

/// Bytes of a [`Lines`] as mutable values of `T`. Panics when they do not start on one.
pub(crate) fn cast_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    let start = bytes.as_mut_ptr().cast::<T>();
    assert!(start.is_aligned(), "unaligned panel");
    // SAFETY: as in `cast`, borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(start, bytes.len() / size_of::<T>()) }
}
