//! `fleet serve`: a model behind HTTP. `fleet-rank` does it; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use fleet_common::job::Quantization;
use std::net::IpAddr;
use std::path::PathBuf;

/// Answer over HTTP as OpenAI's API does, to try a model with any client; one request after the other, by the CPU
#[derive(clap::Args)]
pub struct Args {
    /// Directory with config.json, model.safetensors and tokenizer.json: a checkpoint, or any Hugging Face directory of a family that
    /// fleet knows
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The name by which clients ask for it; without it that of its directory
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Adapter of PEFT that changes the model; several add up. With NAME= before it, it is a model of its own beside the first
    #[arg(long = "adapter", value_name = "[NAME=]DIR")]
    adapters: Vec<String>,
    /// A chat template by its name, of the model or built in, such as chatml, or a .jinja file
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    /// Keep the matrices of its blocks in few bits: nf4, fp4, int8, hqq8, hqq4, hqq3, hqq2 or hqq1
    #[arg(long, value_name = "KIND")]
    quantization: Option<Quantization>,
    /// Address to listen on, by default 127.0.0.1. There is no key: on another one whoever reaches it can use the model
    #[arg(long, value_name = "IP")]
    host: Option<IpAddr>,
    /// By default 8000; 0 takes a free one
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let mut options = vec![
        ("--model", Some(args.model.into())),
        ("--name", args.name.map(Into::into)),
        ("--quantization", args.quantization.map(|kind| kind.name().into())),
        ("--chat-template", args.chat_template.map(Into::into)),
        ("--host", args.host.map(|host| host.to_string().into())),
        ("--port", args.port.map(|port| port.to_string().into())),
    ];
    options.extend(args.adapters.into_iter().map(|adapter| ("--adapter", Some(adapter.into()))));
    Err(programs::become_rank("serve", options, None))
}
