//! `fleet launch`: a cluster of this machine, one job, its progress, its exit code. Leaves no process behind.

mod local;
mod output;
mod signals;
mod trace;
pub mod work;
mod worker;

use crate::client::{Client, Flow};
use crate::cluster::Cluster;
use crate::commands::submit;
use crate::failure::Failure;
use crate::json;
use crate::out;
use crate::places::Registration;
use crate::report::{End, Report, Style};
use fleet_common::events::{Event, EventBody, FailureKind};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{JobView, Reply, Request, SubmitJob};
use local::{Incident, Local};
use output::ProgramOutput;
use signals::{Notices, Signal, Signals};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use work::{Prepared, Traced};

/// Train on this machine: brings up a cluster, runs one job, takes the cluster down
///
/// With `-- PROGRAM ARGS` it starts N copies of any program instead, with RANK, WORLD_SIZE and the rest as torchrun sets them, and with
/// OMP_NUM_THREADS=1 and PYTHONUNBUFFERED=1 where these are not set. SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are passed on to all of them. Rank 0
/// reads what this command is given on stdin, also at a terminal.
#[derive(clap::Args)]
pub struct Args {
    /// Ranks to start; without it the job's `devices`, else one per accelerator, else one
    #[arg(short = 'n', long = "ranks", alias = "nproc-per-node", alias = "nproc_per_node", value_name = "N")]
    ranks: Option<u32>,
    /// Job file: .toml, .yaml or .json
    #[arg(conflicts_with = "program")]
    job: Option<PathBuf>,
    /// Replace a setting of the job file, such as --set data.path=FILE
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "program")]
    sets: Vec<String>,
    /// One JSON object per line on stdout, the summary last
    #[arg(long)]
    json: bool,
    /// Where the local cluster keeps its state; without it a directory that is removed at the end
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Coordinators to run, each its own process: with three, any one may die
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = coordinators)]
    coordinators: u32,
    /// Write what each rank did when to this file, for https://ui.perfetto.dev; as `trace` in the job
    #[arg(long, value_name = "FILE", conflicts_with = "program")]
    trace: Option<PathBuf>,
    /// Any program, with the environment that torchrun gives
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn coordinators(text: &str) -> Result<u32, String> {
    let odd = text.parse().ok().filter(|count| [1, 3, 5].contains(count));
    odd.ok_or_else(|| "1, 3 or 5: an even number survives no more deaths than the one below it".to_owned())
}

/// The coordinator is restarted when it dies, so its absence is worth waiting out.
const PATIENCE: Duration = Duration::from_secs(60);
/// Events read ahead of the screen.
const EVENTS_MAX: usize = 1024;
/// After a second signal the cluster is told, but not waited for.
const LAST_WORD: Duration = Duration::from_millis(300);

pub fn run(args: Args, started_unix_ms: u64) -> Result<u8, Failure> {
    let style = match (args.json, args.program.is_empty()) {
        (true, _) => Style::Json,
        (false, true) => Style::of_training(false),
        (false, false) => Style::Program { ranks: args.ranks.unwrap_or_else(work::accelerators) },
    };
    let mut report = Report::new(style, Some(started_unix_ms));
    let done = work::prepare(&args).and_then(|prepared| run_prepared(prepared, &args, &mut report));
    match done {
        Ok(code) => Ok(code),
        Err(Failure { code, message }) if args.json => {
            out::note(&format!("error: {message}"));
            report.finish(End::Failed { message, code });
            Ok(code)
        }
        Err(failure) => Err(failure),
    }
}

fn run_prepared(prepared: Prepared, args: &Args, report: &mut Report) -> Result<u8, Failure> {
    for warning in &prepared.warnings {
        report.note(&format!("warning: {warning}"));
    }
    // children die with the thread that started them: this runtime is the main thread, which lives as long as the process
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::environment(format!("cannot start: {e}")))?;
    let done = runtime.block_on(async {
        let (mut signals, mut notices) = (Signals::listen()?, Notices::listen()?);
        let mut entry = Registration::enter(args.data_dir.as_deref())?;
        let relay = prepared.program.then(|| match !args.json && output::goes_to_one_place() {
            true => "together",
            false => "apart",
        });
        let ranks = prepared.submit.world_size;
        let traced = prepared.traced.clone();
        let mut local = Local::new(&entry.launch.data_dir, ranks, args.coordinators, relay)?;
        let done = session(&mut local, &mut signals, &mut notices, prepared, report).await;
        local.end(&mut signals).await;
        traced.iter().for_each(|traced| put_together(traced, report));
        if !matches!(done, Ok(exit::SUCCEEDED)) {
            entry.keep();
        }
        done
    });
    runtime.shutdown_background();
    done
}

/// After the ranks' end, whatever that was.
fn put_together(traced: &Traced, report: &Report) {
    let file = traced.file.display();
    let line = match trace::put_together(&traced.file, &traced.parts) {
        Ok(missing) if missing.is_empty() => {
            format!("the trace is in {file}; https://ui.perfetto.dev opens it")
        }
        Ok(missing) if missing.len() == traced.parts.len() => {
            format!("warning: the trace in {file} is empty: no rank came so far as to write its part")
        }
        Ok(missing) => {
            let missing: Vec<String> = missing.iter().map(u32::to_string).collect();
            format!(
                "warning: the trace in {file} lacks what ranks did that wrote nothing: {}",
                missing.join(", ")
            )
        }
        Err(e) => {
            format!("warning: the trace could not be put together; each rank's part lies beside {file}: {e}")
        }
    };
    report.note(&line);
}

/// What the tasks that talk to the coordinator tell the main loop.
enum News {
    Submitted(JobId),
    Event(Box<Event>),
    Ended(Box<JobView>),
    Failed(Failure),
}

async fn session(
    local: &mut Local,
    signals: &mut Signals,
    notices: &mut Notices,
    prepared: Prepared,
    report: &mut Report,
) -> Result<u8, Failure> {
    let Prepared { submit, program, .. } = prepared;
    let ranks = submit.world_size;
    let started = tokio::select! {
        started = local.start() => started?,
        signal = signals.next() => {
            report.finish(End::Cancelled);
            return Ok(signals::exit_code(signal));
        }
    };
    report.cluster(&started.as_json(), &started.as_text());

    let (tell, mut news) = mpsc::channel(EVENTS_MAX);
    let cluster = Cluster::in_data_dir(local.data_dir());
    tokio::spawn(converse(cluster.clone(), submit, tell));

    let mut output = ProgramOutput::new(ranks, report.is_json());
    let mut job = None;
    let mut stopped_by = None;
    // Said when all that was printed before it is.
    let mut last_event = None;
    loop {
        tokio::select! {
            item = news.recv() => match item {
                Some(News::Submitted(id)) => {
                    job = Some(id);
                    report.submitted(&id.to_string(), ranks);
                    local.listen();
                }
                Some(News::Event(event)) => {
                    last_event.take().into_iter().for_each(|event: Box<Event>| report.event(&event));
                    match event.body {
                        // Heard from the worker itself, all of it.
                        EventBody::Log { rank: Some(_), .. } | EventBody::LeftOut { .. } if program => {}
                        EventBody::Finished(_) => last_event = Some(event),
                        _ => report.event(&event),
                    }
                }
                Some(News::Ended(view)) => {
                    if program {
                        local.rest_of_output(signals, |printed| output.print(printed)).await;
                        if view.error.as_ref().is_some_and(|error| error.kind == FailureKind::NotStarted) {
                            output.is_told_otherwise();
                        }
                        output.finish();
                    }
                    last_event.into_iter().for_each(|event| report.event(&event));
                    let code = exit_code(&view, program, stopped_by);
                    // As in a shell, where nothing is said of a pipeline whose reader had enough.
                    if !(out::reader_is_gone() && code == signals::exit_code(Signal::SIGPIPE)) {
                        report.finish(End::Job(view));
                    }
                    return Ok(code);
                }
                Some(News::Failed(failure)) => return Ok(failed(report, failure)),
                None => return Ok(failed(report, Failure::unreachable("the coordinator's answers ended early"))),
            },
            incident = local.incident() => match incident {
                Incident::NodeJoined { node, pid } => {
                    if report.is_json() {
                        report.say(&json::node(&node, "joined", Some(pid), "the node is registered"), "");
                    }
                }
                Incident::Printed(printed) => {
                    output.print(printed);
                    if out::reader_is_gone() {
                        local.close(false);
                    }
                    if out::error_reader_is_gone() {
                        local.close(true);
                    }
                }
                Incident::CoordinatorRestarted { name, pid, why } => {
                    let text = format!("the {name} ended ({why}) and was started again; the ranks go on");
                    report.say(&json::node(&name, "restarted", Some(pid), &text), &format!("warning: {text}"));
                }
                Incident::Lost(failure) => {
                    output.finish();
                    return Ok(failed(report, failure));
                }
            },
            signal = notices.next() => match program {
                true => local.pass_on(signal),
                false => report.note(&format!("{signal} is nothing that training minds; it goes on")),
            },
            signal = signals.next() => match (job, stopped_by) {
                (Some(job), None) => {
                    stopped_by = Some(signals::exit_code(signal));
                    let what = match (program, signal) {
                        (true, Signal::SIGQUIT) => "passed on to the program as SIGTERM",
                        (true, _) => "passed on to the program",
                        (false, _) => "stopping after a checkpoint",
                    };
                    report.note(&format!("{signal}: {what}; once more, after a second, stops at once"));
                    local.pass_on(signal);
                    tokio::spawn(cancel(cluster.clone(), job, false, PATIENCE));
                }
                (None, None) => {
                    report.finish(End::Cancelled);
                    return Ok(signals::exit_code(signal));
                }
                (_, Some(code)) => {
                    if let Some(job) = job {
                        // the checkpoint that may be half written is left behind by the ranks' end; the last valid one stays
                        let _ = tokio::time::timeout(LAST_WORD, cancel(cluster, job, true, LAST_WORD)).await;
                    }
                    output.finish();
                    report.finish(End::Cancelled);
                    return Ok(code);
                }
            },
        }
    }
}

/// Submits the job and passes its events on until it has ended.
async fn converse(cluster: Cluster, submit: SubmitJob, tell: mpsc::Sender<News>) {
    let mut client = Client::patient(cluster, PATIENCE);
    let last = match talk(&mut client, submit, &tell).await {
        Ok(view) => News::Ended(Box::new(view)),
        Err(failure) => News::Failed(failure),
    };
    let _ = tell.send(last).await;
}

async fn talk(client: &mut Client, submit: SubmitJob, tell: &mpsc::Sender<News>) -> Result<JobView, Failure> {
    let job = submit::submit(client, submit).await?;
    let _ = tell.send(News::Submitted(job)).await;
    let mut from = 1;
    loop {
        let mut seen = 0;
        let pass_on = |event| {
            seen += 1;
            async move {
                match tell.send(News::Event(Box::new(event))).await {
                    Ok(()) => Flow::Continue,
                    Err(_) => Flow::Stop,
                }
            }
        };
        client.watch(job, from, true, pass_on).await?;
        from += seen;
        let view = submit::job_view(client, job).await?;
        if view.state.is_final() {
            return Ok(view);
        }
    }
}

async fn cancel(cluster: Cluster, job: JobId, now: bool, patience: Duration) {
    let mut client = Client::patient(cluster, patience);
    match client.change(Request::Cancel { job, now }).await {
        // a job that has ended meanwhile cannot be cancelled, and need not be
        Ok(Reply::Done) | Err(Failure { code: exit::REFUSED_INPUT, .. }) => {}
        Ok(other) => out::note(&format!("warning: {}", crate::client::unexpected(&other))),
        Err(failure) => out::note(&format!("warning: the job could not be told to stop: {failure}")),
    }
}

fn failed(report: &mut Report, failure: Failure) -> u8 {
    let Failure { message, code } = failure;
    report.finish(End::Failed { message, code });
    code
}

/// A signal's code where one stopped the job; else the job's; for a program its own, as a shell would give it.
fn exit_code(view: &JobView, program: bool, stopped_by: Option<u8>) -> u8 {
    use fleet_common::protocol::JobState;
    if let (JobState::Cancelled, Some(code)) = (view.state, stopped_by) {
        return code;
    }
    let own =
        view.error.as_ref().filter(|_| program).and_then(|error| match (error.signal, error.exit_code) {
            (Some(signal), _) => u8::try_from(128 + signal).ok(),
            (None, Some(code)) => u8::try_from(code).ok().filter(|code| *code != 0),
            (None, None) => None,
        });
    own.unwrap_or_else(|| submit::exit_code(view))
}
