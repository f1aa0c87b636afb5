use super::*;
use proptest::prelude::*;
use weights::RopeScaling;

pub(super) fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab: 64,
        d_model: 32,
        d_ff: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        rms_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        max_context: 128,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
        bos_token_id: None,
        eos_token_ids: vec![],
    }
}

pub(super) fn mixer() -> MixerSpec {
    MixerSpec {
        recurrent: RecurrentKind::Mamba2,
        window: 16,
        sinks: 1,
        d_state: 8,
        d_conv: 4,
        dropped: Default::default(),
    }
}

fn some_converted() -> HeadPlan {
    let mut plan = HeadPlan::empty(&config());
    plan.layers[1].groups[0] = GroupPlan { mixer: GroupMixer::Recurrent, score: Some(-0.002) };
    plan.mixer = Some(mixer());
    plan.beta = 0.25;
    plan
}

fn message(result: Result<HeadPlan>) -> String {
    result.expect_err("should be refused").to_string()
}

#[test]
fn round_trip() {
    for plan in [HeadPlan::empty(&config()), some_converted()] {
        assert_eq!(HeadPlan::from_json(&plan.to_json(), &config()).unwrap(), plan);
    }
}

#[test]
fn reads_the_documented_form() {
    let json = r#"{"version": 1, "model": {"family": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8},
      "criterion": {"name": "mixer-fisher", "tokens": 6144, "bank_sha256": "00", "data_sha256": "11"},
      "beta": 0.75, "keep_at_least_per_layer": 0,
      "mixer": {"recurrent": "gated-delta", "window": 0, "sinks": 0, "d_state": 8, "d_conv": 4},
      "layers": [{"groups": [{"mixer": "attention", "score": -0.31}, {"mixer": "recurrent", "score": -0.002}]},
                 {"groups": [{"mixer": "recurrent"}, {"mixer": "recurrent"}]}]}"#;
    let plan = HeadPlan::from_json(json, &config()).unwrap();
    assert_eq!((plan.converted(), plan.total()), (3, 4));
    assert!(!plan.is_converted(0, 0) && plan.is_converted(0, 1));
    assert_eq!(plan.mixer.unwrap().recurrent, RecurrentKind::GatedDelta);
}

#[test]
fn version_is_checked_before_fields() {
    let json = r#"{"version": 7, "brand_new_field": true}"#;
    assert!(message(HeadPlan::from_json(json, &config())).contains("version 7, expected 1"));
}

#[test]
fn unknown_fields_and_broken_json() {
    let json = some_converted().to_json().replacen("\"beta\"", "\"betta\": 1, \"beta\"", 1);
    assert!(message(HeadPlan::from_json(&json, &config())).contains("betta"));
    for json in ["", "{", "null", "[]", "{\"version\": -1}", "{\"version\": 1e99}", "{\"version\": 1}"] {
        message(HeadPlan::from_json(json, &config()));
    }
    let deep = "[".repeat(100_000);
    message(HeadPlan::from_json(&deep, &config()));
    let long = " ".repeat(MAX_PLAN_BYTES + 1);
    assert!(message(HeadPlan::from_json(&long, &config())).contains("bytes"));
}

#[test]
fn mismatches_name_expected_and_found() {
    let other = ModelConfig { layers: 3, ..config() };
    let text = message(HeadPlan::from_json(&some_converted().to_json(), &other));
    assert!(text.contains("layers is 2 in the plan, 3 in the model"), "{text}");
    let other = ModelConfig { family: Family::Qwen3, ..config() };
    let text = message(HeadPlan::from_json(&some_converted().to_json(), &other));
    assert!(text.contains("llama") && text.contains("qwen3"), "{text}");
}

#[test]
fn structure_is_checked() {
    let refused = |change: &dyn Fn(&mut HeadPlan), word: &str| {
        let mut plan = some_converted();
        change(&mut plan);
        let text = plan.validate(&config()).expect_err(word).to_string();
        assert!(text.contains(word), "{text} does not mention {word}");
    };
    refused(&|p| p.mixer = None, "no mixer");
    refused(&|p| p.beta = 1.5, "beta");
    refused(&|p| p.beta = f64::NAN, "beta");
    refused(&|p| p.version = 2, "version");
    refused(&|p| p.layers.truncate(1), "lists 1 layers");
    refused(&|p| p.layers[1].groups.truncate(1), "layer 1 lists 1 groups");
    refused(&|p| p.keep_at_least_per_layer = 2, "keep_at_least_per_layer");
    refused(&|p| p.model.heads = 8, "heads");
}

#[test]
fn mixer_ranges() {
    use RecurrentKind::*;
    let spec = |recurrent, window, sinks, d_state, d_conv| {
        MixerSpec { recurrent, window, sinks, d_state, d_conv, dropped: Default::default() }
            .validate(8)
            .map_err(|e| e.to_string())
    };
    for (ok, s) in [
        (true, spec(Mamba2, 16, 1, 8, 4)),
        (true, spec(Mamba2, 0, 0, 8, 1)),
        (false, spec(Mamba2, 16, 1, 16, 4)),
        (false, spec(GatedDelta, 0, 0, 0, 4)),
        (true, spec(GatedDelta, MAX_WINDOW, MAX_SINKS, 8, MAX_CONV)),
        (false, spec(GatedDelta, MAX_WINDOW + 1, 0, 8, 4)),
        (false, spec(GatedDelta, 64, MAX_SINKS + 1, 8, 4)),
        (false, spec(GatedDelta, 0, 1, 8, 4)),
        (false, spec(GatedDelta, 0, 0, 8, 0)),
        (false, spec(GatedDelta, 0, 0, 8, MAX_CONV + 1)),
        (true, spec(Mamba, 0, 0, 16, 4)),
        (true, spec(Mamba, 0, 0, MAX_MAMBA_STATE, 4)),
        (false, spec(Mamba, 0, 0, MAX_MAMBA_STATE + 1, 4)),
        (false, spec(Mamba, 0, 0, 0, 4)),
        (true, spec(None, 1, 0, 0, 0)),
        (false, spec(None, 0, 0, 0, 0)),
        (false, spec(None, 16, 1, 8, 0)),
        (false, spec(None, 16, 1, 0, 4)),
    ] {
        assert_eq!(s.is_ok(), ok, "{s:?}");
    }
    let averaged = MixerSpec { dropped: Dropped::Averaged, ..mixer() };
    assert!(averaged.validate(8).is_ok());
    let unseen = MixerSpec { window: 0, sinks: 0, ..averaged };
    assert!(unseen.validate(8).unwrap_err().to_string().contains("has no window"));

    for (recurrent, window, ok) in [
        (Mamba2, 16, true),
        (GatedDelta, 1, true),
        (GatedDelta, 0, false),
        (Mamba, 16, false),
        (None, 16, false),
    ] {
        let spec = MixerSpec { dropped: Dropped::Weighed, ..MixerSpec::of(recurrent, window, 0, 8) };
        assert_eq!(spec.can_weigh(), ok, "{spec}");
        let spec = MixerSpec { sinks: 2, ..spec };
        assert!(spec.is_exact_over(window + 2) && !spec.is_exact_over(window + 3));
        assert!(!MixerSpec { dropped: Dropped::Forgotten, ..spec }.is_exact_over(1));
        assert_eq!(spec.validate(8).is_ok(), ok, "{spec}");
    }
}

#[test]
fn skipped_layers_convert_nothing_and_one_is_left() {
    let mut plan = some_converted();
    assert!(!plan.to_json().contains("skipped") && !plan.is_base());
    plan.layers[0].skipped = true;
    assert!(plan.validate(&config()).is_ok());
    assert_eq!(HeadPlan::from_json(&plan.to_json(), &config()).unwrap(), plan);
    let message = |plan: &HeadPlan| plan.validate(&config()).unwrap_err().to_string();
    plan.layers[1].skipped = true;
    assert!(message(&plan).contains("every layer is skipped"));
    plan.layers[0].skipped = false;
    assert!(message(&plan).contains("layer 1 is skipped and converts groups"));
    plan.layers[1].groups[0].mixer = GroupMixer::Attention;
    assert!(plan.validate(&config()).is_ok() && !plan.is_base());
    assert_eq!((plan.skipped(), plan.is_skipped(0), plan.is_skipped(1)), (1, false, true));
}

#[test]
fn only_tokens_that_count_are_written_down() {
    let mut plan = some_converted();
    assert!(!plan.to_json().contains("dropped"), "plans that forget look as they always did");
    for (dropped, name) in [(Dropped::Averaged, "averaged"), (Dropped::Weighed, "weighed")] {
        plan.mixer = plan.mixer.map(|mixer| MixerSpec { dropped, ..mixer });
        assert!(plan.to_json().contains(&format!(r#""dropped": "{name}""#)));
        assert_eq!(HeadPlan::from_json(&plan.to_json(), &config()).unwrap(), plan);
    }
    let unknown = plan.to_json().replace("weighed", "kept");
    assert!(HeadPlan::from_json(&unknown, &config()).unwrap_err().to_string().contains("forgotten"));
}

/// Any plan that fits [`config`], valid or not in its mixer and beta.
fn any_plan() -> impl Strategy<Value = HeadPlan> {
    let kind = prop_oneof![
        Just(RecurrentKind::None),
        Just(RecurrentKind::Mamba),
        Just(RecurrentKind::Mamba2),
        Just(RecurrentKind::GatedDelta)
    ];
    let dropped = prop_oneof![Just(Dropped::Forgotten), Just(Dropped::Averaged), Just(Dropped::Weighed)];
    let spec = (kind, 0usize..70_000, 0usize..5, 0usize..20, 0usize..10, dropped).prop_map(
        |(recurrent, window, sinks, d_state, d_conv, dropped)| MixerSpec {
            recurrent,
            window,
            sinks,
            d_state,
            d_conv,
            dropped,
        },
    );
    let group = (any::<bool>(), proptest::option::of(-1e9..1e9)).prop_map(|(converted, score)| GroupPlan {
        mixer: if converted { GroupMixer::Recurrent } else { GroupMixer::Attention },
        score,
    });
    let groups = proptest::collection::vec(group, 4);
    (proptest::option::of(spec), groups, 0.0..1.1, 0usize..3).prop_map(|(mixer, groups, beta, keep)| {
        HeadPlan {
            mixer,
            beta,
            keep_at_least_per_layer: keep,
            layers: groups.chunks(2).map(|g| LayerPlan { groups: g.to_vec(), skipped: false }).collect(),
            ..HeadPlan::empty(&config())
        }
    })
}

proptest! {
    #[test]
    fn plans_that_are_valid_survive_and_no_other_is_read(plan in any_plan()) {
        match HeadPlan::from_json(&plan.to_json(), &config()) {
            Ok(again) => prop_assert_eq!(again, plan),
            Err(_) => prop_assert!(plan.validate(&config()).is_err()),
        }
    }

    #[test]
    fn damaged_text_is_refused_or_a_plan(changes in proptest::collection::vec((0usize..2000, any::<u8>()), 1..6)) {
        let mut bytes = some_converted().to_json().into_bytes();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(text) = std::str::from_utf8(&bytes)
            && let Ok(plan) = HeadPlan::from_json(text, &config())
        {
            prop_assert!(plan.validate(&config()).is_ok());
            prop_assert_eq!(HeadPlan::from_json(&plan.to_json(), &config()).unwrap(), plan);
        }
    }
}
