use super::*;
use crate::ModelConfig;
use crate::error::WeightsError;
use crate::gguf::{GgufSource, Value};
use crate::safetensors::{Metadata, write_f32};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::path::PathBuf;

fn exec() -> Exec {
    Exec::new(2).unwrap()
}

/// The tiny model of a family, of the model crate's tests.
fn tiny(family: &str) -> Checkpoint {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data").join(family);
    Checkpoint::open(&dir).unwrap()
}

fn config_json() -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": 9, "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": true,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": [2, 3, 4, 5],
    })
}

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A folder with random values; rows of 256 (whole K blocks), 64, 288 and 6 values. A plan makes it a hybrid.
fn folder(dir: &Path, plan: Option<serde_json::Value>, bad: Option<&str>) -> Checkpoint {
    let mut shapes = ModelConfig::from_hf_json(&config_json()).unwrap().tensor_shapes();
    if let Some(plan) = plan {
        std::fs::write(dir.join("head_plan.json"), plan.to_string()).unwrap();
        for (name, shape) in [
            ("q_proj.weight", vec![32, 256]),
            ("q_conv.weight", vec![32, 4]),
            ("dt_proj.weight", vec![2, 256]),
            ("dt_proj.bias", vec![2]),
            ("in_proj.weight", vec![8, 6]),
            ("gate_proj.weight", vec![32, 256]),
        ] {
            shapes.push((format!("model.layers.0.self_attn.recurrent.1.{name}"), shape));
        }
    }
    std::fs::write(dir.join("config.json"), config_json().to_string()).unwrap();
    let values: Vec<Vec<f32>> = shapes
        .iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let mut values = random(shape.iter().product(), i as u64);
            if bad == Some(name) {
                values[3] = 1e30;
            }
            values
        })
        .collect();
    let tensors: Vec<_> =
        shapes.iter().zip(&values).map(|((n, s), v)| (n.as_str(), s.as_slice(), v.as_slice())).collect();
    write_f32(&dir.join("model.safetensors"), &tensors, &Metadata::new()).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn export(source: &Checkpoint, dtype: Dtype, out: &Path) -> Result<Vec<String>> {
    let export = Export::plan(source, dtype)?;
    let mut file = export.create(out)?;
    for tensor in export.tensors() {
        file.write(&exec(), tensor)?;
    }
    let size = file.finish()?;
    assert_eq!(size, std::fs::metadata(out).unwrap().len());
    assert!(export.bytes_by_dtype().iter().map(|(.., bytes)| *bytes as u64).sum::<u64>() < size);
    Ok(export.notes().to_vec())
}

/// What storing `values` as `dtype` makes of them.
fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let (block, block_bytes) = dtype.block();
    let mut bytes = vec![0; values.len() / block * block_bytes];
    quantize(dtype, values, &mut bytes);
    let mut out = vec![0.0; values.len()];
    dequantize(dtype, &bytes, &mut out);
    out
}

/// Every tensor of `found` is what its stored type makes of the same tensor of `source`.
fn assert_same(source: &Checkpoint, found: &Checkpoint, what: &str) {
    assert_eq!(found.config, source.config, "{what}");
    for info in found.tensors.infos() {
        let expected = source.tensors.read_f32(&info.name).unwrap();
        assert_eq!(source.tensors.info(&info.name).unwrap().shape, info.shape, "{what}: {}", info.name);
        let values = found.tensors.read_f32(&info.name).unwrap();
        assert_eq!(values, rounded(info.dtype, &expected), "{what}: {}", info.name);
    }
}

#[test]
fn base_models_of_every_family_and_type_come_back() {
    let dir = tempfile::tempdir().unwrap();
    for family in ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3"] {
        let source = tiny(family);
        for dtype in Dtype::ALL {
            let out = dir.path().join(format!("{family}-{}.gguf", dtype.name()));
            let notes = export(&source, dtype, &out).unwrap();
            assert!(notes.iter().any(|note| note.contains("no tokenizer")), "{notes:?}");
            let found = Checkpoint::open(&out).unwrap();
            assert!(found.plan_json.is_none());
            assert!(found.tokenizer().is_err());
            assert_eq!(found.tensors.infos().len(), source.config.tensor_shapes().len());
            assert_same(&source, &found, &format!("{family} {}", dtype.name()));
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 6 * 11, "temporary files stayed");
}

#[test]
fn llama_cpps_metadata_alone_describe_the_model() {
    let dir = tempfile::tempdir().unwrap();
    // Not llama3: of a head of 8 values too few frequencies are scaled to find the scaling again.
    for family in ["llama2", "smollm2", "mistral", "qwen2", "qwen3"] {
        let source = tiny(family);
        let mut export = Export::plan(&source, Dtype::F32).unwrap();
        export.metadata = without_own(&export.metadata);
        let mut file = export.create(&dir.path().join("x.gguf")).unwrap();
        for tensor in export.tensors() {
            file.write(&exec(), tensor).unwrap();
        }
        file.finish().unwrap();
        let found = Checkpoint::open(&dir.path().join("x.gguf")).unwrap();
        let mut expected = source.config.clone();
        if family == "mistral" {
            expected.family = crate::Family::Llama;
        }
        // Written by a tokenizer, of which these models have none.
        (expected.bos_token_id, expected.eos_token_ids) =
            (found.config.bos_token_id, found.config.eos_token_ids.clone());
        assert_eq!(found.config, expected, "{family}");
        for info in found.tensors.infos() {
            let (a, b) = (source.tensors.read_f32(&info.name), found.tensors.read_f32(&info.name));
            assert_eq!(a.unwrap(), b.unwrap(), "{family}: {}", info.name);
        }
    }
}

#[test]
fn rope_factors_are_the_converters() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_llama.gguf");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = parse(&bytes, &path).unwrap().tensors;
    let stored = tensors.iter().find(|t| t.name == ROPE_FREQS).unwrap();
    let mut expected = vec![0.0; stored.shape[0]];
    dequantize(stored.dtype, &bytes[stored.range.clone()], &mut expected);
    let found = rope_factors(&Checkpoint::open(&path).unwrap().config).unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        // The converter computes in f32.
        assert!((found - expected).abs() <= 1e-5 * expected, "{found} {expected}");
    }
    assert_eq!(rope_factors(&tiny("llama2").config), None);
}

/// The same metadata without this project's keys.
fn without_own(metadata: &MetadataBuilder) -> MetadataBuilder {
    let bytes = metadata.header(0);
    let mut out = MetadataBuilder::default();
    for (key, range) in parse(&bytes, Path::new("x")).unwrap().entries {
        if !key.starts_with("recurformer.") {
            out.copied(&key, &bytes[range]);
        }
    }
    out
}

#[test]
fn types_follow_rows_and_purpose() {
    let dir = tempfile::tempdir().unwrap();
    let source = folder(dir.path(), Some(json!({"version": 1})), None);
    let head = |name: &str| format!("model.layers.0.self_attn.recurrent.1.{name}");
    let layer = |name: &str| format!("model.layers.0.{name}");
    for (wanted, embedding, whole, other) in [
        (Dtype::F32, Dtype::F32, Dtype::F32, Dtype::F32),
        (Dtype::BF16, Dtype::BF16, Dtype::BF16, Dtype::BF16),
        (Dtype::Q8_0, Dtype::Q8_0, Dtype::Q8_0, Dtype::Q8_0),
        (Dtype::Q4_1, Dtype::Q8_0, Dtype::Q4_1, Dtype::Q4_1),
        (Dtype::Q4K, Dtype::Q8_0, Dtype::Q4K, Dtype::Q5_0),
        (Dtype::Q5K, Dtype::Q8_0, Dtype::Q5K, Dtype::Q5_1),
        (Dtype::Q6K, Dtype::Q6K, Dtype::Q6K, Dtype::Q8_0),
    ] {
        let export = Export::plan(&source, wanted).unwrap();
        assert_eq!(export.architecture(), "recurformer");
        let dtype = |name: &str| export.tensors().iter().find(|t| t.name == name).unwrap().dtype;
        assert_eq!(dtype("model.embed_tokens.weight"), embedding);
        assert_eq!(dtype(&layer("self_attn.q_proj.weight")), whole);
        assert_eq!(dtype(&layer("self_attn.o_proj.weight")), other);
        assert_eq!(dtype(&layer("mlp.down_proj.weight")), other);
        assert_eq!((dtype(&head("q_proj.weight")), dtype(&head("gate_proj.weight"))), (whole, whole));
        let small = if wanted.is_plain() { wanted } else { Dtype::Q8_0.for_row_length(6) };
        assert_eq!(dtype(&head("in_proj.weight")), small);
        for name in [
            layer("input_layernorm.weight"),
            head("q_conv.weight"),
            head("dt_proj.weight"),
            head("dt_proj.bias"),
        ] {
            assert_eq!(dtype(&name), Dtype::F32, "{name}");
        }
        let notes = export.notes().join("\n");
        assert_eq!(notes.contains("rows are not whole blocks"), !wanted.is_plain(), "{notes}");
        assert_eq!(notes.contains("embedding"), embedding != wanted, "{notes}");
    }
    assert_eq!(Dtype::parse("q4_K"), Some(Dtype::Q4K));
    assert_eq!(Dtype::parse("q3_k"), None);
}

#[test]
fn hybrids_come_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let plan = json!({"version": 1, "layers": ["any JSON passes here"]});
    let source = folder(dir.path(), Some(plan.clone()), None);
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": ["a b"]}});
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"chat_template": "x", "eos_token": "b"}"#)
        .unwrap();
    for dtype in Dtype::ALL {
        let out = dir.path().join("h.gguf");
        export(&source, dtype, &out).unwrap();
        let found = Checkpoint::open(&out).unwrap();
        assert_eq!(found.plan_json.as_ref(), Some(&plan));
        assert_eq!(found.config.eos_token_ids, [2, 3, 4, 5]);
        assert_eq!(found.tensors.infos().len(), source.tensors.infos().len());
        assert_same(&source, &found, dtype.name());
        let tokenizer = found.tokenizer().unwrap();
        assert_eq!(tokenizer.encode("abba", false).unwrap(), [2, 1, 0]);
        assert_eq!((tokenizer.chat_template(), tokenizer.eos_id()), (Some("x"), Some(1)));
        // From a hybrid's file another one: the same metadata, the bytes of tensors of the same type.
        let again = dir.path().join("again.gguf");
        let notes = export(&found, dtype, &again).unwrap();
        assert!(!notes.iter().any(|note| note.contains("quantised already")), "{notes:?}");
        assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(&out).unwrap(), "{}", dtype.name());
    }
}

#[test]
fn a_files_metadata_are_copied_with_their_types() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_llama.gguf");
    let source = Checkpoint::open(&path).unwrap();
    let out = dir.path().join("m.gguf");
    export(&source, Dtype::Q8_0, &out).unwrap();
    let (old, new) = (std::fs::read(&path).unwrap(), std::fs::read(&out).unwrap());
    let (before, after) = (parse(&old, &path).unwrap(), parse(&new, &out).unwrap());
    for (key, range) in &before.entries {
        let (_, found) = after.entries.iter().find(|(k, _)| k == key).unwrap();
        if !NOT_COPIED.contains(&key.as_str()) {
            assert_eq!(new[found.clone()], old[range.clone()], "{key}");
        }
    }
    assert_eq!(after.metadata["general.file_type"], Value::Unsigned(7));
    let found = Checkpoint::open(&out).unwrap();
    assert_same(&source, &found, "tiny_llama");
    let again = dir.path().join("again.gguf");
    let notes = export(&found, Dtype::Q4_0, &again).unwrap();
    assert!(notes.iter().any(|note| note.contains("quantised already (Q8_0)")), "{notes:?}");
}

#[test]
fn what_cannot_be_written_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("m"), dir.path().join("out.gguf"));
    std::fs::create_dir(&model).unwrap();
    let source = folder(&model, None, Some("model.layers.0.mlp.up_proj.weight"));
    // 1e30 is infinite as F16, and so would be the scale of its block.
    for dtype in [Dtype::F16, Dtype::Q8_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K] {
        let error = export(&source, dtype, &out).unwrap_err();
        assert!(
            matches!(&error, WeightsError::Unsupported { what } if what.contains("up_proj") && what.contains("f32")),
            "{}: {error}",
            dtype.name()
        );
    }
    // Not finished: an interruption.
    let planned = Export::plan(&source, Dtype::F32).unwrap();
    let mut file = planned.create(&out).unwrap();
    file.write(&exec(), &planned.tensors()[0]).unwrap();
    assert!(file.write(&exec(), &planned.tensors()[2]).unwrap_err().to_string().contains("not the turn"));
    drop(file);
    assert!(planned.create(&out).unwrap().finish().unwrap_err().to_string().contains("not written"));
    assert!(matches!(planned.create(&dir.path().join("no/out.gguf")), Err(WeightsError::Io { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // A killed process's leftovers go with the next export of that name.
    std::fs::write(dir.path().join(".out.gguf.tmp-a1B2c3"), "x").unwrap();
    export(&source, Dtype::F32, &out).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// A hybrid's file, as bytes.
fn hybrid_bytes() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let source = folder(dir.path(), Some(json!({"version": 1})), None);
    let out = dir.path().join("h.gguf");
    export(&source, Dtype::Q8_0, &out).unwrap();
    std::fs::read(out).unwrap()
}

#[test]
fn hostile_hybrids_are_refused() {
    let good = hybrid_bytes();
    let path = PathBuf::from("h.gguf");
    GgufSource::from_bytes(good.clone(), &path).unwrap();
    let header = parse(&good, &path).unwrap();
    let end = header.tensors.iter().map(|t| t.range.end).max().unwrap();
    let start = header.tensors.iter().map(|t| t.range.start).min().unwrap();
    for length in (0..start).step_by(7).chain([end - 1]) {
        assert!(GgufSource::from_bytes(good[..length].to_vec(), &path).is_err(), "{length} bytes");
    }
    let with = |change: &dyn Fn(&mut MetadataBuilder)| {
        // What is set first stays.
        let mut metadata = MetadataBuilder::default();
        change(&mut metadata);
        for (key, range) in &header.entries {
            metadata.copied(key, &good[range.clone()]);
        }
        GgufSource::from_bytes(metadata.header(0), &path).map(|_| ()).map_err(|e| e.to_string())
    };
    with(&|_| ()).unwrap();
    for (key, value, word) in [
        (own::CONFIG_KEY, "{", own::CONFIG_KEY),
        (own::CONFIG_KEY, "[]", "JSON object"),
        (own::PLAN_KEY, "", own::PLAN_KEY),
        (own::PLAN_KEY, "7", "JSON object"),
        (own::VERSION_KEY, "1", "version number"),
        ("general.architecture", "llama", "missing"),
        ("general.architecture", "recurformer2", "recurformer2"),
    ] {
        let error = with(&|m| m.text(key, value)).unwrap_err();
        assert!(
            error.contains(word) && error.contains("h.gguf") || error.contains("unsupported"),
            "{key}: {error}"
        );
    }
    assert!(with(&|m| m.u32(own::VERSION_KEY, 2)).unwrap_err().contains("supported is 1"));
    assert!(with(&|m| m.u32(own::CONFIG_KEY, 2)).unwrap_err().contains("not a text"));
    let deep = "[".repeat(100_000);
    assert!(with(&|m| m.text(own::PLAN_KEY, &deep)).is_err());
    for key in [own::CONFIG_KEY, own::PLAN_KEY, own::VERSION_KEY] {
        let mut metadata = MetadataBuilder::default();
        for (k, range) in header.entries.iter().filter(|(k, _)| k != key) {
            metadata.copied(k, &good[range.clone()]);
        }
        let error = GgufSource::from_bytes(metadata.header(0), &path).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("missing"), "{key}: {error}");
    }
}

#[test]
fn a_configuration_of_another_architecture_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama3");
    let export = Export::plan(&source, Dtype::F32).unwrap();
    for (key, value) in [("head_dim", json!(16)), ("model_type", json!("qwen3"))] {
        let mut config = source.config_json.clone();
        config[key] = value;
        let mut metadata = MetadataBuilder::default();
        metadata.text(own::CONFIG_KEY, &config.to_string());
        let bytes = export.metadata.header(0);
        for (key, range) in parse(&bytes, dir.path()).unwrap().entries {
            metadata.copied(&key, &bytes[range]);
        }
        let out = dir.path().join("m.gguf");
        let tensor = GgufOut { name: "token_embd.weight".into(), shape: vec![64, 32], dtype: Dtype::F32 };
        let mut writer = GgufWriter::create(&out, &metadata, vec![tensor]).unwrap();
        writer.append("token_embd.weight", &vec![0; 64 * 32 * 4]).unwrap();
        writer.finish().unwrap();
        let error = Checkpoint::open(&out).err().unwrap().to_string();
        assert!(error.contains(own::CONFIG_KEY) && error.contains("other metadata"), "{key}: {error}");
    }
}

#[test]
fn halves_are_rounded_to_nearest_even() {
    let values = random(512, 5);
    let expected: Vec<f32> = values.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
    assert_eq!(rounded(Dtype::F16, &values), expected);
    let expected: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    assert_eq!(rounded(Dtype::BF16, &values), expected);
}
