//! `fleet-rank`: without arguments a rank of a training job, started by the node agent; also the probe, and text generation.

mod bench;
mod generating;
mod serving;

use clap::{Parser, Subcommand};
use fleet_checkpoint::{of_another_base, of_fewer_bits, remove_unfinished};
use fleet_common::events::{FailureKind, JobError, Outcome};
use fleet_common::exit::{self, Fault};
use fleet_common::ids::Rank;
use fleet_common::job::{Job, Quantization, Shape};
use fleet_common::link::{Latency, Rate};
use fleet_common::protocol::{FromRank, RANK_SOCKET_ENV};
use fleet_common::{arguments, signals};
use fleet_cpu::{product, shim as libtorch};
use fleet_learn::adapter::{Combination, can_combine, combine};
use fleet_learn::agent_link::AgentLink;
use fleet_learn::{Error, shim, trainer};
use fleet_rank::merge::{belong_together, merge, unmerge};
use fleet_rank::quantise::quantise;
use fleet_rank::{assemble, eval, logits, plan};
use fleet_torch::device;
use generating::GenerateArgs;
use serving::ServeArgs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The training engine of fleet. Started by `worker`; run by hand it can only probe and generate.
#[derive(Parser)]
#[command(name = "fleet-rank", version, about)]
struct Args {
    /// Print what this machine can do as one line of JSON.
    #[arg(long)]
    probe: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Continue texts with a trained model.
    Generate(GenerateArgs),
    /// Answer over HTTP, as OpenAI's API does.
    Serve(ServeArgs),
    /// Write the logits of a model for given token ids.
    Logits(LogitsArgs),
    /// Measure how well a model predicts texts.
    Eval(EvalArgs),
    /// Make one model of a model and its adapters.
    Merge(MergeArgs),
    /// Take adapters out of a model of which they have become a part.
    Unmerge(MergeArgs),
    /// Make one adapter of several.
    Combine(CombineArgs),
    /// Write a model with matrices in few bits.
    Quantise(QuantiseArgs),
    /// Say what a job needs and how fast it will be, before it runs.
    Plan(PlanArgs),
    /// Time training steps on made-up data.
    #[command(hide = true)]
    Bench(bench::BenchArgs),
}

/// Those of a job that change what is computed here, by all of their names.
const PRECISIONS: [&str; 6] = ["32", "fp32", "float32", "bf16-mixed", "bf16", "bfloat16"];

fn is_bf16(precision: &str) -> bool {
    precision.starts_with('b')
}

#[derive(clap::Args)]
struct LogitsArgs {
    /// A model directory: config.json and model.safetensors. A checkpoint is one.
    #[arg(long)]
    model: PathBuf,
    /// A directory with adapter_config.json and adapter_model.safetensors, as PEFT writes them, that changes the model; several add up.
    #[arg(long = "adapter")]
    adapters: Vec<PathBuf>,
    /// A list of token ids as JSON, or a list of such lists of one length.
    #[arg(long)]
    ids: PathBuf,
    /// Where to write the tensor `logits`, fp32.
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    device: String,
    #[arg(long, default_value = "32", value_parser = PRECISIONS)]
    precision: String,
}

#[derive(clap::Args)]
struct MergeArgs {
    #[arg(long)]
    model: PathBuf,
    /// As PEFT writes them; several add up.
    #[arg(long = "adapter", required = true)]
    adapters: Vec<PathBuf>,
    /// A directory that is not there yet.
    #[arg(long)]
    output: PathBuf,
    /// Also adapters that were trained beside another model.
    #[arg(long)]
    force: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn run_merge(args: &MergeArgs) -> Result<(), Error> {
    if !args.force {
        belong_together(&args.model, &args.adapters)?;
    }
    for line in args.adapters.iter().filter_map(|adapter| of_fewer_bits(adapter)) {
        eprintln!("warning: {line}");
    }
    said(&merge(&args.model, &args.adapters, &args.output)?, args.json)
}

/// Says which adapters were trained beside another model.
fn warn_of_other_bases<'a>(model: &Path, adapters: impl IntoIterator<Item = &'a PathBuf>) {
    for adapter in adapters {
        // What cannot be read is told by who computes with it.
        if let Ok(Some(line)) = of_another_base(adapter, model) {
            eprintln!("warning: {line}");
        }
    }
}

fn said<T: serde::Serialize + std::fmt::Display>(made: &T, json: bool) -> Result<(), Error> {
    let text = if json { serde_json::json!(made).to_string() } else { made.to_string() };
    told(writeln!(std::io::stdout(), "{text}"))
}

#[derive(clap::Args)]
struct CombineArgs {
    /// A directory as PEFT writes it, and what counts of it: DIR=WEIGHT.
    #[arg(long = "adapter", required = true, value_parser = weighted)]
    adapters: Vec<(PathBuf, f64)>,
    #[arg(long, default_value = "cat", value_parser = ["cat", "linear"])]
    r#type: String,
    /// A directory that is not there yet.
    #[arg(long)]
    output: PathBuf,
    /// Also adapters that were trained beside different models.
    #[arg(long)]
    force: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn weighted(text: &str) -> Result<(PathBuf, f64), String> {
    let is_whole = PathBuf::from(text).is_dir();
    let (dir, weight) = text.rsplit_once('=').filter(|_| !is_whole).unwrap_or((text, "1"));
    let number = weight.parse().ok().filter(|weight: &f64| weight.is_finite() && *weight != 0.0);
    let number = number.ok_or_else(|| format!("{weight:?} is no weight; write DIR=0.7"))?;
    Ok((dir.into(), number))
}

fn run_combine(args: &CombineArgs) -> Result<(), Error> {
    if !args.force {
        can_combine(&args.adapters)?;
    }
    let how = if args.r#type == "linear" { Combination::Linear } else { Combination::Cat };
    said(&combine(&args.adapters, how, &args.output)?, args.json)
}

#[derive(clap::Args)]
struct QuantiseArgs {
    #[arg(long)]
    model: PathBuf,
    /// nf4, fp4, int8, hqq8, hqq4, hqq3, hqq2, hqq1.
    #[arg(long)]
    to: Quantization,
    /// A directory that is not there yet.
    #[arg(long)]
    output: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct PlanArgs {
    /// The job, as it travels (`Job::to_json`).
    #[arg(long)]
    job: String,
    /// Of the whole job.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    ranks: u32,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// What goes from node to node, such as 10Gbit.
    #[arg(long)]
    link: Option<Rate>,
    /// From node to node, such as 50us.
    #[arg(long)]
    latency: Option<Latency>,
    /// Show instead how algorithms are chosen.
    #[arg(long)]
    costs: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// After some seconds, to a user who sees nothing until then.
fn say_what_takes_long(max_seq_len: u32) {
    const PATIENCE: Duration = Duration::from_secs(4);
    let say = move || {
        std::thread::sleep(PATIENCE);
        eprintln!("measuring steps of {max_seq_len} tokens on this machine, in each precision that fits ...");
    };
    // It ends with the process. Without it the plan is the same.
    drop(std::thread::Builder::new().name("patience".into()).spawn(say));
}

fn run_plan(args: &PlanArgs) -> Result<(), Error> {
    let job = Job::from_json(&args.job).map_err(|e| Error::Input(format!("--job: {e}")))?;
    let (ranks, nodes) = (args.ranks, args.nodes);
    if !ranks.is_multiple_of(nodes) {
        return Err(Error::Input(format!("{ranks} ranks cannot be divided evenly over {nodes} nodes")));
    }
    let wanted = plan::Wanted {
        shape: Shape { ranks, nodes },
        links: plan::links(args.link, args.latency),
        told: args.link.is_some() && args.latency.is_some(),
    };
    let text = if args.costs {
        let costs = wanted.costs();
        if args.json { serde_json::json!(costs).to_string() } else { costs.table() }
    } else {
        say_what_takes_long(job.max_seq_len);
        let plan = plan::plan(&job, &wanted)?;
        if args.json { serde_json::json!(plan).to_string() } else { plan.table() }
    };
    let mut out = std::io::stdout().lock();
    told(writeln!(out, "{text}").and_then(|()| out.flush()))
}

#[derive(clap::Args)]
struct EvalArgs {
    /// A model directory: config.json, model.safetensors, tokenizer.json. A checkpoint is one.
    #[arg(long)]
    model: PathBuf,
    /// A directory with adapter_config.json and adapter_model.safetensors, as PEFT writes them, that changes the model; several add up.
    #[arg(long = "adapter")]
    adapters: Vec<PathBuf>,
    /// Files and folders of text, read as a job's `data.path`.
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// How text is found in them: a setting of `[data]` as KEY=VALUE.
    #[arg(long = "set")]
    sets: Vec<String>,
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    device: String,
    #[arg(long, default_value = "32", value_parser = PRECISIONS)]
    precision: String,
    /// Tokens of a window.
    #[arg(long)]
    max_seq_len: Option<usize>,
    /// Windows that are computed at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn run_eval(args: EvalArgs) -> Result<(), Error> {
    let EvalArgs { model, adapters, data, sets, device, precision, max_seq_len, batch_size, json } = args;
    let (bf16, batch) = (is_bf16(&precision), usize::from(batch_size));
    let wanted = eval::Wanted { model, adapters, data, sets, device, bf16, window: max_seq_len, batch };
    record_panics(false); // one within a tokenizer is told in one line
    let evaluation = eval::evaluate(&wanted)?;
    let text = if json { serde_json::json!(evaluation).to_string() } else { evaluation.table() };
    let mut out = std::io::stdout().lock();
    told(writeln!(out, "{text}").and_then(|()| out.flush()))
}

/// A reader that went away is no error; a disk that is full is one.
fn told(written: std::io::Result<()>) -> Result<(), Error> {
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Environment(format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}

impl From<LogitsArgs> for logits::Wanted {
    fn from(args: LogitsArgs) -> Self {
        let LogitsArgs { model, adapters, ids, out, device, precision } = args;
        logits::Wanted { model, adapters, ids, out, device, bf16: is_bf16(&precision) }
    }
}

fn main() -> ExitCode {
    signals::mind_no_file_limit();
    let args: Args = arguments::parse();
    if let Some(other) = libtorch::other_libtorch() {
        let needed = libtorch::libtorch_version();
        eprintln!(
            "error: the libtorch that was loaded is {other}, and fleet needs {needed}, for which it was compiled; `pip install torch=={needed}` mends that, or LD_LIBRARY_PATH=LIBTORCH/lib of such a one"
        );
        return ExitCode::from(exit::ENVIRONMENT);
    }
    match &args.command {
        Some(Command::Merge(_) | Command::Unmerge(_) | Command::Combine(_) | Command::Quantise(_)) => {
            signals::before_the_end(|| {
                IS_ENDING.store(true, Ordering::SeqCst);
                remove_unfinished();
            });
        }
        Some(Command::Generate(GenerateArgs { model, adapters, .. })) => warn_of_other_bases(model, adapters),
        Some(Command::Eval(EvalArgs { model, adapters, .. })) => warn_of_other_bases(model, adapters),
        Some(Command::Logits(LogitsArgs { model, adapters, .. })) => warn_of_other_bases(model, adapters),
        Some(Command::Serve(args)) => warn_of_other_bases(&args.model, &args.adapter_dirs()),
        _ => {}
    }
    let code = match args.command {
        None if args.probe => probe(),
        None => be_a_rank(),
        Some(Command::Generate(args)) => report(generating::run(&args)),
        Some(Command::Serve(args)) => report(serving::run(&args)),
        Some(Command::Eval(args)) => report(run_eval(args)),
        Some(Command::Logits(args)) => report(logits::write(&args.into())),
        Some(Command::Merge(args)) => report(run_merge(&args)),
        Some(Command::Unmerge(args)) => {
            report(unmerge(&args.model, &args.adapters, &args.output).and_then(|made| said(&made, args.json)))
        }
        Some(Command::Combine(args)) => report(run_combine(&args)),
        Some(Command::Quantise(args)) => {
            report(quantise(&args.model, args.to, &args.output).and_then(|written| said(&written, args.json)))
        }
        Some(Command::Plan(args)) => report(run_plan(&args)),
        Some(Command::Bench(args)) => report(bench::run(&args)),
    };
    ExitCode::from(code)
}

fn report(result: Result<(), Error>) -> u8 {
    match result {
        Ok(()) => exit::SUCCEEDED,
        Err(e) => {
            // What was removed under it is no error: the signal ends this process.
            while IS_ENDING.load(Ordering::SeqCst) {
                std::thread::park();
            }
            eprintln!("error: {e}");
            e.fault().exit_code()
        }
    }
}

fn probe() -> u8 {
    let cuda = device::cuda_devices();
    let line = serde_json::json!({
        "libtorch": libtorch::libtorch_version(),
        "cuda_devices": cuda.as_ref().copied().unwrap_or(0),
        "no_cuda": cuda.err(),
        "mps": tch::utils::has_mps(),
        "bf16_products": product::cpu_has_bf16(),
    });
    println!("{line}");
    exit::SUCCEEDED
}

/// What is done for a user at the command line: should it panic, that is an error of one line.
fn caught(work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    record_panics(false);
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Error::Job(panic_line())))
}

/// A signal is about to end this process.
static IS_ENDING: AtomicBool = AtomicBool::new(false);

/// The message of the last panic, in one line.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps the line of a panic for whoever tells of it, instead of the report of many lines; `told`: it goes to stderr too.
fn record_panics(told: bool) {
    std::panic::set_hook(Box::new(move |info| {
        let what = info.payload().downcast_ref::<&str>().map(|s| (*s).to_owned());
        let what = what.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
        let place = info.location().map_or(String::new(), |l| format!(" at {}:{}", l.file(), l.line()));
        let line = format!("fleet-rank failed{place}: {what}").replace('\n', " ");
        if told {
            eprintln!("{line}");
        }
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
    }));
}

fn panic_line() -> String {
    let line = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    line.unwrap_or_else(|| "fleet-rank failed".into())
}

fn be_a_rank() -> u8 {
    let Some(fd) = std::env::var(RANK_SOCKET_ENV).ok().and_then(|text| text.parse().ok()) else {
        eprintln!("error: fleet-rank is started by `worker`; to train, use `fleet launch`");
        return exit::REFUSED_INPUT;
    };
    let opened = shim::inherited_socket(fd).and_then(AgentLink::open);
    let (mut link, start) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            eprintln!("error: the agent cannot be understood: {e}");
            return exit::ENVIRONMENT;
        }
    };
    record_panics(true);
    let failed = |kind: FailureKind, fault: Fault, rank: Rank, message: String| JobError {
        kind,
        fault,
        rank: Some(rank),
        node: None,
        signal: None,
        exit_code: None,
        message,
        last_lines: Vec::new(),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| trainer::run(&start, &mut link, &assemble::learner)));
    let error = match outcome {
        Ok(Ok(outcome @ (Outcome::Succeeded { .. } | Outcome::Stopped { .. }))) => {
            link.send(&FromRank::Done(outcome));
            return exit::SUCCEEDED;
        }
        Ok(Ok(Outcome::Failed(error))) => error,
        Ok(Err(e)) => failed(e.kind(start.rank), e.fault(), e.culprit(start.rank), e.to_string()),
        Err(_) => failed(FailureKind::Rank, Fault::Job, start.rank, panic_line()),
    };
    link.send(&FromRank::Failed(error));
    exit::JOB_FAILED
}
