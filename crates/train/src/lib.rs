//! Training: data pipeline, optimizer, alignment of head banks, healing of hybrids, resumable checkpoints.
//! Uses models and banks; knows nothing of terminals or reports.
#![forbid(unsafe_code)]

pub mod align;
pub mod bench;
pub mod data;
pub mod error;
pub mod heal;
mod optim;
mod state;
mod teacher;
#[cfg(test)]
mod testing;

pub use error::{Result, TrainError};
