//! Progress bars with rate and ETA on stderr, and Ctrl-C as a flag that long functions poll.

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Seconds between progress lines when stderr is not a terminal.
const LOG_EVERY: Duration = Duration::from_secs(15);

/// The terminal side of a command.
pub struct Ui {
    bar: Option<ProgressBar>,
    label: String,
    unit: String,
    started: Instant,
    /// Units that were done when the phase began.
    resumed: u64,
    last_log: Instant,
    cancelled: Arc<AtomicBool>,
    terminal: bool,
}

impl Ui {
    /// Installs the Ctrl-C handler: the first one asks running work to save and stop, the second ends the process.
    pub fn new() -> Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancelled);
        ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            eprintln!("\ninterrupted: finishing the current step (once more to quit at once)");
        })?;
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        Ok(Self {
            bar: None,
            label: String::new(),
            unit: String::new(),
            started: now,
            resumed: 0,
            last_log: now,
            cancelled,
            terminal,
        })
    }

    /// A message for the person at the terminal.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) if self.terminal => bar.suspend(|| eprintln!("{line}")),
            _ => eprintln!("{line}"),
        }
    }

    /// Removes a bar left on the screen.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The flag set by Ctrl-C.
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }
}

impl model::Progress for Ui {
    fn start(&mut self, label: &str, total: u64, unit: &str) {
        self.clear();
        let template = if total > 0 {
            format!("{{msg:>26}} {{bar:28}} {{human_pos}}/{{human_len}} {unit} {{per_sec}} ETA {{eta}}")
        } else {
            format!("{{msg:>26}} {{spinner}} {{human_pos}} {unit} {{per_sec}} {{elapsed}}")
        };
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = if total > 0 { ProgressBar::new(total) } else { ProgressBar::new_spinner() };
        bar.set_draw_target(if self.terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        bar.set_style(style);
        bar.set_message(label.to_string());
        (self.label, self.unit) = (label.to_string(), unit.to_string());
        self.started = Instant::now();
        self.resumed = 0;
        self.last_log = self.started;
        self.bar = Some(bar);
    }

    fn advance(&mut self, n: u64, message: &str) {
        let Some(bar) = &self.bar else { return };
        bar.inc(n);
        if !message.is_empty() {
            bar.set_message(format!("{}: {message}", self.label));
        }
        if !self.terminal && self.last_log.elapsed() >= LOG_EVERY {
            self.last_log = Instant::now();
            let done = bar.position();
            let rate = (done - self.resumed) as f64 / self.started.elapsed().as_secs_f64();
            let eta = bar.length().filter(|&total| total >= done && rate > 0.0).map(|total| {
                format!(", ETA {}", HumanDuration(Duration::from_secs_f64((total - done) as f64 / rate)))
            });
            let of = bar.length().map(|t| format!("/{t}")).unwrap_or_default();
            eprintln!("{} {done}{of} {} ({rate:.0}/s{})", bar.message(), self.unit, eta.unwrap_or_default());
        }
    }

    fn resumed(&mut self, n: u64) {
        let Some(bar) = &self.bar else { return };
        bar.set_position(n);
        bar.reset_eta();
        self.resumed = n;
    }

    fn finish(&mut self) {
        self.clear();
    }

    fn note(&mut self, line: &str) {
        self.say(line);
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}
