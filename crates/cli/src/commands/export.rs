//! `export`: one GGUF file of a model, quantised if asked for.

use crate::common::{BudgetArgs, ExecArgs, check_output, dtype, plan_of, print_json, usage};
use crate::ui::Ui;
use anyhow::{Result, bail};
use eval::report::bytes;
use model::{HeadPlan, Progress};
use serde_json::json;
use std::path::PathBuf;
use weights::gguf::Export;

/// Element types of `--weights`.
const TYPES: [&str; 11] =
    ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"];

/// Write a model into one GGUF file, with its tokenizer and chat template, quantised with --weights.
///
/// A base model's file can be read by llama.cpp as well. A hybrid's file has the architecture
/// `recurformer`, holds its plan, and only this project reads it. Either is a --model for every command.
/// Norms, biases and the small tensors of recurrent heads stay F32; the embedding is stored as Q8_0 with
/// types of 4 and 5 bits; rows that are not whole blocks take a type of similar size that fits them,
/// which the output tells. A hybrid keeps all of its heads, so that the file can be run at a lower --beta;
/// with --beta it gets those of that budget only.
///
/// Examples:
///   recurformer export --model hybrid --gguf hybrid.gguf
///   recurformer export --model hybrid --gguf hybrid-q4.gguf --weights q4_k
///   recurformer export --model elastic --beta 0.5 --gguf half.gguf
///   recurformer export --model HuggingFaceTB/SmolLM2-135M-Instruct --gguf base.gguf --weights q8_0 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// The file to write.
    #[arg(long, value_name = "OUT.gguf")]
    gguf: PathBuf,
    /// Element type of the matrices.
    #[arg(long, default_value = "q8_0", value_name = "TYPE", ignore_case = true,
          value_parser = clap::builder::PossibleValuesParser::new(TYPES))]
    weights: String,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    exec: ExecArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if !args.gguf.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        return Err(usage(format!(
            "--gguf {} must end in .gguf, by which other commands know it",
            args.gguf.display()
        )));
    }
    if args.gguf.exists() {
        bail!("{} exists already\nhint: choose another --gguf or remove it", args.gguf.display());
    }
    check_output(&args.gguf, true)?;
    let wanted = dtype(&args.weights).map_err(usage)?;
    let checkpoint = args.budget.open(&args.model, ui)?;
    let plan = checkpoint.plan_json.is_some().then(|| plan_of(&checkpoint)).transpose()?;
    let exec = args.exec.exec()?;
    let export = Export::plan(&checkpoint, wanted)?;
    for note in export.notes() {
        ui.note(&format!("note: {note}"));
    }
    let values: usize = export.tensors().iter().map(|t| t.values()).sum();
    ui.start(&format!("write {}", wanted.name()), values as u64, "values");
    checkpoint.tensors.prefetch();
    let mut file = export.create(&args.gguf)?;
    for tensor in export.tensors() {
        if ui.cancelled() {
            bail!("interrupted: {} was not written", args.gguf.display());
        }
        file.write(&exec, tensor)?;
        ui.advance(tensor.values() as u64, "");
    }
    let size = file.finish()?;
    ui.finish();
    let types = export.bytes_by_dtype();
    if args.json {
        let types: Vec<_> = types
            .iter()
            .map(|(dtype, tensors, bytes)| json!({"dtype": dtype.name(), "tensors": tensors, "bytes": bytes}))
            .collect();
        return print_json(&json!({
            "path": args.gguf, "bytes": size, "architecture": export.architecture(), "weights": wanted.name(),
            "hybrid": plan.is_some(), "converted": plan.as_ref().map(HeadPlan::converted),
            "parameters": values, "dtypes": types, "notes": export.notes(),
        }));
    }
    println!(
        "wrote {} ({}), architecture {}",
        args.gguf.display(),
        bytes(size as usize),
        export.architecture()
    );
    if let Some(plan) = &plan {
        println!("  hybrid        {} of {} KV groups converted", plan.converted(), plan.total());
    }
    println!("  parameters    {:.1} M", values as f64 / 1e6);
    for (dtype, tensors, size) in types {
        println!("    {:<6} {tensors:>5} tensors {:>12}", dtype.name(), bytes(size));
    }
    Ok(())
}
