//! Generated long-range tasks, sized in tokens of a model's tokenizer: prompts with answers to test with, documents to train on,
//! labelled sequences.
//! Knows text and tokenizers; knows nothing of models or scores.
#![forbid(unsafe_code)]

mod draw;
pub mod error;
pub mod hashhop;
pub mod induction;
pub mod mqar;
pub mod passkey;
pub mod probe;
mod retrieval;
pub mod ruler;
mod sizing;
mod source;
#[cfg(test)]
mod testing;
mod text;

pub use error::{Result, TaskError};
pub use source::{Generated, Kind, Part};
