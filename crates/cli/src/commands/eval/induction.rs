//! `eval induction`: random tokens that return, model and base in one run.

use super::pair::{Measured, PairArgs};
use crate::ui::Ui;
use anyhow::Result;
use eval::induction::{InductionResult, InductionTest, induction};
use serde_json::json;

/// Random tokens that return: accuracy and loss the second time, by the distance to the first.
///
/// `repeat` gives a sequence of different random tokens twice; `copy` gives a span, other tokens, and the beginning of the span again. Accuracy has a Wilson
/// interval, losses (nats) their standard error; `first` is the loss of the same tokens the first time.
///
/// Example:
///   recurformer eval induction --model healed --base smollm2-135m --distances 32,128,512 --samples 20
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct InductionArgs {
    #[command(flatten)]
    pair: PairArgs,
    /// Tokens from the first occurrence to the second, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "32,128,512")]
    distances: Vec<usize>,
    /// Sequences per task and distance.
    #[arg(long, default_value_t = 16)]
    samples: usize,
    /// Tokens that are copied.
    #[arg(long, default_value_t = 16)]
    span: usize,
    /// Of them, those that are given the second time.
    #[arg(long, default_value_t = 2)]
    cue: usize,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// `eval induction`.
pub fn run_induction(args: &InductionArgs, ui: &mut Ui) -> Result<()> {
    let InductionArgs { pair, distances, samples, span, cue, seed } = args;
    let test = InductionTest {
        distances: distances.clone(),
        samples: *samples,
        span: *span,
        cue: *cue,
        seed: *seed,
    };
    let measured = pair.measure(ui, |exec, running, ui| {
        Ok(induction(exec, &running.engine, &running.tokenizer()?, &test, ui)?)
    })?;
    if pair.printed(&measured, json!({"seed": seed, "span": span, "cue": cue}), &[*seed])? {
        return Ok(());
    }
    let Measured { results, base, .. } = measured;
    let columns =
        |name: &str| format!(" {:>31} {:>13} {:>15}", format!("{name}: tokens (95 %)"), "loss", "first");
    let beside = if base.is_some() { columns("base") } else { String::new() };
    println!("{:<8} {:>8}{}{beside}", "task", "distance", columns("model"));
    let values = |r: &InductionResult| format!(" {:>31} {:>13} {:>15}", r.score, r.loss, r.first_loss);
    for (i, r) in results.iter().enumerate() {
        let beside = base.as_ref().map_or(String::new(), |base| values(&base[i]));
        println!("{:<8} {:>8}{}{beside}", r.task, r.distance, values(r));
    }
    for (i, r) in results.iter().enumerate() {
        if let Some(whole) = r.whole {
            let beside = base.as_ref().and_then(|base| base[i].whole).map(|score| format!("; base {score}"));
            println!("whole copies at {}: {whole}{}", r.distance, beside.unwrap_or_default());
        }
    }
    Ok(())
}
