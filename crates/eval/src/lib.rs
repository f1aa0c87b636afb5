//! Measuring models: perplexity, divergence from a base, long-range tasks, speed and memory, and the HTML report.
//! Reads models and result files; trains and converts nothing.
#![forbid(unsafe_code)]

pub mod answers;
pub mod bench;
pub mod choice;
pub mod compare;
pub mod error;
pub mod hashhop;
pub mod induction;
pub mod lastword;
pub mod likelihood;
pub mod passkey;
pub mod quality;
pub mod report;
pub mod ruler;
pub mod run;
pub mod text;

pub use error::{EvalError, Result};
