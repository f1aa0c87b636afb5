//! Starting values and what is fitted.

use super::*;

fn fixture(kind: RecurrentKind) -> Fixture {
    Fixture::new(Case {
        kind,
        window: 4,
        sinks: 1,
        q_heads: 3,
        seq: 40,
        dressed: true,
        dropped: Dropped::Forgotten,
    })
}

fn named(fixture: &Fixture, tensors: &HeadTensors, name: &str) -> Vec<f32> {
    let index = fixture.layout.tensors().iter().position(|t| t.name == name).unwrap();
    tensors.values[index].clone()
}

/// Decays of f32 values whose logs are of the order of 1/128.
const DECAY_TOLERANCE: f32 = 1e-6;

#[test]
fn attention_initialised_heads_start_from_the_base() {
    for kind in [RecurrentKind::Mamba2, RecurrentKind::GatedDelta] {
        let fixture = fixture(kind);
        let start = init(&fixture.layout, &fixture.env().base, &[0.5, 10.0, 1000.0], 3);
        let get = |name: &str| named(&fixture, &start, name);
        for (i, name) in ["q_proj.weight", "k_proj.weight", "v_proj.weight"].into_iter().enumerate() {
            assert_eq!(get(name), fixture.base[i]);
            assert_eq!(get(&name.replace("weight", "bias")), fixture.base[3 + i]);
        }
        for name in ["q_conv.weight", "k_conv.weight", "v_conv.weight"] {
            assert!(get(name).chunks(4).all(|taps| taps == [0.0, 0.0, 0.0, 1.0]));
        }
        let decays: Vec<f32> = get("dt_proj.bias").into_iter().map(kernels::elementwise::softplus).collect();
        let expected = match kind {
            RecurrentKind::Mamba2 => vec![1.0 / 2.0, 1.0 / 10.0, 1.0 / 128.0],
            _ => vec![3.0 / 140.0],
        };
        assert_eq!(decays.len(), expected.len());
        for (d, e) in decays.iter().zip(&expected) {
            assert!((d - e).abs() < DECAY_TOLERANCE, "{d} {e}");
        }
        assert!(get("out_gain").iter().all(|&g| g == 1.0));
        for (info, values) in fixture.layout.tensors().iter().zip(&start.values) {
            let zero = ["dt_proj.weight", "in_scale.", "d_skip", "beta_proj.", "gate_proj.", "far_"];
            if zero.iter().any(|z| info.name.starts_with(z)) {
                assert!(values.iter().all(|&v| v == 0.0), "{}", info.name);
            }
        }
    }
}

#[test]
fn mamba_starts_as_its_reference_implementation() {
    let fixture = fixture(RecurrentKind::Mamba);
    let base = fixture.env().base;
    let start = init(&fixture.layout, &base, &[], 3);
    assert_eq!(start, init(&fixture.layout, &base, &[], 3));
    assert_ne!(start, init(&fixture.layout, &base, &[], 4));
    let get = |name: &str| named(&fixture, &start, name);
    let (d_model, d_inner, rank, d_conv) = (18.0f32, 18.0f32, 2.0f32, 4.0f32);
    for (name, fan_in) in [
        ("in_proj.weight", d_model),
        ("x_proj.weight", d_inner),
        ("dt_proj.weight", rank),
        ("conv.weight", d_conv),
        ("conv.bias", d_conv),
    ] {
        let largest = get(name).iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let bound = fan_in.powf(-0.5);
        assert!(largest <= bound * 1.0001 && largest > 0.7 * bound, "{name}: {largest} of {bound}");
    }
    for row in get("A_log").chunks(5) {
        assert_eq!(row, [1.0f32, 2.0, 3.0, 4.0, 5.0].map(f32::ln));
    }
    assert!(get("D").iter().all(|&d| d == 1.0));
    let deltas: Vec<f32> = get("dt_proj.bias").into_iter().map(kernels::elementwise::softplus).collect();
    assert!(deltas.iter().all(|d| (0.99e-3..=1.01e-1).contains(d)), "{deltas:?}");
}

#[test]
fn a_head_without_recurrence_has_no_tensors() {
    let fixture = fixture(RecurrentKind::None);
    assert!(fixture.layout.tensors().is_empty());
    assert!(init(&fixture.layout, &fixture.env().base, &[], 0).values.is_empty());
    assert!(fit(&exec(), &fixture.env(), fixture.x(), fixture.dout()).is_empty());
}

fn fitted_gain(fixture: &Fixture, target: MatRef<'_>) -> Vec<f32> {
    let [(tensor, gain)] = &fit(&exec(), &fixture.env(), fixture.x(), target)[..] else {
        panic!("one tensor")
    };
    assert_eq!(fixture.layout.tensors()[*tensor].name, "out_gain");
    gain.clone()
}

#[test]
fn a_head_that_weighs_is_fitted_to_the_true_weights() {
    for kind in [RecurrentKind::Mamba2, RecurrentKind::GatedDelta] {
        let case =
            Case { kind, window: 4, sinks: 1, q_heads: 3, seq: 60, dressed: true, dropped: Dropped::Weighed };
        let mut fixture = Fixture::new(case);
        let (heads, dim, d_inner) = (3, fixture.layout.dims.head_dim, fixture.layout.d_inner());
        let fitted = fit(&exec(), &fixture.env(), fixture.x(), fixture.dout());
        let names: Vec<&str> = fitted.iter().map(|(i, _)| fixture.layout.tensors()[*i].name).collect();
        assert_eq!(names, ["far_proj.bias", "far_count", "out_gain"]);

        // The line minimises the weighted squared distance from the true log weights among slopes from 0 to 1.
        let naive = fixture.naive();
        let (_, lse) = naive.local();
        let everything = Naive {
            layout: HeadLayout { spec: MixerSpec { window: 1000, ..fixture.layout.spec }, ..fixture.layout },
            ..naive.clone()
        };
        let (_, total) = everything.local();
        let logits = naive.far_logits();
        let error = |head: usize, bias: f64, count: f64| -> f64 {
            let row = |t: usize| {
                let share = 1.0 - (lse[t][head] - total[t][head]).exp();
                let far = total[t][head] + share.ln();
                share * (far - logits[t][head] - bias - count * ((t - 4) as f64).ln()).powi(2)
            };
            (5..60).map(row).sum()
        };
        for head in 0..heads {
            let (bias, count) = (f64::from(fitted[0].1[head]), f64::from(fitted[1].1[head]));
            assert!((0.0..=1.0).contains(&count));
            let found = error(head, bias, count);
            for (b, c) in [(1e-2, 0.0), (-1e-2, 0.0), (0.0, 1e-2), (0.0, -1e-2), (1e-2, -1e-2), (-1e-2, 1e-2)]
            {
                let slope = count + c;
                assert!(
                    !(0.0..=1.0).contains(&slope) || error(head, bias + b, slope) >= found,
                    "{kind:?} {head}"
                );
            }
        }

        // With them, the gain makes the rest orthogonal to the recurrence.
        for (tensor, values) in &fitted {
            fixture.tensors.values[*tensor].clone_from(values);
        }
        let naive = fixture.naive();
        let (local, lse) = naive.local();
        let (y, gain) = (naive.recurrence(), &fitted[2].1);
        let window = |t: usize, head: usize| naive.keep(t, head, lse[t][head]);
        for head in 0..heads {
            let (mut along, mut power) = (0.0, 0.0);
            for t in 0..60 {
                let keep = window(t, head);
                for c in head * dim..(head + 1) * dim {
                    let y = (1.0 - keep) * y[t][c];
                    let rest = f64::from(fixture.dout[t * d_inner + c])
                        - keep * local[t][c]
                        - f64::from(gain[c]) * y;
                    along += rest * y;
                    power += y * y;
                }
            }
            assert!((along / power).abs() < OUTPUT_TOLERANCE, "{kind:?} head {head}");
        }
    }
}

#[test]
fn the_fitted_gain_recovers_the_gain_and_is_optimal() {
    for kind in [RecurrentKind::Mamba2, RecurrentKind::GatedDelta] {
        let fixture = fixture(kind);
        let naive = fixture.naive();
        let (local, y) = (naive.local().0.concat(), naive.recurrence().concat());
        let (d_inner, head_dim) = (fixture.layout.d_inner(), fixture.layout.dims.head_dim);
        let true_gain = |i: usize| [0.7, -1.5, 3.0][i % d_inner / head_dim];
        let target: Vec<f32> = (0..y.len()).map(|i| (local[i] + true_gain(i) * y[i]) as f32).collect();
        let target = MatRef::dense(&target, fixture.x().rows(), d_inner);
        let gain = fitted_gain(&fixture, target);
        let expected: Vec<f64> = (0..d_inner).map(true_gain).collect();
        assert_near(&gain, &expected, OUTPUT_TOLERANCE, "gain");

        // Of any target: the rest is orthogonal to y.
        let gain = fitted_gain(&fixture, fixture.dout());
        for head in 0..3 {
            let channels = (0..y.len()).filter(|i| i % d_inner / head_dim == head);
            let (mut along, mut power) = (0.0, 0.0);
            for i in channels {
                let rest = f64::from(fixture.dout[i]) - local[i] - f64::from(gain[i % d_inner]) * y[i];
                along += rest * y[i];
                power += y[i] * y[i];
            }
            assert!((along / power).abs() < OUTPUT_TOLERANCE, "{kind:?} head {head}");
        }
    }
}

#[test]
fn projections_are_the_only_slow_tensors() {
    for kind in KINDS {
        for info in fixture(kind).layout.tensors() {
            let copied = ["q_proj.", "k_proj.", "v_proj."].iter().any(|p| info.name.starts_with(p));
            assert_eq!(info.class == TensorClass::Projection, copied, "{}", info.name);
        }
    }
}
