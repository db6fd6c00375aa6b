//! `fleet-rank generate`: texts from the command line.

mod texts;

use crate::{caught, told};
use fleet_common::job::Quantization;
use fleet_data::chat::Conversation;
use fleet_learn::Error;
use fleet_rank::generate::{Ask, Chat, Prompt, Sampling, Settings, TextModel};
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use texts::Texts;
use time::OffsetDateTime;

#[derive(clap::Args)]
pub struct GenerateArgs {
    /// A model directory: config.json, model.safetensors, tokenizer.json. A checkpoint is one.
    #[arg(long)]
    pub model: PathBuf,
    /// A directory with adapter_config.json and adapter_model.safetensors, as PEFT writes them, that changes the model; several add up.
    #[arg(long = "adapter")]
    pub adapters: Vec<PathBuf>,
    /// The beginning of a text; with --chat a user's message. Several may be given.
    #[arg(long = "prompt", required_unless_present = "file")]
    prompts: Vec<String>,
    /// More of them: a file of JSON, one a line: a text, {"prompt": TEXT}, or a conversation, {"messages": [...]}.
    #[arg(long = "prompts")]
    file: Option<PathBuf>,
    /// Answer the prompt, in the words of the model's chat template.
    #[arg(long)]
    chat: bool,
    /// What the model is told before the message.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// A chat template by its name, of the model or built in, or a .jinja file.
    #[arg(long)]
    chat_template: Option<String>,
    /// Write up to so many texts at the same time, which takes less time than one after the other. Each stays what it is alone.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: u32,
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// A string before which the text ends; several may be given.
    #[arg(long)]
    stop: Vec<String>,
    /// 0 takes the likeliest token every time.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all.
    #[arg(long, default_value_t = 50)]
    top_k: usize,
    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Keep matrices in few bits: nf4, fp4, int8, hqq8, hqq4, hqq3, hqq2, hqq1.
    #[arg(long)]
    quantization: Option<Quantization>,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object at the end instead of the text as it comes.
    #[arg(long)]
    json: bool,
}

/// Bytes of a file of prompts, which is read whole.
const FILE_MAX: u64 = 64 << 20;

/// What is asked.
enum Asked {
    Text(String),
    Chat(Conversation),
}

pub fn run(args: &GenerateArgs) -> Result<(), Error> {
    if !(0.0..=1.0).contains(&args.top_p) || args.top_p == 0.0 {
        return Err(Error::Input(format!("--top-p is {}; give a number above 0, at most 1", args.top_p)));
    }
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(Error::Input(format!(
            "--temperature is {}; give 0 or a positive number",
            args.temperature
        )));
    }
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let settings = Settings { max_new_tokens: args.max_new_tokens, sampling, stop: args.stop.clone() };
    caught(|| write(args, &settings))
}

fn write(args: &GenerateArgs, settings: &Settings) -> Result<(), Error> {
    let asked = asked(args)?;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let mut model = TextModel::open(&args.model, &args.adapters, args.quantization, threads)?;
    // Nothing is computed where one of them cannot be asked.
    let prompts = prompts(args, &model, &asked)?;
    let titles: Vec<&str> = asked.iter().map(Asked::text).collect();
    let mut texts = Texts::new(&titles, args.json, std::io::stdout().lock());
    model.write_all(&prompts, settings, args.batch as usize, &mut |number, said| texts.take(number, said))?;
    told(texts.written)
}

fn prompts(args: &GenerateArgs, model: &TextModel, asked: &[Asked]) -> Result<Vec<Prompt>, Error> {
    let now = OffsetDateTime::now_utc();
    let template = match asked.iter().any(|asked| matches!(asked, Asked::Chat(_))) {
        true => Some(model.template(0, args.chat_template.as_deref())?),
        false => None,
    };
    for misfit in template.iter().flat_map(|template| template.misfits(model.tokenizer(), now)) {
        eprintln!("warning: {misfit}");
    }
    let all = asked.len();
    let prompt = |(number, asked): (usize, &Asked)| {
        let ask = match (asked, &template) {
            (Asked::Chat(conversation), Some(template)) => Ask::Chat(Chat { conversation, template, now }),
            _ => Ask::Text(asked.text()),
        };
        let prompt = model.prompt(&ask).and_then(|prompt| model.check_room(&prompt).map(|()| prompt));
        prompt.map_err(|error| match error {
            Error::Input(what) if all > 1 => Error::Input(format!("prompt {}: {what}", number + 1)),
            error => error,
        })
    };
    asked.iter().enumerate().map(prompt).collect()
}

/// All prompts, in their order.
fn asked(args: &GenerateArgs) -> Result<Vec<Asked>, Error> {
    let of_text = |text: &str| match args.chat {
        true => Asked::Chat(Conversation::ask(args.system.as_deref(), text)),
        false => Asked::Text(text.to_owned()),
    };
    let mut all: Vec<Asked> = args.prompts.iter().map(|text| of_text(text)).collect();
    let Some(path) = &args.file else { return Ok(all) };
    let text = read(path)?;
    for (number, line) in
        text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, line)| !line.trim().is_empty())
    {
        let wrong =
            |what: &str| Error::Input(format!("--prompts {}, line {}: {what}", path.display(), number + 1));
        let value: Value = serde_json::from_str(line).map_err(|e| wrong(&format!("not JSON ({e})")))?;
        all.push(match (&value, &value["prompt"], &value["messages"]) {
            (Value::String(text), ..) | (_, Value::String(text), Value::Null) => of_text(text),
            (_, Value::Null, Value::Array(messages)) => {
                Asked::Chat(Conversation::new(messages).map_err(|e| wrong(&e.to_string()))?)
            }
            _ => return Err(wrong("neither a text nor an object with `prompt` or `messages`")),
        });
    }
    match all.is_empty() {
        false => Ok(all),
        true => Err(Error::Input(format!("--prompts {}: it has no line", path.display()))),
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let cannot = |e: &dyn std::fmt::Display| Error::Input(format!("--prompts {}: {e}", path.display()));
    let file = std::fs::File::open(path).map_err(|e| cannot(&e))?;
    let mut text = String::new();
    file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(|e| cannot(&e))?;
    match text.len() as u64 > FILE_MAX {
        false => Ok(text),
        true => Err(cannot(&format!("it has more than {FILE_MAX} bytes; give several smaller ones"))),
    }
}

impl Asked {
    fn text(&self) -> &str {
        match self {
            Asked::Text(text) => text,
            Asked::Chat(conversation) => conversation.last_text(),
        }
    }
}
