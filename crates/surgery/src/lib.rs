//! From a base model to a hybrid: head statistics, selection criteria, head bank, plan selection, conversion.
//! Works on token ids and models; knows nothing of datasets, optimizers or progress bars.
#![forbid(unsafe_code)]

pub mod bank;
pub mod base;
pub mod convert;
pub mod criteria;
pub mod error;
mod exp;
mod report_file;
mod scores;
pub mod select;
pub mod sinks;
pub mod stats;
#[cfg(test)]
mod testing;

pub use bank::{BankInfo, HeadBank};
pub use error::{Result, SurgeryError};
pub use stats::{GroupStats, HeadStats, HeadsReport, LayerHeads};
