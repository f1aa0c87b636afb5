use std::sync::Barrier;

use super::*;

/// Runs one region and checks that every item ran once.
fn check(pool: &Pool, n: usize) {
    let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
    pool.run(n, &|i| {
        counts[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(counts.into_iter().all(|count| count.into_inner() == 1));
}

#[test]
fn every_item_runs_once() {
    for threads in [1, 2, 3, 16] {
        let pool = Pool::new(threads).unwrap();
        for n in [0, 1, 2, 3, 63, 64, 65, 500] {
            check(&pool, n);
        }
    }
}

#[test]
fn many_small_regions() {
    for (threads, regions) in [(2, 50_000), (3, 2_000), (8, 300)] {
        let pool = Pool::new(threads).unwrap();
        let total = AtomicUsize::new(0);
        for region in 0..regions {
            pool.run(region % 5, &|i| {
                total.fetch_add(i + 1, Ordering::Relaxed);
            });
        }
        assert_eq!(total.into_inner(), regions / 5 * (1 + 3 + 6 + 10));
    }
}

#[test]
fn sleeping_workers_are_woken() {
    let pool = Pool::new(2).unwrap();
    let asleep = || pool.shared.region.0.state.load(Ordering::Relaxed) & SLEEPERS != 0;
    for _ in 0..20 {
        while !asleep() {
            std::thread::yield_now();
        }
        // Both items must run at the same time, on two threads.
        let barrier = Barrier::new(2);
        pool.run(2, &|_| {
            barrier.wait();
        });
    }
}

#[test]
fn the_caller_takes_part_and_blocks_for_the_others() {
    let pool = Pool::new(2).unwrap();
    let caller = std::thread::current().id();
    for _ in 0..5 {
        let barrier = Barrier::new(2);
        let (mine, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
        pool.run(2, &|_| {
            barrier.wait();
            if std::thread::current().id() == caller {
                mine.fetch_add(1, Ordering::Relaxed);
            } else {
                std::thread::sleep(2 * LATE);
            }
            finished.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!((mine.into_inner(), finished.into_inner()), (1, 2));
    }
}

#[test]
fn late_workers_rest_and_come_back() {
    let pool = Pool::new(3).unwrap();
    let mut control = pool.control.lock().unwrap();
    let ms = Duration::from_millis;
    let rests = |control: &Control| [0, 1].map(|i: usize| control.records[i].rest.map(|rest| rest.0));
    control.records[1].late = true;
    // Not yet timed; as long as our own items; nothing to compare with.
    for (busy, mine) in [(None, 1), (Some(ms(10)), 5), (Some(ms(1)), 0)] {
        pool.judge(&mut control, busy, mine, ms(4));
        assert_eq!(rests(&control), [None, None]);
        assert_eq!(control.watched, WATCHED);
    }
    // Late by 7 ms − 2 × 2 ms, then again and again.
    for rest in [24, 48, 96, 192, 320, 320].map(ms) {
        pool.judge(&mut control, Some(ms(10)), 5, ms(7));
        assert_eq!(rests(&control), [None, Some(rest)]);
    }
    // Long ago: forgotten.
    control.records[1].rest = Some((ms(0), Instant::now() - ms(1)));
    pool.judge(&mut control, Some(ms(10)), 5, ms(40));
    assert_eq!(rests(&control), [None, Some(FIRST_REST)]);
    drop(control);
    // Regions run meanwhile without it, and a dropped pool does not wait for it.
    check(&pool, 100);
}

#[test]
fn nested_and_concurrent_regions_run_where_they_are() {
    let pool = Pool::new(3).unwrap();
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(5, &|_| {
                        pool.run(7, &|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(count.into_inner(), 4 * 200 * 5 * 7);
    pool.run(5, &|_| {
        let outer = std::thread::current().id();
        pool.run(7, &|_| assert_eq!(std::thread::current().id(), outer));
    });
}

#[test]
fn panics_reach_the_caller_after_every_item_has_run() {
    let pool = Pool::new(3).unwrap();
    for _ in 0..50 {
        let count = AtomicUsize::new(0);
        let region = || {
            pool.run(64, &|i| {
                count.fetch_add(1, Ordering::Relaxed);
                if i % 9 == 4 {
                    // Not `panic!`, whose hook would print.
                    resume_unwind(Box::new(i));
                }
            });
        };
        let panic = catch_unwind(AssertUnwindSafe(region)).unwrap_err();
        assert_eq!(*panic.downcast::<usize>().unwrap() % 9, 4);
        assert_eq!(count.into_inner(), 64);
        check(&pool, 10);
    }
}

#[test]
fn pools_can_be_dropped_at_any_time() {
    for threads in [1, 2, 5, 33] {
        for regions in [0, 1, 3] {
            let pool = Pool::new(threads).unwrap();
            (0..regions).for_each(|_| check(&pool, threads));
        }
    }
}

#[test]
fn too_many_threads_are_refused() {
    assert!(Pool::new(MAX_THREADS + 1).unwrap_err().contains("4096"));
}
