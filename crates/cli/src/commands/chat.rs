//! `chat`: a conversation whose history stays in the cache.

use crate::commands::generate::SamplingArgs;
use crate::common::{EngineArgs, ExecArgs};
use crate::ui::Ui;
use anyhow::Result;
use model::EngineOptions;
use model::generate::{GenerateLimits, generate};
use std::io::{BufRead, IsTerminal, Write};
use std::sync::atomic::Ordering;
use weights::tokenizer::{ChatMessage, StopStream};

/// Talk to a model with its chat template; the conversation stays in the cache. End with Ctrl-D or /quit.
///
/// Examples:
///   recurformer chat --model smollm2-135m --temperature 0.7 --top-p 0.9
///   echo "What is a whale?" | recurformer chat --model healed
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    #[arg(long)]
    model: String,
    /// System message.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let exec = args.exec.exec()?;
    let mut sampler = args.sampling.sampler()?;
    let running = args.engine.run(&args.model, EngineOptions::default(), &exec, ui)?;
    let (model, tokenizer) = (&running.engine, running.tokenizer()?);
    let mut messages: Vec<ChatMessage> = Vec::new();
    messages
        .extend(args.system.iter().map(|text| ChatMessage { role: "system".into(), content: text.clone() }));
    let mut cache = model.new_cache();
    let mut history: Vec<u32> = Vec::new();
    let interactive = std::io::stdin().is_terminal();
    let mut stdin = std::io::stdin().lock();
    let stop = ui.stop_flag();
    loop {
        if interactive {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.read_line(&mut line)? == 0 || line.trim() == "/quit" {
            return Ok(());
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(ChatMessage { role: "user".into(), content: line.trim_end().to_string() });
        let rendered = tokenizer.encode(&tokenizer.apply_chat_template(&messages, true)?, false)?;
        // The cache holds the conversation so far. Should the template have rewritten it, start over rather than mix two histories.
        if !rendered.starts_with(&history) || history.len() == rendered.len() {
            cache = model.new_cache();
            history.clear();
        }
        let fresh = rendered[history.len()..].to_vec();
        let mut text = StopStream::new(&tokenizer, &args.sampling.stop);
        let mut out = std::io::stdout().lock();
        let mut failure = None;
        let limits =
            GenerateLimits { max_new: args.sampling.max_tokens, stop_ids: &model.config.eos_token_ids };
        generate(&exec, model, &mut cache, &mut history, &fresh, &mut sampler, limits, |id| {
            let written = text
                .push(id)
                .map_err(anyhow::Error::from)
                .and_then(|new| Ok(write!(out, "{new}").and_then(|()| out.flush())?));
            if let Err(error) = written {
                failure = Some(error);
                return false;
            }
            !text.stopped() && !stop.load(Ordering::SeqCst)
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let (rest, text) = text.finish()?;
        writeln!(out, "{rest}")?;
        messages.push(ChatMessage { role: "assistant".into(), content: text });
        if stop.swap(false, Ordering::SeqCst) && !interactive {
            return Ok(());
        }
    }
}
