//! `fleet adapter`: adapters of PEFT. `fleet-rank` computes; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use std::path::PathBuf;

/// Adapters: small matrices that change a model, as PEFT writes them
#[derive(clap::Subcommand)]
pub enum Command {
    Merge(MergeArgs),
}

/// Make one model of a model and its adapters, for programs that read no adapters; checks that it computes the same
#[derive(clap::Args)]
pub struct MergeArgs {
    /// Directory of the model: a checkpoint, or any Hugging Face directory of a family that fleet knows
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Directory with adapter_config.json and adapter_model.safetensors; several add up
    #[arg(long = "adapter", value_name = "DIR", required = true)]
    adapters: Vec<PathBuf>,
    /// Where to write it: a new directory, with all that lies beside the model
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(command: Command) -> Result<u8, Failure> {
    let Command::Merge(args) = command;
    programs::check_model(&args.model)?;
    let mut options = vec![("--model", Some(args.model.into())), ("--output", Some(args.output.into()))];
    options.extend(args.adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    Err(programs::become_rank("merge", options, args.json.then_some("--json")))
}
