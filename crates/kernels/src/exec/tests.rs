use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[test]
fn loops_visit_everything_once_and_nest() {
    for threads in [0, 1, 2, 3, 9] {
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

#[test]
fn items_and_results_are_dropped_once_whatever_panics() {
    struct Counted<'a>(&'a AtomicUsize);
    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    for threads in [1, 2, 5] {
        let exec = Exec::with_isa(threads, Isa::SCALAR).unwrap();
        for bad in [0, 7, 19, 20] {
            let (items, results, made) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
            let run = || {
                exec.parallel_map_items((0..20).map(|_| Counted(&items)).collect(), |i, item| {
                    assert!(i != bad, "item {i} is bad");
                    drop(item);
                    made.fetch_add(1, Ordering::Relaxed);
                    Counted(&results)
                })
            };
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
                Ok(found) => assert!(bad == 20 && found.len() == 20),
                Err(panic) => {
                    assert_eq!(*panic.downcast::<String>().unwrap(), format!("item {bad} is bad"));
                }
            }
            assert_eq!(items.load(Ordering::Relaxed), 20);
            assert_eq!(results.load(Ordering::Relaxed), made.load(Ordering::Relaxed));
        }
        // The pool goes on working.
        assert_eq!(exec.parallel_map(3, |i| i), [0, 1, 2]);
    }
}

#[test]
#[should_panic(expected = "chunks of 0 values")]
fn chunks_of_nothing_are_refused() {
    Exec::with_isa(2, Isa::SCALAR).unwrap().parallel_chunks(&mut [1.0], 0, |_, _| ());
}

#[test]
fn too_many_threads_are_an_error() {
    let error = Exec::with_isa(1 << 20, Isa::SCALAR).unwrap_err();
    assert!(matches!(error, KernelError::ThreadPool { threads, .. } if threads == 1 << 20), "{error}");
}
