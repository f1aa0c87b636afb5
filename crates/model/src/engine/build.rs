//! Weights → packed layers, once. Knows names, plans and stored types; does no arithmetic on activations.

use super::layer::{Block, ConvertedGroup, Kept, Layer, Segment};
use crate::error::{ModelError, Result};
use crate::mixers::{HeadLayout, HeadView, ProjectionSource, StepWeights};
use crate::model::head_tensor_name;
use crate::plan::HeadPlan;
use kernels::Exec;
use kernels::packed::{Packed, Rows};
use kernels::quant::Dtype;
use weights::{ModelConfig, StoredTensor};

/// Where a model's tensors come from, by Hugging Face name. Names and shapes were checked.
pub(super) trait Source {
    /// A matrix, not dequantised.
    fn stored(&self, name: &str) -> Result<StoredTensor<'_>>;
    /// Any tensor as f32.
    fn values(&self, name: &str) -> Result<Vec<f32>>;
}

/// Matrices with at most this many rows, the rates of recurrent heads, are never quantised: they decide over whole states, and cost nothing.
const SMALL_ROWS: usize = 16;

/// Rows of one tensor that become a block of a segment.
struct Part {
    name: String,
    rows: Vec<u32>,
    bias: Option<Vec<f32>>,
}

/// Packs the tensors of one source, in a wanted type.
pub(super) struct Builder<'a> {
    pub exec: &'a Exec,
    pub source: &'a dyn Source,
    pub config: &'a ModelConfig,
    pub plan: &'a HeadPlan,
    pub head: Option<HeadLayout>,
    /// Type of all large matrices; as stored when absent.
    pub wanted: Option<Dtype>,
}

impl Builder<'_> {
    /// One whole matrix.
    pub fn matrix(&self, name: &str, wanted: Option<Dtype>) -> Result<Packed> {
        let stored = self.source.stored(name)?;
        let rows: Vec<u32> = (0..stored.rows as u32).collect();
        let dtype = self.target(&stored, rows.len(), wanted);
        self.pack(dtype, &[(name, stored, rows)])
    }

    /// The embedding, or an output projection of its own. Four and five bits are too few for it: it then has eight.
    pub fn table(&self, name: &str) -> Result<Packed> {
        let few = [Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q4K, Dtype::Q5K];
        self.matrix(name, self.wanted.map(|w| if few.contains(&w) { Dtype::Q8_0 } else { w }))
    }

    fn target(&self, stored: &StoredTensor<'_>, rows: usize, wanted: Option<Dtype>) -> Dtype {
        match wanted {
            _ if rows <= SMALL_ROWS => Dtype::F32,
            Some(dtype) => dtype.for_row_length(stored.cols),
            None => stored.dtype,
        }
    }

    fn pack(&self, dtype: Dtype, parts: &[(&str, StoredTensor<'_>, Vec<u32>)]) -> Result<Packed> {
        for (name, stored, _) in parts {
            stored.check_finite(name)?;
        }
        let (names, cols) = (parts.iter().map(|(name, ..)| *name), parts[0].1.cols);
        let ids: Vec<Vec<u32>> = parts
            .iter()
            .map(|(_, stored, rows)| {
                rows.iter().map(|&r| stored.row_order.stored_row(r as usize) as u32).collect()
            })
            .collect();
        let rows: Vec<Rows<'_>> = parts
            .iter()
            .zip(&ids)
            .map(|((_, stored, _), ids)| Rows {
                dtype: stored.dtype,
                bytes: stored.bytes,
                cols: stored.cols,
                ids,
            })
            .collect();
        Packed::pack(self.exec, dtype, cols, &rows).map_err(|error| ModelError::Param {
            name: names.collect::<Vec<_>>().join("`, `"),
            expected: vec![rows.iter().map(|r| r.ids.len()).sum(), cols],
            found: error.to_string(),
        })
    }

    /// Everything of layer `l`.
    pub fn layer(&self, l: usize) -> Result<Layer> {
        let config = self.config;
        let (group_size, head_dim) = (config.group_size(), config.head_dim);
        let d_inner = group_size * head_dim;
        let name = |tensor: &str| format!("model.layers.{l}.{tensor}");
        let kept: Vec<usize> = (0..config.kv_heads).filter(|&g| !self.plan.is_converted(l, g)).collect();
        let converted: Vec<usize> = (0..config.kv_heads).filter(|&g| self.plan.is_converted(l, g)).collect();

        let base = |kind: &str, groups: &[usize], per_group: usize| -> Result<Part> {
            let rows: Vec<u32> =
                groups.iter().flat_map(|&g| (g * per_group) as u32..((g + 1) * per_group) as u32).collect();
            let bias = match config.qkv_bias {
                true => {
                    let all = self.source.values(&name(&format!("self_attn.{kind}.bias")))?;
                    Some(rows.iter().map(|&r| all[r as usize]).collect())
                }
                false => None,
            };
            Ok(Part { name: name(&format!("self_attn.{kind}.weight")), rows, bias })
        };
        let mut parts = Vec::new();
        if !kept.is_empty() {
            parts.push(base("q_proj", &kept, d_inner)?);
            parts.push(base("k_proj", &kept, head_dim)?);
            parts.push(base("v_proj", &kept, head_dim)?);
        }
        for &group in &converted {
            let layout = self.head.expect("a converted group has a layout");
            for info in layout.projections() {
                parts.push(match info.source {
                    ProjectionSource::BaseQuery => base("q_proj", &[group], d_inner)?,
                    ProjectionSource::BaseKey => base("k_proj", &[group], head_dim)?,
                    ProjectionSource::BaseValue => base("v_proj", &[group], head_dim)?,
                    ProjectionSource::Own { weight, bias, first_row } => Part {
                        name: head_tensor_name(l, group, weight),
                        rows: (first_row as u32..(first_row + info.rows) as u32).collect(),
                        bias: bias.map(|b| self.source.values(&head_tensor_name(l, group, b))).transpose()?,
                    },
                });
            }
        }
        let (segments, blocks) = self.segments(parts)?;
        let mut blocks = blocks.into_iter();
        let mut next = || blocks.next().expect("a block for every part");
        let kept = match kept.is_empty() {
            true => None,
            false => Some(Kept {
                q: next(),
                k: next(),
                v: next(),
                out_columns: kept.iter().map(|g| g * d_inner).collect(),
            }),
        };
        let converted = converted
            .into_iter()
            .map(|group| {
                let layout = self.head.expect("a converted group has a layout");
                let tensors = self.small_tensors(l, group, &layout)?;
                let view = HeadView { values: tensors.iter().map(Vec::as_slice).collect() };
                Ok(ConvertedGroup {
                    group,
                    blocks: layout.projections().iter().map(|_| next()).collect(),
                    step: StepWeights::new(layout, &view),
                    tensors,
                })
            })
            .collect::<Result<_>>()?;
        let qk_norm = |tensor: &str| match config.qk_norm {
            true => self.source.values(&name(tensor)).map(Some),
            false => Ok(None),
        };
        let matrix = |tensor: &str| self.matrix(&name(tensor), self.wanted);
        Ok(Layer {
            input_norm: self.source.values(&name("input_layernorm.weight"))?,
            segments,
            kept,
            converted,
            q_norm: qk_norm("self_attn.q_norm.weight")?,
            k_norm: qk_norm("self_attn.k_norm.weight")?,
            o: matrix("self_attn.o_proj.weight")?,
            post_norm: self.source.values(&name("post_attention_layernorm.weight"))?,
            gate: matrix("mlp.gate_proj.weight")?,
            up: matrix("mlp.up_proj.weight")?,
            down: matrix("mlp.down_proj.weight")?,
        })
    }

    /// A segment for every type among `parts`, with the parts one after another, and where each part is.
    fn segments(&self, parts: Vec<Part>) -> Result<(Vec<Segment>, Vec<Block>)> {
        let mut stored = Vec::with_capacity(parts.len());
        let mut dtypes: Vec<Dtype> = Vec::new();
        for part in &parts {
            let matrix = self.source.stored(&part.name)?;
            let dtype = self.target(&matrix, part.rows.len(), self.wanted);
            if !dtypes.contains(&dtype) {
                dtypes.push(dtype);
            }
            stored.push((dtype, matrix));
        }
        let mut widths = vec![0; dtypes.len()];
        let mut biases: Vec<Option<Vec<f32>>> = vec![None; dtypes.len()];
        let mut groups: Vec<Vec<(&str, StoredTensor<'_>, Vec<u32>)>> =
            dtypes.iter().map(|_| Vec::new()).collect();
        let mut blocks = Vec::with_capacity(parts.len());
        for (part, (dtype, matrix)) in parts.iter().zip(stored) {
            let segment = dtypes.iter().position(|&d| d == dtype).expect("collected above");
            let (column, rows) = (widths[segment], part.rows.len());
            if let Some(bias) = &part.bias {
                let all = biases[segment].get_or_insert_default();
                all.resize(column, 0.0);
                all.extend_from_slice(bias);
            }
            blocks.push(Block { segment, column, width: rows });
            widths[segment] += rows;
            groups[segment].push((&part.name, matrix, part.rows.clone()));
        }
        let mut segments = Vec::with_capacity(dtypes.len());
        for (((dtype, group), mut bias), width) in dtypes.into_iter().zip(&groups).zip(biases).zip(widths) {
            if let Some(bias) = &mut bias {
                bias.resize(width, 0.0);
            }
            segments.push(Segment { weight: self.pack(dtype, group)?, bias });
        }
        Ok((segments, blocks))
    }

    /// The tensors of a converted group in the layout's order, those that are projections of the layer's input left empty.
    fn small_tensors(&self, l: usize, group: usize, layout: &HeadLayout) -> Result<Vec<Vec<f32>>> {
        let projected: Vec<&str> = layout
            .projections()
            .iter()
            .flat_map(|info| match info.source {
                ProjectionSource::Own { weight, bias, .. } => [Some(weight), bias],
                _ => [None, None],
            })
            .flatten()
            .collect();
        layout
            .tensors()
            .iter()
            .map(|tensor| match projected.contains(&tensor.name) {
                true => Ok(Vec::new()),
                false => self.source.values(&head_tensor_name(l, group, tensor.name)),
            })
            .collect()
    }
}
