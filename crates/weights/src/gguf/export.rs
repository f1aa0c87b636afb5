//! A checkpoint → one GGUF file: which tensor becomes what, then tensor after tensor.
//! A base model's file is llama.cpp's to read as well; a hybrid's is this project's own (see `own`).

use super::describe::{architecture, describe, file_type, rope_factors};
use super::writer::{GgufOut, GgufWriter, MetadataBuilder};
use super::{ROPE_FREQS, gguf_name, is_query_or_key, own, parse};
use crate::config::unsupported;
use crate::error::Result;
#[cfg(doc)]
use crate::error::WeightsError;
use crate::mmap::MappedFile;
use crate::source::Checkpoint;
use crate::stored::RowOrder;
use crate::tokenizer::LlamaCpp;
use half::f16;
use kernels::Exec;
use kernels::quant::{Dtype, dequantize, quantize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(test)]
mod tests;

/// Values converted between two writes, and values per parallel task.
const PIECE: usize = 1 << 22;
const TASK: usize = 1 << 15;
/// llama.cpp's version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;
/// Metadata that describe the old file's bytes, not the model.
const NOT_COPIED: [&str; 6] = [
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "split.count",
    "split.no",
    "split.tensors.count",
];

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportTensor {
    /// Hugging Face name, in the source.
    pub name: String,
    /// Name in the file.
    pub file_name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Element type in the file.
    pub dtype: Dtype,
    order: RowOrder,
}

impl ExportTensor {
    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a GGUF file of a checkpoint will hold.
pub struct Export<'a> {
    source: &'a Checkpoint,
    architecture: &'static str,
    metadata: MetadataBuilder,
    rope_factors: Option<Vec<f32>>,
    tensors: Vec<ExportTensor>,
    notes: Vec<String>,
}

impl<'a> Export<'a> {
    /// Decides everything for matrices stored as `wanted`. Vectors and the small tensors of a hybrid's heads are F32. A row
    /// that is not whole blocks takes [`Dtype::for_row_length`]. Embedding and output projection are at least Q8_0 with types of 4 and 5 bits.
    ///
    /// # Errors
    /// [`WeightsError::Unsupported`] for what llama.cpp does not compute in a base model; [`WeightsError::Io`].
    pub fn plan(source: &'a Checkpoint, wanted: Dtype) -> Result<Self> {
        let config = &source.config;
        let hybrid = source.plan_json.is_some();
        let architecture = if hybrid { own::ARCHITECTURE } else { architecture(config.family) };
        let mut export = Self {
            source,
            architecture,
            metadata: MetadataBuilder::default(),
            rope_factors: if hybrid { None } else { rope_factors(config) },
            tensors: Vec::new(),
            notes: Vec::new(),
        };
        let mut listed = config.tensor_shapes();
        if hybrid {
            let heads = source.tensors.infos().iter().filter(|i| i.name.contains(".self_attn.recurrent."));
            listed.extend(heads.map(|info| (info.name.clone(), info.shape.clone())));
        }
        for (name, shape) in listed {
            let permuted = architecture == "llama" && is_query_or_key(&name);
            let order = match permuted {
                true => RowOrder::Interleaved { head_dim: config.head_dim },
                false => RowOrder::HuggingFace,
            };
            let file_name = if hybrid { Some(name.clone()) } else { gguf_name(&name) };
            let file_name = file_name.expect("every tensor of a configuration has a name in llama.cpp");
            let dtype = stored_as(&name, &shape, wanted);
            export.tensors.push(ExportTensor { name, file_name, shape, dtype, order });
        }
        export.note_types(wanted);
        export.describe(wanted)?;
        Ok(export)
    }

    /// `general.architecture`: llama.cpp's for a base model, this project's for a hybrid.
    pub fn architecture(&self) -> &'static str {
        self.architecture
    }

    /// The tensors in the order in which they must be written.
    pub fn tensors(&self) -> &[ExportTensor] {
        &self.tensors
    }

    /// Element types with the number of their tensors and bytes, largest first.
    pub fn bytes_by_dtype(&self) -> Vec<(Dtype, usize, usize)> {
        let mut totals: Vec<(Dtype, usize, usize)> = Vec::new();
        for tensor in &self.tensors {
            let (block, block_bytes) = tensor.dtype.block();
            let bytes = tensor.values() / block * block_bytes;
            match totals.iter_mut().find(|(dtype, ..)| *dtype == tensor.dtype) {
                Some((_, count, total)) => (*count, *total) = (*count + 1, *total + bytes),
                None => totals.push((tensor.dtype, 1, bytes)),
            }
        }
        totals.sort_by_key(|&(.., bytes)| std::cmp::Reverse(bytes));
        totals
    }

    /// What a person should know: types that were replaced, a tokenizer that llama.cpp does not know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Starts the file `out` under a temporary name.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn create(&self, out: &Path) -> Result<ExportFile<'_>> {
        let mut announced = Vec::with_capacity(self.tensors.len() + 1);
        if let Some(factors) = &self.rope_factors {
            let shape = vec![factors.len()];
            announced.push(GgufOut { name: ROPE_FREQS.to_string(), shape, dtype: Dtype::F32 });
        }
        announced.extend(self.tensors.iter().map(|t| GgufOut {
            name: t.file_name.clone(),
            shape: t.shape.clone(),
            dtype: t.dtype,
        }));
        let mut writer = GgufWriter::create(out, &self.metadata, announced)?;
        if let Some(factors) = &self.rope_factors {
            let bytes: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
            writer.append(ROPE_FREQS, &bytes)?;
        }
        Ok(ExportFile { source: self.source, writer })
    }

    fn describe(&mut self, wanted: Dtype) -> Result<()> {
        let source = self.source;
        let out = &mut self.metadata;
        out.text("general.architecture", self.architecture);
        out.u32("general.file_type", file_type(wanted));
        out.u32("general.quantization_version", QUANTIZATION_VERSION);
        if !source.path.is_dir() {
            let bytes = MappedFile::open(&source.path)?;
            for (key, range) in parse(&bytes, &source.path)?.entries {
                match &source.plan_json {
                    // Not the file's when the checkpoint is exported at a lower budget.
                    Some(plan) if key == own::PLAN_KEY => out.text(own::PLAN_KEY, &plan.to_string()),
                    _ if NOT_COPIED.contains(&key.as_str()) => {}
                    _ => out.copied(&key, &bytes[range]),
                }
            }
            return Ok(());
        }
        if let Some(name) = source.path.file_name() {
            out.text("general.name", &name.to_string_lossy());
        }
        out.u32(own::VERSION_KEY, own::VERSION);
        let mut config_json = source.config_json.clone();
        // generation_config.json may name more of them than config.json.
        config_json["eos_token_id"] = serde_json::json!(source.config.eos_token_ids);
        out.text(own::CONFIG_KEY, &config_json.to_string());
        let llama_cpp = match &source.plan_json {
            Some(plan) => {
                out.text(own::PLAN_KEY, &plan.to_string());
                LlamaCpp::Omitted
            }
            None => {
                describe(&source.config, out)?;
                LlamaCpp::Described { vocab: source.config.vocab }
            }
        };
        let known = match source.tokenizer() {
            Ok(tokenizer) => {
                let known = tokenizer.to_gguf(llama_cpp, out)?;
                if !known && llama_cpp != LlamaCpp::Omitted {
                    self.notes.push(
                        "llama.cpp has no tokenizer like this model's: it will take token ids of this file only"
                            .to_string(),
                    );
                }
                known
            }
            Err(error) => {
                self.notes.push(format!("the file has no tokenizer: {error}"));
                false
            }
        };
        if !known && llama_cpp != LlamaCpp::Omitted {
            out.text("tokenizer.ggml.model", "none");
        }
        Ok(())
    }

    fn note_types(&mut self, wanted: Dtype) {
        let mut replaced: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut requantised = None;
        for tensor in self.tensors.iter().filter(|t| is_matrix(&t.name)) {
            if tensor.dtype != wanted {
                let kind = if is_embedding(&tensor.name) { "embedding and output" } else { "" };
                *replaced.entry((kind, tensor.dtype.name())).or_default() += 1;
            }
            let from = self.source.tensors.info(&tensor.name).map_or(Dtype::F32, |info| info.dtype);
            if !from.is_plain() && from != tensor.dtype && !tensor.dtype.is_plain() {
                requantised = Some(from);
            }
        }
        for ((kind, dtype), count) in replaced {
            self.notes.push(if kind.is_empty() {
                let block = wanted.block().0;
                format!(
                    "{count} matrices whose rows are not whole blocks of {block} values are stored as {dtype}"
                )
            } else {
                format!("{kind} are stored as {dtype}")
            });
        }
        if let Some(from) = requantised {
            self.notes.push(format!(
                "the source is quantised already ({}): quantising it again adds error; better start from F32, F16 or BF16",
                from.name()
            ));
        }
    }
}

/// A GGUF file being written; dropped without [`finish`](Self::finish), it leaves nothing.
pub struct ExportFile<'a> {
    source: &'a Checkpoint,
    writer: GgufWriter,
}

impl ExportFile<'_> {
    /// Converts and writes the next tensor. Bytes of a tensor that has its type already are copied.
    ///
    /// # Errors
    /// [`WeightsError::NonFinite`] for NaN or infinity in the source; [`WeightsError::Unsupported`] for values too
    /// large for the type; [`WeightsError::Io`].
    pub fn write(&mut self, exec: &Exec, tensor: &ExportTensor) -> Result<()> {
        let stored = self.source.tensors.stored(&tensor.name)?;
        stored.check_finite(&tensor.name)?;
        let (block, block_bytes) = tensor.dtype.block();
        let (cols, row_bytes) = (stored.cols, stored.cols / block * block_bytes);
        if row_bytes == 0 {
            return Ok(());
        }
        let (piece, task) = ((PIECE / cols).max(1), (TASK / cols).max(1));
        // Halves and the scales of blocks, which are halves, would saturate.
        let largest =
            if matches!(tensor.dtype, Dtype::F32 | Dtype::BF16) { f32::INFINITY } else { f16::MAX.to_f32() };
        let too_large = AtomicBool::new(false);
        let mut bytes = vec![0; piece.min(stored.rows) * row_bytes];
        for first in (0..stored.rows).step_by(piece) {
            let bytes = &mut bytes[..piece.min(stored.rows - first) * row_bytes];
            exec.parallel_items(bytes.chunks_mut(task * row_bytes).collect(), |i, out| {
                let mut values = vec![0.0; cols];
                for (r, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                    let row = stored.row(tensor.order.hugging_face_row(first + i * task + r));
                    if stored.dtype == tensor.dtype {
                        out.copy_from_slice(row);
                    } else {
                        dequantize(stored.dtype, row, &mut values);
                        if values.iter().any(|v| v.abs() > largest) {
                            too_large.store(true, Ordering::Relaxed);
                        }
                        quantize(tensor.dtype, &values, out);
                    }
                }
            });
            if too_large.load(Ordering::Relaxed) {
                return Err(unsupported(format!(
                    "tensor `{}` as {}, which holds values up to {largest}; this one has larger ones: use f32 or bf16",
                    tensor.name,
                    tensor.dtype.name()
                )));
            }
            self.writer.append(&tensor.file_name, bytes)?;
        }
        Ok(())
    }

    /// Completes the file; returns its size.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; [`WeightsError::Malformed`] when a tensor was not written.
    pub fn finish(self) -> Result<u64> {
        self.writer.finish()
    }
}

fn is_embedding(name: &str) -> bool {
    matches!(name, "model.embed_tokens.weight" | "lm_head.weight")
}

/// Large matrices, which products with activations read whole: all but norms, biases and the small tensors of a hybrid's heads.
fn is_matrix(name: &str) -> bool {
    const PROJECTIONS: [&str; 8] = ["q", "k", "v", "o", "gate", "up", "down", "in"];
    let part = name.strip_suffix("_proj.weight").and_then(|rest| rest.rsplit('.').next());
    is_embedding(name) || part.is_some_and(|part| PROJECTIONS.contains(&part))
}

fn stored_as(name: &str, shape: &[usize], wanted: Dtype) -> Dtype {
    let &[_, cols] = shape else { return Dtype::F32 };
    if !is_matrix(name) {
        return Dtype::F32;
    }
    let few_bits = !wanted.is_plain() && !matches!(wanted, Dtype::Q8_0 | Dtype::Q6K);
    let wanted = if is_embedding(name) && few_bits { Dtype::Q8_0 } else { wanted };
    wanted.for_row_length(cols)
}
