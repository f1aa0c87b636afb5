use super::*;
use serde_json::json;

fn base(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "sliding_window": null,
    })
}

fn with(model_type: &str, extra: Value) -> Value {
    let mut config = base(model_type);
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn parse(model_type: &str, extra: Value) -> ModelConfig {
    ModelConfig::from_hf_json(&with(model_type, extra)).unwrap()
}

fn error(model_type: &str, extra: Value) -> String {
    ModelConfig::from_hf_json(&with(model_type, extra)).unwrap_err().to_string()
}

#[test]
fn families_have_their_own_parts_and_defaults() {
    let llama = parse("llama", json!({}));
    assert_eq!((llama.head_dim, llama.group_size(), llama.qkv_bias, llama.qk_norm), (16, 2, false, false));
    assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
    assert_eq!((llama.rope_theta, llama.rms_eps, llama.tie_embeddings), (10_000.0, 1e-6, false));
    let qwen2 = parse("qwen2", json!({"tie_word_embeddings": true}));
    assert!(qwen2.qkv_bias && !qwen2.qk_norm && qwen2.tie_embeddings && qwen2.eos_token_ids.is_empty());
    let qwen3 = parse("qwen3", json!({}));
    assert_eq!((qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm), (128, false, true));
    assert_eq!(parse("mistral", json!({"head_dim": 32})).head_dim, 32);
    let mut no_kv = base("llama");
    no_kv["num_key_value_heads"] = Value::Null;
    assert_eq!(ModelConfig::from_hf_json(&no_kv).unwrap().kv_heads, 4);
}

#[test]
fn old_and_new_form_agree() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let mut old_scaling = scaling.clone();
    old_scaling["type"] = "llama3".into();
    let mut new = scaling;
    new["rope_type"] = "llama3".into();
    new["rope_theta"] = 500_000.0.into();
    let old = parse("llama", json!({"rope_theta": 500_000, "rope_scaling": old_scaling}));
    assert_eq!(old, parse("llama", json!({"rope_parameters": new})));
    assert_eq!(
        parse("qwen2", json!({"rope_theta": 1e6})),
        parse("qwen2", json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}))
    );
    assert_eq!(parse("llama", json!({"rope_scaling": null, "rope_theta": 5.0})).rope_theta, 5.0);
}

#[test]
fn llama3_frequencies_follow_the_three_pieces() {
    let config = parse(
        "llama",
        json!({"head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}),
    );
    // From transformers' _compute_llama3_parameters in float64.
    let plain: Vec<f64> = (0..32).map(|i| 500_000f64.powf(-f64::from(i) / 32.0)).collect();
    let freq = config.rope_inv_freq();
    assert_eq!(freq.len(), 32);
    for (i, (&f, &p)) in freq.iter().zip(&plain).enumerate() {
        let wavelength = 2.0 * std::f64::consts::PI / p;
        if wavelength < 2048.0 {
            assert_eq!(f, p, "frequency {i}");
        } else if wavelength > 8192.0 {
            assert_eq!(f, p / 8.0, "frequency {i}");
        } else {
            assert!(f < p && f > p / 8.0, "frequency {i}");
        }
    }
    let linear = parse("llama", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
    assert_eq!(linear.rope_inv_freq()[0], 0.5);
}

#[test]
fn token_ids_may_be_a_number_a_list_or_null() {
    assert_eq!(parse("llama", json!({"eos_token_id": [5, 6]})).eos_token_ids, [5, 6]);
    let mut config = parse("llama", json!({"eos_token_id": 5, "bos_token_id": null}));
    assert_eq!(config.bos_token_id, None);
    config.merge_generation_config(&json!({"eos_token_id": [7, 5]})).unwrap();
    assert_eq!(config.eos_token_ids, [7, 5]);
    config.merge_generation_config(&json!({})).unwrap();
    assert!(config.merge_generation_config(&json!({"eos_token_id": "x"})).is_err());
}

#[test]
fn features_that_are_not_computed_are_named() {
    for (family, extra, word) in [
        ("gemma", json!({}), "gemma"),
        ("mixtral", json!({}), "mixtral"),
        ("llama", json!({"hidden_act": "gelu"}), "gelu"),
        ("llama", json!({"mlp_bias": true}), "mlp_bias"),
        ("llama", json!({"attention_bias": true}), "attention_bias"),
        ("qwen3", json!({"attention_bias": true}), "attention_bias"),
        ("qwen2", json!({"num_experts": 8}), "experts"),
        ("mistral", json!({"sliding_window": 128}), "sliding_window"),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 1}),
            "sliding_window",
        ),
        ("qwen2", json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
        ("llama", json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
        ("llama", json!({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}), "dynamic"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        ("llama", json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
    ] {
        let message = error(family, extra.clone());
        assert!(message.starts_with("unsupported") && message.contains(word), "{family} {extra}: {message}");
    }
}

#[test]
fn windows_that_are_not_in_use_are_accepted() {
    parse("mistral", json!({"sliding_window": 256}));
    parse("qwen2", json!({"use_sliding_window": false, "sliding_window": 16}));
    parse("qwen2", json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 2}));
    parse("qwen3", json!({"layer_types": ["full_attention", "full_attention"]}));
    let mut absent = with("mistral", json!({"max_position_embeddings": 8192}));
    absent.as_object_mut().unwrap().remove("sliding_window");
    assert!(ModelConfig::from_hf_json(&absent).unwrap_err().to_string().contains("4096"));
}

#[test]
fn sizes_that_do_not_fit_are_malformed() {
    for extra in [
        json!({"num_key_value_heads": 3}),
        json!({"num_key_value_heads": 0}),
        json!({"num_attention_heads": 0}),
        json!({"hidden_size": 0}),
        json!({"head_dim": 15}),
        json!({"hidden_size": 63}),
        json!({"vocab_size": u64::MAX}),
        json!({"vocab_size": -1}),
        json!({"vocab_size": "many"}),
        json!({"rms_norm_eps": -1.0}),
        json!({"rope_theta": 0.0}),
        json!({"rope_scaling": [1]}),
        json!({"rope_scaling": {"type": "llama3", "factor": 8.0}}),
        json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
    ] {
        let message = error("llama", extra.clone());
        assert!(message.contains("malformed"), "{extra}: {message}");
    }
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    {
        let mut config = base("llama");
        config.as_object_mut().unwrap().remove(key);
        assert!(ModelConfig::from_hf_json(&config).unwrap_err().to_string().contains(key));
    }
    assert!(ModelConfig::from_hf_json(&json!([])).is_err());
}

#[test]
fn tensor_shapes_cover_every_family() {
    assert_eq!(parse("llama", json!({})).tensor_shapes().len(), 3 + 2 * 9);
    assert_eq!(parse("qwen2", json!({"tie_word_embeddings": true})).tensor_shapes().len(), 2 + 2 * 12);
    let qwen3 = parse("qwen3", json!({})).tensor_shapes();
    assert_eq!(qwen3.len(), 3 + 2 * 11);
    assert!(qwen3.contains(&("model.layers.1.self_attn.o_proj.weight".into(), vec![64, 512])));
}

#[test]
fn the_epsilon_is_written_as_people_write_it() {
    for (eps, decimal) in [(1e-5_f32, 1e-5), (1e-6, 1e-6), (0.1, 0.1), (f32::MIN_POSITIVE, 1.1754944e-38)] {
        let mut config = parse("llama", json!({}));
        config.rms_eps = eps;
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(json["rms_eps"].as_f64(), Some(decimal));
        assert_eq!(serde_json::from_value::<ModelConfig>(json).unwrap(), config);
    }
}
