//! `retrieval`: how often a head's strongest attention is on the token of the needle that is to be said next.

use super::needle::{Needle, NeedlePrompt, check_prompts};
use super::{Cost, Criterion, Inputs, Measured, Measurement, Scores, Source};
use crate::error::{Result, SurgeryError};
use kernels::elementwise::dot;
use model::observe::AttnView;
use model::{LayerObserver, Model, Progress, TokenBatch};

pub const CRITERION: Criterion = Criterion {
    name: "retrieval",
    about: "minus the retrieval-head score: share of answer tokens at whose generation the head attends most to that token in the needle; mean over the group's heads",
    cost: Cost::ForwardNeedles,
    measured: Some(Measured { seconds: 43.0, of: "8 prompts of 1,024 tokens" }),
    reference: "Retrieval Head, arXiv 2404.15574",
    source: Source::Needles(measure),
};

fn measure(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Measurement> {
    let heads = head_scores(inputs, progress)?;
    let group_size = inputs.model.config.group_size();
    let mean = |heads: &[f64]| -heads.iter().sum::<f64>() / group_size as f64;
    let groups = heads.iter().map(|layer| layer.chunks_exact(group_size).map(mean).collect()).collect();
    Ok(Measurement { groups, heads: Some(heads) })
}

/// The score of every query head, `[layer][head]`, 0 to 1, mean over the needles. The answers are given, not sampled: the token that is
/// generated at each step is the needle's.
pub fn head_scores(inputs: &Inputs<'_>, progress: &mut dyn Progress) -> Result<Scores> {
    let Inputs { exec, model, prompts, .. } = *inputs;
    check_prompts("retrieval", model, prompts)?;
    let mut hits =
        Hits { model, prompt: &prompts[0], sums: vec![vec![0.0; model.config.heads]; model.config.layers] };
    progress.start("retrieval", prompts.len() as u64, "prompts");
    for prompt in prompts {
        if progress.cancelled() {
            return Err(SurgeryError::Interrupted);
        }
        hits.prompt = prompt;
        model.forward_batch(exec, &TokenBatch::one(&prompt.tokens), &mut hits, None)?;
        progress.advance(1, "");
    }
    progress.finish();
    let needles: usize = prompts.iter().map(|prompt| prompt.needles.len()).sum();
    hits.sums.iter_mut().flatten().for_each(|sum| *sum /= needles as f64);
    Ok(hits.sums)
}

struct Hits<'a> {
    model: &'a Model,
    prompt: &'a NeedlePrompt,
    /// By layer and query head.
    sums: Scores,
}

impl LayerObserver for Hits<'_> {
    fn attention(&mut self, view: AttnView<'_>) {
        let (d, group_size) = (self.model.config.head_dim, self.model.config.group_size());
        let tokens = &self.prompt.tokens;
        for (head, sum) in self.sums[view.layer].iter_mut().enumerate() {
            let (q, k) = (view.q.columns(head * d, d), view.k.columns(head / group_size * d, d));
            for Needle { said, asked, distractor } in &self.prompt.needles {
                let len = distractor.len();
                for at in *asked..asked + len {
                    let query = q.row(at - 1);
                    let scores = (0..at).map(|key| dot(query, k.row(key)));
                    // The softmax keeps the order of the scores.
                    let top = scores.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(key, _)| key);
                    let copies = |key: usize| (*said..said + len).contains(&key) && tokens[key] == tokens[at];
                    if top.is_some_and(copies) {
                        *sum += 1.0 / len as f64;
                    }
                }
            }
        }
    }
}
