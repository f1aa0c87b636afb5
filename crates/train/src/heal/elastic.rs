//! Several budgets in one run: which one a step trains for, and how often each had its turn. Knows plans and steps; knows nothing of losses.

use crate::error::Result;
use model::{HeadPlan, Model, ModelError, ResolvedPlan};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The hybrid's plan at every beta of the run.
pub(super) struct Budgets {
    seed: u64,
    /// By ascending beta.
    plans: Vec<(f64, ResolvedPlan)>,
}

impl Budgets {
    /// Prepares `betas`; nothing when there are none.
    ///
    /// # Errors
    /// [`ModelError::Budget`] for a beta that the plan cannot be run at, two that convert the same groups, and a list whose largest leaves
    /// heads of the plan untrained.
    pub fn new(hybrid: &Model, betas: &[f64], seed: u64) -> Result<Option<Self>> {
        let mut plans: Vec<(f64, ResolvedPlan)> = Vec::with_capacity(betas.len());
        for beta in sorted(betas) {
            let plan = hybrid.resolve(hybrid.plan.at_beta(beta)?)?;
            if let Some((other, before)) = plans.last()
                && before.plan().converted() == plan.plan().converted()
            {
                let reason = format!("it converts the same groups as {other}\nhint: name each budget once");
                return Err(ModelError::Budget { beta, reason }.into());
            }
            plans.push((beta, plan));
        }
        let (converted, total) = (hybrid.plan.converted(), hybrid.plan.total());
        match plans.last() {
            Some((beta, largest)) if largest.plan().converted() < converted => Err(ModelError::Budget {
                beta: *beta,
                reason: format!(
                    "the largest of the run converts {} groups and the plan {converted}, whose other heads would never be trained\n\
                     hint: add {} to the betas of the run, or start from a hybrid with a lower one",
                    largest.plan().converted(),
                    share(converted, total)
                ),
            }
            .into()),
            Some(_) => Ok(Some(Self { seed, plans })),
            None => Ok(None),
        }
    }

    /// Refuses a budget without a head, for runs that train nothing else.
    ///
    /// # Errors
    /// [`ModelError::Budget`].
    pub fn check_heads(&self) -> Result<()> {
        match self.plans.first() {
            Some((beta, plan)) if plan.plan().converted() == 0 => {
                let reason =
                    "no group is converted, so there is no head to train\nhint: leave it out, it is the base"
                        .into();
                Err(ModelError::Budget { beta: *beta, reason }.into())
            }
            _ => Ok(()),
        }
    }

    /// The beta of a step, counted from 1.
    pub fn beta(&self, step: u64) -> f64 {
        self.plans[draw(self.seed, self.plans.len(), step)].0
    }

    /// Exchanges the hybrid's plan for that of `step`; done again, it has its own back.
    pub fn swap(&mut self, hybrid: &mut Model, step: u64) {
        let drawn = draw(self.seed, self.plans.len(), step);
        hybrid.swap_plan(&mut self.plans[drawn].1);
    }

    /// The plan of `step`, outside of its two swaps.
    pub fn plan(&self, step: u64) -> &HeadPlan {
        self.plans[draw(self.seed, self.plans.len(), step)].1.plan()
    }

    /// In how many of the first `steps` steps `group` of `layer` is recurrent.
    pub fn turns(&self, steps: u64, (layer, group): (usize, usize)) -> u64 {
        let turns = turns(self.seed, self.plans.len(), steps);
        let converts = self.plans.iter().map(|(_, plan)| plan.plan().is_converted(layer, group));
        turns.into_iter().zip(converts).filter(|(_, converts)| *converts).map(|(turns, _)| turns).sum()
    }
}

/// The betas of a run in ascending order, whatever order they were named in.
pub(super) fn sorted(betas: &[f64]) -> Vec<f64> {
    let mut betas = betas.to_vec();
    betas.sort_by(f64::total_cmp);
    betas
}

/// `part` of `total` with as few digits as give it back.
fn share(part: usize, total: usize) -> String {
    let exact = part as f64 / total as f64;
    (1..17)
        .map(|digits| format!("{exact:.digits$}"))
        .find(|text| text.parse().is_ok_and(|beta| model::plan::groups_at(beta, total) == part))
        .unwrap_or_else(|| exact.to_string())
}

/// Which of `n` has its turn in `step`, counted from 1: every `n` steps are a round in which each has one, in an order drawn for the round.
fn draw(seed: u64, n: usize, step: u64) -> usize {
    let (round, turn) = ((step - 1) / n as u64, (step - 1) % n as u64);
    order(seed, n, round)[turn as usize]
}

fn order(seed: u64, n: usize, round: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Far from the streams of the low-rank factors' starting values.
    rng.set_stream(u64::MAX - round);
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut rng);
    order
}

/// Turns of each of `n` in the first `steps` steps.
fn turns(seed: u64, n: usize, steps: u64) -> Vec<u64> {
    let (rounds, rest) = (steps / n as u64, (steps % n as u64) as usize);
    let mut turns = vec![rounds; n];
    order(seed, n, rounds)[..rest].iter().for_each(|&i| turns[i] += 1);
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_each_once_in_an_order_of_its_own() {
        for (n, seed) in [(1, 0), (2, 7), (3, 0), (5, u64::MAX)] {
            let drawn: Vec<usize> = (1..=60).map(|step| draw(seed, n, step)).collect();
            for round in drawn.chunks(n) {
                let mut round = round.to_vec();
                round.sort_unstable();
                assert_eq!(round, (0..n).collect::<Vec<_>>());
            }
            let orders: std::collections::HashSet<&[usize]> = drawn.chunks(n).collect();
            assert!(orders.len() > 1 || n == 1, "never shuffled");
            for steps in 0..60 {
                let counted: Vec<u64> =
                    (0..n).map(|i| drawn[..steps].iter().filter(|d| **d == i).count() as u64).collect();
                assert_eq!(turns(seed, n, steps as u64), counted);
            }
        }
        let of = |seed| (1..=30).map(|step| draw(seed, 3, step)).collect::<Vec<_>>();
        assert_ne!(of(0), of(1));
    }

    #[test]
    fn shares_are_short() {
        assert_eq!([share(45, 90), share(81, 90), share(1, 3), share(3, 3)], ["0.5", "0.9", "0.3", "1.0"]);
        assert_eq!((share(30, 90), share(29, 90)), ("0.33".into(), "0.32".into()));
    }
}
