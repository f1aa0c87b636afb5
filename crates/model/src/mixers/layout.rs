//! Which tensors a converted group has, in which order and shape, and how a flat list of them gets its names.

use super::merged::DroppedSums;
use super::{HeadCache, HeadDims, HeadLayout, HeadTensorInfo, HeadTensors, TensorClass};
use crate::plan::{Dropped, MixerSpec, RecurrentKind};
use kernels::kv::KvType;
use weights::ModelConfig;

impl HeadLayout {
    /// The layout of any group of a model under `spec`.
    pub fn new(spec: MixerSpec, config: &ModelConfig) -> Self {
        let dims = HeadDims {
            d_model: config.d_model,
            q_heads: config.group_size(),
            head_dim: config.head_dim,
            qkv_bias: config.qkv_bias,
        };
        Self { spec, dims }
    }

    /// The group's tensors in order; empty for [`RecurrentKind::None`].
    pub fn tensors(&self) -> Vec<HeadTensorInfo> {
        match self.spec.recurrent {
            RecurrentKind::None => Vec::new(),
            RecurrentKind::Mamba => self.mamba_tensors(),
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => self.qkv_tensors(),
        }
    }

    /// Zeroed tensors (for gradients and moments).
    pub fn zeros(&self) -> HeadTensors {
        HeadTensors { values: self.tensors().iter().map(|t| vec![0.0; t.shape.iter().product()]).collect() }
    }

    /// An empty f32 cache for one sequence.
    pub fn new_cache(&self) -> HeadCache {
        HeadCache::new(self, KvType::F32)
    }

    /// An empty cache beside an attention cache of this type.
    pub fn new_cache_beside(&self, kv_type: KvType) -> HeadCache {
        HeadCache::new(self, kv_type)
    }

    /// Constant cache bytes of one group beside an attention cache of this type: f32 conv tails and state, ring of keys and values, and f32 sums of
    /// the dropped ones where they are averaged.
    pub fn cache_bytes(&self, kv_type: KvType) -> usize {
        let tails: usize = self.tail_lens().iter().sum();
        let ring = 2 * self.ring_entries() * self.dims.head_dim;
        let per_value = if kv_type == KvType::F32 { 4 } else { 2 };
        let dropped = match self.spec.dropped {
            Dropped::Forgotten | Dropped::Weighed => 0,
            Dropped::Averaged => DroppedSums::bytes_for(self.dims.head_dim),
        };
        (tails + self.state_len()) * size_of::<f32>() + ring * per_value + dropped
    }

    /// Values per token that a window needs rotated, queries and keys; 0 without a window.
    pub fn rotated_width(&self) -> usize {
        if self.has_local() { self.d_inner() + self.dims.head_dim } else { 0 }
    }

    /// Width of the group's output and of a Mamba block, `G·D`.
    pub fn d_inner(&self) -> usize {
        self.dims.q_heads * self.dims.head_dim
    }

    /// Rank `R` of Mamba's Δ projection.
    pub fn dt_rank(&self) -> usize {
        self.dims.d_model.div_ceil(16)
    }

    /// Rows of `dt_proj` (decays per token) of the attention-initialised mixers.
    pub(super) fn decays(&self) -> usize {
        match self.spec.recurrent {
            RecurrentKind::GatedDelta => 1,
            _ => self.dims.q_heads,
        }
    }

    /// Values of each conv tail: q, k, v, or Mamba's one.
    pub(super) fn tail_lens(&self) -> Vec<usize> {
        let rows = self.spec.d_conv.saturating_sub(1);
        let head_dim = self.dims.head_dim;
        match self.spec.recurrent {
            RecurrentKind::None => Vec::new(),
            RecurrentKind::Mamba => vec![rows * self.d_inner()],
            RecurrentKind::Mamba2 | RecurrentKind::GatedDelta => {
                vec![rows * self.d_inner(), rows * head_dim, rows * head_dim]
            }
        }
    }

    /// Values of the recurrent state.
    pub(super) fn state_len(&self) -> usize {
        let HeadDims { q_heads, head_dim, .. } = self.dims;
        match self.spec.recurrent {
            RecurrentKind::None => 0,
            RecurrentKind::Mamba => self.d_inner() * self.spec.d_state,
            RecurrentKind::Mamba2 => q_heads * head_dim * head_dim,
            RecurrentKind::GatedDelta => head_dim * head_dim,
        }
    }

    /// Tokens that the local part remembers.
    pub(super) fn ring_entries(&self) -> usize {
        if self.has_local() { self.spec.window + self.spec.sinks } else { 0 }
    }

    /// Whether there is a local softmax part.
    pub(super) fn has_local(&self) -> bool {
        self.spec.window > 0
    }

    /// Whether the recurrence is weighed against the window.
    pub(crate) fn weighs(&self) -> bool {
        self.spec.dropped == Dropped::Weighed
    }

    fn qkv_tensors(&self) -> Vec<HeadTensorInfo> {
        let HeadDims { d_model, q_heads, head_dim, qkv_bias } = self.dims;
        let (d_inner, d_conv, decays) = (self.d_inner(), self.spec.d_conv, self.decays());
        let mut list = vec![
            projection("q_proj.weight", &[d_inner, d_model]),
            projection("k_proj.weight", &[head_dim, d_model]),
            projection("v_proj.weight", &[head_dim, d_model]),
        ];
        if qkv_bias {
            list.push(projection("q_proj.bias", &[d_inner]));
            list.push(projection("k_proj.bias", &[head_dim]));
            list.push(projection("v_proj.bias", &[head_dim]));
        }
        list.push(new("q_conv.weight", &[d_inner, d_conv]));
        list.push(new("k_conv.weight", &[head_dim, d_conv]));
        list.push(new("v_conv.weight", &[head_dim, d_conv]));
        list.push(new("dt_proj.weight", &[decays, d_model]));
        list.push(new("dt_proj.bias", &[decays]));
        if self.spec.recurrent == RecurrentKind::Mamba2 {
            list.push(new("in_scale.weight", &[decays, d_model]));
            list.push(new("in_scale.bias", &[decays]));
            list.push(new("d_skip", &[q_heads]));
        } else {
            list.push(new("beta_proj.weight", &[decays, d_model]));
            list.push(new("beta_proj.bias", &[decays]));
        }
        list.push(new("gate_proj.weight", &[d_inner, d_model]));
        list.push(new("out_gain", &[d_inner]));
        if self.weighs() {
            list.push(new("far_proj.weight", &[q_heads, d_model]));
            list.push(new("far_proj.bias", &[q_heads]));
            list.push(new("far_count", &[q_heads]));
        }
        list
    }

    fn mamba_tensors(&self) -> Vec<HeadTensorInfo> {
        let (d_model, d_inner, rank) = (self.dims.d_model, self.d_inner(), self.dt_rank());
        let MixerSpec { d_state, d_conv, .. } = self.spec;
        vec![
            new("in_proj.weight", &[2 * d_inner, d_model]),
            new("conv.weight", &[d_inner, d_conv]),
            new("conv.bias", &[d_inner]),
            new("x_proj.weight", &[rank + 2 * d_state, d_inner]),
            new("dt_proj.weight", &[d_inner, rank]),
            new("dt_proj.bias", &[d_inner]),
            new("A_log", &[d_inner, d_state]),
            new("D", &[d_inner]),
        ]
    }
}

fn projection(name: &'static str, shape: &[usize]) -> HeadTensorInfo {
    HeadTensorInfo { name, shape: shape.to_vec(), class: TensorClass::Projection }
}

fn new(name: &'static str, shape: &[usize]) -> HeadTensorInfo {
    HeadTensorInfo { name, shape: shape.to_vec(), class: TensorClass::New }
}

/// The tensors of `mamba2` and `gated-delta` by name; `T` is a shared or mutable slice.
pub(super) struct QkvTensors<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub q_bias: Option<T>,
    pub k_bias: Option<T>,
    pub v_bias: Option<T>,
    pub q_conv: T,
    pub k_conv: T,
    pub v_conv: T,
    pub dt: T,
    pub dt_bias: T,
    /// `in_scale` or `beta_proj`.
    pub input: T,
    pub input_bias: T,
    /// `mamba2` only.
    pub d_skip: Option<T>,
    pub gate: T,
    pub gain: T,
    pub far: Option<FarTensors<T>>,
}

/// What estimates the weight of dropped tokens.
pub(super) struct FarTensors<T> {
    pub proj: T,
    pub bias: T,
    pub count: T,
}

impl<T> QkvTensors<T> {
    /// Names the tensors of `layout`, given in order. Panics when their number is wrong.
    pub fn new(layout: &HeadLayout, tensors: impl IntoIterator<Item = T>) -> Self {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().expect("a head has the number of tensors its layout lists");
        let (q, k, v) = (next(), next(), next());
        let biased = layout.dims.qkv_bias;
        let named = Self {
            q,
            k,
            v,
            q_bias: biased.then(&mut next),
            k_bias: biased.then(&mut next),
            v_bias: biased.then(&mut next),
            q_conv: next(),
            k_conv: next(),
            v_conv: next(),
            dt: next(),
            dt_bias: next(),
            input: next(),
            input_bias: next(),
            d_skip: (layout.spec.recurrent == RecurrentKind::Mamba2).then(&mut next),
            gate: next(),
            gain: next(),
            far: layout.weighs().then(|| FarTensors { proj: next(), bias: next(), count: next() }),
        };
        assert!(tensors.next().is_none(), "more tensors than the head's layout lists");
        named
    }
}

/// The tensors of `mamba` by name; `T` is a shared or mutable slice.
pub(super) struct MambaTensors<T> {
    pub in_proj: T,
    pub conv: T,
    pub conv_bias: T,
    pub x_proj: T,
    pub dt: T,
    pub dt_bias: T,
    pub a_log: T,
    pub d: T,
}

impl<T> MambaTensors<T> {
    /// Names the tensors, given in order. Panics when their number is wrong.
    pub fn new(tensors: impl IntoIterator<Item = T>) -> Self {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().expect("a Mamba head has eight tensors");
        let named = Self {
            in_proj: next(),
            conv: next(),
            conv_bias: next(),
            x_proj: next(),
            dt: next(),
            dt_bias: next(),
            a_log: next(),
            d: next(),
        };
        assert!(tensors.next().is_none(), "a Mamba head has eight tensors");
        named
    }
}
