//! One file per command.

pub mod align;
pub mod analyze;
pub mod bench;
pub mod bench_train;
pub mod chat;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod generate;
pub mod heal;
pub mod inspect;
pub mod logits;
pub mod plan;
pub mod quickstart;
pub mod report;
pub mod sinks;
pub mod train_mqar;
