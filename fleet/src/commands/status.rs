//! `fleet status`: the cluster at a glance, or one job in full.

use super::{OutputArgs, Target, connect, coordinators, jobs, nodes, submit};
use crate::client::{Client, block_on, unexpected};
use crate::cluster::{Cluster, local_pid};
use crate::failure::Failure;
use crate::{json, out, text};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{ClusterView, CoordinatorView, JobView, Reply, Request, Wish};
use serde_json::json;
use std::path::PathBuf;

/// Show the cluster, or one job
#[derive(clap::Args)]
pub struct Args {
    /// A job, such as job-1
    job: Option<JobId>,
    /// The data directory of a local launch or of a coordinator; the same as --cluster DIR
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = match &args.data_dir {
        Some(dir) => Client::new(Cluster::in_data_dir(dir)).stale(cluster.stale),
        None => connect(cluster)?,
    };
    block_on(async {
        if let Some(job) = args.job {
            let view = submit::job_view(&mut client, job).await?;
            match args.output.json {
                true => out::json(&json::job(&view)),
                false => print_job(&view),
            }
            return Ok(exit::SUCCEEDED);
        }
        let cluster = match client.ask(Request::ClusterStatus).await? {
            Reply::Cluster(view) => view,
            other => return Err(unexpected(&other)),
        };
        let replicas = coordinators::list(&mut client).await?;
        let nodes = nodes::list(&mut client).await?;
        let jobs = jobs::list(&mut client).await?;
        if args.output.json {
            let nodes: Vec<_> = nodes.iter().map(json::node_view).collect();
            let jobs: Vec<_> = jobs.iter().map(json::job).collect();
            let dir = client.data_dir();
            let pid = |view: &CoordinatorView| {
                dir.and_then(|dir| local_pid(dir, &cluster.cluster_id, view.address.replica))
            };
            let leader = replicas.iter().find(|view| Some(view.address.replica) == cluster.leader);
            let leader = leader.map(|view| {
                json!({"id": view.address.replica.to_string(), "address": view.address.client, "pid": pid(view)})
            });
            let replicas: Vec<_> = replicas
                .iter()
                .map(|view| {
                    let mut value = json::coordinator(view);
                    value["pid"] = json!(pid(view));
                    value
                })
                .collect();
            out::json(&json!({
                "cluster": json::cluster_view(&cluster), "leader": leader, "replicas": replicas, "nodes": nodes, "jobs": jobs,
            }));
        } else {
            print_cluster(&cluster);
            if replicas.len() > 1 {
                out::line("");
                coordinators::print(&replicas);
            }
            out::line("");
            nodes::print(&nodes);
            out::line("");
            jobs::print(&jobs);
        }
        Ok(exit::SUCCEEDED)
    })
}

fn print_cluster(view: &ClusterView) {
    let leader = view.leader.map_or("no leader".to_owned(), |leader| format!("leader {leader}"));
    out::line(&format!(
        "cluster {}: {leader}, term {}, log at {}",
        view.cluster_id, view.term, view.applied_index
    ));
    out::line(&format!(
        "{} nodes, {} jobs running, {} queued",
        view.nodes, view.jobs_running, view.jobs_queued
    ));
    if let Some(why) = &view.read_only {
        out::line(&format!("refuses changes: {why}"));
    }
}

/// What the job asked for beyond its ranks.
fn wish(wish: &Wish) -> Option<String> {
    let mut parts = Vec::new();
    parts.extend((wish.priority != 0).then(|| format!("priority {}", wish.priority)));
    parts.extend(
        wish.nodes.map(|nodes| if nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") }),
    );
    parts.extend((wish.slots_per_rank > 1).then(|| format!("{} slots per rank", wish.slots_per_rank)));
    parts.extend(wish.labels.iter().map(|(name, value)| format!("{name}={value}")));
    parts.extend(wish.max_time_s.map(|seconds| format!("at most {}", text::clock(seconds))));
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn print_job(job: &JobView) {
    out::line(&format!("{} {}: {}, {}", job.job, job.name, jobs::state_name(job.state), job.reason));
    let parts: Vec<String> =
        job.parts.iter().map(|part| format!("{} on {}", part.ranks, part.name)).collect();
    let place = if parts.is_empty() { "no node yet".to_owned() } else { parts.join(", ") };
    out::line(&format!("ranks: {} ({place}), generation {}", job.world_size, job.generation));
    if let Some(wish) = wish(&job.wish) {
        out::line(&format!("asked for: {wish}"));
    }
    if job.total_steps > 0 {
        let rate = job
            .tokens_per_s
            .map_or(String::new(), |rate| format!(", {} tokens/s", text::thousands(rate.max(0.0) as u64)));
        out::line(&format!(
            "step: {}/{}, loss {}, evaluation loss {}{rate}",
            job.step,
            job.total_steps,
            text::loss(job.loss),
            text::loss(job.eval_loss)
        ));
    }
    if let Some(stall) = jobs::stall(job) {
        out::line(&stall);
    }
    if let Some(checkpoint) = &job.checkpoint {
        out::line(&format!(
            "checkpoint: {} (step {}, {}B)",
            checkpoint.path,
            checkpoint.step,
            text::short(checkpoint.bytes)
        ));
    }
    if let Some(error) = &job.error {
        out::line(&format!("error: {}", error.message));
        error.last_lines.iter().for_each(|line| out::line(&format!("  | {line}")));
    }
}
