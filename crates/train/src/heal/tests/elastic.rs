//! Runs for several budgets: what a step touches, what it computes, how often each budget comes, and that it resumes to the bit.

use super::*;

pub(super) const BETAS: [f64; 3] = [0.25, 0.5, 1.0];

/// Everything converted; best to worst: (1, 0), (0, 1), (0, 0), (1, 1).
pub(super) fn wide(base: &Model) -> Model {
    let spec = spec(RecurrentKind::Mamba2);
    let mut plan = HeadPlan::empty(&base.config);
    (plan.mixer, plan.beta) = (Some(spec), 1.0);
    for (layer, scores) in plan.layers.iter_mut().zip([[1.0, 2.0], [3.0, 0.0]]) {
        for (group, score) in layer.groups.iter_mut().zip(scores) {
            (group.mixer, group.score) = (GroupMixer::Recurrent, Some(score));
        }
    }
    let bank = fresh_bank(base, spec, 11);
    base.with_plan(plan, &mut |l, g| Ok(bank.groups[l][g].clone())).unwrap()
}

/// The same heads under the plan of `beta`, in a model of its own.
fn narrow(base: &Model, wide: &Model, beta: f64) -> Model {
    let plan = wide.plan.at_beta(beta).unwrap();
    base.with_plan(plan, &mut |l, g| Ok(wide.head_tensors(l, g).unwrap())).unwrap()
}

fn elastic(dir: &Path, steps: u64, trainable: Trainable) -> HealOptions {
    HealOptions { elastic: BETAS.to_vec(), trainable, seed: 3, ..options(dir, steps) }
}

fn batches(data: &mut SequenceStream) -> Vec<TokenBatch> {
    (0..2).map(|_| data.next_batch(1)).collect()
}

#[test]
fn a_step_touches_the_groups_of_its_budget_only() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    let mut hybrid = wide(&base);
    let options = elastic(Path::new(""), 12, Trainable::HeadsAndNorms);
    let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &options).unwrap();
    let (mut data, own) = (stream(), hybrid.plan.clone());
    for _ in 0..12 {
        let (before, moments) =
            (hybrid.clone(), trainer.full.iter().map(|f| f.moments.clone()).collect::<Vec<_>>());
        let beta = trainer.step(&mut hybrid, &batches(&mut data), 1e-2).unwrap().beta.unwrap();
        assert_eq!(hybrid.plan, own);
        let plan = own.at_beta(beta).unwrap();
        let touched = changed(&before, &hybrid);
        assert!(touched.iter().any(|n| n.ends_with("norm.weight")));
        let mut inactive = 0;
        for (full, moments) in trainer.full.iter().zip(moments) {
            let name = &hybrid.params.get(full.id).name;
            let place = (0..2).flat_map(|l| [(l, 0), (l, 1)]).find(|&(layer, group)| {
                name.starts_with(&format!("model.layers.{layer}.self_attn.recurrent.{group}."))
            });
            let active = place.is_none_or(|(layer, group)| plan.is_converted(layer, group));
            assert_eq!(touched.contains(name), active, "beta {beta}: {name}");
            assert_eq!(full.moments != moments, active, "beta {beta}: moments of {name}");
            inactive += usize::from(!active);
        }
        assert_eq!(inactive > 0, beta < 1.0);
    }
}

/// A group's first turn, in whichever step it comes, is the first step of a model that has the step's plan alone: gradients, clipping and bias
/// correction included.
#[test]
fn a_step_is_the_step_of_a_model_of_that_plan() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    for trainable in [Trainable::Heads, Trainable::HeadsAndNorms, Trainable::All] {
        let mut hybrid = wide(&base);
        let options = elastic(Path::new(""), 12, trainable);
        let mut trainer = Trainer::new(&exec, Some(&base), &hybrid, &options).unwrap();
        let (mut data, mut seen, mut late) = (stream(), Vec::new(), 0);
        for step in 1..=3 {
            let before = hybrid.clone();
            let batches = batches(&mut data);
            let report = trainer.step(&mut hybrid, &batches, 1e-2).unwrap();
            let beta = report.beta.unwrap();
            // All that trained before, the base included, is in the starting point.
            let mut twin = narrow(&before, &before, beta);
            let plain = HealOptions { elastic: Vec::new(), ..options.clone() };
            let mut alone = Trainer::new(&exec, Some(&base), &twin, &plain).unwrap();
            let expected = alone.step(&mut twin, &batches, 1e-2).unwrap();
            assert_eq!((report.loss, report.kl), (expected.loss, expected.kl));
            assert_eq!(report.grad_norm, expected.grad_norm);
            for (layer, group) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                if twin.plan.is_converted(layer, group) && !seen.contains(&(layer, group)) {
                    seen.push((layer, group));
                    late += usize::from(step > 1);
                    assert_eq!(hybrid.head_tensors(layer, group), twin.head_tensors(layer, group));
                }
            }
        }
        assert_eq!(seen.len(), 4);
        assert!(late > 0, "the seed lets no group begin after the first step");
    }
}

#[test]
fn budgets_come_equally_often_and_the_plan_is_marked() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 4);
    let (dir, start) = (tempfile::tempdir().unwrap(), wide(&base));
    let mut hybrid = start.clone();
    let options = HealOptions { elastic: vec![1.0, 0.25, 0.5], ..elastic(dir.path(), 60, Trainable::Heads) };
    let options = HealOptions { lr: 1e-2, ..options };
    let metrics = heal(&exec, Some(&base), &mut hybrid, &mut long_stream(), &options, &mut Silent).unwrap();
    for beta in BETAS {
        assert_eq!(metrics.iter().filter(|m| m.beta == Some(beta)).count(), 20);
        let (before, after) = (narrow(&base, &start, beta), narrow(&base, &hybrid, beta));
        let (before, after) = (divergence(&exec, &base, &before), divergence(&exec, &base, &after));
        assert!(after < before, "beta {beta}: {before} to {after}");
    }
    assert_eq!(hybrid.plan.elastic.as_ref().unwrap().betas, BETAS);
    // Trained for its own beta again, it is elastic no more, and its metrics name no beta.
    let plain = HealOptions { elastic: Vec::new(), ..options };
    let metrics = heal(&exec, Some(&base), &mut hybrid, &mut stream(), &plain, &mut Silent).unwrap();
    assert_eq!((hybrid.plan.elastic, metrics[0].beta), (None, None));
    let log = std::fs::read_to_string(dir.path().join("heal/metrics.jsonl")).unwrap();
    assert!(!log.contains("beta"));
}

#[test]
fn interrupted_or_killed_it_ends_with_the_same_bits() {
    let exec = Exec::new(2).unwrap();
    let base = tiny_model(&tiny_config(), 2);
    let start = wide(&base);
    for (trainable, stage) in [
        (Trainable::Heads, Stage::Distill { kl: 0.9, ce: 0.1 }),
        (Trainable::Lora(3), Stage::Continue),
        (Trainable::All, Stage::Distill { kl: 1.0, ce: 0.0 }),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut whole = start.clone();
        let options = HealOptions { stage, ..elastic(dir.path(), 10, trainable) };
        let expected = heal(&exec, Some(&base), &mut whole, &mut stream(), &options, &mut Silent).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let options = HealOptions {
            state_dir: dir.path().join("heal"),
            resume: true,
            save_every_steps: Some(2),
            ..options
        };
        let run = |progress: &mut dyn Progress| {
            let mut hybrid = start.clone();
            heal(&exec, Some(&base), &mut hybrid, &mut stream(), &options, progress).map(|m| (hybrid, m))
        };
        killed(|| run(&mut DieAfter(2)));
        assert!(matches!(run(&mut StopAfter::new(3)), Err(TrainError::Interrupted)));
        killed(|| run(&mut DieAfter(1)));
        let (resumed, metrics) = run(&mut Silent).unwrap();
        assert!(values(&resumed) == values(&whole), "{trainable:?}");
        assert_eq!(resumed.plan, whole.plan);
        let betas = |m: &[HealMetric]| m.iter().map(|m| (m.beta, m.loss.to_bits())).collect::<Vec<_>>();
        assert_eq!(betas(&metrics), betas(&expected));
        // A finished run is not repeated, and marks its plan all the same.
        assert_eq!(run(&mut Silent).unwrap().0.plan, whole.plan);

        let other = HealOptions { elastic: vec![0.5, 1.0], ..options.clone() };
        for other in [other, HealOptions { elastic: Vec::new(), ..options.clone() }] {
            let refused = heal(&exec, Some(&base), &mut start.clone(), &mut stream(), &other, &mut Silent);
            assert!(refused.unwrap_err().to_string().contains("`elastic`"));
        }
    }
}

#[test]
fn budgets_that_cannot_be_trained_are_named() {
    let exec = Exec::new(1).unwrap();
    let base = tiny_model(&tiny_config(), 9);
    let refused = |hybrid: &Model, betas: &[f64], trainable| {
        let options = HealOptions { elastic: betas.to_vec(), trainable, ..HealOptions::default() };
        Trainer::new(&exec, Some(&base), hybrid, &options).err().map(|e| e.to_string())
    };
    let all = wide(&base);
    for (betas, words) in [
        (&[0.5, 1.2][..], &["beta 1.2", "between 0 and 1"][..]),
        (&[f64::NAN, 1.0], &["between 0 and 1"]),
        (&[0.5, 1.0, 0.5], &["beta 0.5: it converts the same groups as 0.5", "hint: "]),
        (&[0.5, 0.75], &["beta 0.75", "converts 3 groups and the plan 4", "hint: add 1.0"]),
        (&[0.0, 1.0], &["beta 0: no group", "hint: "]),
    ] {
        let text = refused(&all, betas, Trainable::Heads).unwrap();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    assert_eq!(refused(&all, &[0.0, 1.0], Trainable::HeadsAndNorms), None);
    let half = narrow(&base, &all, 0.5);
    assert!(refused(&half, &[0.25, 1.0], Trainable::Heads).unwrap().contains("converts 2"));
    assert_eq!(refused(&half, &[0.5, 0.25], Trainable::Heads), None);
}
