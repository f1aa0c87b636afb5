//! `fetch`: brings models and texts into the cache ahead of time.

use crate::common::open;
use crate::ui::Ui;
use anyhow::Result;
use train::data::{DataSource, Split, built_in};
use weights::ModelSource;

/// Bring a model or a built-in text into the local cache ahead of time.
///
/// Examples:
///   recurformer fetch smollm2-135m
///   recurformer fetch HuggingFaceTB/SmolLM2-135M-Instruct
///   recurformer fetch english-small
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Built-in model (`smollm2-135m`), hub id (`owner/name`), `english-small` or `english-mixed`; several may be given.
    #[arg(required = true)]
    names: Vec<String>,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    for name in &args.names {
        if let Ok(DataSource::BuiltIn(text)) = DataSource::parse(name) {
            // Reading it is what proves that it is there; any tokenizer will do.
            let tokenizer = open("smollm2-135m", ui)?.tokenizer()?;
            let documents = [Split::Train, Split::Heldout].map(|split| built_in(text, split, &tokenizer, ui));
            let [train, heldout] = documents;
            let (train, heldout) = (train?, heldout?);
            let count = |docs: &[train::data::Document]| docs.iter().map(|d| d.tokens.len()).sum::<usize>();
            println!(
                "{name}: {} documents ({} tokens) to train on, {} ({}) held out",
                train.len(),
                count(&train),
                heldout.len(),
                count(&heldout)
            );
        } else {
            let path = ModelSource::parse(name)?.fetch(&mut |line| ui.say(line))?;
            println!("{}", path.display());
        }
    }
    Ok(())
}
