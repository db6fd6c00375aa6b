//! `fleet logits`: what a model computes for given tokens, for anyone who wants to compare.

use crate::failure::Failure;
use crate::programs;
use std::path::PathBuf;

/// Write the logits of a model for given token ids
#[derive(clap::Args)]
pub struct Args {
    /// Directory with config.json and model.safetensors: a checkpoint, or any Hugging Face directory of a family that fleet knows
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of PEFT that changes the model, a directory with adapter_config.json and adapter_model.safetensors; several add up
    #[arg(long = "adapter", value_name = "DIR")]
    adapters: Vec<PathBuf>,
    /// JSON file with a list of token ids, or a list of such lists of one length
    #[arg(long, value_name = "FILE.json")]
    ids: PathBuf,
    /// Where to write `logits`, [sequences, tokens, vocabulary] in fp32
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// auto, cpu or cuda
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// 32 or bf16-mixed
    #[arg(long, value_name = "PRECISION")]
    precision: Option<String>,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let mut options = vec![
        ("--model", Some(args.model.into())),
        ("--ids", Some(args.ids.into())),
        ("--out", Some(args.out.into())),
        ("--device", args.device.map(Into::into)),
        ("--precision", args.precision.map(Into::into)),
    ];
    options.extend(args.adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    Err(programs::become_rank("logits", options, None))
}
