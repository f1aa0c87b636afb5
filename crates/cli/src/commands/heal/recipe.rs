//! `heal --recipe`: all stages from a base model to a healed hybrid.

use super::{Args, RecipeArg};
use crate::common::{DataArgs, check_output, documents, load, print_json, usage};
use crate::run::run_info;
use crate::ui::Ui;
use anyhow::{Result, bail};
use eval::report::{Report, number};
use eval::run::RunInfo;
use kernels::Exec;
use model::HeadPlan;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use train::data::{Split, split_pair};
use train::recipe::{
    self, Budget, DEFAULT, Files, Numbering, PAPER, Record, Run, Seeds, StageResult, publish,
};

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let chosen = match args.recipe {
        Some(RecipeArg::Default) => DEFAULT,
        Some(RecipeArg::Paper) => PAPER,
        None => return Err(usage("give --model, or --recipe to start from the base")),
    };
    let budget = match (args.beta, args.elastic.is_empty()) {
        (Some(beta), _) => Budget::Beta(beta),
        (None, false) => Budget::Elastic(args.elastic.clone()),
        (None, true) => return Err(usage("a recipe needs --beta, or --elastic for several")),
    };
    let work = work_folder(&args.out);
    check_output(&args.out, false)?;
    if work.exists() && !args.resume {
        bail!(
            "{} exists already\nhint: continue that run with --resume, or remove the folder",
            work.display()
        );
    }
    let exec = args.exec.exec()?;
    let base = load(&args.base, ui)?;
    let chosen = match args.tokens {
        Some(tokens) => chosen.scaled(tokens)?,
        None => chosen,
    };
    let chosen = recipe::Recipe { seeds: Seeds::new(args.seed), ..chosen };
    let fitted = chosen.clone().fitted(base.model.config.max_context);
    fitted.check(&base.model.config)?;
    budget.check(&base.model.config)?;
    if fitted != chosen {
        ui.say(&format!(
            "note: contexts are cut to the {} tokens of {}",
            base.model.config.max_context, args.base
        ));
    }
    let data = match args.data.is_empty() {
        true => fitted.text.iter().map(ToString::to_string).collect(),
        false => args.data.clone(),
    };
    let data = DataArgs { data };
    // The built-in texts' held-out parts stay unseen, for `eval`.
    let (train, heldout) = split_pair(documents(&data, Split::Train, &base.checkpoint, &exec, ui)?);
    let stages = Run {
        exec: &exec,
        checkpoint: &base.checkpoint,
        base: &base.model,
        train: &train,
        heldout: &heldout,
        recipe: &fitted,
        budget: &budget,
        work: &work,
        save_every_s: args.save_every,
        numbering: Numbering::default(),
    };
    let mut record = Record::open(&stages, &args.base, &data.data, args.resume)?;
    let outcome = recipe::run(&stages, Some(&mut record), ui)?;
    page(args, &exec, &record, &outcome.plan)?.write_html(&work.join("report.html"))?;
    publish(&work, &record, &args.out)?;
    if args.json {
        return print_json(&record);
    }
    print!("{}", table(&record));
    println!(
        "wrote {}; its recipe.json tells the settings; heads, bank, plan and report.html are in {}",
        args.out.display(),
        work.display()
    );
    Ok(())
}

/// Where the stages of a run with this output leave their files.
fn work_folder(out: &Path) -> PathBuf {
    let mut work = out.as_os_str().to_os_string();
    work.push(".work");
    work.into()
}

/// Stage, tokens, minutes and result, one line each.
fn table(record: &Record) -> String {
    let mut text = format!("{:<8} {:>9} {:>8}  result\n", "stage", "tokens", "minutes");
    for stage in &record.stages {
        let tokens = if stage.tokens > 0 { stage.tokens.to_string() } else { "-".into() };
        let minutes = stage.seconds / 60.0;
        let mut results = stage.result.iter().flat_map(lines);
        let first = results.next().unwrap_or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<8} {tokens:>9} {minutes:>8.1}  {first}", stage.stage);
        results.for_each(|line| {
            let _ = writeln!(text, "{:<27}  {line}", "");
        });
    }
    text
}

fn lines(result: &StageResult) -> Vec<String> {
    match result {
        StageResult::Analyze { mean_recency_ratio_64: ratio } => {
            vec![format!("mean recency_ratio_64 {}", number(*ratio))]
        }
        StageResult::Align { mean_heldout_error: error } => {
            vec![format!("mean held-out relative error {}", number(*error))]
        }
        StageResult::Plan { criterion, converted, total } => {
            vec![format!("{converted} of {total} KV groups converted by {criterion}")]
        }
        StageResult::Convert {} => vec!["every other tensor copied byte for byte".into()],
        StageResult::Heal { losses } => losses
            .iter()
            .map(|l| {
                let beta = l.beta.map_or(String::new(), |beta| format!("beta {beta}: "));
                format!("{beta}loss {:.4} → {:.4} in {} steps", l.first, l.last, l.steps)
            })
            .collect(),
    }
}

/// The page of the run's own files.
fn page(args: &Args, exec: &Exec, record: &Record, plan: &HeadPlan) -> Result<Report> {
    let files = Files::of(&work_folder(&args.out));
    let found: Vec<_> = [files.heads, files.plan, files.align_metrics, files.heal_metrics]
        .into_iter()
        .filter(|path| path.exists())
        .collect();
    let mut report = Report::from_files(&found)?;
    let minutes = record.stages.iter().map(|stage| stage.seconds).sum::<f64>() / 60.0;
    report.title = format!("{}, healed", args.base);
    report.summary = format!(
        "{} of {} KV groups of {} became recurrent and were trained on {}, in {minutes:.1} minutes.",
        plan.converted(),
        plan.total(),
        args.base,
        record.data.join(", ")
    );
    for source in &mut report.sources {
        source.run = Some(RunInfo { seeds: vec![args.seed], ..run_info(exec) });
    }
    Ok(report)
}
