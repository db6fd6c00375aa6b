//! `fleet-rank serve`: a model behind HTTP, from the command line.

use crate::caught;
use fleet_common::job::Quantization;
use fleet_learn::Error;
use fleet_rank::serve::{Wanted, serve};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct ServeArgs {
    /// A model directory: config.json, model.safetensors, tokenizer.json. A checkpoint is one.
    #[arg(long)]
    pub model: PathBuf,
    /// The name by which it is asked; else that of its directory.
    #[arg(long)]
    name: Option<String>,
    /// A directory of PEFT that changes the model. With NAME= before it, it is a model of its own beside.
    #[arg(long = "adapter")]
    adapters: Vec<String>,
    /// A chat template by its name, of the model or built in, or a .jinja file.
    #[arg(long)]
    chat_template: Option<String>,
    /// Keep matrices in few bits: nf4, fp4, int8, hqq8, hqq4, hqq3, hqq2, hqq1.
    #[arg(long)]
    quantization: Option<Quantization>,
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
}

impl ServeArgs {
    /// Where all adapters lie.
    pub fn adapter_dirs(&self) -> Vec<PathBuf> {
        self.adapters.iter().map(|given| split(given).1).collect()
    }
}

pub fn run(args: &ServeArgs) -> Result<(), Error> {
    let of_dir = || {
        let dir = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
        dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    };
    let (named, adapters): (Vec<_>, Vec<_>) =
        args.adapters.iter().map(|given| split(given)).partition(|(name, _)| name.is_some());
    let wanted = Wanted {
        model: args.model.clone(),
        name: args.name.clone().unwrap_or_else(of_dir),
        adapters: adapters.into_iter().map(|(_, dir)| dir).collect(),
        named: named.into_iter().filter_map(|(name, dir)| Some((name?, dir))).collect(),
        chat_template: args.chat_template.clone(),
        listen: SocketAddr::new(args.host, args.port),
        quantization: args.quantization,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
    };
    caught(|| serve(&wanted))
}

/// `NAME=DIR`, or `DIR`, which may hold a `=` behind a slash.
fn split(given: &str) -> (Option<String>, PathBuf) {
    match given.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !name.contains('/') => (Some(name.to_owned()), dir.into()),
        _ => (None, given.into()),
    }
}
