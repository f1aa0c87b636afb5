//! The base model as a teacher: weights packed once, never trained.

use crate::error::Result;
use kernels::kv::KvType;
use kernels::quant::Dtype;
use kernels::{Exec, Precision};
use model::{Engine, EngineOptions, Model};

/// The base, as exact as the products of those who learn from it.
pub(crate) fn teacher(exec: &Exec, base: &Model) -> Result<Engine> {
    let options = match exec.precision() {
        Precision::F32 => EngineOptions::EXACT,
        Precision::Bf16 => EngineOptions { weights: Some(Dtype::BF16), kv_type: KvType::Bf16 },
    };
    Ok(Engine::from_model(exec, base, options)?)
}
