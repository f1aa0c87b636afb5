//! One folder with configuration, plan, tokenizer and tensors, complete or not at all.

use crate::error::{Result, SurgeryError};
use model::{HeadPlan, Param, Progress};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs;
use std::path::Path;
use weights::files::{Existing, atomic_dir, atomic_write, remove_stale};
use weights::safetensors::{Metadata, OutTensor, SINGLE_FILE, SafetensorsWriter};
use weights::{Checkpoint, Dtype, TensorInfo, WeightsError};

/// Version of the mark in `config.json`.
const MARK_VERSION: u32 = 1;

/// Files beside the tensors that a Hugging Face folder may hold and a conversion does not change.
const COMPANIONS: [&str; 11] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "LICENSE",
];

/// A tensor of the new checkpoint.
pub struct Output<'a> {
    /// Hugging Face name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Where its values come from.
    pub content: Content<'a>,
}

/// Where a tensor's values come from.
pub enum Content<'a> {
    /// The source's tensor of the same name: its bytes, or its exact f32 values when it is quantised.
    Source,
    /// These values, written as F32.
    Values(Cow<'a, [f32]>),
}

impl<'a> Output<'a> {
    /// A tensor of the source as it is.
    pub fn copy(info: &TensorInfo) -> Self {
        Self { name: info.name.clone(), shape: info.shape.clone(), content: Content::Source }
    }
    /// A parameter's values.
    pub fn values(name: &str, param: &'a Param) -> Self {
        Self {
            name: name.to_string(),
            shape: param.shape.clone(),
            content: Content::Values(Cow::Borrowed(param.data())),
        }
    }
}

/// Writes the folder `out` with `tensors` and everything else from `source`.
///
/// # Errors
/// [`SurgeryError::Weights`] when `out` exists and is not empty or a file cannot be read or written;
/// [`SurgeryError::Interrupted`]. Nothing is left behind.
pub fn write_checkpoint(
    source: &Checkpoint,
    plan: &HeadPlan,
    tensors: &[Output<'_>],
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    remove_stale(out)?;
    let dir = atomic_dir(out, Existing::Refuse)?;
    atomic_write(&dir.path().join("config.json"), &pretty(&marked_config(source, out)?, out)?)?;
    atomic_write(&dir.path().join("head_plan.json"), plan.to_json().as_bytes())?;
    copy_companions(source, dir.path(), progress)?;

    let mut announced = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let dtype = match tensor.content {
            Content::Source => source.tensors.raw(&tensor.name)?.map_or(Dtype::F32, |(dtype, _)| dtype),
            Content::Values(_) => Dtype::F32,
        };
        announced.push(OutTensor { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() });
    }
    let metadata = Metadata::from([("format".to_string(), "pt".to_string())]);
    let mut writer = SafetensorsWriter::create(&dir.path().join(SINGLE_FILE), &announced, &metadata)?;
    progress.start("write", tensors.len() as u64, "tensors");
    for tensor in tensors {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        match &tensor.content {
            Content::Values(values) => writer.write_f32(&tensor.name, values)?,
            Content::Source => {
                // Read even where the bytes are copied: a checkpoint with NaN is not worth converting.
                let values = source.tensors.read_f32(&tensor.name)?;
                match source.tensors.raw(&tensor.name)? {
                    Some((_, bytes)) => writer.write_raw(&tensor.name, bytes)?,
                    None => writer.write_f32(&tensor.name, &values)?,
                }
            }
        }
        progress.advance(1, "");
    }
    writer.finish()?;
    progress.finish();
    Ok(dir.commit()?)
}

/// The source's `config.json` with this project's mark; everything else, `model_type` included, stays.
fn marked_config(source: &Checkpoint, out: &Path) -> Result<Value> {
    let mut config = source.config_json.clone();
    let object = config.as_object_mut().ok_or_else(|| SurgeryError::File {
        path: out.join("config.json"),
        reason: "the source's config.json is not an object".into(),
    })?;
    object.insert("recurformer".into(), json!({"version": MARK_VERSION}));
    Ok(config)
}

fn pretty(json: &Value, out: &Path) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(json)
        .map_err(|e| SurgeryError::File { path: out.to_path_buf(), reason: e.to_string() })?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn copy_companions(source: &Checkpoint, dir: &Path, progress: &mut dyn Progress) -> Result<()> {
    if source.path.is_dir() {
        for name in COMPANIONS {
            let from = source.path.join(name);
            if from.is_file() {
                let io = |e| SurgeryError::Weights(WeightsError::Io { path: from.clone(), source: e });
                fs::copy(&from, dir.join(name)).map_err(io)?;
            }
        }
        return Ok(());
    }
    match source.tokenizer() {
        Ok(tokenizer) => tokenizer.save(dir)?,
        Err(error) => progress.note(&format!("note: the new folder has no tokenizer: {error}")),
    }
    Ok(())
}
