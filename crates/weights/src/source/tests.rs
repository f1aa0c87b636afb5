use super::*;
use crate::safetensors::{Metadata, write_f32};
use serde_json::json;
use std::ffi::OsString;
use std::fs;

fn tiny_config() -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true, "eos_token_id": 2,
    })
}

/// A whole model folder; `change` edits the list of `(name, shape)` before it is written.
fn write_model(dir: &Path, config: &serde_json::Value, change: impl FnOnce(&mut Vec<(String, Vec<usize>)>)) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut shapes = ModelConfig::from_hf_json(config).unwrap().tensor_shapes();
    change(&mut shapes);
    let values: Vec<Vec<f32>> = shapes.iter().map(|(_, s)| vec![0.5; s.iter().product()]).collect();
    let tensors: Vec<(&str, &[usize], &[f32])> = shapes
        .iter()
        .zip(&values)
        .map(|((name, shape), values)| (name.as_str(), shape.as_slice(), values.as_slice()))
        .collect();
    write_f32(&dir.join("model.safetensors"), &tensors, &Metadata::new()).unwrap();
}

fn open_error(change: impl FnOnce(&mut Vec<(String, Vec<usize>)>)) -> WeightsError {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &tiny_config(), change);
    Checkpoint::open(dir.path()).err().unwrap()
}

#[test]
fn a_folder_opens_with_its_extras() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &tiny_config(), |shapes| {
        shapes.push(("model.layers.0.self_attn.recurrent.0.decay".into(), vec![2]));
        shapes.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![1]));
        shapes.push(("lm_head.weight".into(), vec![6, 4]));
    });
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 2]}"#).unwrap();
    fs::write(dir.path().join("head_plan.json"), r#"{"version": 1}"#).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config.eos_token_ids, [5, 2]);
    assert_eq!(checkpoint.plan_json.as_ref().unwrap()["version"], 1);
    assert_eq!(checkpoint.config_json, tiny_config());
    let recurrent = "model.layers.0.self_attn.recurrent.0.decay";
    assert_eq!(checkpoint.tensors.read_f32(recurrent).unwrap(), [0.5, 0.5]);
    assert!(checkpoint.tokenizer().err().unwrap().to_string().contains("no tokenizer.json"));
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    let missing = open_error(|shapes| shapes.retain(|(name, _)| name != "model.norm.weight"));
    assert!(
        matches!(&missing, WeightsError::MissingTensor { name, .. } if name == "model.norm.weight"),
        "{missing}"
    );
    let shape = open_error(|shapes| shapes[0].1 = vec![4, 6]);
    assert!(matches!(&shape, WeightsError::Shape { found, .. } if found == &[4, 6]), "{shape}");
    let bias = open_error(|shapes| shapes.push(("model.layers.0.self_attn.o_proj.bias".into(), vec![4])));
    assert!(matches!(&bias, WeightsError::Unsupported { what } if what.contains("o_proj.bias")), "{bias}");
    let layer = open_error(|shapes| shapes.push(("model.layers.1.input_layernorm.weight".into(), vec![4])));
    assert!(matches!(layer, WeightsError::Unsupported { .. }));
}

#[test]
fn folders_without_a_model_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let error = || Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(error().contains("no config.json") && error().contains("hint:"));
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(error().contains("malformed config.json"));
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(error().contains(&dir.path().display().to_string()), "{}", error());
    fs::write(dir.path().join("config.json"), tiny_config().to_string()).unwrap();
    assert!(error().contains("neither model.safetensors"));
    let file = dir.path().join("empty.gguf");
    fs::write(&file, "").unwrap();
    assert!(Checkpoint::open(&file).err().unwrap().to_string().contains("malformed GGUF"));
    assert!(Checkpoint::open(&dir.path().join("none.gguf")).is_err());
}

#[test]
fn arguments_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(ModelSource::parse(path).unwrap(), ModelSource::Directory(path.into()));
    let named = dir.path().join("m.gguf");
    let magic = dir.path().join("model.bin");
    let other = dir.path().join("model.safetensors");
    fs::write(&named, "").unwrap();
    fs::write(&magic, "GGUF....").unwrap();
    fs::write(&other, "........").unwrap();
    for file in [&named, &magic] {
        assert_eq!(ModelSource::parse(file.to_str().unwrap()).unwrap(), ModelSource::Gguf(file.clone()));
    }
    assert!(ModelSource::parse(other.to_str().unwrap()).unwrap_err().to_string().contains("config.json"));
    assert_eq!(ModelSource::parse("smollm2-135m").unwrap(), ModelSource::Builtin("smollm2-135m".into()));
    let id = "HuggingFaceTB/SmolLM2-135M-Instruct";
    assert_eq!(ModelSource::parse(id).unwrap(), ModelSource::Hub(id.into()));
    for bad in ["", "nothing", "/no/such", "../x/y", "a/b/c", "no/such.gguf", "a/", "a b/c", "../x", "~/x"] {
        assert!(ModelSource::parse(bad).unwrap_err().to_string().contains("hint:"), "{bad}");
    }
    let error = ModelSource::Builtin("other".into()).fetch(&mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("smollm2-135m"));
}

#[test]
fn the_built_in_model_comes_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("models/smollm2-135m");
    fs::create_dir_all(&folder).unwrap();
    let found = fetch_builtin(&Cache::at(dir.path()), &mut |m| panic!("{m}")).unwrap();
    assert_eq!(found, folder.join("SmolLM2-135M-Instruct.Q4_1.gguf"));
}

fn settings(variables: &[(&str, &str)]) -> HubSettings {
    HubSettings::from_variables(|name| {
        variables.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v))
    })
}

#[test]
fn the_hubs_variables_are_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().to_str().unwrap();
    fs::write(dir.path().join("token"), " stored\n").unwrap();
    let plain = settings(&[("HOME", "/home/u")]);
    assert_eq!(plain.cache, Path::new("/home/u/.cache/huggingface/hub"));
    assert_eq!((plain.token, plain.endpoint, plain.offline), (None, None, false));
    let set = settings(&[("HF_HOME", home), ("HF_ENDPOINT", "http://mirror"), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!((set.cache, set.token.as_deref()), (dir.path().join("hub"), Some("stored")));
    assert_eq!((set.endpoint.as_deref(), set.offline), (Some("http://mirror"), true));
    assert_eq!(settings(&[("HF_HOME", home), ("HF_TOKEN", "t")]).token.as_deref(), Some("t"));
    assert_eq!(settings(&[("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0")]).cache, Path::new("/c"));
    assert!(!settings(&[("HF_HUB_OFFLINE", "0")]).offline);
}

#[test]
fn offline_uses_complete_snapshots_only() {
    let dir = tempfile::tempdir().unwrap();
    let settings = HubSettings { cache: dir.path().into(), token: None, endpoint: None, offline: true };
    let fetch = || hub::fetch("owner/name", &settings, &mut |_| ());
    assert!(fetch().unwrap_err().to_string().contains("HF_HUB_OFFLINE"));
    let repo = dir.path().join("models--owner--name");
    let snapshot = repo.join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "abc").unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    assert!(fetch().is_err());
    fs::write(snapshot.join("model.safetensors"), "").unwrap();
    assert_eq!(fetch().unwrap(), snapshot);
    let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    fs::write(snapshot.join("one.safetensors"), "").unwrap();
    assert!(fetch().is_err());
    fs::write(snapshot.join("two.safetensors"), "").unwrap();
    assert_eq!(fetch().unwrap(), snapshot);
    fs::write(snapshot.join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../x"}}"#).unwrap();
    assert!(fetch().unwrap_err().to_string().contains("inside the folder"));
}

#[test]
fn an_unreachable_hub_is_an_error_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago: nobody listens.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = HubSettings {
        cache: dir.path().into(),
        token: None,
        endpoint: Some(format!("http://127.0.0.1:{port}/")),
        offline: false,
    };
    let error = hub::fetch("owner/name", &settings, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("hint:"), "{error}");
}
