//! `fleet generate`: text from a model. `fleet-rank` does it, because only it links libtorch; this process becomes it.

use crate::failure::Failure;
use crate::programs;
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
    /// The beginning of the text; with --chat the user's message
    #[arg(long)]
    prompt: String,
    /// Answer the prompt, in the words of the model's chat template
    #[arg(long)]
    chat: bool,
    /// What the model is told before the message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// A chat template by its name, of the model or built in, such as chatml
    #[arg(long, value_name = "NAME", requires = "chat")]
    chat_template: Option<String>,
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u32>,
    /// 0 always takes the likeliest token
    #[arg(long)]
    temperature: Option<f64>,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that together have probability P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    #[arg(long)]
    seed: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let mut options = vec![
        ("--model", Some(args.model.into())),
        ("--prompt", Some(args.prompt.into())),
        ("--system", args.system.map(Into::into)),
        ("--chat-template", args.chat_template.map(Into::into)),
        ("--max-new-tokens", args.max_new_tokens.map(|n| n.to_string().into())),
        ("--temperature", args.temperature.map(|x| x.to_string().into())),
        ("--top-k", args.top_k.map(|k| k.to_string().into())),
        ("--top-p", args.top_p.map(|p| p.to_string().into())),
        ("--seed", args.seed.map(|seed| seed.to_string().into())),
    ];
    options.extend(args.adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    let flags = [args.chat.then_some("--chat"), args.json.then_some("--json")];
    Err(programs::become_rank("generate", options, flags.into_iter().flatten()))
}
