//! `fleet logs`: what happened in a job: the ranks' lines, steps, evaluations, checkpoints. With `--full` what the ranks printed, all of
//! it, from the files on their nodes.

use super::{OutputArgs, Target, connect, jobs, submit};
use crate::client::{Client, Flow, block_on, unexpected};
use crate::failure::Failure;
use crate::report::{Report, Style};
use crate::{out, text};
use fleet_common::events::{Event, EventBody};
use fleet_common::exit;
use fleet_common::ids::{JobId, Rank};
use fleet_common::protocol::{JobView, Reply, Request};

/// Bytes of a line that are held before they are shown: what is longer is shown as several.
const LINE_MAX: usize = 1 << 20;

/// Print what happened in a job: the ranks' lines, steps, evaluations, checkpoints
#[derive(clap::Args)]
pub struct Args {
    /// A job, such as job-1; without it the newest
    job: Option<JobId>,
    /// Only this rank's lines
    #[arg(long)]
    rank: Option<Rank>,
    /// Go on until the job ends, and end as it does
    #[arg(short, long)]
    follow: bool,
    /// All that the ranks of the last start printed up to now, rank by rank, from the files on their nodes
    #[arg(long, conflicts_with = "follow")]
    full: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    block_on(async {
        let job = match args.job {
            Some(job) => job,
            None => {
                let newest = jobs::list(&mut client).await?.into_iter().map(|job| job.job).max();
                newest.ok_or_else(|| Failure::input("the cluster has had no job yet"))?
            }
        };
        if let Some(rank) = args.rank {
            let ranks = submit::job_view(&mut client, job).await?.world_size;
            if rank >= ranks {
                return Err(Failure::input(format!(
                    "{job} has no rank {rank}: its ranks are 0 to {}",
                    ranks - 1
                )));
            }
        }
        let style = if args.output.json { Style::Json } else { Style::Lines };
        let mut report = Report::new(style, None);
        if args.full {
            return everything(&mut client, &mut report, job, args.rank).await;
        }
        let print = |event: Event| {
            if args.rank.is_none_or(|rank| is_of(&event, rank)) {
                report.event(&event);
            }
            std::future::ready(if out::is_closed() { Flow::Stop } else { Flow::Continue })
        };
        tokio::select! {
            watched = client.watch(job, 1, args.follow, print) => watched?,
            () = out::reader_gone() => {} // nothing may be printed for hours, which would tell as well
        }
        if args.follow && !out::is_closed() {
            let view = submit::job_view(&mut client, job).await?;
            if view.state.is_final() {
                report.note(&ended(&view));
                return Ok(submit::exit_code(&view));
            }
        }
        Ok(exit::SUCCEEDED)
    })
}

/// How the job that was followed has ended, in one line.
fn ended(view: &JobView) -> String {
    let JobView { job, state, reason, .. } = view;
    format!("{job} {}: {}", jobs::state_name(*state), reason.lines().next().unwrap_or_default())
}

/// What the ranks printed, whole, one rank after the other.
async fn everything(
    client: &mut Client,
    report: &mut Report,
    job: JobId,
    only: Option<Rank>,
) -> Result<u8, Failure> {
    let view = match client.ask(Request::Job(job)).await? {
        Reply::Job(view) => view,
        other => return Err(unexpected(&other)),
    };
    if view.generation > 1 {
        report.note(&format!(
            "{job} was started {} times, and this is what its ranks printed since the last start; what they printed before lies on the nodes of then, in the worker's data directory under gangs/{job}.N",
            view.generation
        ));
    }
    let ranks = match only {
        Some(rank) => rank..rank.saturating_add(1),
        None => 0..view.world_size,
    };
    let mut failed: Option<Failure> = None;
    for rank in ranks {
        // What one node has is not lost because another one is away. The last failure is this command's own.
        if let Err(Failure { code, message }) = all_of(client, report, job, rank).await {
            let this = Failure { code, message: format!("rank {rank}: {message}") };
            if let Some(before) = failed.replace(this) {
                report.note(&before.message);
            }
        }
        if out::is_closed() {
            break;
        }
    }
    failed.map_or(Ok(exit::SUCCEEDED), Err)
}

async fn all_of(client: &mut Client, report: &mut Report, job: JobId, rank: Rank) -> Result<(), Failure> {
    let (mut from, mut line) = (0, Vec::new());
    loop {
        let piece = match client.ask(Request::Output { job, rank, from }).await? {
            Reply::Output(piece) => piece,
            other => return Err(unexpected(&other)),
        };
        if piece.start > from {
            let gone = text::short(piece.start - from);
            report.note(&format!("rank {rank}: {gone}B from here on are not there any more: a node keeps the newest of what a rank prints"));
            line.clear();
        }
        for byte in &piece.bytes {
            if *byte == b'\n' || line.len() >= LINE_MAX {
                say(report, rank, &mut line);
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
        from = piece.start + piece.bytes.len() as u64;
        if out::is_closed() || piece.bytes.is_empty() || from >= piece.end {
            break;
        }
    }
    if !line.is_empty() {
        say(report, rank, &mut line);
    }
    Ok(())
}

/// Shows a line, as it was printed.
fn say(report: &mut Report, rank: Rank, line: &mut Vec<u8>) {
    report.line_of(rank, line.strip_suffix(b"\r").unwrap_or(line));
    line.clear();
}

fn is_of(event: &Event, wanted: Rank) -> bool {
    matches!(&event.body, EventBody::Log { rank: Some(rank), .. } if *rank == wanted)
}
