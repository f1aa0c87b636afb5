//! The `run` object of JSON outputs: what was run, when, by which build, on what.

use crate::common::print_json;
use anyhow::Result;
use eval::run::{RunInfo, RunModel};
use kernels::Exec;
use serde_json::Value;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// This run, without seeds and models.
pub fn run_info(exec: &Exec) -> RunInfo {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    RunInfo {
        command: command_line(std::env::args()),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: option_env!("RECURFORMER_COMMIT").map(Into::into),
        date: utc(since.as_secs()),
        cpu: cpu_name(),
        isa: exec.isa().name().into(),
        threads: exec.threads(),
        seeds: Vec::new(),
        models: Vec::new(),
    }
}

/// Prints results with their `run` object, which says which models and seeds they are of.
pub fn print_results(exec: &Exec, mut results: Value, models: Vec<RunModel>, seeds: &[u64]) -> Result<()> {
    results["run"] = serde_json::to_value(RunInfo { models, seeds: seeds.into(), ..run_info(exec) })?;
    print_json(&results)
}

/// The CPU's name where the operating system tells it in a file.
pub fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// The command line as a person would type it: the program by its name alone, arguments quoted where a shell needs it.
fn command_line(mut args: impl Iterator<Item = String>) -> String {
    let program = args.next().unwrap_or_default();
    let program = Path::new(&program).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    std::iter::once(program).chain(args).map(|arg| quoted(&arg)).collect::<Vec<_>>().join(" ")
}

fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        return arg.into();
    }
    format!("'{}'", arg.replace('\'', "'\\''"))
}

/// Seconds since 1970 as an ISO 8601 time; days to dates as in Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + 400 * era + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_times() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        let args =
            ["/usr/bin/recurformer", "generate", "--prompt", "it's $HOME", "--stop", "", "--data=a.txt"];
        assert_eq!(
            command_line(args.map(String::from).into_iter()),
            r"recurformer generate --prompt 'it'\''s $HOME' --stop '' --data=a.txt"
        );
    }
}
