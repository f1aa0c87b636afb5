//! How long-running functions report progress and learn that the user wants them to stop.

/// Receives progress. All methods have empty defaults, so `&mut Silent` observes nothing.
pub trait Progress {
    /// A new phase of `total` units begins (0: unknown).
    fn start(&mut self, label: &str, total: u64, unit: &str) {
        let _ = (label, total, unit);
    }
    /// `n` more units are done; `message` is short and current (a loss, a file name) or empty.
    fn advance(&mut self, n: u64, message: &str) {
        let _ = (n, message);
    }
    /// `n` units were done by an earlier run: they count as done, not for the rate.
    fn resumed(&mut self, n: u64) {
        self.advance(n, "");
    }
    /// The phase is over.
    fn finish(&mut self) {}
    /// A line worth keeping on the screen.
    fn note(&mut self, line: &str) {
        let _ = line;
    }
    /// Whether the user asked to stop; the function then saves what it has and returns its `Interrupted` error.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Reports nothing and never stops.
pub struct Silent;

impl Progress for Silent {}
