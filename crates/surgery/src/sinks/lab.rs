//! One sequence under interventions: strengths of keys, negative log-likelihood and KL over its second half.
//! Knows passes; knows nothing of what their results mean.

use super::measure::{first_query, strengths};
use crate::error::Result;
use kernels::Exec;
use kernels::loss::{cross_entropy, kl_divergence};
use model::observe::AttnView;
use model::{Cut, CutPart, Intervention, LayerObserver, Model};

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 256;
/// Rise of the mean negative log-likelihood, in nats per token, from which a run counts as having broken the model.
pub const MAX_NLL_RISE: f64 = 1.0;

/// A sequence and what the unchanged model makes of it.
pub struct Lab<'a> {
    exec: &'a Exec,
    model: &'a Model,
    tokens: &'a [u32],
    /// Final hidden states of the unchanged pass from [`first_query`] on.
    tail: &'a [f32],
    /// Mean negative log-likelihood of the second half, unchanged.
    pub nll: f64,
}

/// What one changed pass gave.
pub struct Outcome {
    /// Mean negative log-likelihood of the second half, in nats per token.
    pub nll: f64,
    /// Strength of every watched key, by place and key.
    pub strengths: Vec<Vec<f64>>,
}

impl Outcome {
    /// Whether everything measured is a number.
    pub fn is_finite(&self) -> bool {
        self.nll.is_finite() && self.strengths.iter().flatten().all(|s| s.is_finite())
    }
}

impl<'a> Lab<'a> {
    /// `hidden` are the final hidden states `[T, d_model]` of the unchanged pass.
    pub fn new(exec: &'a Exec, model: &'a Model, tokens: &'a [u32], hidden: &'a [f32]) -> Self {
        let tail = &hidden[first_query(tokens.len()) * model.config.d_model..];
        let mut lab = Self { exec, model, tokens, tail, nll: 0.0 };
        lab.nll = lab.mean_nll(tokens, tail);
        lab
    }

    /// The sequence.
    pub fn tokens(&self) -> &'a [u32] {
        self.tokens
    }

    /// Runs the model on `tokens` with `change`; measures the strengths of `keys` in the (layer, head) pairs `places`, which are sorted.
    pub fn run(
        &self,
        tokens: &[u32],
        change: &Intervention,
        places: &[(usize, usize)],
        keys: &[usize],
    ) -> Result<Outcome> {
        let mut watch = Watch { exec: self.exec, model: self.model, places, keys, strengths: Vec::new() };
        let hidden = self.model.forward_changed(self.exec, tokens, change, &mut watch)?;
        let strengths = watch.strengths;
        let tail = &hidden[first_query(tokens.len()) * self.model.config.d_model..];
        Ok(Outcome { nll: self.mean_nll(tokens, tail), strengths })
    }

    /// Whether a run with this negative log-likelihood and these strengths says nothing because the model no longer works.
    pub fn is_broken(&self, outcome: &Outcome) -> bool {
        !outcome.is_finite() || outcome.nll - self.nll > MAX_NLL_RISE
    }

    /// Mean KL per token, of the second half's tokens after `position`, from the unchanged model to the one that no longer gets `part` of it
    /// in the heads `places`.
    pub fn kl_without(&self, position: usize, part: CutPart, places: &[(usize, usize)]) -> Result<f64> {
        let (d_model, vocab) = (self.model.config.d_model, self.model.config.vocab);
        let cut = Cut { position, part, heads: places.to_vec() };
        let change = Intervention { cut: Some(cut), ..Intervention::default() };
        let hidden = self.model.forward_changed(self.exec, self.tokens, &change, &mut model::NoObserver)?;
        let first = first_query(self.tokens.len());
        let from = first.max(position + 1);
        let (base, changed) = (&self.tail[(from - first) * d_model..], &hidden[from * d_model..]);
        let mut sum = 0.0;
        let chunks = base.chunks(LOGIT_ROWS * d_model).zip(changed.chunks(LOGIT_ROWS * d_model));
        for (base, changed) in chunks {
            let (base, changed) = (self.model.logits(self.exec, base), self.model.logits(self.exec, changed));
            let mut kl = vec![0.0; base.len() / vocab];
            kl_divergence(self.exec, &base, &changed, vocab, 0.0, &mut kl, None);
            sum += kl.iter().map(|&kl| f64::from(kl)).sum::<f64>();
        }
        Ok(sum / (self.tokens.len() - from).max(1) as f64)
    }

    /// Of the tokens after the second half's rows `tail`.
    fn mean_nll(&self, tokens: &[u32], tail: &[f32]) -> f64 {
        let (d_model, vocab) = (self.model.config.d_model, self.model.config.vocab);
        let targets = &tokens[first_query(tokens.len()) + 1..];
        let mut sum = 0.0;
        for (targets, hidden) in targets.chunks(LOGIT_ROWS).zip(tail.chunks(LOGIT_ROWS * d_model)) {
            let logits = self.model.logits(self.exec, &hidden[..targets.len() * d_model]);
            let mut nll = vec![0.0; targets.len()];
            cross_entropy(self.exec, &logits, vocab, targets, 0.0, &mut nll, None);
            sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        }
        sum / targets.len().max(1) as f64
    }
}

struct Watch<'a> {
    exec: &'a Exec,
    model: &'a Model,
    places: &'a [(usize, usize)],
    keys: &'a [usize],
    strengths: Vec<Vec<f64>>,
}

impl LayerObserver for Watch<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let config = &self.model.config;
        let (d, group_size) = (config.head_dim, config.group_size());
        let (single, scale) = (self.exec.single(), 1.0 / (d as f32).sqrt());
        let heads: Vec<usize> =
            self.places.iter().filter(|(layer, _)| *layer == view.layer).map(|&(_, head)| head).collect();
        self.strengths.extend(self.exec.parallel_map(heads.len(), |i| {
            let (q, k) = (view.q.columns(heads[i] * d, d), view.k.columns(heads[i] / group_size * d, d));
            strengths(&single, q, k, scale, self.keys)
        }));
    }

    fn wants(&self, layer: usize) -> bool {
        self.places.iter().any(|&(at, _)| at == layer)
    }
}
