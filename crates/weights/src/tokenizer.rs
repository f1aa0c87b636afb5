//! Tokenizer and chat template, from `tokenizer.json` / `tokenizer_config.json` or from GGUF metadata.
//! Whatever the source, a `tokenizer.json` is kept, so that a converted checkpoint carries the tokenizer it was made with.

mod chat;
mod from_gguf;
mod stop;
#[cfg(test)]
mod tests;
mod to_gguf;

pub use stop::StopStream;

use crate::config::unsupported;
use crate::error::{Result, WeightsError};
use crate::files::{atomic_write, read_json};
use crate::gguf;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

/// Whether [`Tokenizer::to_gguf`] also writes llama.cpp's metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlamaCpp {
    /// They are written, for a model with `vocab` rows in its embedding.
    Described {
        /// Tokens that llama.cpp expects; missing ones are filled up with unused ones.
        vocab: usize,
    },
    /// They are left out, in files that llama.cpp cannot compute anyway.
    Omitted,
}

/// A tokenizer with its special tokens and chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Text of `tokenizer.json`.
    json: Vec<u8>,
    /// `tokenizer_config.json`, with the chat template in it.
    config: Value,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a Hugging Face folder; only the first
    /// must exist.
    ///
    /// # Errors
    /// [`WeightsError::Io`], [`WeightsError::Malformed`], or [`WeightsError::Unsupported`] when the folder has a tokenizer of
    /// another kind only.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let other =
                ["tokenizer.model", "vocab.json", "tekken.json"].into_iter().find(|f| dir.join(f).exists());
            return Err(match other {
                Some(file) => unsupported(format!(
                    "{} holds its tokenizer as `{file}` only; supported is tokenizer.json (transformers writes it with \
                     AutoTokenizer.from_pretrained(…).save_pretrained(…))",
                    dir.display()
                )),
                None => WeightsError::Tokenizer(format!(
                    "{} has no tokenizer.json\nhint: copy tokenizer.json and tokenizer_config.json of the original model there, or give \
                     token ids (--tokens, .npy files)",
                    dir.display()
                )),
            });
        }
        let json = std::fs::read(&path).map_err(WeightsError::io(&path))?;
        let optional = |name: &str| -> Result<Option<Value>> {
            let path = dir.join(name);
            if path.exists() { read_json(&path, "tokenizer configuration").map(Some) } else { Ok(None) }
        };
        let mut config =
            optional("tokenizer_config.json")?.unwrap_or_else(|| Value::Object(Default::default()));
        if !config.is_object() {
            return Err(WeightsError::malformed(
                &dir.join("tokenizer_config.json"),
                "tokenizer configuration",
                "expected an object",
            ));
        }
        if let Some(map) = optional("special_tokens_map.json")? {
            for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
                if config.get(key).is_none_or(Value::is_null) && map.get(key).is_some_and(|v| !v.is_null()) {
                    config[key] = map[key].clone();
                }
            }
        }
        let template = dir.join("chat_template.jinja");
        if template.exists() {
            config["chat_template"] =
                std::fs::read_to_string(&template).map_err(WeightsError::io(&template))?.into();
        }
        Self::from_parts(json, config).map_err(|e| WeightsError::malformed(&path, "tokenizer", e.to_string()))
    }

    /// Makes the tokenizer of a GGUF file: the `tokenizer.json` in it when this project wrote one, else what llama.cpp's
    /// metadata describe.
    ///
    /// # Errors
    /// [`WeightsError::Unsupported`] for a tokenizer model or pre-tokenizer that is not known exactly;
    /// [`WeightsError::Tokenizer`] for metadata that do not fit together.
    pub fn from_gguf(metadata: &gguf::Metadata) -> Result<Self> {
        if let Some(own) = from_gguf::own(metadata)? {
            return Self::from_parts(own.0, own.1);
        }
        let (json, config) = from_gguf::convert(metadata)?;
        Self::from_parts(json.to_string().into_bytes(), config)
    }

    /// Makes a tokenizer from the text of `tokenizer.json` and the content of `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn from_parts(json: Vec<u8>, config: Value) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(failed)?;
        // What a training script left there must not shorten or pad texts.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        Ok(Self { inner, json, config })
    }

    /// Token ids of `text`; special tokens (BOS…) are added only when `add_special`. Special tokens written in `text` are
    /// recognised.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; special tokens are left out when `skip_special`.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(failed)
    }

    /// An incremental decoder that emits only complete UTF-8 text.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream { tokenizer: self, ids: Vec::new(), context: 0, emitted: 0 }
    }

    /// Id of a token given as text, special ones included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of a token as it stands in the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens in the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.special("bos_token").and_then(|token| self.token_id(token))
    }

    /// The end-of-sequence token; the configuration's `eos_token_ids` may name more.
    pub fn eos_id(&self) -> Option<u32> {
        self.special("eos_token").and_then(|token| self.token_id(token))
    }

    /// The chat template, when the model has one.
    pub fn chat_template(&self) -> Option<&str> {
        match self.config.get("chat_template")? {
            Value::String(template) => Some(template),
            // Several templates by name: the one called `default`.
            Value::Array(list) => list
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template")?.as_str()),
            _ => None,
        }
    }

    /// Renders `messages` with the model's chat template, as transformers' `apply_chat_template(tokenize=False)`.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`] when the model has no template, or the template refuses the messages.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let template = self.chat_template().ok_or_else(|| {
            WeightsError::Tokenizer("the model has no chat template (it is a base model)".into())
        })?;
        chat::render(
            template,
            minijinja::context! {
                messages => messages,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.special("bos_token").unwrap_or(""),
                eos_token => self.special("eos_token").unwrap_or(""),
                unk_token => self.special("unk_token").unwrap_or(""),
                pad_token => self.special("pad_token").unwrap_or(""),
                tools => (),
                documents => (),
            },
        )
    }

    /// Writes what a Hugging Face checkpoint needs (`tokenizer.json`, `tokenizer_config.json`) into `dir`.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn save(&self, dir: &Path) -> Result<()> {
        atomic_write(&dir.join("tokenizer.json"), &self.json)?;
        let config = format!("{:#}\n", self.config);
        atomic_write(&dir.join("tokenizer_config.json"), config.as_bytes())
    }

    /// Adds the tokenizer to the metadata of a GGUF file: `tokenizer.json` and its configuration as they are, and, with
    /// [`LlamaCpp::Described`], the metadata llama.cpp reads. Returns whether llama.cpp knows such a tokenizer.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn to_gguf(&self, llama_cpp: LlamaCpp, out: &mut gguf::MetadataBuilder) -> Result<bool> {
        to_gguf::write_own(self, out)?;
        match llama_cpp {
            LlamaCpp::Described { vocab } => to_gguf::describe(self, vocab, out),
            LlamaCpp::Omitted => Ok(false),
        }
    }

    /// Text of a special token, stored as text or as an object with `content`.
    fn special(&self, key: &str) -> Option<&str> {
        let value = self.config.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }
}

fn failed(error: impl std::fmt::Display) -> WeightsError {
    WeightsError::Tokenizer(error.to_string())
}

/// Streaming detokeniser made by [`Tokenizer::stream`]. Special tokens give no text.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// First token decoded again, so that decoders that look at the neighbour (leading spaces) see one.
    context: usize,
    /// Tokens before this one have been emitted.
    emitted: usize,
}

impl TokenStream<'_> {
    /// Text that became complete with `id` (possibly empty).
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        // A character cut between tokens decodes to U+FFFD at the end: wait for the rest of it.
        if text.is_empty() || text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        self.advance();
        Ok(text)
    }

    /// The text held back, when no more tokens come.
    ///
    /// # Errors
    /// [`WeightsError::Tokenizer`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.pending()?;
        self.advance();
        Ok(text)
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.emitted], true)?;
        let all = self.tokenizer.decode(&self.ids[self.context..], true)?;
        Ok(all.strip_prefix(before.as_str()).unwrap_or(&all).to_string())
    }

    fn advance(&mut self) {
        self.ids.drain(..self.emitted);
        self.context = 0;
        self.emitted = self.ids.len();
    }
}
