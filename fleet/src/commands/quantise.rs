//! `fleet quantise`: a model in few bits, as files. `fleet-rank` computes; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use fleet_common::job::Quantization;
use std::path::PathBuf;

/// Write a model with the matrices of its blocks in few bits, as transformers with bitsandbytes or hqq reads it
#[derive(clap::Args)]
pub struct Args {
    /// Directory of the model: a checkpoint, or any Hugging Face directory of a family that fleet knows
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// nf4, fp4 or int8 (bitsandbytes), hqq8, hqq4, hqq3, hqq2 or hqq1 (hqq)
    #[arg(long, value_name = "KIND")]
    to: Quantization,
    /// Where to write it: a new directory, with all that lies beside the model
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let options = vec![
        ("--model", Some(args.model.into())),
        ("--to", Some(args.to.name().into())),
        ("--output", Some(args.output.into())),
    ];
    Err(programs::become_rank("quantise", options, args.json.then_some("--json")))
}
