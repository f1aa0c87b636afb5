//! The thread pool behind [`Exec`](crate::Exec): one parallel region at a time, items claimed from one counter, nothing
//! allocated per region. Knows nothing of slices or arithmetic.
//!
//! A region is open or closed; workers may join only while it is open, and the caller waits only for those that joined.
//! A worker that is asleep or was descheduled before joining therefore costs nothing. One that was descheduled in the
//! middle of an item does: the caller measures such waits and sends the worker to rest for a multiple of the time lost.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// Threads of one pool at most, the caller included.
const MAX_THREADS: usize = 4096;
/// An idle worker looks for the next region this long before it offers its core to others, ...
const WORKER_SPIN: Duration = Duration::from_micros(40);
/// ... and a caller for the last workers before it blocks.
const CALLER_SPIN: Duration = Duration::from_micros(60);
/// Looks at the region between two looks at the clock (or before the first).
const LOOKS: usize = 64;
/// Times a thread yields between spinning and blocking.
const YIELDS: usize = 4;
/// Longer waits than this are suspected to be a descheduled worker.
const LATE: Duration = Duration::from_micros(300);
/// Regions whose start is timed after a suspicious wait; else no clock is read before a wait.
const WATCHED: u32 = 1 << 16;
/// A late worker rests this many times the time it cost, but not longer than `FIRST_REST`; ...
const REST_FACTOR: u32 = 8;
const FIRST_REST: Duration = Duration::from_millis(40);
/// ... one that is late again soon twice as long as before, but not longer than this.
const MAX_REST: Duration = Duration::from_millis(320);

// Layout of `Shared::state`: workers inside | OPEN | WAITING | STOP | sleeping workers | epoch.
const INSIDE: u64 = (1 << 16) - 1;
/// Workers may join.
const OPEN: u64 = 1 << 16;
/// The caller blocks until no worker is inside.
const WAITING: u64 = 1 << 17;
/// The pool is being dropped.
const STOP: u64 = 1 << 18;
const SLEEPER: u64 = 1 << 19;
const SLEEPERS: u64 = ((1 << 16) - 1) * SLEEPER;
const EPOCH: u64 = 1 << 35;

/// Own cache lines (two: adjacent lines are prefetched together).
#[repr(align(128))]
struct Line<T>(T);

/// What a region runs: `call(data, item)` for each `item < n`.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
    n: usize,
}

/// The region as every thread sees it. The job lies beside the state, so that one cache line brings both to a worker.
struct Region {
    state: AtomicU64,
    /// Written only by the owner of [`Pool::control`] while the region is closed and no worker is inside; read only by
    /// threads inside.
    job: UnsafeCell<Job>,
}

/// One worker as the caller sees it.
struct Worker {
    /// Between joining and leaving a region.
    inside: AtomicBool,
    /// Microseconds it shall rest before it joins again.
    rest: AtomicU32,
}

struct Shared {
    region: Line<Region>,
    /// The next item to claim.
    next: Line<AtomicUsize>,
    workers: Box<[Line<Worker>]>,
    /// Counts wake-ups; guards the sleepers' count in the state.
    wakes: Mutex<u64>,
    /// Sleeping workers wait here, ...
    wake: Condvar,
    /// ... resting ones here, until they have rested or the pool stops, ...
    stop: Condvar,
    /// ... and here the caller for the last worker.
    left: Condvar,
    panicked: AtomicBool,
    /// The first panic of the region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: every field but `region.job` is `Sync`; the job's rule (see `Region`) excludes concurrent writes, and the data
// it points to is a `Sync` closure that outlives the region (`Pool::run`).
unsafe impl Sync for Shared {}
// SAFETY: as above; the job's pointers are dereferenced only inside a region.
unsafe impl Send for Shared {}

/// What the caller keeps between regions.
struct Control {
    /// Regions still to be timed from their start.
    watched: u32,
    records: Vec<Record>,
}

/// What the caller remembers of a worker.
#[derive(Clone, Default)]
struct Record {
    /// It was inside when the wait became suspicious.
    late: bool,
    /// Its last rest and when that ends.
    rest: Option<(Duration, Instant)>,
}

/// Worker threads that help callers of [`run`](Self::run).
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Held by the caller whose region runs.
    control: Mutex<Control>,
    handles: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is consistent after each statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn inside(state: u64) -> u64 {
    state & INSIDE
}

impl Pool {
    /// Starts `threads - 1` workers: the caller takes part. Fails with the reason when they cannot be started.
    pub(crate) fn new(threads: usize) -> Result<Self, String> {
        if threads > MAX_THREADS {
            return Err(format!("at most {MAX_THREADS} are supported"));
        }
        let workers = threads.saturating_sub(1);
        let worker = || Line(Worker { inside: AtomicBool::new(false), rest: AtomicU32::new(0) });
        let job = UnsafeCell::new(Job { call: call::<fn(usize)>, data: std::ptr::null(), n: 0 });
        let shared = Arc::new(Shared {
            region: Line(Region { state: AtomicU64::new(0), job }),
            next: Line(AtomicUsize::new(0)),
            workers: (0..workers).map(|_| worker()).collect(),
            wakes: Mutex::new(0),
            wake: Condvar::new(),
            stop: Condvar::new(),
            left: Condvar::new(),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let control = Mutex::new(Control { watched: 0, records: vec![Record::default(); workers] });
        let mut pool = Self { shared, control, handles: Vec::with_capacity(workers) };
        for me in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("kernel-{}", me + 1));
            // On failure, dropping `pool` stops those already started.
            let handle = thread.spawn(move || shared.work(me)).map_err(|error| error.to_string())?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Runs `f(0..n)` on the workers and this thread, each item once; returns when all are done. A panic of `f` is passed
    /// on after all items have run (the first one, if several panic). When a region runs already, be it an outer one
    /// of this thread or another thread's, everything runs here.
    pub(crate) fn run<F: Fn(usize) + Sync>(&self, n: usize, f: &F) {
        let mut control = match self.control.try_lock() {
            Ok(control) => control,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..n).for_each(f),
        };
        let shared = &*self.shared;
        let begun = (control.watched > 0).then(|| {
            control.watched -= 1;
            Instant::now()
        });
        let job = Job { call: call::<F>, data: std::ptr::from_ref(f).cast(), n };
        // SAFETY: `control` is held, and the previous owner left the region closed with nobody inside (below).
        unsafe { *shared.region.0.job.get() = job };
        shared.next.0.store(0, Ordering::Relaxed);
        let state = &shared.region.0.state;
        // Release: whoever joins sees the job and the counter.
        if state.fetch_add(EPOCH | OPEN, Ordering::AcqRel) & SLEEPERS != 0 {
            shared.wake_all();
        }
        let mine = shared.run_items(job);
        // From here to the end of the wait nothing can panic: `f` must not be left while workers use it.
        if inside(state.fetch_and(!OPEN, Ordering::AcqRel)) > 0 {
            self.wait(&mut control, begun, mine);
        }
        if shared.panicked.load(Ordering::Relaxed) {
            shared.panicked.store(false, Ordering::Relaxed);
            let panic = lock(&shared.panic).take();
            drop(control);
            resume_unwind(panic.expect("stored before the flag"));
        }
    }

    /// Waits until no worker is inside the closed region. `mine` items were run here since `begun`.
    fn wait(&self, control: &mut Control, begun: Option<Instant>, mine: usize) {
        let shared = &*self.shared;
        // Acquire: what the leaving workers wrote is visible.
        let done = || inside(shared.region.0.state.load(Ordering::Acquire)) == 0;
        if spin(LOOKS, done) {
            return;
        }
        let start = Instant::now();
        while start.elapsed() < CALLER_SPIN {
            if spin(LOOKS, done) {
                return;
            }
        }
        for _ in 0..YIELDS {
            std::thread::yield_now();
            if done() {
                break;
            }
        }
        if !done() {
            shared.block(LATE.saturating_sub(start.elapsed()));
        }
        if !done() {
            for (record, worker) in control.records.iter_mut().zip(&shared.workers) {
                record.late = worker.0.inside.load(Ordering::Relaxed);
            }
            shared.block(Duration::MAX);
        }
        let waited = start.elapsed();
        if waited > LATE {
            self.judge(control, begun.map(|begun| start - begun), mine, waited);
        }
        control.records.iter_mut().for_each(|record| record.late = false);
    }

    /// Sends workers to rest that were late by much more than one of our own items took.
    fn judge(&self, control: &mut Control, busy: Option<Duration>, mine: usize, waited: Duration) {
        control.watched = WATCHED;
        let (Some(busy), 1..) = (busy, mine) else { return };
        let expected = 2 * busy / u32::try_from(mine).unwrap_or(u32::MAX);
        let lost = waited.saturating_sub(expected);
        if lost < LATE {
            return;
        }
        let now = Instant::now();
        let first = (lost * REST_FACTOR).min(FIRST_REST);
        let workers = self.shared.workers.iter().zip(&mut control.records);
        for (worker, record) in workers.filter(|(_, record)| record.late) {
            let rest = match record.rest {
                // Less good time since the last rest than that took: its core is still in use.
                Some((last, end)) if now < end + last => (2 * last).clamp(first, MAX_REST),
                _ => first,
            };
            record.rest = Some((rest, now + rest));
            worker.0.rest.store(rest.as_micros() as u32, Ordering::Relaxed);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.region.0.state.fetch_or(STOP, Ordering::AcqRel);
        self.shared.wake_all();
        self.shared.stop.notify_all();
        for handle in self.handles.drain(..) {
            // Workers catch the panics of items; anything else has been reported by the panic hook.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("workers", &self.handles.len()).finish_non_exhaustive()
    }
}

/// Calls the closure that `data` points to.
///
/// # Safety
/// `data` points to a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(data: *const (), item: usize) {
    // SAFETY: the caller's promise.
    let f = unsafe { &*data.cast::<F>() };
    f(item);
}

/// Looks up to `looks` times; whether it was done.
fn spin(looks: usize, done: impl Fn() -> bool) -> bool {
    (0..looks).any(|_| {
        std::hint::spin_loop();
        done()
    })
}

impl Shared {
    /// A worker's life.
    fn work(&self, me: usize) {
        let worker = &self.workers[me].0;
        let mut seen = 0;
        while self.join(worker, &mut seen) {
            worker.inside.store(true, Ordering::Relaxed);
            // SAFETY: this thread is inside the region (`join`), whose job is not written until it has left.
            let job = unsafe { *self.region.0.job.get() };
            self.run_items(job);
            worker.inside.store(false, Ordering::Relaxed);
            // Release: the caller sees what the items wrote.
            let state = self.region.0.state.fetch_sub(1, Ordering::AcqRel);
            if inside(state) == 1 && state & WAITING != 0 {
                // The caller looks at the state under this lock, so it sees the change or gets the notice.
                drop(lock(&self.wakes));
                self.left.notify_one();
            }
        }
    }

    /// Waits for an open region other than `seen` and enters it; `false` when the pool stops.
    fn join(&self, worker: &Worker, seen: &mut u64) -> bool {
        let mut spinning: Option<Instant> = None;
        let mut looks = 0;
        loop {
            let rest = worker.rest.load(Ordering::Relaxed);
            if rest > 0 {
                worker.rest.store(0, Ordering::Relaxed);
                self.rest(Duration::from_micros(u64::from(rest)));
            }
            let state = self.region.0.state.load(Ordering::Relaxed);
            if state & STOP != 0 {
                return false;
            }
            if is_new(state, *seen) {
                // Acquire: the job and the counter.
                let joined = self.region.0.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    *seen = state / EPOCH;
                    return true;
                }
                continue;
            }
            std::hint::spin_loop();
            looks += 1;
            if looks < LOOKS {
                continue;
            }
            if spinning.get_or_insert_with(Instant::now).elapsed() < WORKER_SPIN {
                looks = 0;
            } else if looks < LOOKS + YIELDS {
                std::thread::yield_now();
            } else {
                self.sleep(*seen);
                (spinning, looks) = (None, 0);
            }
        }
    }

    /// Claims and runs items until none is left; how many. Never unwinds.
    fn run_items(&self, job: Job) -> usize {
        let mut count = 0;
        loop {
            // The order of the claims matters to nobody; leaving the region publishes the results.
            let item = self.next.0.fetch_add(1, Ordering::Relaxed);
            if item >= job.n {
                return count;
            }
            count += 1;
            // SAFETY: the region cannot end before this thread has left it, so the closure is alive (`Pool::run`).
            let run = || unsafe { (job.call)(job.data, item) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                let mut first = lock(&self.panic);
                match *first {
                    None => *first = Some(panic),
                    // Dropping a foreign payload could panic in turn.
                    Some(_) => std::mem::forget(panic),
                }
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Sleeps until woken, unless there is something to do already.
    fn sleep(&self, seen: u64) {
        let mut wakes = lock(&self.wakes);
        let state = self.region.0.state.fetch_add(SLEEPER, Ordering::AcqRel);
        if is_new(state, seen) || state & STOP != 0 {
            self.region.0.state.fetch_sub(SLEEPER, Ordering::AcqRel);
            return;
        }
        let before = *wakes;
        while *wakes == before {
            wakes = self.wake.wait(wakes).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wakes all sleeping workers.
    #[cold]
    fn wake_all(&self) {
        let mut wakes = lock(&self.wakes);
        *wakes += 1;
        // The count changes only under this lock.
        self.region.0.state.fetch_and(!SLEEPERS, Ordering::AcqRel);
        drop(wakes);
        self.wake.notify_all();
    }

    /// Does nothing for `time`, or until the pool stops.
    fn rest(&self, time: Duration) {
        let wakes = lock(&self.wakes);
        let running = |_: &mut u64| self.region.0.state.load(Ordering::Relaxed) & STOP == 0;
        drop(self.stop.wait_timeout_while(wakes, time, running));
    }

    /// Blocks the caller until no worker is inside, for `time` at most.
    #[cold]
    fn block(&self, time: Duration) {
        let wakes = lock(&self.wakes);
        self.region.0.state.fetch_or(WAITING, Ordering::AcqRel);
        let occupied = |_: &mut u64| inside(self.region.0.state.load(Ordering::Acquire)) > 0;
        if time == Duration::MAX {
            drop(self.left.wait_while(wakes, occupied));
        } else {
            drop(self.left.wait_timeout_while(wakes, time, occupied));
        }
        self.region.0.state.fetch_and(!WAITING, Ordering::AcqRel);
    }
}

/// Whether `state` shows an open region that is not the one of epoch `seen`.
fn is_new(state: u64, seen: u64) -> bool {
    state & OPEN != 0 && state / EPOCH != seen
}
