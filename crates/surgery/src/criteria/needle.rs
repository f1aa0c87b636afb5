//! Prompts that ask back what they said, as tokens: what the criteria about retrieval look at. Knows positions; knows nothing of text.

use crate::error::{Result, SurgeryError};
use crate::stats::check_base;
use kernels::Exec;
use kernels::loss::cross_entropy;
use model::Model;
use sha2::{Digest, Sha256};

/// A prompt with its answers, everything in one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeedlePrompt {
    /// Token ids of text, questions and answers.
    pub tokens: Vec<u32>,
    /// What is said once and asked back.
    pub needles: Vec<Needle>,
}

/// A run of tokens that stands in the text and again as an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needle {
    /// Position of its first token in the text.
    pub said: usize,
    /// Position of its first token in the answer; it is generated from the position before.
    pub asked: usize,
    /// As many other tokens that could stand in its place.
    pub distractor: Vec<u32>,
}

impl NeedlePrompt {
    /// The positions that generate answer tokens, and these tokens.
    pub(super) fn answers(&self) -> (Vec<usize>, Vec<u32>) {
        let positions = self.needles.iter().flat_map(|n| n.asked..n.asked + n.distractor.len());
        positions.map(|at| (at - 1, self.tokens[at])).unzip()
    }

    /// The tokens with every needle replaced by its distractor in the text; the answers stay.
    pub(super) fn corrupted(&self) -> Vec<u32> {
        let mut tokens = self.tokens.clone();
        for needle in &self.needles {
            tokens[needle.said..needle.said + needle.distractor.len()].copy_from_slice(&needle.distractor);
        }
        tokens
    }

    fn check(&self, index: usize) -> Result<()> {
        let wrong = |what: &str| Err(SurgeryError::Argument(format!("needle prompt {index}: {what}")));
        if self.needles.is_empty() {
            return wrong("it has no needle");
        }
        for Needle { said, asked, distractor } in &self.needles {
            let len = distractor.len();
            if len == 0 {
                return wrong("a needle has no tokens");
            }
            // Sizes come from the caller: no sum may overflow.
            let fits = |at: usize, end: usize| at.checked_add(len).is_some_and(|last| last <= end);
            if !fits(*said, *asked) || !fits(*asked, self.tokens.len()) {
                return wrong("a needle does not stand before its answer, within the tokens");
            }
            if self.tokens[*said..said + len] != self.tokens[*asked..asked + len] {
                return wrong("an answer is not its needle");
            }
            if self.tokens[*said..said + len] == distractor[..] {
                return wrong("a distractor is its needle");
            }
        }
        Ok(())
    }
}

/// Refuses hybrids, missing prompts and prompts that contradict themselves.
pub(super) fn check_prompts(criterion: &str, model: &Model, prompts: &[NeedlePrompt]) -> Result<()> {
    check_base(model)?;
    if prompts.is_empty() {
        return Err(SurgeryError::Argument(format!(
            "criterion `{criterion}` is measured on needle prompts, none was given\nhint: give at least one"
        )));
    }
    prompts.iter().enumerate().try_for_each(|(index, prompt)| prompt.check(index))
}

/// SHA-256 of everything in the prompts.
pub(crate) fn prompts_sha256(prompts: &[NeedlePrompt]) -> String {
    let mut hash = Sha256::new();
    for prompt in prompts {
        hash.update((prompt.tokens.len() as u64).to_le_bytes());
        prompt.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        for Needle { said, asked, distractor } in &prompt.needles {
            for n in [*said, *asked, distractor.len()] {
                hash.update((n as u64).to_le_bytes());
            }
            distractor.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
    }
    format!("{:x}", hash.finalize())
}

/// Some rows of `values` `[rows, width]`.
pub(super) fn gather(values: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|&row| &values[row * width..(row + 1) * width]).copied().collect()
}

/// Mean log-probability (nats) of the answer tokens, from the final hidden states of the whole prompt.
pub(super) fn answer_log_prob(exec: &Exec, model: &Model, prompt: &NeedlePrompt, hidden: &[f32]) -> f64 {
    let (rows, targets) = prompt.answers();
    let logits = model.logits(exec, &gather(hidden, &rows, model.config.d_model));
    let mut nll = vec![0.0; targets.len()];
    cross_entropy(exec, &logits, model.config.vocab, &targets, 1.0, &mut nll, None);
    -nll.iter().map(|&x| f64::from(x)).sum::<f64>() / targets.len() as f64
}
