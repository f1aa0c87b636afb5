//! Passes over one sequence with something changed on the way: positions, who sees whom, what a key or value gives. For finding causes.
//! Knows rows and heads; knows nothing of why something is changed.

use super::Model;
use super::parts::Qkv;
use super::tokens::TokenBatch;
use crate::error::{ModelError, Result};
use crate::observe::LayerObserver;
use kernels::attention::{AttnMask, AttnShape, attention};
use kernels::rope::RopeTable;
use kernels::{Exec, MatMut, MatRef};

/// What a pass over one sequence changes; the default changes nothing. Changed tokens are simply given to the pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intervention {
    /// Position code of every token in place of `0..seq`, in any order. Who sees whom follows the order of the tokens all the same.
    pub positions: Option<Vec<usize>>,
    /// A position whose query sees only its own key, in every layer and head.
    pub alone: Option<usize>,
    /// What later queries no longer get from a position.
    pub cut: Option<Cut>,
}

/// A position that gives less to the queries after it; its own query is left as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The position.
    pub position: usize,
    /// What is taken away.
    pub part: CutPart,
    /// The (layer, query head) pairs where it is.
    pub heads: Vec<(usize, usize)>,
}

/// What a [`Cut`] takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutPart {
    /// The key: the other attention weights are normalised anew.
    Key,
    /// The value: the weights stay, the position's share of the output becomes zero.
    Value,
}

/// An [`Intervention`] ready for the layers.
pub(super) struct Edits<'a> {
    intervention: &'a Intervention,
    /// The changed position codes.
    pub turn: Option<RopeTable>,
}

impl Model {
    /// [`forward_batch`](Self::forward_batch) of one sequence under an intervention: the final normed hidden states `[seq, d_model]`. An
    /// empty intervention gives the same bits.
    ///
    /// # Errors
    /// [`ModelError::Intervention`] for a hybrid model and for positions, layers or heads that do not exist; [`ModelError::Token`];
    /// [`ModelError::Context`], for position codes too.
    pub fn forward_changed(
        &self,
        exec: &Exec,
        tokens: &[u32],
        intervention: &Intervention,
        observer: &mut dyn LayerObserver,
    ) -> Result<Vec<f32>> {
        self.check_intervention(tokens.len(), intervention)?;
        let turn = intervention.positions.as_ref().map(|positions| {
            let mut table = RopeTable::new(&self.layout.inv_freq);
            table.set_positions(exec, positions);
            table
        });
        let edits = Edits { intervention, turn };
        self.forward_pass(exec, &TokenBatch::one(tokens), observer, None, (None, Some(&edits)))
    }

    fn check_intervention(&self, seq: usize, intervention: &Intervention) -> Result<()> {
        let bad = |reason: String| Err(ModelError::Intervention(reason));
        let Intervention { positions, alone, cut } = intervention;
        if self.plan.converted() > 0 {
            return bad(format!(
                "the model is a hybrid ({} groups converted); only base models are computed with changes",
                self.plan.converted()
            ));
        }
        if let Some(positions) = positions {
            if positions.len() != seq {
                return bad(format!("{} position codes for {seq} tokens", positions.len()));
            }
            let end = positions.iter().max().map_or(0, |&p| p.saturating_add(1));
            if end > self.context_limit {
                return Err(ModelError::Context { requested: end, limit: self.context_limit });
            }
        }
        for position in alone.iter().chain(cut.iter().map(|cut| &cut.position)) {
            if *position >= seq {
                return bad(format!("position {position} of {seq} tokens"));
            }
        }
        let (layers, heads) = (self.config.layers, self.config.heads);
        let mut places = cut.iter().flat_map(|cut| &cut.heads);
        match places.find(|&&(layer, head)| layer >= layers || head >= heads) {
            Some((layer, head)) => {
                bad(format!("layer {layer} head {head} of {layers} layers with {heads} heads"))
            }
            None => Ok(()),
        }
    }

    /// Changes the head outputs `[seq, heads · head_dim]` of a layer without converted groups.
    pub(super) fn edit_outputs(
        &self,
        exec: &Exec,
        layer: usize,
        edits: &Edits<'_>,
        qkv: &Qkv,
        out: &mut [f32],
    ) {
        let (d, heads) = (self.config.head_dim, self.config.heads);
        let (group_size, width) = (self.config.group_size(), heads * d);
        let rows = out.len() / width;
        if let Some(cut) = &edits.intervention.cut {
            for &(_, head) in cut.heads.iter().filter(|&&(at, _)| at == layer) {
                let columns = |x, width, head| MatRef::dense(x, rows, width).columns(head * d, d);
                let kv_width = self.config.kv_heads * d;
                let (q, kv_head) = (columns(&qkv.q, width, head), head / group_size);
                let (k, v) = (columns(&qkv.k, kv_width, kv_head), columns(&qkv.v, kv_width, kv_head));
                let shape = AttnShape { q_heads: 1, kv_heads: 1, ..self.attn_shape(heads / group_size) };
                let changed = cut_head(exec, shape, cut, q, k, v);
                for t in cut.position + 1..rows {
                    out[t * width + head * d..][..d].copy_from_slice(&changed[t * d..][..d]);
                }
            }
        }
        // One key has the whole weight, so its value is the output.
        if let Some(t) = edits.intervention.alone {
            for (head, out) in out[t * width..][..width].chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&qkv.v[(t * heads / group_size + head / group_size) * d..][..d]);
            }
        }
    }
}

/// Outputs `[seq, head_dim]` of one head without a position's key, or without its value. Rows up to the position mean nothing.
fn cut_head(
    exec: &Exec,
    shape: AttnShape,
    cut: &Cut,
    q: MatRef<'_>,
    k: MatRef<'_>,
    v: MatRef<'_>,
) -> Vec<f32> {
    let (seq, d) = (q.rows(), shape.head_dim);
    let mut out = vec![0.0; seq * d];
    let target = MatMut::dense(&mut out, seq, d);
    match cut.part {
        CutPart::Key => {
            let kv_pos: Vec<usize> = (0..seq).filter(|&j| j != cut.position).collect();
            let without = |x: MatRef<'_>| kv_pos.iter().flat_map(|&j| x.row(j).to_vec()).collect::<Vec<_>>();
            let (k, v) = (without(k), without(v));
            let (k, v) = (MatRef::dense(&k, seq - 1, d), MatRef::dense(&v, seq - 1, d));
            let mask = AttnMask::Local { q_pos0: 0, kv_pos: &kv_pos, window: seq, sinks: 0 };
            attention(exec, shape, mask, q, k, v, target, None);
        }
        CutPart::Value => {
            let mut v = v.to_dense();
            v[cut.position * d..][..d].fill(0.0);
            let v = MatRef::dense(&v, seq, d);
            attention(exec, shape, AttnMask::Causal { q_pos0: 0 }, q, k, v, target, None);
        }
    }
    out
}
