//! The built command, run as a user runs it, on tiny random models of every family. No network, no clock.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod baselines;
mod common;
mod elastic;
mod errors;
mod export;
mod likelihood;
mod logits;
mod memory;
mod mqar;
mod pipeline;
mod quickstart;
mod recipe;
mod report;
#[cfg(unix)]
mod resume;
mod sinks;
mod sources;
mod text;
