//! `generate`: continues a prompt.

use crate::common::{EngineArgs, ExecArgs, Running, usage};
use crate::run::print_results;
use crate::ui::Ui;
use anyhow::{Context, Result};
use kernels::Exec;
use model::generate::{Finish, GenerateLimits, generate};
use model::{EngineOptions, Sampler, SamplerOptions};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;
use weights::Tokenizer;
use weights::tokenizer::StopStream;

/// Continue a prompt, streaming the text.
///
/// Examples:
///   recurformer generate --model smollm2-135m --prompt "The whale" --max-tokens 64
///   recurformer generate --model healed --prompt-file notes.txt --temperature 0.8 --top-p 0.95 --seed 7 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// The prompt.
    #[arg(long, required_unless_present_any = ["prompt_file", "tokens"])]
    prompt: Option<String>,
    /// Read the prompt from a text file, or from a .npy file of int32 token ids.
    #[arg(long, conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// The prompt as token ids, comma-separated; with --json no tokenizer is needed.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["prompt", "prompt_file"])]
    tokens: Option<Vec<u32>>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print one JSON object at the end instead of streaming.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

/// Sampling options, shared with `chat`.
#[derive(clap::Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0: always the most probable token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep the K most probable tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the smallest set of tokens with this probability.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Drop tokens below this share of the most probable one.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Penalty on tokens already seen; 1: off.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the draw.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop when this text appears (may be repeated).
    #[arg(long)]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    /// The sampler.
    pub fn sampler(&self) -> Result<Sampler> {
        Sampler::new(SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        })
        .map_err(|e| usage(e.to_string()))
    }
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let exec = args.exec.exec()?;
    let mut sampler = args.sampling.sampler()?;
    let running = args.engine.run(&args.model, EngineOptions::default(), &exec, ui)?;
    let model = &running.engine;
    let (prompt, tokenizer) = prompt(args, &running, &exec, ui)?;
    let mut cache = model.new_cache();
    let mut history = Vec::new();
    let mut text = tokenizer.as_ref().map(|tokenizer| StopStream::new(tokenizer, &args.sampling.stop));
    let mut ids = Vec::new();
    let stop = ui.stop_flag();
    let clock = Instant::now();
    let mut first_token = None;
    let mut out = std::io::stdout().lock();
    let mut failure = None;
    let limits = GenerateLimits { max_new: args.sampling.max_tokens, stop_ids: &model.config.eos_token_ids };
    let finish = generate(&exec, model, &mut cache, &mut history, &prompt, &mut sampler, limits, |id| {
        first_token.get_or_insert_with(|| clock.elapsed().as_secs_f64());
        ids.push(id);
        let go_on = !stop.load(Ordering::SeqCst);
        let Some(text) = &mut text else { return go_on };
        let emitted = text.push(id).map_err(anyhow::Error::from).and_then(|new| {
            if !args.json {
                write!(out, "{new}").and_then(|()| out.flush())?;
            }
            Ok(())
        });
        if let Err(error) = emitted {
            failure = Some(error);
            return false;
        }
        !text.stopped() && go_on
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let seconds = clock.elapsed().as_secs_f64();
    let stopped = text.as_ref().is_some_and(StopStream::stopped);
    let (rest, text) = text.map(StopStream::finish).transpose()?.unzip();
    if args.json {
        let given = tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&prompt, true)).transpose()?;
        let value = json!({
            "prompt": given, "text": text, "tokens": ids, "prompt_tokens": prompt.len(),
            "finish": if stopped { "stop" } else { finish_name(finish) },
            "first_token_s": first_token, "seconds": seconds, "cache_bytes": cache.bytes(), "cache_tokens": cache.len(),
        });
        return print_results(&exec, value, vec![running.about.clone()], &[args.sampling.seed]);
    }
    writeln!(out, "{}", rest.unwrap_or_default())?;
    let decode = (ids.len().max(1) - 1) as f64 / (seconds - first_token.unwrap_or(seconds)).max(1e-9);
    ui.say(&format!(
        "[{} + {} tokens; first after {:.2} s, then {decode:.1} tokens/s; cache {}]",
        prompt.len(),
        ids.len(),
        first_token.unwrap_or(seconds),
        eval::report::bytes(cache.bytes())
    ));
    Ok(())
}

/// The prompt's token ids, and the tokenizer: none when it is missing and neither the prompt nor the output is text.
fn prompt(args: &Args, running: &Running, exec: &Exec, ui: &mut Ui) -> Result<(Vec<u32>, Option<Tokenizer>)> {
    let ids = match (&args.tokens, &args.prompt_file) {
        (Some(tokens), _) => Some(tokens.clone()),
        (_, Some(path)) if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy")) => {
            let documents = train::data::read_file(exec, path, None, ui)?;
            train::data::check_vocab(&documents, running.engine.config.vocab)?;
            Some(documents.into_iter().flat_map(|d| d.tokens).collect())
        }
        _ => None,
    };
    let only_ids = ids.is_some() && args.json && args.sampling.stop.is_empty();
    let tokenizer = match running.tokenizer() {
        Err(_) if only_ids => None,
        other => Some(other?),
    };
    let ids = match (ids, &tokenizer, &args.prompt_file, &args.prompt) {
        (Some(ids), ..) => ids,
        (_, Some(tokenizer), Some(path), _) => tokenizer
            .encode(&std::fs::read_to_string(path).with_context(|| path.display().to_string())?, true)?,
        (_, Some(tokenizer), _, Some(text)) => tokenizer.encode(text, true)?,
        _ => return Err(usage("give --prompt, --prompt-file or --tokens")),
    };
    if ids.is_empty() {
        return Err(usage("the prompt holds no token"));
    }
    Ok((ids, tokenizer))
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText | Finish::Stopped => "stop",
        Finish::Length => "length",
    }
}
