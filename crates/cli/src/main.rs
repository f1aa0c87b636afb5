//! The `recurformer` command: parses arguments, calls the library crates, prints. Holds no logic of its own.
#![deny(unsafe_code)]

mod allocator;
mod commands;
mod common;
mod hints;
mod run;
mod ui;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Turn pretrained Transformers into hybrids whose recency-aware attention heads are recurrent, and run them.
///
/// Data goes to stdout, progress and messages to stderr. Exit code 2 means wrong usage, 1 any other failure, 130 an interruption.
#[derive(Parser)]
#[command(name = "recurformer", version, max_term_width = 110, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Quickstart(commands::quickstart::Args),
    Fetch(commands::fetch::Args),
    Inspect(commands::inspect::Args),
    Logits(commands::logits::Args),
    Analyze(commands::analyze::Args),
    Sinks(commands::sinks::Args),
    Align(commands::align::Args),
    Plan(commands::plan::Args),
    Convert(commands::convert::Args),
    Heal(commands::heal::Args),
    Export(commands::export::Args),
    Generate(commands::generate::Args),
    Chat(commands::chat::Args),
    Eval(commands::eval::Args),
    Bench(commands::bench::Args),
    Report(commands::report::Args),
    BenchTrain(commands::bench_train::Args),
    TrainMqar(commands::train_mqar::Args),
    Doctor(commands::doctor::Args),
}

fn main() -> ExitCode {
    // A reader that goes away (`| head`) ends the process quietly instead of panicking in println.
    sigpipe::reset();
    let cli = Cli::parse();
    let mut ui = match ui::Ui::new() {
        Ok(ui) => ui,
        Err(error) => return report(&error),
    };
    let result = match cli.command {
        Command::Quickstart(args) => commands::quickstart::run(&args, &mut ui),
        Command::Fetch(args) => commands::fetch::run(&args, &mut ui),
        Command::Inspect(args) => commands::inspect::run(&args, &mut ui),
        Command::Logits(args) => commands::logits::run(&args, &mut ui),
        Command::Analyze(args) => commands::analyze::run(&args, &mut ui),
        Command::Sinks(args) => commands::sinks::run(&args, &mut ui),
        Command::Align(args) => commands::align::run(&args, &mut ui),
        Command::Plan(args) => commands::plan::run(&args, &mut ui),
        Command::Convert(args) => commands::convert::run(&args, &mut ui),
        Command::Heal(args) => commands::heal::run(&args, &mut ui),
        Command::Export(args) => commands::export::run(&args, &mut ui),
        Command::Generate(args) => commands::generate::run(&args, &mut ui),
        Command::Chat(args) => commands::chat::run(&args, &mut ui),
        Command::Eval(args) => commands::eval::run(&args, &mut ui),
        Command::Bench(args) => commands::bench::run(&args, &mut ui),
        Command::Report(args) => commands::report::run(&args, &mut ui),
        Command::BenchTrain(args) => commands::bench_train::run(&args, &mut ui),
        Command::TrainMqar(args) => commands::train_mqar::run(&args, &mut ui),
        Command::Doctor(args) => commands::doctor::run(&args, &mut ui),
    };
    ui.clear();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Prints an error with its causes, and chooses the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Most errors of the libraries tell their cause themselves.
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    if !text.contains("\nhint: ")
        && let Some(hint) = hints::hint(error)
    {
        text = format!("{text}\nhint: {hint}");
    }
    eprintln!("error: {text}");
    if common::is_usage(error) {
        ExitCode::from(2)
    } else if text.starts_with("interrupted") {
        ExitCode::from(130)
    } else {
        ExitCode::FAILURE
    }
}
