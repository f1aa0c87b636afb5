//! The backward pass through converted groups.

use super::super::tokens::{RoundedSequences, rows_of};
use super::{Model, Pass, TokenBatch, add};
use crate::mixers::{self, BaseGroupGrads, HeadTensors, LayerInput};
use crate::params::{Grads, ParamId};
use crate::plan::RecurrentKind;
use kernels::elementwise::axpy;
use kernels::packed::Uses;
use kernels::{Exec, MatMut, MatRef};
use std::ops::Range;

/// Gradients of one (group, sequence) of a converted group.
struct HeadJob {
    tensors: Option<HeadTensors>,
    base: BaseGroupGrads,
    dx: Option<Vec<f32>>,
}

impl Model {
    /// Converted groups: every (group, sequence) on its own thread, as many at a time as have the rows of one longest sequence per thread;
    /// summed in order, so that the result does not depend on their timing.
    pub(super) fn converted_backward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        x: &[f32],
        dout: &[f32],
        grads: &mut Grads,
        mut dx: Option<&mut Vec<f32>>,
        forms: &mut RoundedSequences,
    ) {
        let Pass { exec, batch, memory, .. } = *pass;
        let (sequences, d_model) = (batch.sequences(), self.config.d_model);
        let ids = &self.layout.layers[layer];
        let saved = &memory.saved;
        assert_eq!(saved.len(), ids.converted.len() * sequences, "the tape was filled under another plan");
        let need_dx = dx.is_some();
        // Groups of which nobody needs anything are left out.
        let base_wanted = self.base_grads(layer, grads).any_wanted();
        let groups: Vec<usize> = (0..ids.converted.len())
            .filter(|&i| {
                let group = ids.converted[i];
                need_dx || base_wanted || ids.heads[group].iter().any(|&id| grads.wants(id))
            })
            .collect();
        let jobs = groups.len() * sequences;
        let inner = if jobs == 1 { exec.clone() } else { exec.single() };
        if jobs > 0 {
            forms.set(exec, MatRef::dense(x, batch.rows(), d_model), batch, Uses::Both);
        }
        let mut start = 0;
        while start < jobs {
            let wave = wave(exec, batch, start..jobs);
            let done = exec.parallel_map(wave, |i| {
                let (index, s) = (groups[(start + i) / sequences], (start + i) % sequences);
                let saved = &saved[index * sequences + s];
                self.head_backward(
                    &inner,
                    layer,
                    ids.converted[index],
                    LayerInput { values: rows_of(x, batch.range(s), d_model), shared: forms.get(s) },
                    saved,
                    rows_of(dout, batch.range(s), self.config.heads * self.config.head_dim),
                    grads,
                    need_dx,
                )
            });
            for (i, job) in done.into_iter().enumerate() {
                let (index, s) = (groups[(start + i) / sequences], (start + i) % sequences);
                if let (Some(dx), Some(from)) = (dx.as_deref_mut(), &job.dx) {
                    let rows = batch.range(s);
                    axpy(exec, 1.0, from, &mut dx[rows.start * d_model..rows.end * d_model]);
                }
                self.add_head_grads(layer, ids.converted[index], &job, grads);
            }
            start += wave;
        }
    }

    #[allow(clippy::too_many_arguments, reason = "private; one job of converted_backward")]
    fn head_backward(
        &self,
        exec: &Exec,
        layer: usize,
        group: usize,
        x: LayerInput<'_>,
        saved: &mixers::HeadSaved,
        dout: MatRef<'_>,
        grads: &Grads,
        need_dx: bool,
    ) -> HeadJob {
        let env = self.head_env(layer, group).expect("a converted group has a layout");
        let per_group = self.config.group_size() * self.config.head_dim;
        let seq = dout.rows();
        let trained = self.head_param_ids(layer, group).iter().any(|&id| grads.wants(id));
        let mut job = HeadJob {
            tensors: trained.then(|| env.layout.zeros()),
            base: self.base_grads(layer, grads),
            dx: need_dx.then(|| vec![0.0; seq * self.config.d_model]),
        };
        let dout = dout.columns(group * per_group, per_group);
        let base = job.base.any_wanted().then_some(&mut job.base);
        let dx = job.dx.as_mut().map(|dx| MatMut::dense(dx, seq, self.config.d_model));
        mixers::backward(exec, &env, x, saved, dout, job.tensors.as_mut(), dx, base);
        job
    }

    /// Zeroed gradients of those base tensors that are trainable and that a converted group of this plan reads.
    fn base_grads(&self, layer: usize, grads: &Grads) -> BaseGroupGrads {
        let Some(head) = self.layout.head.filter(|head| head.spec.window > 0) else {
            return BaseGroupGrads::default();
        };
        let ids = &self.layout.layers[layer];
        let (d_model, d) = (self.config.d_model, self.config.head_dim);
        let q_rows = self.config.group_size() * d;
        let wanted = |id: Option<ParamId>, len| id.filter(|&id| grads.wants(id)).map(|_| vec![0.0; len]);
        // The local part of mamba2 and gated-delta reads the head's own projections, but the base's norms.
        let projections = matches!(head.spec.recurrent, RecurrentKind::None | RecurrentKind::Mamba);
        let projection = |id: Option<ParamId>, len| wanted(id.filter(|_| projections), len);
        BaseGroupGrads {
            q_proj: projection(Some(ids.q), q_rows * d_model),
            k_proj: projection(Some(ids.k), d * d_model),
            v_proj: projection(Some(ids.v), d * d_model),
            q_bias: projection(ids.q_bias, q_rows),
            k_bias: projection(ids.k_bias, d),
            v_bias: projection(ids.v_bias, d),
            q_norm: wanted(ids.q_norm, d),
            k_norm: wanted(ids.k_norm, d),
        }
    }

    /// Adds one job's gradients of the head's own and the base's tensors.
    fn add_head_grads(&self, layer: usize, group: usize, job: &HeadJob, grads: &mut Grads) {
        let ids = &self.layout.layers[layer];
        if let Some(HeadTensors { values }) = &job.tensors {
            for (&id, from) in ids.heads[group].iter().zip(values) {
                if let Some(to) = grads.get_mut(id) {
                    add(from, to);
                }
            }
        }
        let base = &job.base;
        let blocks = [
            (Some(ids.q), &base.q_proj),
            (Some(ids.k), &base.k_proj),
            (Some(ids.v), &base.v_proj),
            (ids.q_bias, &base.q_bias),
            (ids.k_bias, &base.k_bias),
            (ids.v_bias, &base.v_bias),
        ];
        for (id, from) in blocks {
            if let (Some(to), Some(from)) = (id.and_then(|id| grads.get_mut(id)), from) {
                add(from, &mut to[group * from.len()..(group + 1) * from.len()]);
            }
        }
        for (id, from) in [(ids.q_norm, &base.q_norm), (ids.k_norm, &base.k_norm)] {
            if let (Some(to), Some(from)) = (id.and_then(|id| grads.get_mut(id)), from) {
                add(from, to);
            }
        }
    }
}

/// How many of `jobs`, which go through the sequences again and again, run together: their results are in memory until all are done.
fn wave(exec: &Exec, batch: &TokenBatch, jobs: Range<usize>) -> usize {
    let most = exec.threads().max(1) * batch.longest();
    let rows = jobs.scan(0, |rows, job| {
        *rows += batch.range(job % batch.sequences()).len();
        Some(*rows)
    });
    rows.take_while(|&rows| rows <= most).count()
}

impl BaseGroupGrads {
    /// Whether any member is wanted.
    fn any_wanted(&self) -> bool {
        let Self { q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm } = self;
        [q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm].iter().any(|g| g.is_some())
    }
}
