//! `window-error`: what windowing a group changes in its layer's output, on the base's own inputs; forward only.

use super::window::{WINDOW, show_sinks, window_delta};
use super::{Cost, Criterion, ForwardCriterion, Measured, Scores, Source};
use crate::error::Result;
use kernels::{Exec, MatMut, MatRef, Store, Trans, gemm};
use model::observe::AttnView;
use model::{Model, ModelError};

pub const CRITERION: Criterion = Criterion {
    name: "window-error",
    about: "minus the squared change of the layer's output per token when the group sees the last 64 tokens and the sinks",
    cost: Cost::Forward,
    measured: Some(Measured { seconds: 2.0, of: "1,024 tokens" }),
    reference: "this project",
    source: Source::Forward(start),
};

fn start<'a>(exec: &'a Exec, model: &'a Model) -> Result<Box<dyn ForwardCriterion + 'a>> {
    Ok(Box::new(WindowError::new(exec, model, WINDOW)?))
}

pub struct WindowError<'a> {
    exec: &'a Exec,
    model: &'a Model,
    window: usize,
    /// W_O by layer, `[d_model, heads · head_dim]`.
    out_proj: Vec<&'a [f32]>,
    /// Σ‖W_O Δo‖² by layer and group.
    error: Vec<Vec<f64>>,
}

impl<'a> WindowError<'a> {
    pub fn new(exec: &'a Exec, model: &'a Model, window: usize) -> Result<Self> {
        let config = &model.config;
        let out_proj = (0..config.layers)
            .map(|layer| {
                let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
                let expected = vec![config.d_model, config.heads * config.head_dim];
                match model.params.id(&name) {
                    Some(id) => Ok(model.params.data(id)),
                    None => Err(ModelError::Param { name, expected, found: "nothing".into() }.into()),
                }
            })
            .collect::<Result<_>>()?;
        let error = vec![vec![0.0; config.kv_heads]; config.layers];
        Ok(Self { exec, model, window, out_proj, error })
    }
}

impl ForwardCriterion for WindowError<'_> {
    fn attention(&mut self, view: &AttnView<'_>, sinks: &[Vec<usize>]) {
        let config = &self.model.config;
        let (d_model, seq) = (config.d_model, view.q.rows());
        let (width, group_width) = (config.heads * config.head_dim, config.group_size() * config.head_dim);
        let mut delta = vec![0.0; seq * width];
        window_delta(self.exec, config, self.window, view, &mut delta);
        show_sinks(self.exec, config, self.window, view, sinks, &mut delta);
        let delta = MatRef::dense(&delta, seq, width);
        let out_proj = MatRef::dense(self.out_proj[view.layer], d_model, width);
        let mut change = vec![0.0; seq * d_model];
        for (group, error) in self.error[view.layer].iter_mut().enumerate() {
            gemm(
                self.exec,
                MatMut::dense(&mut change, seq, d_model),
                delta.columns(group * group_width, group_width),
                Trans::No,
                out_proj.columns(group * group_width, group_width),
                Trans::Yes,
                1.0,
                Store::Overwrite,
            );
            *error += kernels::elementwise::dot(&change, &change);
        }
    }

    fn finish(self: Box<Self>, tokens: usize) -> Scores {
        let score = |error: f64| -error / tokens as f64;
        self.error.into_iter().map(|layer| layer.into_iter().map(score).collect()).collect()
    }
}
