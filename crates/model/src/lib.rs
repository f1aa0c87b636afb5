//! Hybrid Transformer models: plan, layers, mixers, cache, forward, backward, sampling.
//! Knows arithmetic order and parameter names; knows nothing of files' bytes, datasets or optimizers.
#![forbid(unsafe_code)]

pub mod cache;
pub mod engine;
pub mod error;
pub mod generate;
pub mod mixers;
pub mod model;
pub mod observe;
pub mod params;
pub mod plan;
pub mod progress;
pub mod sampler;

pub use cache::Cache;
pub use engine::{Engine, EngineOptions, LogitRows};
pub use error::{ModelError, Result};
pub use model::{
    BackwardPass, Cut, CutPart, Gates, Intervention, Model, ResolvedPlan, RoundedSequences, Tape, TokenBatch,
    Trace, head_tensor_name, narrow,
};
pub use observe::{GradObserver, LayerObserver, NoObserver};
pub use params::{Grads, Param, ParamId, ParamStore};
pub use plan::{Dropped, GroupMixer, HeadPlan, MixerSpec, RecurrentKind};
pub use progress::{Progress, Silent};
pub use sampler::{Sampler, SamplerOptions};
pub use weights::{Family, ModelConfig};
