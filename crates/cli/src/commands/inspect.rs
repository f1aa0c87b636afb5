//! `inspect`: what a model is, how large, what its cache costs, which heads are what.

use crate::common::{BudgetArgs, plan_of, print_json};
use crate::ui::Ui;
use anyhow::Result;
use eval::report::bytes;
use model::plan::GroupPlan;
use model::{GroupMixer, HeadPlan, ModelConfig};
use serde_json::json;
use surgery::select::summary;
use weights::tensors::{bytes_by_dtype, parameter_count};

/// Show what a model is: architecture, sizes, element types, cache bytes per token; of a hybrid its plan, and the
/// budgets that it was trained for.
///
/// Examples:
///   recurformer inspect smollm2-135m
///   recurformer inspect hybrid-q4.gguf
///   recurformer inspect ./hybrid --json
///   recurformer inspect ./elastic --beta 0.5
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Folder, GGUF file, hub id or built-in name.
    model: String,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, ui: &mut Ui) -> Result<()> {
    let checkpoint = args.budget.open(&args.model, ui)?;
    let config = &checkpoint.config;
    let plan = plan_of(&checkpoint)?;
    let infos = checkpoint.tensors.infos();
    let parameters = parameter_count(infos);
    let by_dtype: Vec<(&str, usize, usize)> = bytes_by_dtype(infos)
        .into_iter()
        .map(|(dtype, size)| (dtype.name(), infos.iter().filter(|i| i.dtype == dtype).count(), size))
        .collect();
    let container = match (checkpoint.path.is_dir(), &checkpoint.plan_json) {
        (true, _) => "folder",
        (false, None) => "GGUF",
        (false, Some(_)) => "GGUF of architecture recurformer",
    };
    let architecture = checkpoint.config_json["architectures"][0].as_str();
    let architecture = architecture.unwrap_or_else(|| config.family.architecture());
    let cache = summary(&plan, config);
    if args.json {
        let dtypes: Vec<_> =
            by_dtype.iter().map(|(d, n, b)| json!({"dtype": d, "tensors": n, "bytes": b})).collect();
        return print_json(&json!({
            "path": checkpoint.path, "container": container, "architecture": architecture, "config": config, "parameters": parameters, "dtypes": dtypes,
            "kv_bytes_per_token": cache.hybrid_bytes_per_token, "hybrid": !plan.is_base(), "cache": cache,
            "plan": (!plan.is_base()).then_some(&plan), "elastic": plan.elastic,
        }));
    }
    println!("{} ({container})", checkpoint.path.display());
    println!("  architecture  {architecture}");
    println!(
        "  family        {:?}, {} layers, d_model {}, d_ff {}",
        config.family, config.layers, config.d_model, config.d_ff
    );
    println!(
        "  attention     {} heads, {} KV heads, head_dim {}",
        config.heads, config.kv_heads, config.head_dim
    );
    println!(
        "  vocabulary    {}{}",
        config.vocab,
        if config.tie_embeddings { ", tied embeddings" } else { "" }
    );
    println!(
        "  context       {} tokens, RoPE base {}, {:?}",
        config.max_context, config.rope_theta, config.rope_scaling
    );
    println!("  parameters    {:.1} M", parameters as f64 / 1e6);
    for (dtype, tensors, size) in &by_dtype {
        println!("    {dtype:<6} {tensors:>5} tensors {:>12}", bytes(*size));
    }
    println!(
        "  cache         {} per token (base {}), constant {}",
        bytes(cache.hybrid_bytes_per_token),
        bytes(cache.base_bytes_per_token),
        bytes(cache.constant_bytes)
    );
    if !plan.is_base() {
        println!("  hybrid        {} of {} KV groups converted", plan.converted(), plan.total());
        if let Some(mixer) = &plan.mixer {
            println!("  mixer         {:?}, window {}, sinks {}", mixer.recurrent, mixer.window, mixer.sinks);
        }
        print_budgets(&plan, config)?;
        println!(
            "  groups        A attention, r recurrent, - of a layer that is left out; one line per layer"
        );
        for (layer, groups) in plan.layers.iter().enumerate() {
            let mark = |g: &GroupPlan| match g.mixer {
                _ if groups.skipped => '-',
                GroupMixer::Attention => 'A',
                GroupMixer::Recurrent => 'r',
            };
            let marks: String = groups.groups.iter().map(mark).collect();
            println!("    {layer:>3} {marks}");
        }
    }
    Ok(())
}

/// The budgets that an elastic hybrid was trained for, and what each costs.
fn print_budgets(plan: &HeadPlan, config: &ModelConfig) -> Result<()> {
    let Some(elastic) = &plan.elastic else { return Ok(()) };
    println!("  elastic       trained for {} budgets:", elastic.betas.len());
    for &beta in &elastic.betas {
        let cache = summary(&plan.at_beta(beta)?, config);
        println!(
            "    --beta {beta:<6} {} of {} groups, cache {} per token, constant {}",
            cache.converted,
            cache.total,
            bytes(cache.hybrid_bytes_per_token),
            bytes(cache.constant_bytes)
        );
    }
    Ok(())
}
