//! `fleet generate`: texts from a model. `fleet-rank` does it, because only it links libtorch; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use fleet_common::job::Quantization;
use std::path::PathBuf;

/// Generate text from a checkpoint or any Hugging Face directory of a family that fleet knows
#[derive(clap::Args)]
pub struct Args {
    /// Directory with config.json, model.safetensors and tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of PEFT that changes the model, a directory with adapter_config.json and adapter_model.safetensors; several add up
    #[arg(long = "adapter", value_name = "DIR")]
    adapters: Vec<PathBuf>,
    /// The beginning of a text; with --chat a user's message. Several may be given
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present = "file")]
    prompts: Vec<String>,
    /// More of them: a file of JSON, one a line: a text, {"prompt": TEXT}, or a conversation, {"messages": [...]}
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Answer the prompt, in the words of the model's chat template
    #[arg(long)]
    chat: bool,
    /// What the model is told before the message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// A chat template by its name, of the model or built in, such as chatml, or a .jinja file
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    /// Write up to N texts at the same time, 8 if not given: takes less time than one after the other, and gives the same texts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: Option<u32>,
    /// The most tokens that a text gets, 128 if not given
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u32>,
    /// A string before which the text ends; several may be given
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// 0 always takes the likeliest token
    #[arg(long)]
    temperature: Option<f64>,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that together have probability P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// The same seed gives the same text; 0 if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Keep the matrices of its blocks in few bits: nf4, fp4, int8, hqq8, hqq4, hqq3, hqq2 or hqq1
    #[arg(long, value_name = "KIND")]
    quantization: Option<Quantization>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let mut options = vec![
        ("--model", Some(args.model.into())),
        ("--prompts", args.file.map(Into::into)),
        ("--system", args.system.map(Into::into)),
        ("--quantization", args.quantization.map(|kind| kind.name().into())),
        ("--chat-template", args.chat_template.map(Into::into)),
        ("--batch", args.batch.map(|n| n.to_string().into())),
        ("--max-new-tokens", args.max_new_tokens.map(|n| n.to_string().into())),
        ("--temperature", args.temperature.map(|x| x.to_string().into())),
        ("--top-k", args.top_k.map(|k| k.to_string().into())),
        ("--top-p", args.top_p.map(|p| p.to_string().into())),
        ("--seed", args.seed.map(|seed| seed.to_string().into())),
    ];
    options.extend(args.adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    options.extend(args.prompts.into_iter().map(|text| ("--prompt", Some(text.into()))));
    options.extend(args.stop.into_iter().map(|text| ("--stop", Some(text.into()))));
    let flags = [args.chat.then_some("--chat"), args.json.then_some("--json")];
    Err(programs::become_rank("generate", options, flags.into_iter().flatten()))
}
