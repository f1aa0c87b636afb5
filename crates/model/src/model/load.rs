//! Models from checkpoints. Knows which tensors a model needs; knows nothing of file formats.

use super::{Model, layout};
use crate::error::{ModelError, Result};
use crate::params::ParamStore;
use crate::plan::HeadPlan;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use weights::tensors::Without;
use weights::{Checkpoint, ModelConfig, TensorSource};

/// Buffers that old checkpoints carry inside layers and that are computed here.
const IGNORED_SUFFIXES: [&str; 3] =
    ["rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.attention.bias"];

impl Model {
    /// Loads every tensor the plan needs; shapes are checked against the configuration, NaN is an error.
    ///
    /// # Errors
    /// [`ModelError::Param`] for a missing tensor or a wrong shape, [`ModelError::Unexpected`] for a layer's tensor that the
    /// model would leave out, [`ModelError::Plan`] for a plan that does not fit, [`ModelError::Weights`] for unreadable files.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let (config, plan) = check_checkpoint(checkpoint)?;
        let source = checkpoint.tensors.as_ref();
        let wanted = layout::tensor_shapes(&config, &plan);
        let mut params = ParamStore::default();
        for ((name, shape), data) in wanted.iter().zip(read_all(source, &wanted)) {
            let data = data?;
            if data.len() != shape.iter().product::<usize>() {
                let found = format!("{} values", data.len());
                return Err(ModelError::Param { name: name.clone(), expected: shape.clone(), found });
            }
            params.insert(name.clone(), shape.clone(), data);
        }
        Self::from_parts(config, plan, params)
    }
}

/// A hybrid's checkpoint at a lower budget: with its plan [`at_beta`](HeadPlan::at_beta), and without the heads of groups that become attention
/// again. Whatever reads it sees a smaller hybrid; the files stay as they are.
///
/// # Errors
/// [`ModelError::Budget`] for a base model and as [`HeadPlan::at_beta`]; [`ModelError::Plan`] for a plan that does not fit.
pub fn narrow(checkpoint: Checkpoint, beta: f64) -> Result<Checkpoint> {
    let Checkpoint { path, config, config_json, tensors, plan_json } = checkpoint;
    let Some(json) = plan_json else {
        return Err(ModelError::Budget {
            beta,
            reason: format!(
                "{} is a base model: all of its groups are attention\nhint: give a hybrid, from `convert` or `heal`, or no beta",
                path.display()
            ),
        });
    };
    let wide = HeadPlan::from_json(&json.to_string(), &config)?;
    let plan = wide.at_beta(beta)?;
    let unused: Vec<String> = (0..config.layers)
        .flat_map(|layer| (0..config.kv_heads).map(move |group| (layer, group)))
        .filter(|&(layer, group)| wide.is_converted(layer, group) && !plan.is_converted(layer, group))
        .map(|(layer, group)| layout::head_tensor_name(layer, group, ""))
        .collect();
    let hidden = |name: &str| unused.iter().any(|prefix| name.starts_with(prefix));
    let tensors = Box::new(Without::new(tensors, path.clone(), hidden));
    let plan_json = Some(plan.to_value());
    Ok(Checkpoint { path, config, config_json, tensors, plan_json })
}

/// A checkpoint's configuration and plan, after checking that it holds every tensor of them with its shape and no other.
pub(crate) fn check_checkpoint(checkpoint: &Checkpoint) -> Result<(ModelConfig, HeadPlan)> {
    let config = checkpoint.config.clone();
    config.validate()?;
    let plan = match &checkpoint.plan_json {
        Some(json) => HeadPlan::from_json(&json.to_string(), &config)?,
        None => HeadPlan::empty(&config),
    };
    check(checkpoint.tensors.as_ref(), &layout::tensor_shapes(&config, &plan), config.layers)?;
    Ok((config, plan))
}

/// Everything wanted is there with its shape, and no layer holds a tensor nobody wants.
fn check(source: &dyn TensorSource, wanted: &[(String, Vec<usize>)], layers: usize) -> Result<()> {
    let found: HashMap<&str, &[usize]> =
        source.infos().iter().map(|info| (info.name.as_str(), info.shape.as_slice())).collect();
    for (name, expected) in wanted {
        let shape = found.get(name.as_str());
        if shape != Some(&expected.as_slice()) {
            let found = shape.map_or("nothing".into(), |s| format!("{s:?}"));
            return Err(ModelError::Param { name: name.clone(), expected: expected.clone(), found });
        }
    }
    let known: HashSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let unexpected = source.infos().iter().find(|info| {
        let layer =
            info.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        layer.is_some_and(|l: usize| l < layers)
            && !known.contains(info.name.as_str())
            && !IGNORED_SUFFIXES.iter().any(|suffix| info.name.ends_with(suffix))
    });
    match unexpected {
        Some(info) => Err(ModelError::Unexpected { name: info.name.clone() }),
        None => Ok(()),
    }
}

/// Reads (and dequantises) all wanted tensors, in order, on all CPUs.
fn read_all(
    source: &dyn TensorSource,
    wanted: &[(String, Vec<usize>)],
) -> Vec<weights::error::Result<Vec<f32>>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(wanted.len().max(1));
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some((name, _)) = wanted.get(i) else { return done };
            done.push((i, source.read_f32(name)));
        }
    };
    let mut read: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .flat_map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    read.sort_by_key(|(i, _)| *i);
    read.into_iter().map(|(_, data)| data).collect()
}
