//! Tokenizer and chat template, from `tokenizer.json` / `tokenizer_config.json` or from GGUF metadata.

use crate::error::Result;
use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

/// A tokenizer with its special tokens and chat template.
pub struct Tokenizer {
    _private: (),
}

impl Tokenizer {
    /// Token ids of `text`; special tokens (BOS…) are added only when `add_special`.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let _ = (text, add_special);
        todo!()
    }
    /// Text of `ids`; special tokens are left out when `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let _ = (ids, skip_special);
        todo!()
    }
    /// An incremental decoder that emits only complete UTF-8 text.
    pub fn stream(&self) -> TokenStream<'_> {
        todo!()
    }
    /// Id of a token given as text, special ones included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        let _ = token;
        todo!()
    }
    /// Renders `messages` with the model's chat template; `Err` when the model has none.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let _ = (messages, add_generation_prompt);
        todo!()
    }
    /// Writes what a Hugging Face checkpoint needs (`tokenizer.json`, `tokenizer_config.json`) into `dir`.
    pub fn save(&self, dir: &std::path::Path) -> Result<()> {
        let _ = dir;
        todo!()
    }
}

/// Streaming detokeniser made by [`Tokenizer::stream`].
pub struct TokenStream<'a> {
    _tokenizer: &'a Tokenizer,
}

impl TokenStream<'_> {
    /// Text that became complete with `id` (possibly empty).
    pub fn push(&mut self, id: u32) -> Result<String> {
        let _ = id;
        todo!()
    }
}
