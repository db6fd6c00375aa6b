//! `fleet eval`: how well a model predicts texts, or the answers of rows. `fleet-rank` does it; this process becomes it.

use crate::failure::Failure;
use crate::programs;
use std::path::PathBuf;

/// Measure how well a model predicts texts, or the answers in rows of instructions: loss, perplexity, token accuracy, bits per byte
#[derive(clap::Args)]
pub struct Args {
    /// Directory with config.json, model.safetensors and tokenizer.json: a checkpoint, or any Hugging Face directory of a family that
    /// fleet knows
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of PEFT that changes the model, a directory with adapter_config.json and adapter_model.safetensors; several add up
    #[arg(long = "adapter", value_name = "DIR")]
    adapters: Vec<PathBuf>,
    /// Files and folders of text or of rows of instructions, read as a job reads its `data.path`; the whole of them counts, of rows the answers
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// More of them
    #[arg(value_name = "FILE")]
    more: Vec<PathBuf>,
    /// A setting of how text is found in them, as in a job: data.text_field=body, data.clean.remove_html=true, data.chat_template=chatml
    #[arg(long = "set", value_name = "K=V")]
    sets: Vec<String>,
    /// auto, cpu or cuda
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// 32 or bf16-mixed
    #[arg(long, value_name = "PRECISION")]
    precision: Option<String>,
    /// Tokens of a window; without it as many as the model was made for, at most 2048
    #[arg(long, value_name = "N")]
    max_seq_len: Option<u32>,
    /// Windows that are computed at once, by default 8
    #[arg(long, value_name = "N")]
    batch_size: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    programs::check_model(&args.model)?;
    let mut options = vec![
        ("--model", Some(args.model.into())),
        ("--device", args.device.map(Into::into)),
        ("--precision", args.precision.map(Into::into)),
        ("--max-seq-len", args.max_seq_len.map(|n| n.to_string().into())),
        ("--batch-size", args.batch_size.map(|n| n.to_string().into())),
    ];
    options.extend(args.data.into_iter().chain(args.more).map(|path| ("--data", Some(path.into()))));
    options.extend(args.adapters.into_iter().map(|dir| ("--adapter", Some(dir.into()))));
    options.extend(args.sets.into_iter().map(|set| ("--set", Some(set.into()))));
    Err(programs::become_rank("eval", options, args.json.then_some("--json")))
}
