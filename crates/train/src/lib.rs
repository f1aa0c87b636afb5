//! Training: data pipeline, optimizer, alignment of head banks, healing of hybrids, recipes of all stages, small models from scratch, resumable
//! checkpoints.
//! Uses models and banks; knows nothing of terminals or reports.
#![forbid(unsafe_code)]

pub mod align;
pub mod bench;
pub mod data;
pub mod error;
pub mod heal;
pub mod mqar;
mod optim;
pub mod recipe;
pub mod scratch;
mod state;
mod teacher;
#[cfg(test)]
mod testing;

pub use error::{Result, TrainError};
pub use optim::MomentType;
