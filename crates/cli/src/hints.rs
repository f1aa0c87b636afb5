//! What a user can do about an error that does not say so itself. Knows the libraries' error types; knows nothing of commands.

use crate::common::Usage;
use eval::EvalError;
use kernels::KernelError;
use model::ModelError;
use std::io::ErrorKind;
use surgery::SurgeryError;
use train::TrainError;
use weights::WeightsError;

const DAMAGED: &str = "the file is damaged or incomplete; fetch or copy it again";
const PLAN: &str = "make a plan for this model with `recurformer plan`, or correct the field named here";
const OPTIONS: &str = "`--help` after the command explains its options";

const ISA: &str = "unset RECURFORMER_ISA, or see `recurformer doctor` for what this CPU has";

/// A sentence for the first error of the chain that is known; none when nobody can do anything about it.
pub fn hint(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        let known = None
            .or_else(|| cause.downcast_ref().map(of_eval))
            .or_else(|| cause.downcast_ref().map(of_train))
            .or_else(|| cause.downcast_ref().map(of_surgery))
            .or_else(|| cause.downcast_ref().map(of_model))
            .or_else(|| cause.downcast_ref().map(of_weights))
            .or_else(|| cause.downcast_ref().map(of_io))
            .or_else(|| cause.is::<KernelError>().then_some(Some(ISA)));
        known.flatten().or_else(|| cause.is::<Usage>().then_some(OPTIONS))
    })
}

fn of_eval(error: &EvalError) -> Option<&'static str> {
    match error {
        EvalError::Model(error) => of_model(error),
        EvalError::Weights(error) => of_weights(error),
        EvalError::Train(error) => of_train(error),
        EvalError::Surgery(error) => of_surgery(error),
        EvalError::Argument(_) => Some(OPTIONS),
        EvalError::Mismatch { .. }
        | EvalError::File { .. }
        | EvalError::NonFinite
        | EvalError::Interrupted => None,
    }
}

fn of_train(error: &TrainError) -> Option<&'static str> {
    match error {
        TrainError::Model(error) => of_model(error),
        TrainError::Weights(error) => of_weights(error),
        TrainError::Surgery(error) => of_surgery(error),
        TrainError::File { .. } => Some(
            "give UTF-8 text, JSONL with a `text` field, parquet with a string column `text`, or .npy files of int32 token ids",
        ),
        TrainError::Data(_) => Some("token ids must come from this model's own tokenizer"),
        TrainError::Argument(_) => Some(OPTIONS),
        TrainError::NonFinite { .. } | TrainError::Interrupted => None,
    }
}

fn of_surgery(error: &SurgeryError) -> Option<&'static str> {
    match error {
        SurgeryError::Model(error) => of_model(error),
        SurgeryError::Weights(error) => of_weights(error),
        SurgeryError::File { .. } => {
            Some("make it again with `recurformer analyze` (heads.json) or `recurformer align` (head bank)")
        }
        SurgeryError::Argument(_) => Some(OPTIONS),
        SurgeryError::Interrupted => None,
    }
}

fn of_model(error: &ModelError) -> Option<&'static str> {
    match error {
        ModelError::Weights(error) => of_weights(error),
        ModelError::Plan(_) => Some(PLAN),
        ModelError::Param { .. } => Some("the configuration or head plan does not belong to these weights"),
        ModelError::Token { .. } => Some("token ids must come from this model's own tokenizer"),
        _ => None,
    }
}

fn of_weights(error: &WeightsError) -> Option<&'static str> {
    match error {
        WeightsError::Io { source, .. } => of_io(source),
        WeightsError::Malformed { .. } => Some(DAMAGED),
        WeightsError::Unsupported { .. } => {
            Some("the README lists the families and formats that are computed")
        }
        WeightsError::MissingTensor { .. } | WeightsError::Shape { .. } => {
            Some("config.json and weights must belong together, and all shards must be there")
        }
        WeightsError::NonFinite { .. } => {
            Some("the checkpoint is damaged or its training diverged; get it again, or use another")
        }
        WeightsError::Tokenizer(_) => Some(
            "the model's own tokenizer and chat template are needed; chat needs an instruction-tuned model",
        ),
        WeightsError::Source { .. } => None,
    }
}

fn of_io(error: &std::io::Error) -> Option<&'static str> {
    match error.kind() {
        ErrorKind::NotFound => Some("check the path; a model's folder must hold all of its files"),
        ErrorKind::PermissionDenied => Some("check the permissions, or choose another place"),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Some("free some space, or write to another disk")
        }
        ErrorKind::InvalidData => Some("the file is not UTF-8 text, or is damaged"),
        ErrorKind::AlreadyExists => Some("choose another --out, or remove it"),
        _ => None,
    }
}
