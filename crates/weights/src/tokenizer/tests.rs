use super::chat::{render, strftime};
use super::*;
use crate::Checkpoint;
use crate::gguf::{Metadata, Value as Meta};
use serde_json::json;
use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

fn texts(json: &Value) -> Vec<String> {
    json.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

fn meta_texts(json: &Value) -> Meta {
    Meta::Array(texts(json).into_iter().map(Meta::Text).collect())
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn byte_level(golden: &Value, pre: &str) -> Metadata {
    let tokens = golden["tokens"].as_array().unwrap().len();
    let kinds = (0..tokens).map(|i| Meta::Signed([3, 3, 3, 4].get(i).copied().unwrap_or(1)));
    Metadata::from([
        ("tokenizer.ggml.model".into(), Meta::Text("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Meta::Text(pre.into())),
        ("tokenizer.ggml.tokens".into(), meta_texts(&golden["tokens"])),
        ("tokenizer.ggml.token_type".into(), Meta::Array(kinds.collect())),
        ("tokenizer.ggml.merges".into(), meta_texts(&golden["merges"])),
        ("tokenizer.ggml.bos_token_id".into(), Meta::Unsigned(1)),
        ("tokenizer.ggml.eos_token_id".into(), Meta::Unsigned(2)),
    ])
}

fn sentence_piece(golden: &Value) -> Metadata {
    let numbers = |key: &str| {
        Meta::Array(
            golden[key].as_array().unwrap().iter().map(|v| Meta::Float(v.as_f64().unwrap())).collect(),
        )
    };
    Metadata::from([
        ("tokenizer.ggml.model".into(), Meta::Text("llama".into())),
        ("tokenizer.ggml.tokens".into(), meta_texts(&golden["tokens"])),
        ("tokenizer.ggml.scores".into(), numbers("scores")),
        (
            "tokenizer.ggml.token_type".into(),
            Meta::Array(
                golden["types"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| Meta::Signed(v.as_i64().unwrap()))
                    .collect(),
            ),
        ),
        ("tokenizer.ggml.bos_token_id".into(), Meta::Unsigned(1)),
        ("tokenizer.ggml.eos_token_id".into(), Meta::Unsigned(2)),
    ])
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut out: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    out.push_str(&stream.finish().unwrap());
    out
}

#[test]
fn byte_level_tokenizers_match_their_originals() {
    let golden = golden("byte_level.json");
    let texts = texts(&golden["texts"]);
    for (pre, expected) in golden["ids"].as_object().unwrap() {
        let tokenizer = Tokenizer::from_gguf(&byte_level(&golden, pre)).unwrap();
        for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(expected), "{pre}: {text:?}");
            // NFC composes; everything else comes back as it was.
            if pre != "qwen2" {
                assert_eq!(&tokenizer.decode(&found, false).unwrap(), text, "{pre}");
            }
            assert_eq!(
                stream(&tokenizer, &found),
                tokenizer.decode(&found, true).unwrap(),
                "{pre}: {text:?}"
            );
        }
        let with = tokenizer.encode("a", true).unwrap();
        assert_eq!(with.len(), if pre == "llama-bpe" { 2 } else { 1 }, "{pre}");
    }
}

#[test]
fn llama_cpps_default_pre_tokenizer_is_lossless() {
    let golden = golden("byte_level.json");
    let tokenizer = Tokenizer::from_gguf(&byte_level(&golden, "default")).unwrap();
    for text in texts(&golden["texts"]) {
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false).unwrap(), false).unwrap(), text);
    }
}

#[test]
fn sentence_piece_matches_the_original() {
    let golden = golden("sentence_piece.json");
    let tokenizer = Tokenizer::from_gguf(&sentence_piece(&golden)).unwrap();
    for (text, expected) in texts(&golden["texts"]).iter().zip(golden["ids"].as_array().unwrap()) {
        let found = tokenizer.encode(text, false).unwrap();
        assert_eq!(found, ids(expected), "{text:?}");
        assert_eq!(&tokenizer.decode(&found, true).unwrap(), text);
        assert_eq!(&stream(&tokenizer, &found), text);
    }
    assert_eq!(tokenizer.encode("a", true).unwrap()[0], 1);
}

#[test]
fn metadata_that_do_not_fit_are_refused() {
    let golden = golden("byte_level.json");
    let error = |key: &str, value: Option<Meta>| {
        let mut metadata = byte_level(&golden, "smollm");
        match value {
            Some(value) => metadata.insert(key.into(), value),
            None => metadata.remove(key),
        };
        Tokenizer::from_gguf(&metadata).err().unwrap().to_string()
    };
    let text = |s: &str| Some(Meta::Text(s.into()));
    assert!(error("tokenizer.ggml.model", text("t5")).contains("t5"));
    assert!(error("tokenizer.ggml.model", None).contains("no tokenizer"));
    assert!(error("tokenizer.ggml.pre", text("tekken")).contains("tekken"));
    assert!(error("tokenizer.ggml.tokens", None).contains("tokens"));
    assert!(error("tokenizer.ggml.tokens", Some(Meta::Array(vec![Meta::Bool(true)]))).contains("strings"));
    assert!(error("tokenizer.ggml.merges", None).contains("merges"));
    assert!(
        error("tokenizer.ggml.merges", Some(Meta::Array(vec![Meta::Text("ab".into())])))
            .contains("two tokens")
    );
    error("tokenizer.ggml.merges", Some(Meta::Array(vec![Meta::Text("nope nothing".into())])));
    assert!(error("tokenizer.ggml.token_type", Some(Meta::Array(vec![]))).contains("types"));
    assert!(error("tokenizer.ggml.bos_token_id", Some(Meta::Unsigned(1 << 20))).contains("bos"));
    assert!(error("tokenizer.ggml.model", text("llama")).contains("scores"));
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.into(), content: content.into() }
}

#[test]
fn a_saved_tokenizer_loads_as_the_same() {
    let checkpoint = Checkpoint::open(&data("tiny_llama.gguf")).unwrap();
    let first = checkpoint.tokenizer().unwrap();
    let dir = tempfile::tempdir().unwrap();
    first.save(dir.path()).unwrap();
    let second = Tokenizer::from_dir(dir.path()).unwrap();
    let messages = [message("user", "Hi <|end|>"), message("assistant", "Hello")];
    let chat = first.apply_chat_template(&messages, true).unwrap();
    assert_eq!(
        chat,
        "<|im_start|>user\nHi <|end|><|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(second.apply_chat_template(&messages, true).unwrap(), chat);
    let ids = first.encode(&chat, true).unwrap();
    assert_eq!(second.encode(&chat, true).unwrap(), ids);
    assert_eq!(
        (ids[0], ids[1]),
        (1, 1),
        "the BOS, then the template's first token, which is the same one here"
    );
    assert_eq!(
        (second.bos_id(), second.eos_id(), second.vocab_size()),
        (Some(1), Some(2), first.vocab_size())
    );
    assert_eq!(second.token_id("<think>"), Some(3));
    assert_eq!(second.token_text(3).as_deref(), Some("<think>"));
    second.save(dir.path()).unwrap();
    assert_eq!(std::fs::read(dir.path().join("tokenizer.json")).unwrap(), first.json);
}

#[test]
fn templates_come_from_every_place_transformers_looks() {
    let checkpoint = Checkpoint::open(&data("tiny_llama.gguf")).unwrap();
    let base = checkpoint.tokenizer().unwrap();
    let of = |config: Value| Tokenizer::from_parts(base.json.clone(), config).unwrap();
    let say = |t: &Tokenizer| t.apply_chat_template(&[message("user", "x")], false);
    assert!(say(&of(json!({}))).unwrap_err().to_string().contains("no chat template"));
    assert_eq!(
        say(&of(json!({"chat_template": "{{ bos_token }}!", "bos_token": {"content": "B"}}))).unwrap(),
        "B!"
    );
    let named = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]);
    assert_eq!(say(&of(json!({"chat_template": named}))).unwrap(), "yes");
    let dir = tempfile::tempdir().unwrap();
    base.save(dir.path()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "from a file").unwrap();
    assert_eq!(say(&Tokenizer::from_dir(dir.path()).unwrap()).unwrap(), "from a file");
    let empty = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_dir(empty.path()).err().unwrap().to_string().contains("no tokenizer.json"));
    std::fs::write(empty.path().join("tokenizer.model"), "").unwrap();
    assert!(Tokenizer::from_dir(empty.path()).err().unwrap().to_string().contains("tokenizer.model"));
    std::fs::write(empty.path().join("tokenizer.json"), "{").unwrap();
    assert!(Tokenizer::from_dir(empty.path()).err().unwrap().to_string().contains("malformed"));
}

#[test]
fn templates_run_as_in_transformers() {
    let messages = vec![message("system", " s "), message("user", "<u>é")];
    let run = |template: &str| render(template, minijinja::context! { messages => messages, tools => () });
    for (template, expected) in [
        (
            "{% for m in messages %}\n  {% if loop.first %}\n{{ m.content.strip() }}\n  {% endif %}\n{% endfor %}\n",
            "s\n",
        ),
        (
            "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{% for m in messages[1:] %}{{ m['role'] }}{% endfor %}", "user"),
        ("{% for m in messages %}{% break %}{% endfor %}ok", "ok"),
        ("{{ messages[1] | tojson }}", r#"{"role": "user", "content": "<u>é"}"#),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% if tools %}t{% else %}none{% endif %}{{ messages[0].missing is defined }}", "noneFalse"),
        ("{{ messages[1].content.startswith('<u>') }} {{ 'a,b'.split(',')[-1] }}", "True b"),
    ] {
        assert_eq!(run(template).unwrap(), expected, "{template}");
    }
    assert!(
        run("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string().contains("alternate")
    );
    assert!(run("{% for %}").is_err());
    assert_eq!(run("{{ strftime_now('%Y') | length }}").unwrap(), "4");
}

#[test]
fn dates_are_civil() {
    let format = "%A %a %d %B %b %m %Y %y %H:%M:%S %% %q %";
    assert_eq!(strftime(format, 0), "Thursday Thu 01 January Jan 01 1970 70 00:00:00 % %q %");
    // 2024-02-29 12:34:56 and 2000-12-31 23:59:59 UTC.
    assert!(strftime(format, 1_709_210_096).starts_with("Thursday Thu 29 February Feb 02 2024 24 12:34:56"));
    assert!(strftime(format, 978_307_199).starts_with("Sunday Sun 31 December Dec 12 2000 00 23:59:59"));
}

/// Every tokenizer of the goldens, with the number of its tokens.
fn known() -> Vec<(String, Tokenizer, Metadata)> {
    let bytes = golden("byte_level.json");
    let mut all: Vec<(String, Metadata)> = ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"]
        .into_iter()
        .map(|pre| (pre.to_string(), byte_level(&bytes, pre)))
        .collect();
    all.push(("llama".into(), sentence_piece(&golden("sentence_piece.json"))));
    all.into_iter()
        .map(|(name, metadata)| (name, Tokenizer::from_gguf(&metadata).unwrap(), metadata))
        .collect()
}

fn written(tokenizer: &Tokenizer, llama_cpp: LlamaCpp) -> (bool, Metadata) {
    let mut out = gguf::MetadataBuilder::default();
    let known = tokenizer.to_gguf(llama_cpp, &mut out).unwrap();
    (known, gguf::parse(&out.header(0), Path::new("t.gguf")).unwrap().metadata)
}

fn without_own(mut metadata: Metadata) -> Metadata {
    metadata.retain(|key, _| !key.starts_with("recurformer."));
    metadata
}

#[test]
fn tokenizers_survive_gguf_both_ways() {
    let texts = texts(&golden("byte_level.json")["texts"]);
    for (name, original, metadata) in known() {
        let vocab = original.vocab_size();
        let (described, found) = written(&original, LlamaCpp::Described { vocab });
        assert!(described, "{name}");
        for key in ["model", "tokens", "merges", "bos_token_id", "eos_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(found.get(&key), metadata.get(&key), "{name} {key}");
        }
        let own = Tokenizer::from_gguf(&found).unwrap();
        assert_eq!((&own.json, &own.config), (&original.json, &original.config), "{name}");
        let llama_cpp = Tokenizer::from_gguf(&without_own(found)).unwrap();
        for text in &texts {
            let ids = original.encode(text, true).unwrap();
            assert_eq!(own.encode(text, true).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(llama_cpp.encode(text, true).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(llama_cpp.decode(&ids, true).unwrap(), original.decode(&ids, true).unwrap());
        }
        let (described, found) = written(&original, LlamaCpp::Omitted);
        assert!(!described && found.keys().all(|key| key.starts_with("recurformer.")), "{name}");
    }
}

#[test]
fn llama_cpp_gets_as_many_tokens_as_the_model_has_rows() {
    let (_, tokenizer, _) = known().remove(0);
    let vocab = tokenizer.vocab_size() + 3;
    let (_, found) = written(&tokenizer, LlamaCpp::Described { vocab });
    let tokens = found["tokenizer.ggml.tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), vocab);
    assert_eq!(tokens[vocab - 1], Meta::Text(format!("[PAD{}]", vocab - 1)));
    let kinds = found["tokenizer.ggml.token_type"].as_array().unwrap();
    assert_eq!(
        (kinds[vocab - 1].as_u64(), kinds[0].as_u64(), kinds[3].as_u64()),
        (Some(5), Some(3), Some(4))
    );
    // More tokens than rows: llama.cpp would refuse the file, this project does not look at those metadata.
    let (known, found) = written(&tokenizer, LlamaCpp::Described { vocab: vocab - 4 });
    assert!(!known && !found.contains_key("tokenizer.ggml.tokens"));
    Tokenizer::from_gguf(&found).unwrap();
}

#[test]
fn tokenizers_of_other_kinds_are_only_this_projects() {
    let (_, tokenizer, _) = known().remove(0);
    let vocab = tokenizer.vocab_size();
    let json: Value = serde_json::from_slice(&tokenizer.json).unwrap();
    for (pointer, value) in [
        ("/pre_tokenizer", json!({"type": "Whitespace"})),
        ("/pre_tokenizer/add_prefix_space", json!(true)),
        ("/normalizer", json!({"type": "Lowercase"})),
        ("/model/ignore_merges", json!(true)),
    ] {
        let mut other = json.clone();
        *other.pointer_mut(pointer).unwrap() = value;
        let other = Tokenizer::from_parts(other.to_string().into_bytes(), json!({})).unwrap();
        let (known, found) = written(&other, LlamaCpp::Described { vocab });
        assert!(!known && !found.contains_key("tokenizer.ggml.model"), "{pointer}");
        assert_eq!(Tokenizer::from_gguf(&found).unwrap().json, other.json);
    }
}

#[test]
fn broken_own_tokenizers_are_named() {
    let text = |s: &str| Meta::Text(s.into());
    for (metadata, word) in [
        (vec![("recurformer.tokenizer", Meta::Unsigned(1))], "not a text"),
        (vec![("recurformer.tokenizer", text("{"))], "tokenizer"),
        (vec![("recurformer.tokenizer", text("{}")), ("recurformer.tokenizer_config", text("[]"))], "object"),
        (vec![("recurformer.tokenizer", text("{}")), ("recurformer.tokenizer_config", text("x"))], "object"),
        (vec![("tokenizer.ggml.model", text("none"))], "carries no tokenizer"),
        (vec![], "carries no tokenizer"),
    ] {
        let metadata: Metadata = metadata.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let error = Tokenizer::from_gguf(&metadata).err().unwrap().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
}
