//! One plan at lower budgets: the groups that stay converted are a part of those that it converts.

use super::{GroupMixer, HeadPlan};
use crate::error::{ModelError, Result};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// The mark of a checkpoint whose heads were trained together for several budgets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elastic {
    /// Shares of KV groups it was trained for, ascending, 0 to 1.
    pub betas: Vec<f64>,
}

impl Elastic {
    /// Checks that there are betas, ascending and between 0 and 1.
    ///
    /// # Errors
    /// [`ModelError::Plan`] with the list.
    pub fn validate(&self) -> Result<()> {
        let Self { betas } = self;
        let in_range = betas.iter().all(|beta| (0.0..=1.0).contains(beta));
        if betas.is_empty() || !in_range || !betas.is_sorted_by(|a, b| a < b) {
            return Err(ModelError::Plan(format!(
                "elastic betas are {betas:?}, expected different numbers between 0 and 1, smallest first"
            )));
        }
        Ok(())
    }
}

/// Groups that a share `beta` (0 to 1) of `total` groups converts: the nearest number.
pub fn groups_at(beta: f64, total: usize) -> usize {
    (beta * total as f64).round() as usize
}

impl HeadPlan {
    /// This plan at a lower budget: of the groups that it converts, the `round(beta · groups)` of highest score stay converted (ties: lower
    /// layer, lower group first), the others are attention again. Plans at lower betas are nested, and where the scores chose this plan's
    /// groups they are what the scores choose at that beta, floors per layer included. Betas that the plan was trained for and that still fit stay in its
    /// mark.
    ///
    /// # Errors
    /// [`ModelError::Budget`] for a `beta` that is not between 0 and 1 or converts more groups than this plan does, and for a converted group
    /// without a score where there is a choice to make.
    pub fn at_beta(&self, beta: f64) -> Result<Self> {
        let (converted, total) = (self.converted(), self.total());
        let bad = |reason: String| Err(ModelError::Budget { beta, reason });
        if !(0.0..=1.0).contains(&beta) {
            return bad("expected a share between 0 and 1".into());
        }
        let budget = groups_at(beta, total);
        if budget > converted {
            return bad(format!(
                "that is {budget} of {total} groups, and the model converts {converted}\n\
                 hint: at most beta {:.4}; convert the base with a plan for a higher one",
                converted as f64 / total as f64
            ));
        }
        let mut plan = self.clone();
        if budget < converted {
            let mut ranked = Vec::with_capacity(converted);
            for (layer, groups) in self.layers.iter().enumerate() {
                for (group, plan) in groups.groups.iter().enumerate() {
                    match plan.score.filter(|score| score.is_finite()) {
                        _ if plan.mixer == GroupMixer::Attention => {}
                        None if budget > 0 => {
                            return bad(format!(
                                "group {group} of layer {layer} has no score to rank it by\n\
                                 hint: give every converted group of the plan a score, or run the model without a beta"
                            ));
                        }
                        // Adding zero makes -0 and 0 a tie.
                        score => ranked.push((score.unwrap_or_default() + 0.0, layer, group)),
                    }
                }
            }
            // Stable: ties stay in layer and group order.
            ranked.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
            for &(_, layer, group) in &ranked[budget..] {
                plan.layers[layer].groups[group].mixer = GroupMixer::Attention;
            }
        }
        plan.beta = beta;
        plan.mixer = self.mixer.filter(|_| budget > 0);
        plan.elastic = self.elastic.as_ref().and_then(|elastic| {
            let betas: Vec<f64> =
                elastic.betas.iter().copied().filter(|&b| groups_at(b, total) <= budget).collect();
            (!betas.is_empty()).then_some(Elastic { betas })
        });
        Ok(plan)
    }
}
