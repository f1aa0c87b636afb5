//! Writing the hybrid checkpoint in Hugging Face layout.
//! Checks everything that can be checked before the first byte is written.

#[cfg(test)]
mod tests;
mod write;

use crate::base::{BaseLayer, check_model, fresh_head};
use crate::error::{Result, SurgeryError};
use crate::{HeadBank, HeadsReport};
use model::mixers::HeadLayout;
use model::model::head_tensor_name;
use model::{HeadPlan, Model, ModelConfig, Progress};
use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;
use weights::{Checkpoint, WeightsError};
use write::{Content, Output, write_checkpoint};

/// Writes `checkpoint` converted by `plan` to the folder `out` (built under a temporary name, renamed at the end): `config.json`,
/// `head_plan.json`, tokenizer files, tensors. Untouched tensors are copied byte for byte where the source stores F32, F16 or BF16, else (quantised
/// sources) written as their exact f32 values. New heads come from `bank`, or from [`model::mixers::init`] when `None`
/// (seeded by `seed`; decays from `heads` when given, else from a mean distance of 16).
///
/// # Errors
/// [`SurgeryError::Argument`] when the checkpoint is a hybrid already, or the bank or the statistics do not fit the plan or the model;
/// [`SurgeryError::Model`] for a plan that does not fit; [`SurgeryError::Weights`] when `out` exists and is not empty, or a file cannot be
/// read or written; [`SurgeryError::Interrupted`]. Nothing is left behind.
pub fn convert(
    checkpoint: &Checkpoint,
    plan: &HeadPlan,
    bank: Option<&HeadBank>,
    heads: Option<&HeadsReport>,
    seed: u64,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let config = &checkpoint.config;
    if let Some(json) = &checkpoint.plan_json {
        refuse_hybrid(&HeadPlan::from_json(&json.to_string(), config)?)?;
    }
    let layout = check(config, plan, bank, heads)?;
    check_tensors(checkpoint)?;
    let used = plan.criterion.as_ref().and_then(|c| c.bank_sha256.as_deref());
    if let (Some(used), Some(bank)) = (used, bank)
        && used != bank.sha256()
    {
        progress
            .note("note: the plan was made with another state of the head bank; the groups stay as planned");
    }

    let mut outputs: Vec<Output<'_>> = checkpoint.tensors.infos().iter().map(Output::copy).collect();
    for layer in 0..config.layers {
        let groups: Vec<usize> =
            (0..config.kv_heads).filter(|&group| plan.is_converted(layer, group)).collect();
        let Some(layout) = layout.filter(|_| !groups.is_empty()) else { continue };
        let fresh = match bank {
            None => Some(BaseLayer::read(checkpoint, layer)?),
            Some(_) => None,
        };
        for group in groups {
            let values: Vec<Cow<'_, [f32]>> = match (&fresh, bank) {
                (None, Some(bank)) => bank.groups[layer][group].values.iter().map(|v| v.into()).collect(),
                (Some(base), _) => {
                    let head = fresh_head(&layout, &base.group(group), heads, (layer, group), seed);
                    head.values.into_iter().map(Cow::Owned).collect()
                }
                (None, None) => unreachable!("the base layer was read where there is no bank"),
            };
            outputs.extend(layout.tensors().into_iter().zip(values).map(|(info, values)| Output {
                name: head_tensor_name(layer, group, info.name),
                shape: info.shape,
                content: Content::Values(values),
            }));
        }
    }
    write_checkpoint(checkpoint, &unmarked(plan), &outputs, out, progress)
}

/// New heads were not trained for several budgets, whatever model the plan comes from.
fn unmarked(plan: &HeadPlan) -> HeadPlan {
    HeadPlan { elastic: None, ..plan.clone() }
}

/// The same in memory, for evaluation without writing: shares the base's tensors.
///
/// # Errors
/// As [`convert`], without those of files.
pub fn convert_in_memory(
    model: &Model,
    plan: &HeadPlan,
    bank: Option<&HeadBank>,
    heads: Option<&HeadsReport>,
    seed: u64,
) -> Result<Model> {
    refuse_hybrid(&model.plan)?;
    let layout = check(&model.config, plan, bank, heads)?;
    let hybrid = model.with_plan(unmarked(plan), &mut |layer, group| {
        Ok(match (bank, layout) {
            (Some(bank), _) => bank.groups[layer][group].clone(),
            (None, Some(layout)) => {
                fresh_head(&layout, &model.base_group(layer, group), heads, (layer, group), seed)
            }
            (None, None) => unreachable!("a plan without a mixer converts no group"),
        })
    })?;
    Ok(hybrid)
}

/// Writes a trained hybrid: like [`convert`], but with the values of `trained` for every parameter that differs from `source`.
///
/// # Errors
/// [`SurgeryError::Argument`] when `trained` is not of `source`'s configuration; [`SurgeryError::Weights`] when `out` exists and is not
/// empty, or a file cannot be read or written; [`SurgeryError::Interrupted`]. Nothing is left behind.
pub fn save_model(
    source: &Checkpoint,
    trained: &Model,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    if source.config != trained.config {
        return Err(SurgeryError::Argument(format!(
            "the trained model is not of {}: their configurations differ",
            source.path.display()
        )));
    }
    let known: HashSet<String> = trained.config.tensor_shapes().into_iter().map(|(name, _)| name).collect();
    let head_names: HashSet<String> = head_names(trained).collect();
    let mut outputs = Vec::new();
    let mut embedding_changed = false;
    for info in source.tensors.infos() {
        let belongs = known.contains(&info.name) || head_names.contains(&info.name);
        let param = trained.params.id(&info.name).filter(|_| belongs).map(|id| trained.params.get(id));
        match param {
            Some(param)
                if info.shape != param.shape
                    || !same_bits(&source.tensors.read_f32(&info.name)?, param.data()) =>
            {
                embedding_changed |= info.name == "model.embed_tokens.weight";
                outputs.push(Output::values(&info.name, param));
            }
            // Heads that the trained model's plan has no place for.
            None if info.name.contains(".self_attn.recurrent.") => {}
            _ => outputs.push(Output::copy(info)),
        }
    }
    if trained.config.tie_embeddings && embedding_changed {
        // A stored copy of the old embedding would contradict the new one.
        outputs.retain(|output| output.name != "lm_head.weight");
    }
    let written: HashSet<String> = outputs.iter().map(|output| output.name.clone()).collect();
    for (_, param) in trained.params.iter() {
        let belongs = known.contains(&param.name) || head_names.contains(&param.name);
        if belongs && !written.contains(&param.name) {
            outputs.push(Output::values(&param.name, param));
        }
    }
    write_checkpoint(source, &trained.plan, &outputs, out, progress)
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Names of all head tensors that the model's plan asks for.
fn head_names(model: &Model) -> impl Iterator<Item = String> {
    let groups = (0..model.config.layers).flat_map(|l| (0..model.config.kv_heads).map(move |g| (l, g)));
    groups
        .flat_map(|(layer, group)| model.head_param_ids(layer, group))
        .map(|&id| model.params.get(id).name.clone())
}

fn refuse_hybrid(plan: &HeadPlan) -> Result<()> {
    if plan.is_base() {
        return Ok(());
    }
    Err(SurgeryError::Argument(format!(
        "this model is a hybrid already: {} of {} groups are converted, {} layers skipped\nhint: convert the base model with the new plan",
        plan.converted(),
        plan.total(),
        plan.skipped()
    )))
}

/// Checks that plan, bank and statistics fit each other and the model; the layout of converted groups, if there are any.
fn check(
    config: &ModelConfig,
    plan: &HeadPlan,
    bank: Option<&HeadBank>,
    heads: Option<&HeadsReport>,
) -> Result<Option<HeadLayout>> {
    plan.validate(config)?;
    if let Some(heads) = heads {
        check_model("the head statistics file", &heads.model, config)?;
    }
    if let Some(bank) = bank {
        bank.check(config)?;
    }
    if plan.converted() == 0 {
        return Ok(None);
    }
    let spec = plan.mixer.ok_or_else(|| {
        SurgeryError::Argument("the plan converts groups but names no mixer to convert them to".into())
    })?;
    match bank {
        Some(bank) if bank.info.spec != spec => Err(SurgeryError::Argument(format!(
            "the plan asks for {spec}; the head bank holds {}\nhint: plan with this bank",
            bank.info.spec
        ))),
        _ => Ok(Some(HeadLayout::new(spec, config))),
    }
}

/// Checks that the checkpoint holds every tensor of its configuration, in its shape.
fn check_tensors(checkpoint: &Checkpoint) -> Result<()> {
    for (name, expected) in checkpoint.config.tensor_shapes() {
        match checkpoint.tensors.info(&name) {
            None => return Err(WeightsError::MissingTensor { path: checkpoint.path.clone(), name }.into()),
            Some(info) if info.shape != expected => {
                return Err(WeightsError::Shape { name, expected, found: info.shape.clone() }.into());
            }
            Some(_) => {}
        }
    }
    Ok(())
}
