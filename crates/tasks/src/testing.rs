//! Tokenizers for tests: small ones that show what sizing does.

use serde_json::{Value, json};
use weights::Tokenizer;

/// One token per byte of ASCII text, but for a few merged pairs. A space may start a word.
pub fn tokenizer() -> Tokenizer {
    let pairs = [
        "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ou", "is", "it", "or", "to", "12", "ar",
    ];
    let single = (0x20..0x7f_u8).map(|b| char::from(b).to_string()).chain(["\n".to_string()]);
    let entries = ["<unk>".to_string()].into_iter().chain(single).chain(pairs.map(String::from));
    let vocab: serde_json::Map<String, Value> =
        entries.zip(0..).map(|(text, id): (_, u32)| (text, id.into())).collect();
    let merges: Vec<String> = pairs.iter().map(|p| format!("{} {}", &p[..1], &p[1..])).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges
        }
    });
    Tokenizer::from_parts(json.to_string().into_bytes(), json!({})).unwrap()
}

/// The text of tokens that hold no special ones.
pub fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    tokenizer.decode(tokens, false).unwrap()
}
