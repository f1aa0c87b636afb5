//! Measuring models: perplexity, divergence from a base, passkey retrieval, speed and memory, and the HTML report.
//! Reads models and result files; trains and converts nothing.
#![forbid(unsafe_code)]

pub mod bench;
pub mod error;
pub mod passkey;
pub mod quality;
pub mod report;
pub mod text;

pub use error::{EvalError, Result};
