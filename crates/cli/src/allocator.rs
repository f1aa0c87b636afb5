//! The allocator of the command, and how long it keeps memory that was freed.

/// Passes allocate and free large buffers all the time; this allocator keeps their pages for a while.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The allocator's `purge_delay`, which its bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Never returns freed pages from now on: every training step needs them again, and clearing them anew shows in profiles (docs/log).
#[allow(unsafe_code)]
pub fn keep_freed_pages() {
    // SAFETY: sets an integer that the allocator reads when it frees; meant to be called by programs, from one thread at a time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) }
}
