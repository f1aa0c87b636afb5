//! `doctor`: what this CPU has, what is used, how fast it is.

use crate::common::ExecArgs;
use crate::ui::Ui;
use anyhow::Result;
use kernels::{Isa, measure};

/// Show what this CPU can do, which instruction set is used, and its measured speed.
///
/// RECURFORMER_ISA=scalar|avx2|avx512|neon forces an instruction set (larger matrix products, in the
/// gemm crate, choose their own unless scalar is forced).
///
/// Example:
///   recurformer doctor --threads 1
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    exec: ExecArgs,
}

pub fn run(args: &Args, _: &mut Ui) -> Result<()> {
    let exec = args.exec.exec()?;
    let available: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
    println!("available     {}", available.join(", "));
    println!("in use        {} with {} threads", exec.isa().name(), exec.threads());
    println!("f32 GEMM      {:.0} GFLOP/s", measure::gemm_gflops(&exec));
    println!("memory read   {:.1} GB/s", measure::read_gigabytes_per_second(&exec));
    Ok(())
}
