//! `doctor`: what this CPU has, what is used, how fast it is.

use crate::common::ExecArgs;
use crate::run::{cpu_name, print_results};
use crate::ui::Ui;
use anyhow::Result;
use kernels::quant::Dtype;
use kernels::{Isa, isa, measure};
use serde_json::json;

/// Show what this CPU can do, which instruction set is used, and its measured speed.
///
/// The environment variable RECURFORMER_ISA forces one of the available instruction sets (larger f32
/// products, in the gemm crate, choose their own unless scalar is forced).
///
/// Example:
///   recurformer doctor --threads 1
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    exec: ExecArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, _: &mut Ui) -> Result<()> {
    let exec = args.exec.exec()?;
    let cpu = cpu_name();
    let features = isa::cpu_features();
    let available: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
    let region = measure::region_seconds(&exec) * 1e6;
    let f32_gemm = measure::gemm_gflops(&exec);
    let bf16_gemm = measure::packed_gflops(&exec, Dtype::BF16)?;
    let q8_gemm = measure::packed_gflops(&exec, Dtype::Q8_0)?;
    let memory = measure::read_gigabytes_per_second(&exec);
    if args.json {
        let found = json!({
            "cpu": cpu,
            "features": features,
            "available": available,
            "isa": exec.isa().name(),
            "threads": exec.threads(),
            "parallel_region_microseconds": region,
            "f32_gemm_gflops": f32_gemm,
            "bf16_gemm_gflops": bf16_gemm,
            "q8_gemm_gops": q8_gemm,
            "memory_read_gigabytes_per_second": memory,
        });
        return print_results(&exec, found, Vec::new(), &[]);
    }
    println!("cpu           {}", cpu.as_deref().unwrap_or("(name unknown)"));
    println!("features      {}", features.join(" "));
    println!("available     {}", available.join(", "));
    println!("in use        {} with {} threads", exec.isa().name(), exec.threads());
    println!("to override   {}=<one of the available>, --threads <n>", isa::ISA_VARIABLE);
    println!("region        {region:.2} us overhead of a parallel region");
    println!("f32 GEMM      {f32_gemm:.0} GFLOP/s");
    println!("bf16 GEMM     {bf16_gemm:.0} GFLOP/s");
    println!("8-bit GEMM    {q8_gemm:.0} GOP/s");
    println!("memory read   {memory:.1} GB/s");
    Ok(())
}
