//! `fleet top`: nodes and jobs as they change, until Ctrl-C.

use super::{Target, connect, jobs, nodes};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, text};
use console::{Term, measure_text_width, truncate_str};
use fleet_common::protocol::{ClusterView, JobView, NodeView, Reply, Request};
use fleet_common::{exit, terminal};
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

/// Watch nodes and jobs as they change
#[derive(clap::Args)]
pub struct Args {
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    interval: f64,
    /// Print once and end, as where the output is no terminal
    #[arg(long)]
    once: bool,
    /// Print JSON once and end
    #[arg(long)]
    json: bool,
}

/// Looks often enough to seem alive, seldom enough to cost nothing.
const INTERVAL_MIN: f64 = 0.2;
const INTERVAL_MAX: f64 = 3_600.0;

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&args.interval) {
        return Err(Failure::input(format!("--interval takes {INTERVAL_MIN} to {INTERVAL_MAX} seconds")));
    }
    let mut client = connect(cluster)?;
    let term = Term::stdout();
    block_on(async {
        if args.json {
            out::json(&json(&look(&mut client).await?));
            return Ok(exit::SUCCEEDED);
        }
        if args.once || !term.is_term() {
            page(&look(&mut client).await?).iter().for_each(|line| out::line(line));
            return Ok(exit::SUCCEEDED);
        }
        let screen = Screen::enter(term);
        let mut every = tokio::time::interval(Duration::from_secs_f64(args.interval));
        loop {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return Ok(exit::SUCCEEDED),
                _ = every.tick() => match look(&mut client).await {
                    Ok(seen) => screen.show(&page(&seen)),
                    // The cluster may be back at the next look.
                    Err(failure) => screen.show(&[failure.message]),
                },
            }
        }
    })
}

struct Seen {
    cluster: ClusterView,
    nodes: Vec<NodeView>,
    jobs: Vec<JobView>,
}

async fn look(client: &mut Client) -> Result<Seen, Failure> {
    let cluster = match client.ask(Request::ClusterStatus).await? {
        Reply::Cluster(view) => view,
        other => return Err(unexpected(&other)),
    };
    Ok(Seen { cluster, nodes: nodes::list(client).await?, jobs: jobs::list(client).await? })
}

fn json(seen: &Seen) -> Value {
    json!({
        "cluster": json::cluster_view(&seen.cluster),
        "nodes": seen.nodes.iter().map(json::node_view).collect::<Vec<_>>(),
        "jobs": seen.jobs.iter().map(json::job).collect::<Vec<_>>(),
    })
}

/// What is shown: the cluster in a line, its nodes, and its unfinished jobs before the others.
fn page(seen: &Seen) -> Vec<String> {
    let cluster = &seen.cluster;
    let leader = cluster.leader.map_or("no leader".to_owned(), |leader| format!("{leader} leads"));
    let slots: u32 = seen.nodes.iter().map(|node| node.slots).sum();
    let used: u32 = seen.nodes.iter().map(|node| node.slots_used).sum();
    let mut lines = vec![format!(
        "cluster {}   {leader}   {} nodes   slots {used}/{slots}   {} running, {} queued",
        cluster.cluster_id,
        seen.nodes.len(),
        cluster.jobs_running,
        cluster.jobs_queued
    )];
    lines.extend(cluster.read_only.iter().map(|why| format!("read-only: {why}")));
    lines.push(String::new());
    lines.extend(nodes::lines(&seen.nodes));
    lines.push(String::new());
    let (running, ended): (Vec<&JobView>, Vec<&JobView>) =
        seen.jobs.iter().partition(|job| !job.state.is_final());
    let rows: Vec<Vec<String>> = running.into_iter().chain(ended).map(row).collect();
    lines.extend(out::columns(
        &["JOB", "NAME", "STATE", "RANKS", "STEP", "LOSS", "TOKENS/S", "MEMORY", "WHY"],
        &rows,
    ));
    lines
}

fn row(job: &JobView) -> Vec<String> {
    let of = if job.total_steps > 0 { format!("/{}", job.total_steps) } else { String::new() };
    vec![
        job.job.to_string(),
        job.name.clone(),
        jobs::state_name(job.state).to_owned(),
        job.world_size.to_string(),
        format!("{}{of}", job.step),
        text::loss(job.loss),
        job.tokens_per_s.map_or("-".to_owned(), |speed| text::thousands(speed as u64)),
        job.memory_mib.map_or("-".to_owned(), |mib| format!("{} MiB", text::thousands(mib))),
        job.reason.clone(),
    ]
}

/// The alternate screen of a terminal; the usual one is back when this is dropped.
struct Screen(Term);

impl Screen {
    fn enter(term: Term) -> Screen {
        let screen = Screen(term);
        screen.write("\x1b[?1049h\x1b[?25l");
        screen
    }

    fn show(&self, lines: &[String]) {
        let (height, width) = self.0.size();
        let mut text = "\x1b[H".to_owned();
        for line in lines.iter().take(usize::from(height).saturating_sub(1)) {
            let line = terminal::plain(line);
            let fits = measure_text_width(&line) <= usize::from(width);
            let line = if fits { line } else { truncate_str(&line, width.into(), "…").into_owned().into() };
            text.push_str(&line);
            text.push_str("\x1b[K\r\n");
        }
        text.push_str("\x1b[J");
        self.write(&text);
    }

    fn write(&self, text: &str) {
        // A terminal that is gone is nobody's loss.
        let _ = (&self.0).write_all(text.as_bytes()).and_then(|()| self.0.flush());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.write("\x1b[?25h\x1b[?1049l");
    }
}
