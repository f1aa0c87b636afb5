//! Generated tasks as documents.

use super::{Document, Split};
use crate::error::{Result, TrainError};
use kernels::Exec;
use model::Progress;
use tasks::{Generated, Part};
use weights::Tokenizer;

/// Documents made between two reports of progress.
const DOCUMENTS_AT_ONCE: usize = 32;

/// The documents of a part of generated tasks, answers included; no document of one part is one of the other. `name` becomes their source.
///
/// # Errors
/// [`TrainError::Argument`] when a task does not fit the documents' length, [`TrainError::Weights`] of the tokenizer, [`TrainError::Interrupted`].
pub fn generated(
    exec: &Exec,
    generated: &Generated,
    name: &str,
    split: Split,
    tokenizer: &Tokenizer,
    progress: &mut dyn Progress,
) -> Result<Vec<Document>> {
    let part = match split {
        Split::Train => Part::Train,
        Split::Heldout => Part::Heldout,
    };
    let count = generated.documents(part);
    progress.start(&format!("generating {name}"), count as u64, "documents");
    let mut documents = Vec::with_capacity(count);
    while documents.len() < count {
        if progress.cancelled() {
            return Err(TrainError::Interrupted);
        }
        let first = documents.len();
        let some = DOCUMENTS_AT_ONCE.min(count - first);
        for tokens in exec.parallel_map(some, |i| generated.document(part, first + i, tokenizer)) {
            documents.push(Document { source: name.into(), tokens: tokens? });
        }
        progress.advance(some as u64, "");
    }
    progress.finish();
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SequenceStream;
    use crate::testing::StopAfter;
    use model::Silent;
    use serde_json::json;

    /// One token per ASCII character.
    fn tokenizer() -> Tokenizer {
        let characters = (0x20..0x7f_u8).chain([b'\n']).map(|byte| char::from(byte).to_string());
        let vocab: serde_json::Map<String, serde_json::Value> =
            characters.zip(0..).map(|(text, id): (_, u32)| (text, id.into())).collect();
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []
        });
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null, "model": model
        });
        Tokenizer::from_parts(json.to_string().into_bytes(), json!({})).unwrap()
    }

    fn make(arg: &str, split: Split, threads: usize) -> Vec<Document> {
        let source = Generated::parse(arg).unwrap().unwrap();
        let exec = Exec::new(threads).unwrap();
        generated(&exec, &source, arg, split, &tokenizer(), &mut Silent).unwrap()
    }

    #[test]
    fn documents_are_the_same_on_any_threads_and_the_parts_differ() {
        for arg in ["retrieval:context=600,tokens=30000", "hashhop:context=600,tokens=30000"] {
            let train = make(arg, Split::Train, 1);
            assert_eq!(train, make(arg, Split::Train, 2));
            let heldout = make(arg, Split::Heldout, 2);
            assert_eq!((train.len(), heldout.len()), (50, 7));
            assert!(train.iter().all(|d| d.source == arg && d.tokens.len() == 600));
            assert!(heldout.iter().all(|d| !train.contains(d)));
        }
    }

    #[test]
    fn beside_text_they_are_drawn_by_the_root_of_their_size() {
        let text = Document { source: "text".into(), tokens: vec![96; 4 * 30_000] };
        let mut documents = make("retrieval:context=600,tokens=30000", Split::Train, 1);
        let whole = documents.clone();
        documents.insert(0, text);
        let mut stream = SequenceStream::new(&documents, 600, 0).unwrap();
        let drawn: Vec<Vec<u32>> = (0..150).map(|_| stream.next_batch(1).tokens().to_vec()).collect();
        let (of_text, of_tasks): (Vec<_>, Vec<_>) =
            drawn.into_iter().partition(|s| s.iter().all(|&t| t == 96));
        assert_eq!((of_text.len(), of_tasks.len()), (100, 50));
        // Sequences as long as the documents are the documents, each with its answers.
        assert!(whole.iter().all(|d| of_tasks.contains(&d.tokens)));
    }

    #[test]
    fn an_interruption_ends_it() {
        let source = Generated::parse("retrieval:context=600,tokens=60000").unwrap().unwrap();
        let exec = Exec::new(1).unwrap();
        let error = generated(&exec, &source, "x", Split::Train, &tokenizer(), &mut StopAfter::new(1));
        assert!(matches!(error, Err(TrainError::Interrupted)));
    }
}
