//! The state of a healing run on disk: trained values, moments and where the run stands.

use super::trainer::Trainer;
use super::{HealOptions, Stage, elastic};
use crate::data::SequenceStream;
use crate::error::Result;
use crate::optim::{AnyMoments, MomentType};
use crate::state::{StateTensor, StateValues, check_same_settings, load_state, save_state};
use kernels::Exec;
use model::{Model, Progress};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use weights::files::remove_stale;

const VERSION: u32 = 1;
const FILE: &str = "state.safetensors";
/// The metrics' file name beside the state.
const METRICS: &str = "metrics.jsonl";

#[derive(Debug, Serialize, Deserialize)]
struct HealState {
    version: u32,
    stage: String,
    step: u64,
    position: u64,
    settings: serde_json::Value,
    lr: String,
}

fn stage_name(stage: Stage) -> String {
    match stage {
        Stage::Distill { kl, ce } => format!("distill, KL {kl}, CE {ce}"),
        Stage::Continue => "continue".into(),
    }
}

/// What may not change between an interrupted run and its continuation. Numbers are written as text, which is exact.
pub(super) fn settings(
    exec: &Exec,
    hybrid: &Model,
    data: &SequenceStream,
    options: &HealOptions,
) -> serde_json::Value {
    let mut settings = serde_json::json!({
        "stage": stage_name(options.stage),
        "trainable": format!("{:?}", options.trainable),
        "tokens": options.tokens,
        "batch": options.batch,
        "accumulate": options.accumulate,
        "projection lr scale": options.projection_lr_scale.to_string(),
        "base lr scale": options.base_lr_scale.to_string(),
        "betas": format!("{:?}", options.betas),
        "weight decay": options.weight_decay.to_string(),
        "warm-up": options.warmup,
        "final lr": options.final_lr.to_string(),
        "clip": options.clip.to_string(),
        "seed": options.seed,
        "precision": format!("{:?}", exec.precision()),
        "data": data.fingerprint(),
        "hybrid": digest(hybrid),
    });
    // Absent in states of other runs, which may be older than this setting.
    if !options.elastic.is_empty() {
        settings["elastic"] = format!("{:?}", elastic::sorted(&options.elastic)).into();
    }
    if options.moments != MomentType::F32 {
        settings["moments"] = format!("{:?}", options.moments).into();
    }
    settings
}

/// Digest of the plan and of the new heads' starting values.
fn digest(hybrid: &Model) -> String {
    let mut digest = Sha256::new();
    digest.update(hybrid.plan.to_json());
    for layer in 0..hybrid.config.layers {
        for group in 0..hybrid.config.kv_heads {
            for &id in hybrid.head_param_ids(layer, group) {
                hybrid.params.data(id).iter().for_each(|v| digest.update(v.to_le_bytes()));
            }
        }
    }
    digest.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes up an interrupted run when the options say so and there is one.
pub(super) fn restore(
    trainer: &mut Trainer<'_>,
    hybrid: &mut Model,
    data: &mut SequenceStream,
    options: &HealOptions,
    settings: &serde_json::Value,
    progress: &mut dyn Progress,
) -> Result<()> {
    let path = options.state_dir.join(FILE);
    remove_stale(&path)?;
    remove_stale(&options.state_dir.join(METRICS))?;
    if !options.resume {
        return Ok(());
    }
    let Some(state) = load_state::<HealState>(&path)? else {
        progress.note(&format!("{} does not exist: starting at the beginning", path.display()));
        return Ok(());
    };
    check_same_settings(&path, &state.info.settings, settings)?;
    if state.info.lr != options.lr.to_string() {
        progress.note(&format!("learning rate changed from {} to {}", state.info.lr, options.lr));
    }
    for full in &mut trainer.full {
        let name = hybrid.params.get(full.id).name.clone();
        state.copy_into(&format!("param.{name}"), hybrid.params.data_mut(full.id))?;
        let (m, v) = (format!("m.{name}"), format!("v.{name}"));
        match &mut full.moments {
            AnyMoments::F32(moments) => {
                state.copy_into(&m, &mut moments.m)?;
                state.copy_into(&v, &mut moments.v)?;
            }
            AnyMoments::Bf16(moments) => {
                state.copy_into_bf16(&m, &mut moments.m)?;
                state.copy_into_bf16(&v, &mut moments.v)?;
            }
        }
    }
    for low_rank in &mut trainer.low_rank {
        let name = &hybrid.params.get(low_rank.id).name;
        let factors = &mut low_rank.factors;
        for (part, values, moments) in
            [("a", &mut factors.a, &mut low_rank.moments_a), ("b", &mut factors.b, &mut low_rank.moments_b)]
        {
            state.copy_into(&format!("lora.{part}.{name}"), values)?;
            state.copy_into(&format!("m.lora.{part}.{name}"), &mut moments.m)?;
            state.copy_into(&format!("v.lora.{part}.{name}"), &mut moments.v)?;
        }
    }
    trainer.resume_at(hybrid, state.info.step);
    data.skip_to(state.info.position);
    Ok(())
}

/// Writes the state atomically; `position` is that of the data stream after the last step.
pub(super) fn save(
    trainer: &Trainer<'_>,
    hybrid: &Model,
    position: u64,
    options: &HealOptions,
    settings: &serde_json::Value,
) -> Result<()> {
    let info = HealState {
        version: VERSION,
        stage: stage_name(options.stage),
        step: trainer.steps(),
        position,
        settings: settings.clone(),
        lr: options.lr.to_string(),
    };
    let mut tensors: Vec<StateTensor<'_>> = Vec::new();
    for full in &trainer.full {
        let param = hybrid.params.get(full.id);
        let (m, v): (StateValues<'_>, StateValues<'_>) = match &full.moments {
            AnyMoments::F32(moments) => (moments.m.as_slice().into(), moments.v.as_slice().into()),
            AnyMoments::Bf16(moments) => (moments.m.as_slice().into(), moments.v.as_slice().into()),
        };
        push(&mut tensors, "param.", &param.name, &param.shape, [param.data().into(), m, v]);
    }
    for low_rank in &trainer.low_rank {
        let name = &hybrid.params.get(low_rank.id).name;
        let f = &low_rank.factors;
        for (part, shape, values, moments) in [
            ("a", [f.rank, f.cols], &f.a, &low_rank.moments_a),
            ("b", [f.rows, f.rank], &f.b, &low_rank.moments_b),
        ] {
            let values = [values, &moments.m, &moments.v].map(|values| values.as_slice().into());
            push(&mut tensors, "", &format!("lora.{part}.{name}"), &shape, values);
        }
    }
    save_state(&options.state_dir.join(FILE), &info, &tensors)
}

/// A parameter's values and both moments.
fn push<'a>(
    tensors: &mut Vec<StateTensor<'a>>,
    prefix: &str,
    name: &str,
    shape: &[usize],
    [values, m, v]: [StateValues<'a>; 3],
) {
    tensors.push((format!("{prefix}{name}"), shape.to_vec(), values));
    tensors.push((format!("m.{name}"), shape.to_vec(), m));
    tensors.push((format!("v.{name}"), shape.to_vec(), v));
}
