//! `fleet adapter`: adapters of PEFT. `fleet-rank` computes; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use std::ffi::OsString;
use std::path::PathBuf;

/// Adapters: small matrices that change a model, as PEFT writes them
#[derive(clap::Subcommand)]
pub enum Command {
    Merge(MergeArgs),
    Unmerge(UnmergeArgs),
    Combine(CombineArgs),
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
    /// Merge also an adapter that was trained beside another model
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take adapters out of a model of which they have become a part; checks that with them it computes the same
#[derive(clap::Args)]
pub struct UnmergeArgs {
    /// Directory of the model that has the adapters in its weights
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Directory of an adapter that is to be taken out; several may be
    #[arg(long = "adapter", value_name = "DIR", required = true)]
    adapters: Vec<PathBuf>,
    /// Where to write the model that is left: a new directory
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make one adapter of several of the same model, each with a weight, as PEFT's add_weighted_adapter does
#[derive(clap::Args)]
pub struct CombineArgs {
    /// Directory of an adapter and what counts of it; without a weight 1
    #[arg(long = "adapter", value_name = "DIR=WEIGHT", required = true)]
    adapters: Vec<OsString>,
    /// cat: what is added is exactly the weighted sum, and ranks add up; linear: matrices are summed with the roots of the weights, and the rank stays
    #[arg(long, value_name = "KIND", default_value = "cat", value_parser = ["cat", "linear"])]
    r#type: String,
    /// Where to write it: a new directory
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Combine also adapters that were trained beside different models
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(command: Command) -> Result<u8, Failure> {
    let (name, model, adapters, output, flags) = match command {
        Command::Merge(args) => {
            let flags = [args.force.then_some("--force"), args.json.then_some("--json")];
            ("merge", args.model, args.adapters, args.output, flags)
        }
        Command::Unmerge(args) => {
            ("unmerge", args.model, args.adapters, args.output, [args.json.then_some("--json"), None])
        }
        Command::Combine(args) => {
            let mut options =
                vec![("--type", Some(args.r#type.into())), ("--output", Some(args.output.into()))];
            options.extend(args.adapters.into_iter().map(|adapter| ("--adapter", Some(adapter))));
            let flags = [args.force.then_some("--force"), args.json.then_some("--json")];
            return Err(programs::become_rank("combine", options, flags.into_iter().flatten()));
        }
    };
    programs::check_model(&model)?;
    let mut options = vec![("--model", Some(model.into())), ("--output", Some(output.into()))];
    options.extend(adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    Err(programs::become_rank(name, options, flags.into_iter().flatten()))
}
