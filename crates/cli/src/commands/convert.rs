//! `convert`: applies a plan to a checkpoint.

use crate::common::{check_output, open};
use crate::ui::Ui;
use anyhow::{Context, Result};
use model::HeadPlan;
use std::path::PathBuf;
use surgery::{HeadBank, HeadsReport, convert::convert};

/// Apply a plan: write the hybrid checkpoint in Hugging Face layout. Tensors it does not touch are copied byte for byte.
///
/// Example:
///   recurformer convert --model smollm2-135m --plan plan.json --bank bank.safetensors --out hybrid
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name of the base.
    #[arg(long)]
    model: String,
    /// plan.json from `plan`.
    #[arg(long)]
    plan: PathBuf,
    /// Head bank from `align`; without one the new heads get their starting values.
    #[arg(long)]
    bank: Option<PathBuf>,
    /// heads.json: mean distances for starting values without a bank.
    #[arg(long)]
    heads: Option<PathBuf>,
    /// Seed of random starting values (mixer `mamba` without a bank).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    check_output(&args.out, false)?;
    let checkpoint = open(&args.model, ui)?;
    let text = std::fs::read_to_string(&args.plan).with_context(|| args.plan.display().to_string())?;
    let plan =
        HeadPlan::from_json(&text, &checkpoint.config).with_context(|| args.plan.display().to_string())?;
    let bank = args.bank.as_ref().map(|path| HeadBank::read(path, &checkpoint.config)).transpose()?;
    let heads = args.heads.as_ref().map(|path| HeadsReport::read(path)).transpose()?;
    convert(&checkpoint, &plan, bank.as_ref(), heads.as_ref(), args.seed, &args.out, ui)?;
    println!("wrote {}: {} of {} KV groups converted", args.out.display(), plan.converted(), plan.total());
    Ok(())
}
