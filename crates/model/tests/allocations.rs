//! Decoding allocates nothing but pages of the cache, whatever the mixers; only `mamba` heads have no such step.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{all_models, configs, tokens};
use kernels::kv::KvType;
use kernels::{Exec, quant::Dtype};
use recurformer_model::{Cache, Engine, EngineOptions, LogitRows, RecurrentKind};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tokens that come before the counted ones: buffers reach their size.
const WARM: usize = 40;
/// Tokens after those, all but the first counted; with the others less than a page.
const STEPS: usize = 24;
/// Tries: a thread that comes late to its first task of a kind still makes its buffers then, once. What every step allocates, every try sees.
const TRIES: usize = 4;

#[test]
fn a_decoding_step_allocates_nothing() {
    let exec = Exec::new(2).unwrap();
    let tokens = tokens(WARM + STEPS, 3);
    for config in configs() {
        for (name, model) in all_models(&config) {
            if name.contains(&format!(" {} ", RecurrentKind::Mamba.name())) {
                continue;
            }
            for (weights, kv_type) in [
                (Dtype::F32, KvType::F32),
                (Dtype::BF16, KvType::F16),
                (Dtype::BF16, KvType::Bf16),
                (Dtype::F32, KvType::Q8),
            ] {
                let options = EngineOptions { weights: Some(weights), kv_type };
                let engine = Engine::from_model(&exec, &model, options).unwrap();
                let (mut cache, mut logits) = (engine.new_cache(), Vec::new());
                let mut step = |tokens: &[u32], cache: &mut Cache| {
                    engine.forward_into(&exec, tokens, cache, LogitRows::Last, &mut logits).unwrap();
                };
                step(&tokens[..WARM - 8], &mut cache);
                tokens[WARM - 8..WARM].chunks(1).for_each(|token| step(token, &mut cache));
                let mut counts = (0..TRIES).map(|_| {
                    let mut cache = cache.clone();
                    // Copies the page that it shares.
                    step(&tokens[WARM..WARM + 1], &mut cache);
                    COUNT.store(0, Ordering::Relaxed);
                    ON.store(true, Ordering::Relaxed);
                    tokens[WARM + 1..].chunks(1).for_each(|token| step(token, &mut cache));
                    ON.store(false, Ordering::Relaxed);
                    COUNT.load(Ordering::Relaxed)
                });
                let none = counts.any(|count| count == 0);
                assert!(none, "{name} {} {kv_type:?}: every try allocates", weights.name());
            }
        }
    }
}
