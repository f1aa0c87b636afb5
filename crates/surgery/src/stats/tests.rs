use super::accumulate::{HeadAccumulator, WINDOWS, bucket, bucket_range};
use super::*;
use crate::testing::{exec, model, noise, spec, tokens};
use kernels::{Exec, MatRef};
use model::{HeadPlan, RecurrentKind, Silent, TokenBatch};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Scores in f32 from gemm against f64: relative 1e-5 of sums of at most a few hundred terms.
const TOLERANCE: f64 = 2e-5;

const D: usize = 8;

/// The definition taken literally: the whole T × T matrix in f64.
fn naive(sequences: &[(Vec<f32>, Vec<f32>)], scale: f64, sinks: &[usize]) -> HeadStats {
    let mut ratio = [Vec::new(), Vec::new(), Vec::new()];
    let (mut sink_mass, mut distance, mut entropy, mut prev) = (vec![], vec![], vec![], vec![]);
    let longest = sequences.iter().map(|(q, _)| q.len() / D).max().unwrap();
    let mut by_distance = vec![0.0; bucket(longest - 1) + 1];
    for (q, k) in sequences {
        let seq = q.len() / D;
        let attention: Vec<Vec<f64>> = (0..seq)
            .map(|i| {
                let scores: Vec<f64> = (0..=i)
                    .map(|j| {
                        scale * (0..D).map(|c| f64::from(q[i * D + c]) * f64::from(k[j * D + c])).sum::<f64>()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let z: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                scores.iter().map(|s| (s - max).exp() / z).collect()
            })
            .collect();
        for (i, row) in attention.iter().enumerate() {
            let live: f64 = (0..=i).filter(|j| !sinks.contains(j)).map(|j| row[j]).sum();
            for (w, ratio) in WINDOWS.into_iter().zip(&mut ratio) {
                if i >= w && (i + 1 - w..=i).all(|j| !sinks.contains(&j)) {
                    ratio.push(row[i + 1 - w..].iter().sum::<f64>() / live);
                }
            }
            if i < FIRST_QUERY.min(seq / 2) {
                continue;
            }
            sink_mass.push((0..=i).filter(|j| sinks.contains(j)).map(|j| row[j]).sum::<f64>());
            entropy.push(-row.iter().map(|&a| if a > 0.0 { a * a.ln() } else { 0.0 }).sum::<f64>());
            prev.push(if i > 0 { row[i - 1] } else { 0.0 });
            if live > 0.0 {
                let live_keys = || (0..=i).filter(|j| !sinks.contains(j));
                distance.push(live_keys().map(|j| row[j] * (i - j) as f64).sum::<f64>() / live);
                live_keys().for_each(|j| by_distance[bucket(i - j)] += row[j] / live);
            }
        }
    }
    let mean = |v: &[f64]| if v.is_empty() { 0.0 } else { v.iter().sum::<f64>() / v.len() as f64 };
    let ratio = ratio.map(|v| if v.is_empty() { 1.0 } else { mean(&v) });
    HeadStats {
        recency_ratio_16: ratio[0],
        recency_ratio_64: ratio[1],
        recency_ratio_128: ratio[2],
        sink_mass: mean(&sink_mass),
        mean_distance: mean(&distance),
        entropy: mean(&entropy),
        prev_token_mass: mean(&prev),
        no_op: 1.0 - mean(&sink_mass) < 0.1,
        mass_by_distance: by_distance.iter().map(|m| m / distance.len().max(1) as f64).collect(),
    }
}

fn fast(sequences: &[(Vec<f32>, Vec<f32>)], scale: f32, sinks: &[usize]) -> HeadStats {
    let exec = Exec::new(1).unwrap();
    let longest = sequences.iter().map(|(q, _)| q.len() / D).max().unwrap();
    let mut sums = HeadAccumulator::new(longest);
    for (q, k) in sequences {
        let seq = q.len() / D;
        sums.add(&exec, MatRef::dense(q, seq, D), MatRef::dense(k, seq, D), scale, sinks);
    }
    sums.stats()
}

fn assert_same(found: &HeadStats, expected: &HeadStats, context: &str) {
    let values = |s: &HeadStats| {
        let mut v = vec![
            s.recency_ratio_16,
            s.recency_ratio_64,
            s.recency_ratio_128,
            s.sink_mass,
            s.mean_distance,
            s.entropy,
            s.prev_token_mass,
        ];
        v.extend(&s.mass_by_distance);
        v
    };
    let (a, b) = (values(found), values(expected));
    assert_eq!((a.len(), found.no_op), (b.len(), expected.no_op), "{context}");
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * (1.0 + b.abs()), "{context}: value {i} is {a}, expected {b}");
    }
}

fn random(seed: u64, seq: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (noise(&mut rng, seq * D, 1.5), noise(&mut rng, seq * D, 1.5))
}

#[test]
fn streaming_sums_are_the_definition() {
    for seq in [1, 2, 3, 16, 17, 18, 63, 64, 65, 66, 129, 130, 200] {
        for sinks in [&[0][..], &[], &[0, 40], &[5, 6, 150], &[900]] {
            let data = [random(seq as u64, seq)];
            assert_same(
                &fast(&data, 0.7, sinks),
                &naive(&data, 0.7f32.into(), sinks),
                &format!("T {seq}, {sinks:?}"),
            );
        }
    }
}

#[test]
fn sequences_count_by_their_queries() {
    let data = [random(1, 70), random(2, 200), random(3, 33)];
    assert_same(&fast(&data, 0.5, &[0]), &naive(&data, 0.5, &[0]), "three lengths");
}

#[test]
fn uniform_attention_has_closed_forms() {
    let seq = 300;
    let data = [(vec![0.0; seq * D], random(4, seq).1)];
    let stats = fast(&data, 1.0, &[0]);
    let mean = |from: usize, f: &dyn Fn(f64) -> f64| {
        (from..seq).map(|i| f(i as f64)).sum::<f64>() / (seq - from) as f64
    };
    let close = |a: f64, b: f64| assert!((a - b).abs() < TOLERANCE * (1.0 + b), "{a}, expected {b}");
    close(stats.recency_ratio_16, mean(16, &|i| 16.0 / i));
    close(stats.recency_ratio_64, mean(64, &|i| 64.0 / i));
    close(stats.recency_ratio_128, mean(128, &|i| 128.0 / i));
    close(stats.sink_mass, mean(64, &|i| 1.0 / (i + 1.0)));
    close(stats.prev_token_mass, mean(64, &|i| 1.0 / (i + 1.0)));
    close(stats.entropy, mean(64, &|i| (i + 1.0).ln()));
    close(stats.mean_distance, mean(64, &|i| (i - 1.0) / 2.0));
    close(stats.mass_by_distance.iter().sum(), 1.0);
    close(stats.mass_by_distance[0], mean(64, &|i| 1.0 / i));
}

#[test]
fn a_window_as_long_as_the_text_holds_everything() {
    let stats = fast(&[random(5, 128)], 1.0, &[0]);
    assert_eq!(stats.recency_ratio_128, 1.0);
    assert!(stats.recency_ratio_16 < stats.recency_ratio_64 && stats.recency_ratio_64 < 1.0);
}

#[test]
fn a_strong_sink_is_a_no_op_and_drowns_nothing() {
    let (q, mut k) = random(6, 140);
    let plain = fast(&[(q.clone(), k.clone())], 1.0, &[0]);
    assert!(!plain.no_op);
    // Every query meets the first key with a score of about 200.
    let mut q = q;
    for row in q.chunks_exact_mut(D) {
        row[0] = 2.0;
    }
    let mut weak = (q.clone(), k.clone());
    for row in weak.1.chunks_exact_mut(D).chain(k.chunks_exact_mut(D)) {
        row[0] = 0.0;
    }
    k[0] = 100.0;
    let strong = fast(&[(q, k)], 1.0, &[0]);
    let weak = fast(&[weak], 1.0, &[0]);
    assert!(strong.no_op && strong.sink_mass > 0.999 && strong.entropy < 1e-6);
    assert!((strong.recency_ratio_64 - weak.recency_ratio_64).abs() < TOLERANCE);
    assert!((strong.mean_distance - weak.mean_distance).abs() < TOLERANCE * weak.mean_distance);
}

#[test]
fn buckets_are_powers_of_two() {
    for (d, b) in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (15, 4), (16, 5), (63, 6), (64, 7), (1023, 10)] {
        let (first, last) = bucket_range(b);
        assert!(bucket(d) == b && first <= d && d <= last, "distance {d}");
    }
    assert!(WINDOWS.iter().all(|w| w.is_power_of_two()));
}

fn analyze_default(sequences: &[Vec<u32>], criteria: &[&str]) -> Result<HeadsReport> {
    let options =
        AnalyzeOptions { criteria: criteria.iter().map(|c| c.to_string()).collect(), ..Default::default() };
    analyze(&exec(), &model(1), sequences, &options, &mut Silent)
}

#[test]
fn a_report_holds_everything_and_survives_the_disk() {
    let sequences = [tokens(1, 100), tokens(2, 80)];
    let model = model(1);
    let report = analyze(&exec(), &model, &sequences, &AnalyzeOptions::default(), &mut Silent).unwrap();
    assert_eq!((report.tokens, report.context, report.sinks.as_slice()), (180, 100, [0].as_slice()));
    for layer in &report.layers {
        assert_eq!((layer.heads.len(), layer.groups.len()), (4, 2));
        for (g, group) in layer.groups.iter().enumerate() {
            let mean = (layer.heads[2 * g].recency_ratio_64 + layer.heads[2 * g + 1].recency_ratio_64) / 2.0;
            assert!((group.stats.recency_ratio_64 - mean).abs() < 1e-12);
            let names: Vec<&str> = group.scores.keys().map(String::as_str).collect();
            assert_eq!(names, ["kl-fisher", "least-recent", "random", "recency", "window-error"]);
            assert_eq!(group.scores["recency"], group.stats.recency_ratio_64);
            assert!(group.scores["kl-fisher"] < 0.0 && group.scores["window-error"] < 0.0);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("heads.json");
    report.write(&path).unwrap();
    assert_eq!(HeadsReport::read(&path).unwrap(), report);

    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for place in [&json["layers"][1]["heads"][3], &json["layers"][1]["groups"][1]] {
        for key in [
            "recency_ratio_16",
            "recency_ratio_64",
            "recency_ratio_128",
            "sink_mass",
            "mean_distance",
            "entropy",
            "prev_token_mass",
        ] {
            assert!(place[key].is_f64(), "{key}");
        }
    }

    let tampered = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        edit(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        HeadsReport::read(&path).unwrap_err().to_string()
    };
    assert!(tampered(&|j| j["version"] = 2.into()).contains("version 2"));
    assert!(tampered(&|j| j["layers"].as_array_mut().unwrap().truncate(1)).contains("1 layers"));
    assert!(tampered(&|j| j["layers"][0]["heads"] = serde_json::json!([])).contains("0 heads"));
    assert!(tampered(&|j| j["layers"][0]["heads"][0]["entropy"] = "x".into()).contains("heads.json"));
    assert!(tampered(&|j| *j = serde_json::json!([])).contains("version none"));
    // Sizes whose products overflow.
    for (key, size) in [("head_dim", 1_u64 << 62), ("head_dim", 0), ("kv_heads", 0), ("heads", u64::MAX / 2)]
    {
        let text = tampered(&|j| {
            j["config"][key] = size.into();
            j["model"][key] = size.into();
        });
        assert!(text.contains("heads.json") && text.contains("`config`"), "{text}");
    }
    assert!(tampered(&|j| j["config"]["d_model"] = (1_u64 << 62).into()).contains("hidden_size"));
}

#[test]
fn statistics_match_the_definition_on_a_model() {
    struct Views(Vec<(Vec<f32>, Vec<f32>)>, usize, usize);
    impl LayerObserver for Views {
        fn attention(&mut self, view: AttnView<'_>) {
            if view.layer == self.1 {
                let copy = |m: MatRef<'_>, head: usize| {
                    (0..m.rows()).flat_map(|t| m.row(t)[head * D..(head + 1) * D].to_vec()).collect()
                };
                self.0.push((copy(view.q, self.2), copy(view.k, self.2 / 2)));
            }
        }
    }
    let sequences = [tokens(3, 150), tokens(4, 90)];
    let report = analyze_default(&sequences, &[]).unwrap();
    for (layer, head) in [(0, 0), (1, 3)] {
        let mut views = Views(Vec::new(), layer, head);
        for sequence in &sequences {
            model(1).forward_batch(&exec(), &TokenBatch::one(sequence), &mut views, None).unwrap();
        }
        let expected = naive(&views.0, 1.0 / (D as f64).sqrt(), &[0]);
        assert_same(&report.layers[layer].heads[head], &expected, "model");
    }
}

/// Sinks that are looked for: each head leaves out its own, in each sequence others.
#[test]
fn found_sinks_are_left_out_head_by_head() {
    let model = sinks::planted::by_token(0.0).model();
    let places = [20, 3];
    let mut text: Vec<Vec<u32>> =
        places.iter().flat_map(|&at| sinks::planted::by_token_text(1, at)).collect();
    let analyze_with = |text: &[Vec<u32>], sinks| {
        let options = AnalyzeOptions { criteria: vec!["recency".into()], sinks, ..Default::default() };
        analyze(&exec(), &model, text, &options, &mut Silent).unwrap()
    };
    let report = analyze_with(&text, SinkChoice::Found);
    let at = |head, sequence, position| FoundSink { layer: 0, head, sequence, position };
    assert_eq!(report.found_sinks, [at(0, 0, 20), at(0, 1, 3)]);
    assert!(report.sinks.is_empty());
    // The first head does nothing else; what remains of its attention is even.
    let (mut sum, mut queries) = (0.0, 0);
    for sink in places {
        for i in (16..64).filter(|&i| i < sink || sink + 16 <= i) {
            sum += 16.0 / (i + 1 - usize::from(sink <= i)) as f64;
            queries += 1;
        }
    }
    let head = &report.layers[0].heads[0];
    assert!(head.no_op && head.sink_mass > 0.99, "{head:?}");
    assert!((head.recency_ratio_16 - sum / f64::from(queries)).abs() < 1e-4, "{head:?}");
    // The second has none: as if none were named.
    let none = analyze_with(&text, SinkChoice::At(vec![]));
    assert_eq!(report.layers[0].heads[1], none.layers[0].heads[1]);
    let first = analyze_with(&text, SinkChoice::At(vec![0]));
    assert!(!first.layers[0].heads[0].no_op);

    // Too short to look for sinks: the first.
    text.push(vec![1; sinks::MIN_TOKENS - 1]);
    let report = analyze_with(&text, SinkChoice::Found);
    assert_eq!(report.found_sinks, [at(0, 0, 20), at(0, 1, 3), at(0, 2, 0), at(1, 2, 0)]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("heads.json");
    report.write(&path).unwrap();
    assert_eq!(HeadsReport::read(&path).unwrap(), report);
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["found_sinks"][0]["head"] = 9.into();
    std::fs::write(&path, json.to_string()).unwrap();
    assert!(HeadsReport::read(&path).unwrap_err().to_string().contains("layer 0 head 9"));
}

#[test]
fn what_cannot_be_analysed_is_an_error() {
    let text = [tokens(1, 20)];
    let message = |result: Result<HeadsReport>| result.unwrap_err().to_string();
    assert!(message(analyze_default(&[], &[])).contains("no calibration text"));
    assert!(message(analyze_default(&[tokens(1, 20), vec![1]], &[])).contains("sequence 1 has 1 tokens"));
    assert!(message(analyze_default(&text, &["recent"])).contains("mixer-fisher, recency"));
    assert!(message(analyze_default(&text, &["mixer-fisher"])).contains("needs a head bank"));
    assert!(message(analyze_default(&[vec![1, 99]], &[])).contains("99"));
    let options =
        AnalyzeOptions { criteria: vec![], sinks: SinkChoice::At((0..20).collect()), ..Default::default() };
    let dense = analyze(&exec(), &model(1), &text, &options, &mut Silent);
    assert!(message(dense).contains("fewer sinks"));

    let base = model(1);
    let mut plan = HeadPlan::empty(&base.config);
    plan.mixer = Some(spec(RecurrentKind::None, 4));
    plan.layers[0].groups[0].mixer = model::GroupMixer::Recurrent;
    let hybrid = base.with_plan(plan, &mut |_, _| Ok(Default::default())).unwrap();
    let result = analyze(&exec(), &hybrid, &text, &AnalyzeOptions::default(), &mut Silent);
    assert!(message(result).contains("hybrid already"));

    struct Stop;
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let stopped = analyze(&exec(), &base, &text, &AnalyzeOptions::default(), &mut Stop);
    assert!(matches!(stopped, Err(SurgeryError::Interrupted)));
}

#[test]
fn similarity_is_the_cosine_of_what_goes_in_and_what_comes_out() {
    let exec = exec();
    let mut model = model(4);
    let set = |model: &mut Model, name: &str, value: f32| {
        let id = model.params.id(name).unwrap();
        model.params.data_mut(id).fill(value);
    };
    // The second layer adds nothing; the final norm only scales, which no cosine sees.
    for name in ["self_attn.o_proj.weight", "mlp.down_proj.weight"] {
        set(&mut model, &format!("model.layers.1.{name}"), 0.0);
    }
    set(&mut model, "model.norm.weight", 1.0);
    let sequences = [tokens(1, 40), tokens(2, 23)];
    let report = analyze(&exec, &model, &sequences, &AnalyzeOptions::default(), &mut Silent).unwrap();
    let embedding = model.params.data(model.params.id("model.embed_tokens.weight").unwrap());
    let mut sum = 0.0;
    for sequence in &sequences {
        let out =
            model.forward_batch(&exec, &TokenBatch::one(sequence), &mut model::NoObserver, None).unwrap();
        for (&token, out) in sequence.iter().zip(out.chunks(24)) {
            let row = &embedding[token as usize * 24..][..24];
            let product = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            sum += product(row, out) / (product(row, row) * product(out, out)).sqrt();
        }
    }
    let found: Vec<f64> = report.layers.iter().map(|layer| layer.similarity.unwrap()).collect();
    assert!((found[0] - sum / 63.0).abs() < 1e-6 && found[0] < 0.99, "{found:?} {}", sum / 63.0);
    assert!((found[1] - 1.0).abs() < 1e-9, "{found:?}");
}
