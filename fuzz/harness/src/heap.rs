//! A bound on what an input may have allocated.
//!
//! A target whose program names [`Heap`] as its global allocator dies of an allocation that makes it more than the bound,
//! on the same input each time, whereas libFuzzer's limit on resident memory does not see what is allocated and not touched.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

/// The system's allocator, which counts.
pub struct Heap;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static BOUND: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Runs `input` while no more than `bytes` may be allocated in addition to what is.
pub fn bounded<T>(bytes: usize, input: impl FnOnce() -> T) -> T {
    let bound = LIVE.load(Ordering::Relaxed).saturating_add(bytes);
    BOUND.store(bound, Ordering::Relaxed);
    let done = input();
    BOUND.store(usize::MAX, Ordering::Relaxed);
    done
}

/// Counts `bytes` more, if they are within the bound.
fn count(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    // A panic is a finding already, and takes what it needs to say so.
    if live > BOUND.load(Ordering::Relaxed) && !std::thread::panicking() {
        // What is said of it is allocated too.
        BOUND.store(usize::MAX, Ordering::Relaxed);
        eprintln!("{live} bytes are allocated, the last {bytes} of them at once");
        std::process::abort();
    }
}

// SAFETY: it hands on every call to the system's allocator as it is.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}
