//! `logits`: the raw output of a model for given token ids.

use crate::common::{EngineArgs, ExecArgs, check_output, usage};
use crate::ui::Ui;
use anyhow::Result;
use model::{EngineOptions, LogitRows};
use npyz::WriterBuilder;
use std::path::PathBuf;

/// Write the logits of a token sequence as a NumPy file, [seq, vocab] f32.
///
/// Example:
///   recurformer logits --model smollm2-135m --tokens 504,3575,282 --out logits.npy
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// Token ids, comma-separated.
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// The .npy file to write.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if args.tokens.is_empty() {
        return Err(usage("--tokens needs at least one id"));
    }
    check_output(&args.out, true)?;
    let exec = args.exec.exec()?;
    let model = args.engine.run(&args.model, EngineOptions::EXACT, &exec, ui)?.engine;
    let logits = model.forward(&exec, &args.tokens, &mut model.new_cache(), LogitRows::All)?;
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new()
        .default_dtype()
        .shape(&[args.tokens.len() as u64, model.config.vocab as u64])
        .writer(&mut bytes)
        .begin_nd()?;
    writer.extend(logits)?;
    writer.finish()?;
    weights::files::atomic_write(&args.out, &bytes)?;
    Ok(())
}
