use super::*;
use crate::safetensors::read_all;
use crate::{Checkpoint, ModelConfig, RopeScaling};
use kernels::quant::dequantize;
use proptest::prelude::*;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Bytes of a GGUF file, put together field by field so that each may be wrong.
#[derive(Clone, Default)]
struct Builder {
    metadata: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

impl Builder {
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.metadata.push([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }
    fn uint(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }
    fn string(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &text(value))
    }
    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut entry = text(name);
        entry.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| entry.extend(d.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }
    fn data(mut self, bytes: usize) -> Self {
        self.data = vec![0; bytes];
        self
    }
    fn build_as(&self, version: u32, tensors: u64, entries: u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(version.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        out.extend(self.metadata.concat());
        out.extend(self.tensors.concat());
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&self.data);
        }
        out
    }
    fn build(&self) -> Vec<u8> {
        self.build_as(3, self.tensors.len() as u64, self.metadata.len() as u64)
    }
}

fn error(bytes: &[u8]) -> String {
    parse(bytes, Path::new("x.gguf")).unwrap_err().to_string()
}

#[test]
fn a_good_file_parses() {
    let builder = Builder::default()
        .uint("a", 7)
        .string("s", "é")
        .tensor("t", &[32, 2], 8, 0)
        .tensor("u", &[3], 0, 96)
        .data(108);
    for version in [2, 3] {
        let header = parse(&builder.build_as(version, 2, 2), Path::new("x")).unwrap();
        assert_eq!(header.metadata["a"], Value::Unsigned(7));
        assert_eq!(header.metadata["s"].as_str(), Some("é"));
        assert_eq!(
            (header.tensors[0].shape.as_slice(), header.tensors[0].range.len()),
            ([2, 32].as_slice(), 68)
        );
    }
}

#[test]
fn truncated_files_are_malformed() {
    let good = Builder::default().uint("a", 7).tensor("t", &[32, 2], 8, 0).data(68).build();
    parse(&good, Path::new("x")).unwrap();
    for length in 0..good.len() {
        let result = parse(&good[..length], Path::new("x"));
        assert!(matches!(result, Err(WeightsError::Malformed { .. })), "{length} bytes");
    }
}

#[test]
fn hostile_counts_and_lengths_are_named() {
    let empty = Builder::default();
    assert!(error(&empty.build_as(3, u64::MAX, 0)).contains("tensors are announced"));
    assert!(error(&empty.build_as(3, 0, u64::MAX)).contains("metadata entries are announced"));
    assert!(error(&empty.build_as(3, 1 << 40, 1 << 40)).contains("announced"));
    assert!(error(&Builder::default().entry("s", 8, &u64::MAX.to_le_bytes()).build()).contains("needs"));
    let array = [8u32.to_le_bytes().as_slice(), &(1u64 << 60).to_le_bytes()].concat();
    assert!(error(&Builder::default().entry("a", 9, &array).build()).contains("announced"));
    let deep = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat().repeat(40);
    assert!(error(&Builder::default().entry("a", 9, &deep).build()).contains("nested too deep"));
    assert!(error(&Builder::default().entry("k", 99, &[0; 8]).build()).contains("unknown type 99"));
    assert!(error(&Builder::default().entry("k", 7, &[2]).build()).contains("boolean"));
    assert!(
        error(&Builder::default().entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xFF]).build()).contains("UTF-8")
    );
    assert!(error(&Builder::default().uint("k", 1).uint("k", 2).build()).contains("twice"));
    assert!(error(&empty.build_as(1, 0, 0)).contains("version 1"));
    assert!(error(&empty.build_as(3u32.swap_bytes(), 0, 0)).contains("big-endian"));
    assert!(error(b"GGML\0\0\0\0").contains("start with"));
}

#[test]
fn hostile_tensors_are_named() {
    let one =
        |dims: &[u64], kind, offset| Builder::default().tensor("t", dims, kind, offset).data(64).build();
    for (bytes, word) in [
        (one(&[u64::MAX, u64::MAX], 0, 0), "overflows"),
        (one(&[1 << 40, 1 << 30], 0, 0), "overflows"),
        (one(&[17], 0, 0), "64 bytes of data"),
        (one(&[1], 0, 64), "64 bytes of data"),
        (one(&[1], 0, u64::MAX - 31), "bytes of data"),
        (one(&[1], 0, 4), "multiple of 32"),
        (one(&[33], 8, 0), "multiple of 32 for Q8_0"),
        (one(&[1; 5], 0, 0), "5 dimensions"),
        (one(&[1], 24, 0), "element type 24"),
        (Builder::default().tensor("t", &[9], 0, 0).tensor("u", &[1], 0, 32).data(64).build(), "overlap"),
        (Builder::default().tensor("t", &[1], 0, 0).tensor("t", &[1], 0, 32).data(64).build(), "twice"),
        (Builder::default().uint("general.alignment", 12).build(), "power of two"),
        (Builder::default().uint("general.alignment", 0).build(), "power of two"),
    ] {
        let message = error(&bytes);
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn every_block_format_matches_the_reference_bit_for_bit() {
    let bytes = std::fs::read(data("quants.gguf")).unwrap();
    let header = parse(&bytes, Path::new("quants.gguf")).unwrap();
    let (expected, _) = read_all(&data("quants.safetensors")).unwrap();
    assert_eq!(header.tensors.len(), 11);
    for tensor in header.tensors {
        let expected = expected.iter().find(|e| e.name == tensor.name).unwrap();
        assert_eq!((tensor.dtype.name(), &tensor.shape), (tensor.name.as_str(), &expected.shape));
        let mut values = vec![f32::NAN; expected.values.len()];
        dequantize(tensor.dtype, &bytes[tensor.range], &mut values);
        for (i, (v, e)) in values.iter().zip(&expected.values).enumerate() {
            // A zero may have either sign: numpy and C differ in -0.
            assert!(
                v.to_bits() == e.to_bits() || (*v == 0.0 && *e == 0.0),
                "{} value {i}: {v} {e}",
                tensor.name
            );
        }
    }
}

#[test]
fn a_converted_llama_comes_back_in_hugging_face_order() {
    let checkpoint = Checkpoint::open(&data("tiny_llama.gguf")).unwrap();
    let (expected, _) = read_all(&data("tiny_llama.safetensors")).unwrap();
    assert_eq!(checkpoint.tensors.infos().len(), expected.len());
    for tensor in expected {
        let info = checkpoint.tensors.info(&tensor.name).unwrap();
        assert_eq!(info.shape, tensor.shape, "{}", tensor.name);
        assert_eq!(checkpoint.tensors.read_f32(&tensor.name).unwrap(), tensor.values, "{}", tensor.name);
        let permuted = tensor.name.contains("q_proj") || tensor.name.contains("k_proj");
        assert_eq!(checkpoint.tensors.raw(&tensor.name).unwrap().is_none(), permuted, "{}", tensor.name);
        let stored = checkpoint.tensors.stored(&tensor.name).unwrap();
        stored.check_finite(&tensor.name).unwrap();
        let mut values = vec![f32::NAN; stored.rows * stored.cols];
        for (row, out) in values.chunks_exact_mut(stored.cols).enumerate() {
            dequantize(stored.dtype, stored.row(row), out);
        }
        assert_eq!(values, tensor.values, "{}", tensor.name);
        checkpoint.tensors.prefetch();
        checkpoint.tensors.release();
    }
    assert!(matches!(checkpoint.tensors.raw("x"), Err(WeightsError::MissingTensor { .. })));
    let config = &checkpoint.config;
    assert_eq!(
        (config.head_dim, config.kv_heads, config.tie_embeddings, config.rms_eps),
        (16, 2, true, 1e-5)
    );
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
    let RopeScaling::Llama3 { factor, high_freq_factor, low_freq_factor, original_context } =
        config.rope_scaling
    else {
        panic!("{:?}", config.rope_scaling);
    };
    assert_eq!((factor, high_freq_factor / low_freq_factor), (8.0, 16.0));
    assert_eq!(original_context as f64 / low_freq_factor, 512.0);
    assert_eq!(&ModelConfig::from_hf_json(&checkpoint.config_json).unwrap(), config);
}

/// A llama of one layer whose tensors are all zero, with what `change` does to its metadata.
fn open_zero(change: impl FnOnce(Builder) -> Builder, arch: &str) -> Result<GgufSource> {
    let key = |k: &str| format!("{arch}.{k}");
    let builder = Builder::default()
        .string("general.architecture", arch)
        .uint(&key("context_length"), 64)
        .uint(&key("embedding_length"), 8)
        .uint(&key("block_count"), 0)
        .uint(&key("feed_forward_length"), 8)
        .uint(&key("attention.head_count"), 2)
        .tensor("token_embd.weight", &[8, 4], 0, 0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, change(builder.data(256)).build()).unwrap();
    GgufSource::open(&path)
}

#[test]
fn metadata_that_is_not_computed_is_named() {
    open_zero(|b| b, "llama").unwrap();
    for (change, word) in [
        (
            Box::new(|b: Builder| b.uint("llama.expert_count", 8)) as Box<dyn FnOnce(Builder) -> Builder>,
            "experts",
        ),
        (Box::new(|b| b.uint("llama.rope.dimension_count", 2)), "RoPE over 2"),
        (Box::new(|b| b.string("llama.rope.scaling.type", "yarn")), "yarn"),
        (Box::new(|b| b.uint("llama.attention.sliding_window", 16)), "sliding"),
        (Box::new(|b| b.uint("llama.attention.value_length", 8)), "values of 8"),
        (Box::new(|b| b.entry("split.count", 2, &2u16.to_le_bytes())), "split"),
        (Box::new(|b| b.tensor("blk.0.ffn_gate_exps.weight", &[8], 0, 128)), "ffn_gate_exps"),
        (Box::new(|b| b.tensor("rope_freqs.weight", &[2], 0, 128)), "positive"),
        (Box::new(|b| b.tensor("blk.0.attn_q.weight", &[2, 3], 0, 128)), "multiple of the head size"),
    ] {
        let message = open_zero(change, "llama").unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    assert!(open_zero(|b| b, "mistral3").unwrap_err().to_string().contains("mistral3"));
    let linear =
        open_zero(|b| b.entry("qwen2.rope.scaling.factor", 6, &4f32.to_le_bytes()), "qwen2").unwrap();
    assert_eq!(linear.config_json()["rope_scaling"]["factor"], 4.0);
}

#[test]
fn names_translate() {
    for (gguf, hf) in [
        ("output.weight", Some("lm_head.weight")),
        ("blk.12.attn_q.bias", Some("model.layers.12.self_attn.q_proj.bias")),
        ("blk.0.attn_k_norm.weight", Some("model.layers.0.self_attn.k_norm.weight")),
        ("blk.00.attn_q.weight", None),
        ("blk.x.attn_q.weight", None),
        ("blk.0.attn_q", None),
        ("blk.0.attn_q.scale", None),
        ("", None),
    ] {
        assert_eq!(hf_name(gguf).as_deref(), hf, "{gguf}");
        if let Some(hf) = hf {
            assert_eq!(gguf_name(hf).as_deref(), Some(gguf));
        }
    }
}

proptest! {
    #[test]
    fn unpermute_undoes_the_converters_permutation(heads in 1usize..4, half in 1usize..5, width in 0usize..4) {
        let head_dim = 2 * half;
        let rows = heads * head_dim;
        let original: Vec<f32> = (0..rows * width).map(|i| i as f32).collect();
        let mut stored = Vec::new();
        for head in 0..heads {
            for j in 0..half {
                for i in 0..2 {
                    let row = head * head_dim + i * half + j;
                    stored.extend_from_slice(&original[row * width..(row + 1) * width]);
                }
            }
        }
        prop_assert_eq!(in_order(&stored, rows, RowOrder::Interleaved { head_dim }), original);
    }

    #[test]
    fn metadata_round_trips(keys in prop::collection::btree_map("[a-z.é]{0,12}", any::<u32>(), 0..8)) {
        let builder = keys.iter().fold(Builder::default(), |b, (k, v)| b.uint(k, *v));
        let header = parse(&builder.build(), Path::new("x")).unwrap_or_else(|e| {
            assert!(keys.contains_key("general.alignment"), "{e}");
            GgufHeader { metadata: Metadata::new(), entries: Vec::new(), tensors: Vec::new() }
        });
        for (key, value) in &header.metadata {
            prop_assert_eq!(value.as_u64(), Some(u64::from(keys[key])));
        }
        prop_assert_eq!(header.metadata.len(), keys.len());
    }
}
