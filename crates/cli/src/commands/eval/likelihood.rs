//! `eval choice` and `eval lastword`: log-likelihoods of what may follow, model and base in one run.

use super::pair::{Measured, PairArgs};
use crate::common::Running;
use crate::ui::Ui;
use anyhow::Result;
use eval::choice::{ChoiceTest, choice};
use eval::lastword::{LastWordTest, lastword};
use eval::likelihood::Mean;
use kernels::Exec;
use serde::Serialize;
use serde_json::json;
use std::path::PathBuf;

/// Which models, on which file.
#[derive(clap::Args)]
struct FileArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// JSON lines, one question each (.gz and .zst are unpacked).
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Only the first N lines.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Keep the log-likelihood of every text in the JSON.
    #[arg(long, requires = "json")]
    details: bool,
}

/// Multiple choice by log-likelihood: lines of {"context": "…", "choices": ["…", "…"], "answer": 0}.
///
/// Scored as lm-evaluation-harness does: a space stands between context and choice; `acc` takes the choice of largest log-likelihood, `acc_norm` divides by
/// its characters, `acc_bytes` by its bytes; ± is the standard error.
///
/// Examples:
///   recurformer eval choice --model healed --base smollm2-135m --data arc_easy.jsonl
///   recurformer eval choice --model healed --data hellaswag.jsonl --limit 500 --json --details
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct ChoiceArgs {
    #[command(flatten)]
    file: FileArgs,
}

/// The last word of every text: lines of {"text": "…"}. Scored as lm-evaluation-harness scores LAMBADA.
///
/// `acc` counts texts whose last word is the greedy continuation, token by token; `perplexity` is that of whole last words; ± is the standard error.
///
/// Example:
///   recurformer eval lastword --model healed --base smollm2-135m --data lambada.jsonl
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct LastWordArgs {
    #[command(flatten)]
    file: FileArgs,
}

impl FileArgs {
    /// What `run` finds of the model and its base; `None` where it was printed as JSON.
    fn measured<T: Serialize>(
        &self,
        ui: &mut Ui,
        run: impl FnMut(&Exec, &Running, &mut Ui) -> Result<T>,
    ) -> Result<Option<Measured<T>>> {
        let measured = self.pair.measure(ui, run)?;
        let printed = self.pair.printed(&measured, json!({"data": self.data}), &[])?;
        Ok((!printed).then_some(measured))
    }
}

/// `eval choice`.
pub fn run_choice(args: &ChoiceArgs, ui: &mut Ui) -> Result<()> {
    let test = ChoiceTest::read(&args.file.data, args.file.limit)?;
    let measured = args.file.measured(ui, |exec, running, ui| {
        let mut result = choice(exec, &running.engine, &running.tokenizer()?, &test, ui)?;
        note_truncated(ui, result.truncated, "choices");
        if !args.file.details {
            result.likelihoods.clear();
        }
        Ok(result)
    })?;
    let Some(Measured { results: result, base, .. }) = measured else { return Ok(()) };
    header(result.items, base.is_some());
    row("acc", result.acc, base.as_ref().map(|b| b.acc));
    row("acc_norm", result.acc_norm, base.as_ref().map(|b| b.acc_norm));
    row("acc_bytes", result.acc_bytes, base.as_ref().map(|b| b.acc_bytes));
    Ok(())
}

/// `eval lastword`.
pub fn run_lastword(args: &LastWordArgs, ui: &mut Ui) -> Result<()> {
    let test = LastWordTest::read(&args.file.data, args.file.limit)?;
    let measured = args.file.measured(ui, |exec, running, ui| {
        let mut result = lastword(exec, &running.engine, &running.tokenizer()?, &test, ui)?;
        note_truncated(ui, result.truncated, "texts");
        if !args.file.details {
            result.likelihoods.clear();
        }
        Ok(result)
    })?;
    let Some(Measured { results: result, base, .. }) = measured else { return Ok(()) };
    header(result.items, base.is_some());
    row("acc", result.acc, base.as_ref().map(|b| b.acc));
    row("perplexity", result.perplexity, base.as_ref().map(|b| b.perplexity));
    Ok(())
}

fn note_truncated(ui: &Ui, truncated: usize, what: &str) {
    if truncated > 0 {
        ui.say(&format!("note: {truncated} {what} lost the beginning of what precedes them: it is longer than the model's context"));
    }
}

fn header(items: usize, base: bool) {
    let beside = if base { format!(" {:>22}", "base") } else { String::new() };
    println!("{:<12} {:>22}{beside}", format!("{items} lines"), "value ± error");
}

fn row(name: &str, value: Mean, base: Option<Mean>) {
    let beside = base.map_or(String::new(), |mean| format!(" {mean:>22}"));
    println!("{name:<12} {value:>22}{beside}");
}
