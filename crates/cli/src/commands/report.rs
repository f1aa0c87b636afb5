//! `report`: result files as one HTML page or as Markdown.

use crate::common::check_output;
use crate::ui::Ui;
use anyhow::Result;
use eval::report::Report;
use std::path::PathBuf;

/// Show result files: one self-contained HTML page with charts, or Markdown tables.
///
/// Each file is recognised by its content: heads.json, plan.json, a checkpoint's head_plan.json, sinks.json,
/// quickstart's results.json, the metrics of align and heal and the results of eval compare (.jsonl), what
/// eval, bench, generate, train-mqar, bench-train and doctor print with --json, and the results of peers/compare.py.
/// A folder stands for those of them that lie in it. The page needs no network.
///
/// Examples:
///   recurformer report heads.json plan.json --out report.html
///   recurformer report recurformer-quickstart passkey.json ruler.json bench.json --out report.html
///   recurformer report compare.jsonl sinks.json --out report.html
///   recurformer report kl-0.25.json kl-0.5.json --md >> README.md
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Result files, or folders with some.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The HTML page to write; an existing one is replaced.
    #[arg(long, required_unless_present = "md")]
    out: Option<PathBuf>,
    /// Print Markdown tables.
    #[arg(long)]
    md: bool,
    /// Heading. Default: the quickstart's own, or a general one.
    #[arg(long)]
    title: Option<String>,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    if let Some(out) = &args.out {
        check_output(out, true)?;
    }
    let mut report = Report::from_files(&args.files)?;
    if let Some(title) = &args.title {
        report.title.clone_from(title);
    }
    if let Some(out) = &args.out {
        report.write_html(out)?;
        for source in &report.sources {
            ui.say(&format!("{}: {}", source.path, source.kind));
        }
        ui.say(&format!("wrote {}", out.display()));
    }
    if args.md {
        print!("{}", report.to_markdown());
    }
    Ok(())
}
