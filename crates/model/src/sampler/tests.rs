use super::*;
use proptest::prelude::*;

/// Sums of f64 in another order.
const PROBABILITY_TOLERANCE: f64 = 1e-12;

/// The same rules, all by full sorts and in the plainest form.
fn naive(options: &SamplerOptions, logits: &[f32], seen: &[u32]) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| {
            let (l, p) = (f64::from(l), f64::from(options.repetition_penalty));
            let l = match seen.contains(&(i as u32)) {
                true if l < 0.0 => l * p,
                true => l / p,
                false => l,
            };
            (i as u32, l / f64::from(options.temperature))
        })
        .filter(|c| c.1.is_finite())
        .collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    if options.top_k > 0 {
        all.truncate(options.top_k);
    }
    let softmax = |all: &mut Vec<(u32, f64)>| {
        let max = all[0].1;
        let sum: f64 = all.iter().map(|c| (c.1 - max).exp()).sum();
        all.iter().map(|c| (c.1 - max).exp() / sum).collect::<Vec<_>>()
    };
    let probabilities = softmax(&mut all);
    let mut mass = 0.0;
    let keep = probabilities.iter().take_while(|p| {
        let before = mass;
        mass += **p;
        options.top_p >= 1.0 || before < f64::from(options.top_p)
    });
    let keep = keep.count();
    all.truncate(keep);
    let probabilities = softmax(&mut all);
    let best = probabilities[0];
    let mut kept = all.into_iter().zip(probabilities).map(|((t, _), p)| (t, p)).collect::<Vec<_>>();
    kept.retain(|c| c.1 >= f64::from(options.min_p) * best);
    let sum: f64 = kept.iter().map(|c| c.1).sum();
    kept.iter_mut().for_each(|c| c.1 /= sum);
    kept.sort_by_key(|c| c.0);
    kept
}

fn options() -> impl Strategy<Value = SamplerOptions> {
    let top_p = prop_oneof![Just(1.0f32), 0.01f32..1.0];
    let min_p = prop_oneof![Just(0.0f32), 0.0f32..1.0];
    let penalty = prop_oneof![Just(1.0f32), 0.5f32..3.0];
    (0.05f32..5.0, 0usize..40, top_p, min_p, penalty, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, repetition_penalty, seed)| SamplerOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
        },
    )
}

/// Of every length up to a few blocks; smooth, with many ties, or with impossible tokens.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let smooth = prop::collection::vec(-20.0f32..20.0, 1..700);
    let ties = prop::collection::vec((-8i8..8).prop_map(f32::from), 1..700);
    let rare = prop_oneof![8 => -10.0f32..10.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(0.0f32)];
    let sparse = prop::collection::vec(rare, 1..300)
        .prop_filter("one possible token", |logits| logits.iter().any(|l| l.is_finite()));
    prop_oneof![smooth, ties, sparse]
}

proptest! {
    #[test]
    fn distribution_is_the_naive_one(
        options in options(),
        logits in logits(),
        seen in prop::collection::vec(0u32..800, 0..20),
    ) {
        let sampler = Sampler::new(options.clone()).unwrap();
        let mut found = sampler.distribution(&logits, &seen).unwrap();
        found.sort_by_key(|c| c.0);
        let expected = naive(&options, &logits, &seen);
        let near_cut = || {
            // Only a token whose mass or ratio sits on the cut itself may differ between the two orders of summation.
            let shifted = |by: f32| SamplerOptions {
                top_p: (options.top_p * (1.0 + by)).min(1.0), min_p: options.min_p * (1.0 - by), ..options.clone()
            };
            naive(&shifted(1e-6), &logits, &seen).len() != naive(&shifted(-1e-6), &logits, &seen).len()
        };
        prop_assert!(found.len() == expected.len() || near_cut());
        if found.len() == expected.len() {
            for (f, e) in found.iter().zip(&expected) {
                prop_assert_eq!(f.0, e.0);
                prop_assert!((f.1 - e.1).abs() <= PROBABILITY_TOLERANCE, "{:?} {:?}", f, e);
            }
        }
    }

    #[test]
    fn draws_are_kept_tokens_and_repeatable(
        options in options(),
        logits in prop::collection::vec(-20.0f32..20.0, 1..100),
    ) {
        let (mut a, mut b) = (Sampler::new(options.clone()).unwrap(), Sampler::new(options).unwrap());
        let kept: Vec<u32> = a.distribution(&logits, &[]).unwrap().iter().map(|c| c.0).collect();
        for _ in 0..8 {
            let token = a.sample(&logits, &[]).unwrap();
            prop_assert_eq!(token, b.sample(&logits, &[]).unwrap());
            prop_assert!(kept.contains(&token));
        }
    }
}

#[test]
fn frequencies_follow_probabilities() {
    let options = SamplerOptions { temperature: 1.0, seed: 3, ..Default::default() };
    let mut sampler = Sampler::new(options).unwrap();
    let logits = [0.5f32.ln(), 0.25f32.ln(), f32::NEG_INFINITY, 0.25f32.ln()];
    let mut counts = [0usize; 4];
    const DRAWS: usize = 20_000;
    for _ in 0..DRAWS {
        counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
    }
    assert_eq!(counts[2], 0);
    for (count, p) in [(counts[0], 0.5), (counts[1], 0.25), (counts[3], 0.25)] {
        // Five standard deviations.
        let slack = 5.0 * (DRAWS as f64 * p * (1.0 - p)).sqrt();
        assert!((count as f64 - DRAWS as f64 * p).abs() < slack, "{counts:?}");
    }
}

#[test]
fn buffers_carry_nothing_over() {
    // Vocabularies and seen tokens change from call to call; only the generator's state may remain.
    for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (5, 0.9, 0.1)] {
        let options =
            SamplerOptions { temperature: 0.8, top_k, top_p, min_p, repetition_penalty: 1.3, seed: 11 };
        let mut used = Sampler::new(options.clone()).unwrap();
        for (len, seen) in [(500usize, &[3u32, 3, 9][..]), (7, &[]), (65, &[64, 0]), (500, &[9])] {
            let logits: Vec<f32> = (0..len).map(|i| ((i * 37) % 23) as f32 * 0.4).collect();
            let fresh = Sampler { rng: used.rng.clone(), ..Sampler::new(options.clone()).unwrap() };
            assert_eq!(
                used.clone().distribution(&logits, seen).unwrap(),
                fresh.distribution(&logits, seen).unwrap()
            );
            assert_eq!(used.sample(&logits, seen).unwrap(), fresh.clone().sample(&logits, seen).unwrap());
        }
    }
}

#[test]
fn a_cut_among_ties_keeps_the_lower_ids() {
    let logits = vec![1.0f32; 200];
    for (options, kept) in [
        (SamplerOptions { top_k: 130, ..Default::default() }, 130),
        (SamplerOptions { top_k: 2, ..Default::default() }, 2),
        (SamplerOptions { top_p: 0.4999, ..Default::default() }, 100),
        (SamplerOptions { min_p: 1.0, ..Default::default() }, 200),
    ] {
        let sampler = Sampler::new(SamplerOptions { temperature: 1.0, ..options }).unwrap();
        let tokens: Vec<u32> = sampler.distribution(&logits, &[]).unwrap().iter().map(|c| c.0).collect();
        assert_eq!(tokens, (0..kept).collect::<Vec<u32>>());
    }
}

#[test]
fn greedy_takes_the_first_best() {
    let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
    assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, -1.0], &[]).unwrap(), 1);
    assert_eq!(sampler.sample(&[-0.0, 0.0], &[]).unwrap(), 0);
    let penalty = SamplerOptions { repetition_penalty: 2.0, ..Default::default() };
    let mut sampler = Sampler::new(penalty).unwrap();
    assert_eq!(sampler.sample(&[1.0, 3.0, 2.0], &[1, 1, 1]).unwrap(), 2);
    assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]).unwrap(), 1);
    assert_eq!(sampler.sample(&[1.0, 2.0], &[7, u32::MAX]).unwrap(), 1);
}

#[test]
fn broken_logits_are_errors() {
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(SamplerOptions { temperature, ..Default::default() }).unwrap();
        for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 3], &[]] {
            assert!(matches!(sampler.sample(logits, &[]), Err(ModelError::Sampler(_))), "{logits:?}");
        }
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -3e38], &[]).unwrap(), 1);
    }
}

#[test]
fn options_are_checked() {
    let ok = SamplerOptions::default;
    for bad in [
        SamplerOptions { temperature: -1.0, ..ok() },
        SamplerOptions { temperature: f32::NAN, ..ok() },
        SamplerOptions { temperature: f32::INFINITY, ..ok() },
        SamplerOptions { top_p: 0.0, ..ok() },
        SamplerOptions { top_p: 1.1, ..ok() },
        SamplerOptions { top_p: f32::NAN, ..ok() },
        SamplerOptions { min_p: -0.1, ..ok() },
        SamplerOptions { min_p: 1.1, ..ok() },
        SamplerOptions { repetition_penalty: 0.0, ..ok() },
        SamplerOptions { repetition_penalty: f32::INFINITY, ..ok() },
    ] {
        assert!(Sampler::new(bad.clone()).is_err(), "{bad:?}");
    }
}
