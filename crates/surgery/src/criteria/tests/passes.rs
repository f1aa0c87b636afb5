//! The criteria with many passes of their own.

use super::super::duo::{answer_states, learn_gates, loss_and_gradient};
use super::super::kl::window_kl;
use super::super::patching::indirect_effects;
use super::super::retrieval::head_scores;
use super::naive::Naive;
use super::planted::{self, COPIES};
use super::*;
use model::{NoObserver, Tape};

/// Central differences in f64 against an f32 pass.
const STEP: f64 = 1e-4;

fn inputs<'a>(exec: &'a Exec, model: &'a Model, duo: &'a DuoOptions) -> Inputs<'a> {
    Inputs { exec, model, sequences: &[], prompts: &[], seed: 0, duo, states: None }
}

/// A prompt of random tokens in which `len` are asked back, several times over.
fn random_prompt(seed: u64, needles: &[(usize, usize, usize)], len: usize) -> NeedlePrompt {
    let mut ids = tokens(seed, len);
    let needles = needles
        .iter()
        .map(|&(said, asked, len)| {
            ids.copy_within(said..said + len, asked);
            let distractor = ids[said..said + len].iter().map(|token| (token + 7) % 48).collect();
            Needle { said, asked, distractor }
        })
        .collect();
    NeedlePrompt { tokens: ids, needles }
}

fn answers(prompt: &NeedlePrompt) -> Vec<usize> {
    prompt.needles.iter().flat_map(|n| n.asked..n.asked + n.distractor.len()).collect()
}

/// Stops at the nth look.
struct StopAfter(std::cell::Cell<usize>);

impl Progress for StopAfter {
    fn cancelled(&self) -> bool {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        left == 0
    }
}

/// A measurement.
type Run = dyn Fn(&Inputs<'_>, &mut dyn Progress) -> Result<Scores>;

/// Runs a measurement that is interrupted again and again, and returns the result with how often it was.
fn interrupted(inputs: &Inputs<'_>, run: &Run) -> (Scores, usize) {
    let dir = tempfile::tempdir().unwrap();
    let states = States { heads: dir.path().join("heads.json"), resume: true };
    let inputs = Inputs { states: Some(&states), ..*inputs };
    for times in 0.. {
        match run(&inputs, &mut StopAfter(2.into())) {
            Ok(found) => {
                assert!(std::fs::read_dir(dir.path()).unwrap().count() == 1);
                states.remove().unwrap();
                assert!(std::fs::read_dir(dir.path()).unwrap().count() == 0);
                return (found, times);
            }
            Err(SurgeryError::Interrupted) => {}
            Err(e) => panic!("{e}"),
        }
    }
    unreachable!()
}

#[test]
fn kl_is_the_divergence_of_whole_passes() {
    let (exec, model, duo) = (exec(), model(1), DuoOptions::default());
    let sequences = [tokens(3, 40), tokens(4, 25)];
    let inputs = Inputs { sequences: &sequences, ..inputs(&exec, &model, &duo) };
    for window in [1, 6, 16] {
        let found = window_kl(&inputs, window, &mut Silent).unwrap();
        let [a, b] = [0, 1].map(|i| Naive::new(&model, &sequences[i]).window_kl(window));
        let mean = |a: &f64, b: &f64| (a * 40.0 + b * 25.0) / 65.0;
        let expected: Scores =
            a.iter().zip(&b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| mean(a, b)).collect()).collect();
        assert!(expected.iter().flatten().all(|&kl| kl > 1e-4), "{expected:?}");
        assert_close("kl", &found, &expected, TOLERANCE);
    }
}

#[test]
fn a_suffix_is_the_end_of_a_whole_pass() {
    // Groups of converted models, too: the layers above are run as they are.
    let (exec, base) = (exec(), model(1));
    let mut plan = model::HeadPlan::empty(&base.config);
    plan.mixer = Some(spec(RecurrentKind::None, 4));
    plan.layers[1].groups[1].mixer = model::GroupMixer::Recurrent;
    let hybrid = base.with_plan(plan, &mut |_, _| Ok(Default::default())).unwrap();
    let batch: TokenBatch = [&tokens(5, 9)[..], &tokens(6, 14)].into_iter().collect();
    for model in [&base, &hybrid] {
        let trace = model.forward_trace(&exec, &batch, &mut NoObserver).unwrap();
        let whole = model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
        assert_eq!(trace.hidden, whole);
        for layer in 0..2 {
            let zeros = vec![0.0; 23 * 16];
            let zeros = kernels::MatRef::dense(&zeros, 23, 16);
            assert_eq!(model.forward_from(&exec, &batch, &trace, layer, 16..32, zeros), whole);
            let ones = vec![1.0; 23 * 16];
            let ones = kernels::MatRef::dense(&ones, 23, 16);
            assert_ne!(model.forward_from(&exec, &batch, &trace, layer, 16..32, ones), whole);
        }
    }
}

#[test]
fn kl_of_a_window_over_everything_is_exactly_nothing() {
    let (exec, model, duo) = (exec(), model(1), DuoOptions::default());
    let sequences = [tokens(1, 65), tokens(2, 30)];
    let inputs = Inputs { sequences: &sequences, ..inputs(&exec, &model, &duo) };
    assert_eq!(window_kl(&inputs, 64, &mut Silent).unwrap(), vec![vec![0.0; 2]; 2]);
    let sequences = [tokens(1, 66)];
    let inputs = Inputs { sequences: &sequences, ..inputs };
    assert!(window_kl(&inputs, 64, &mut Silent).unwrap().iter().flatten().all(|&kl| kl > 0.0));
}

#[test]
fn retrieval_scores_are_the_definition() {
    let (exec, duo) = (exec(), DuoOptions::default());
    let mut found_any = false;
    for seed in 0..12 {
        let model = model(seed);
        let prompt = random_prompt(seed, &[(3, 14, 6)], 21);
        let expected = Naive::new(&model, &prompt.tokens).retrieval(3, 14, 6);
        let prompts = [prompt];
        let inputs = Inputs { prompts: &prompts, ..inputs(&exec, &model, &duo) };
        let found = head_scores(&inputs, &mut Silent).unwrap();
        assert_close("retrieval", &found, &expected, 1e-12);
        found_any |= expected.iter().flatten().any(|&score| score > 0.0);
    }
    assert!(found_any, "random heads hit sometimes");
}

#[test]
fn patching_is_the_effect_of_whole_passes() {
    let (exec, duo) = (exec(), DuoOptions::default());
    let mut compared = 0;
    for seed in 0..8 {
        let model = model(seed);
        let prompt = random_prompt(seed, &[(2, 15, 3), (6, 19, 2)], 24);
        let naive = [prompt.tokens.clone(), prompt.corrupted()].map(|ids| Naive::new(&model, &ids));
        let expected = naive[0].indirect_effects(&naive[1], &answers(&prompt));
        let prompts = [prompt];
        let inputs = Inputs { prompts: &prompts, ..inputs(&exec, &model, &duo) };
        match indirect_effects(&inputs, &mut Silent) {
            Ok(found) => {
                assert_close("patching", &found, &expected, TOLERANCE);
                compared += 1;
            }
            Err(e) => assert!(e.to_string().contains("reads the needle of none"), "{e}"),
        }
    }
    assert!(compared > 0, "replacing a needle lowers the answer sometimes");
}

#[test]
fn the_gates_gradient_is_that_of_finite_differences() {
    let (exec, model) = (exec(), model(1));
    let prompt = random_prompt(2, &[(3, 14, 3), (7, 18, 2)], 22);
    let target = answer_states(&exec, &model, &prompt).unwrap();
    let naive = Naive::new(&model, &prompt.tokens);
    let options = DuoOptions { window: 4, sinks: 2, l1: 0.05, ..Default::default() };
    for alpha in [vec![vec![1.0, 1.0], vec![1.0, 1.0]], vec![vec![0.25, 0.5], vec![0.75, 0.0]]] {
        let mut tape = Tape::default();
        let (loss, gradient) =
            loss_and_gradient(&exec, &model, &options, (&prompt, &target), &alpha, &mut tape).unwrap();
        let at = |alpha: &Scores| naive.duo_loss(alpha, (4, 2), 0.05, &answers(&prompt));
        assert!((loss - at(&alpha)).abs() < TOLERANCE * loss, "{loss}, expected {}", at(&alpha));
        for layer in 0..2 {
            for group in 0..2 {
                let moved = |step: f64| {
                    let mut alpha = alpha.clone();
                    alpha[layer][group] += step;
                    at(&alpha)
                };
                let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                let found = gradient[layer][group];
                assert!(
                    (found - slope).abs() < TOLERANCE * slope.abs().max(0.01),
                    "{found}, expected {slope}"
                );
            }
        }
        // Of the distance alone: nothing to gain where every gate is open.
        let distance = loss - 0.05 * alpha.iter().flatten().sum::<f64>() / 4.0;
        assert_eq!(distance < 1e-9, alpha[0][0] == 1.0, "{distance}");
    }
}

#[test]
fn open_gates_are_the_model_and_closed_ones_are_windows() {
    let (exec, model) = (exec(), model(3));
    let batch: TokenBatch = [&tokens(5, 30)[..], &tokens(6, 17)].into_iter().collect();
    let gated = |alpha: f32| {
        let gates = model::Gates { alpha: vec![vec![alpha; 2]; 2], window: 5, sinks: 1 };
        model.forward_gated(&exec, &batch, &gates, &mut Tape::default()).unwrap()
    };
    assert_eq!(gated(1.0), model.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap());
    let mut plan = model::HeadPlan::empty(&model.config);
    plan.mixer = Some(spec(RecurrentKind::None, 5));
    plan.layers.iter_mut().flat_map(|l| &mut l.groups).for_each(|g| g.mixer = model::GroupMixer::Recurrent);
    let windowed = model.with_plan(plan, &mut |_, _| Ok(Default::default())).unwrap();
    let expected = windowed.forward_batch(&exec, &batch, &mut NoObserver, None).unwrap();
    for (a, b) in gated(0.0).iter().zip(&expected) {
        assert!((a - b).abs() < 1e-4, "{a}, expected {b}");
    }
}

#[test]
fn the_group_that_copies_from_far_is_the_least_safe() {
    let (exec, model) = (exec(), planted::model());
    let prompts: Vec<NeedlePrompt> = (0..4).map(|i| planted::prompt(i, 5 + 9 * i as usize, 120)).collect();
    let sequences: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
    let duo = DuoOptions { steps: 40, lr: 0.1, window: 16, sinks: 1, l1: 0.05 };
    let inputs = Inputs { prompts: &prompts, sequences: &sequences, ..inputs(&exec, &model, &duo) };
    let heads = head_scores(&inputs, &mut Silent).unwrap();
    assert_eq!(heads[COPIES.0][2 * COPIES.1..][..2], [1.0, 1.0], "{heads:?}");
    let effects = indirect_effects(&inputs, &mut Silent).unwrap();
    assert!((effects[COPIES.0][COPIES.1] - 1.0).abs() < 0.05, "{effects:?}");
    for name in ["kl", "retrieval", "patching", "duo"] {
        let (Source::Groups(measure) | Source::Needles(measure)) = find(name).unwrap().source else {
            panic!()
        };
        let scores = measure(&inputs, &mut Silent).unwrap().groups;
        let planted = scores[COPIES.0][COPIES.1];
        let mut others = scores.clone();
        others[COPIES.0].remove(COPIES.1);
        let least = others.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        // The others look nowhere in particular: they cost at most a fifth of what it costs.
        assert!(planted < 5.0 * least && planted < -0.005, "{name}: {scores:?}");
    }
    let gates = learn_gates(&inputs, &mut Silent).unwrap();
    assert!(gates[COPIES.0][COPIES.1] > 0.8, "{gates:?}");
}

#[test]
fn values_within_the_window_or_at_the_sink_cost_nothing() {
    // The same model, asked for what a windowed group still sees.
    let (exec, model) = (exec(), planted::model());
    let duo = DuoOptions::default();
    let cost = |said: usize| {
        let sequences = [planted::prompt(1, said, 120).tokens];
        let inputs = Inputs { sequences: &sequences, ..inputs(&exec, &model, &duo) };
        window_kl(&inputs, 64, &mut Silent).unwrap()[COPIES.0][COPIES.1]
    };
    // The question stands at 118, so its window begins at 55.
    let (sink, far, last_unseen, first_seen) = (cost(0), cost(20), cost(54), cost(55));
    assert!(far > 0.1 && last_unseen > 0.1, "{far} {last_unseen}");
    // Other queries look at the value a little, too, and lose it in every case.
    assert!(sink < 0.25 * far && first_seen < 0.25 * far, "{sink} {first_seen} {far}");
}

#[test]
fn what_was_interrupted_goes_on_to_the_same_bits() {
    let (exec, model) = (exec(), planted::model());
    let prompts: Vec<NeedlePrompt> = (0..3).map(|i| planted::prompt(i, 4, 40)).collect();
    let sequences = [tokens(1, 30), tokens(2, 20), tokens(3, 10)];
    let duo = DuoOptions { steps: 7, window: 8, sinks: 1, ..Default::default() };
    let inputs = Inputs { prompts: &prompts, sequences: &sequences, ..inputs(&exec, &model, &duo) };
    let kl = |inputs: &Inputs<'_>, progress: &mut dyn Progress| window_kl(inputs, 4, progress);
    let runs: [(&Run, usize); 3] = [(&kl, 2), (&indirect_effects, 2), (&learn_gates, 3)];
    for (run, at_least) in runs {
        let (found, times) = interrupted(&inputs, run);
        assert_eq!(found, run(&inputs, &mut Silent).unwrap());
        assert!(times >= at_least, "interrupted {times} times");
    }
}

#[test]
fn states_of_something_else_are_refused() {
    let (exec, model) = (exec(), model(1));
    let duo = DuoOptions::default();
    let dir = tempfile::tempdir().unwrap();
    let resume = States { heads: dir.path().join("heads.json"), resume: true };
    let anew = States { resume: false, ..resume.clone() };
    let path = dir.path().join("heads.json.kl.state");
    let sequences = [tokens(1, 30), tokens(2, 20)];
    let inputs = Inputs { sequences: &sequences, states: Some(&resume), ..inputs(&exec, &model, &duo) };
    assert!(window_kl(&inputs, 4, &mut StopAfter(1.into())).is_err());
    let text = std::fs::read_to_string(&path).unwrap();

    let message = |inputs: Inputs<'_>, window| {
        let error = window_kl(&inputs, window, &mut Silent).unwrap_err().to_string();
        assert!(error.contains("heads.json.kl.state") && error.contains("hint: remove the file"), "{error}");
        error
    };
    let other = [tokens(1, 30), tokens(3, 20)];
    assert!(message(Inputs { sequences: &other, ..inputs }, 4).contains("other data"));
    // The same tokens, cut elsewhere.
    let joined = sequences.concat();
    let cut = [joined[..20].to_vec(), joined[20..].to_vec()];
    assert!(message(Inputs { sequences: &cut, ..inputs }, 4).contains("other data"));
    assert!(message(Inputs { model: &super::model(2), ..inputs }, 4).contains("another model"));
    assert!(message(inputs, 5).contains("other settings"));
    for (from, to) in [("\"version\":1", "\"version\":2"), ("[", "[0.0,"), ("\"done\":1", "\"done\":100")] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = window_kl(&inputs, 4, &mut Silent).unwrap_err().to_string();
        assert!(error.contains("another size") || error.contains("version 2"), "{error}");
    }
    std::fs::write(&path, "{}").unwrap();
    message(inputs, 4);
    let expected = window_kl(&Inputs { states: None, ..inputs }, 4, &mut Silent).unwrap();
    assert_eq!(window_kl(&Inputs { states: Some(&anew), ..inputs }, 4, &mut Silent).unwrap(), expected);
}

#[test]
fn contradictory_prompts_are_refused() {
    let (exec, base) = (exec(), model(1));
    let duo = DuoOptions { window: 4, sinks: 1, steps: 1, ..Default::default() };
    let good = random_prompt(1, &[(3, 14, 3)], 20);
    let measures = ["retrieval", "patching", "duo"].map(|name| match find(name).unwrap().source {
        Source::Needles(measure) => measure,
        _ => panic!("{name}"),
    });
    let refused = |prompts: &[NeedlePrompt], duo: &DuoOptions, needle: &str| {
        for measure in measures {
            let inputs = Inputs { prompts, ..inputs(&exec, &base, duo) };
            let error = measure(&inputs, &mut Silent).err().expect(needle).to_string();
            assert!(error.contains(needle), "{error}");
        }
    };
    refused(&[], &duo, "none was given");
    refused(
        &[good.clone(), NeedlePrompt { needles: vec![], ..good.clone() }],
        &duo,
        "prompt 1: it has no needle",
    );
    let with = |edit: fn(&mut Needle)| {
        let mut prompt = good.clone();
        edit(&mut prompt.needles[0]);
        [prompt]
    };
    refused(&with(|n| n.distractor.clear()), &duo, "has no tokens");
    refused(&with(|n| n.said = 12), &duo, "before its answer");
    refused(&with(|n| n.asked = 18), &duo, "within the tokens");
    refused(&with(|n| n.asked = usize::MAX), &duo, "within the tokens");
    refused(&with(|n| n.said = 4), &duo, "is not its needle");
    let mut prompt = good.clone();
    prompt.needles[0].distractor = prompt.tokens[3..6].to_vec();
    refused(&[prompt], &duo, "a distractor is its needle");

    let gates = |duo: &DuoOptions| {
        let prompts = [good.clone()];
        learn_gates(&Inputs { prompts: &prompts, ..inputs(&exec, &base, duo) }, &mut Silent).map(|_| ())
    };
    gates(&duo).unwrap();
    let message = |duo: DuoOptions| gates(&duo).unwrap_err().to_string();
    assert!(message(DuoOptions { window: 19, ..duo.clone() }).contains("see everything in prompts of 20"));
    assert!(message(DuoOptions { steps: 0, ..duo.clone() }).contains("at least one step"));
    assert!(message(DuoOptions { lr: f64::NAN, ..duo.clone() }).contains("finite"));
}

#[test]
fn an_analysis_measures_them_when_asked() {
    let prompts: Vec<NeedlePrompt> = (0..2).map(|i| planted::prompt(i, 4, 40)).collect();
    let options = AnalyzeOptions {
        criteria: ["kl", "retrieval", "patching", "duo"].map(String::from).to_vec(),
        prompts: prompts.clone(),
        duo: DuoOptions { steps: 2, window: 8, sinks: 1, ..Default::default() },
        ..Default::default()
    };
    let heads = analyze(&exec(), &planted::model(), &[tokens(1, 100)], &options, &mut Silent).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("heads.json");
    heads.write(&path).unwrap();
    assert_eq!(HeadsReport::read(&path).unwrap(), heads);
    let info = heads.needle_prompts.clone().unwrap();
    assert_eq!((info.prompts, info.tokens), (2, 80));
    assert_eq!(heads.layers[COPIES.0].head_scores["retrieval"][2 * COPIES.1..], [1.0, 1.0]);
    for name in ["kl", "retrieval", "patching", "duo"] {
        assert!(scores(name, &heads, None, 0).unwrap().iter().flatten().all(|score| score.is_finite()));
        assert!(!AnalyzeOptions::default().criteria.iter().any(|c| c == name));
    }
    assert_eq!(scores("retrieval", &heads, None, 0).unwrap()[COPIES.0][COPIES.1], -1.0);
    let without = AnalyzeOptions { prompts: Vec::new(), ..options };
    let error = analyze(&exec(), &planted::model(), &[tokens(1, 100)], &without, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("`retrieval` is measured on needle prompts"), "{error}");

    let mut broken = heads;
    broken.layers[1].head_scores.insert("retrieval".into(), vec![0.0; 3]);
    assert!(broken.write(&path).unwrap_err().to_string().contains("each of 4 heads"));
}
