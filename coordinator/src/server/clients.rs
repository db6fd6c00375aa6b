//! Clients: one stream per request. Changes go through the log and are answered when they are durable; queries look at a state that has
//! everything which was acknowledged before.

use super::Shared;
use super::driver::unavailable;
use super::views;
use crate::cluster::Answer;
use crate::cluster::commands::{CancelJob, Change, CreateToken, SubmitJob};
use crate::cluster::records::Stop;
use crate::cluster::session::RequestId;
use crate::planner;
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::JobId;
use fleet_common::job::Job;
use fleet_common::net::JoinToken;
use fleet_common::protocol::{
    self, ClientFrame, PROTOCOL_VERSION, Refusal, RefusalKind, Reply, Request, Role, Work,
};
use quinn::{Connection, RecvStream, SendStream};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tracing::{debug, info};

/// For a request to arrive on its stream.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// Events read from the history at once.
const WATCH_CHUNK: usize = 256;
/// A watcher looks again after this long at the latest, in case a wake-up was lost with a leader.
const WATCH_RECHECK: Duration = Duration::from_secs(1);
/// Longest life of a token: ten years.
const TOKEN_TTL_MAX_S: u64 = 10 * 365 * 24 * 3600;
/// Ranks of one job: what the largest cluster has.
const WORLD_MAX: u32 = 65_536;

pub async fn serve(shared: Arc<Shared>, connection: &Connection) {
    // quinn bounds the streams that are open at once.
    while let Ok((send, receive)) = connection.accept_bi().await {
        tokio::spawn(answer(shared.clone(), send, receive));
    }
}

async fn answer(shared: Arc<Shared>, mut send: SendStream, mut receive: RecvStream) {
    let frame = match timeout(REQUEST_DEADLINE, read_frame::<_, ClientFrame>(&mut receive)).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Err(error)) => {
            debug!("a request could not be read: {error}");
            return drop(write_frame(&mut send, &Reply::Refused(invalid(error.to_string()))).await);
        }
        _ => return,
    };
    let name = name_of(&frame.request);
    let result = match frame {
        ClientFrame { version, .. } if version != PROTOCOL_VERSION => Err(invalid(format!(
            "this cluster speaks version {PROTOCOL_VERSION} of the protocol, the client {version}; install the same version of fleet"
        ))),
        ClientFrame { request: Request::Watch { job, from, follow }, .. } => {
            shared.metrics.count(name, true);
            return watch(&shared, &mut send, job, from, follow).await;
        }
        ClientFrame { client, seq, request, .. } => {
            carry_out(&shared, RequestId { client, seq }, request).await
        }
    };
    shared.metrics.count(name, result.is_ok());
    let reply = result.unwrap_or_else(Reply::Refused);
    if write_frame(&mut send, &reply).await.is_ok() {
        let _ = send.finish();
        // Until the client has it, or is gone.
        let _ = send.stopped().await;
    }
}

async fn carry_out(shared: &Shared, id: RequestId, request: Request) -> Result<Reply, Refusal> {
    match request {
        Request::Submit(job) => submit(shared, id, job).await,
        Request::Cancel { job, now } => {
            let stop = if now { Stop::Now } else { Stop::AfterCheckpoint };
            change(shared, id, Change::CancelJob(CancelJob { job, stop })).await?;
            Ok(Reply::CancelAccepted)
        }
        Request::CreateToken { role, ttl_s, uses } => create_token(shared, id, role, ttl_s, uses).await,
        Request::ClusterStatus => views::cluster(shared).await.map(Reply::Cluster),
        Request::Nodes => views::nodes(shared).await.map(Reply::Nodes),
        Request::Jobs => views::jobs(shared).await.map(Reply::Jobs),
        Request::Job(job) => views::job(shared, job).await.map(|view| Reply::Job(Box::new(view))),
        Request::Checkpoints { job } => views::checkpoints(shared, job).await.map(Reply::Checkpoints),
        Request::Watch { .. } => Err(invalid("a watch has many answers")),
    }
}

/// Makes a change; the state machine's refusal is a refusal.
async fn change(shared: &Shared, id: RequestId, change: Change) -> Result<Answer, Refusal> {
    match shared.metrics.time_commit(shared.handle.propose(Some(id), change)).await? {
        Answer::Rejected(refusal) => Err(refusal),
        answer => Ok(answer),
    }
}

async fn submit(shared: &Shared, id: RequestId, job: protocol::SubmitJob) -> Result<Reply, Refusal> {
    if job.world_size == 0 || job.world_size > WORLD_MAX {
        return Err(invalid(format!("a job has 1 to {WORLD_MAX} ranks, not {}", job.world_size)));
    }
    let (name, keep_checkpoints) = match &job.work {
        Work::Train { job_json } => {
            let job =
                Job::from_json(job_json).map_err(|error| invalid(format!("this is not a job: {error}")))?;
            if job.num_nodes > 1 {
                return Err(invalid(format!(
                    "num_nodes = {}: all ranks of a job run on one node; set num_nodes = 1",
                    job.num_nodes
                )));
            }
            (job.run_name.clone(), job.checkpoint.save_total_limit)
        }
        Work::Program(program) => {
            let name = program
                .argv
                .first()
                .ok_or_else(|| invalid("a program has at least its own name as an argument"))?;
            (name.rsplit('/').next().unwrap_or(name).to_owned(), 1)
        }
    };
    let observed = shared.roster.observed(shared.handle.status().leading_since);
    let largest_node = shared.handle.read(move |state| planner::largest_node(state, &observed)).await?;
    let submit =
        SubmitJob { name, world_size: job.world_size, work: job.work, keep_checkpoints, largest_node };
    match change(shared, id, Change::SubmitJob(submit)).await? {
        Answer::Submitted { job } => {
            info!("{job} was submitted");
            Ok(Reply::Submitted { job })
        }
        other => Err(misfit(&other)),
    }
}

async fn create_token(
    shared: &Shared,
    id: RequestId,
    role: Role,
    ttl_s: u64,
    uses: u32,
) -> Result<Reply, Refusal> {
    if role == Role::Coordinator {
        return Err(invalid(
            "this cluster has one coordinator and takes no other; make a token for a worker or a client",
        ));
    }
    if ttl_s == 0 || ttl_s > TOKEN_TTL_MAX_S || uses == 0 {
        return Err(invalid(format!(
            "a token has at least one use and lives 1 to {TOKEN_TTL_MAX_S} seconds"
        )));
    }
    let token = new_token(shared, Some(id), role, ttl_s, uses).await?;
    info!("a token {} for a {role:?} was made", token.id);
    Ok(Reply::Token { text: token.to_string() })
}

/// Makes a token whose secret is known only to the caller.
pub async fn new_token(
    shared: &Shared,
    id: Option<RequestId>,
    role: Role,
    ttl_s: u64,
    uses: u32,
) -> Result<JoinToken, Refusal> {
    let token =
        JoinToken::generate(role, shared.ca.fingerprint()).map_err(|error| unavailable(error.to_string()))?;
    let create = CreateToken {
        id: token.id.clone(),
        secret_sha256: token.secret_hash(),
        role,
        ttl_ms: ttl_s.saturating_mul(1000),
        uses,
    };
    match shared.handle.propose(id, Change::CreateToken(create)).await? {
        Answer::TokenCreated { id } if id == token.id => Ok(token),
        Answer::TokenCreated { id } => Err(invalid(format!(
            "an earlier try of this request made the token {id}, and its secret is kept nowhere; ask for another with a new request"
        ))),
        Answer::Rejected(refusal) => Err(refusal),
        other => Err(misfit(&other)),
    }
}

/// Sends a job's events: what is recorded, then what comes.
async fn watch(shared: &Shared, send: &mut SendStream, job: JobId, from: u64, follow: bool) {
    let sent = stream_events(shared, send, job, from.max(1), follow).await;
    let last = sent.map_or_else(Reply::Refused, |()| Reply::EndOfEvents);
    if write_frame(send, &last).await.is_ok() {
        let _ = send.finish();
        let _ = send.stopped().await;
    }
}

async fn stream_events(
    shared: &Shared,
    send: &mut SendStream,
    job: JobId,
    mut next: u64,
    follow: bool,
) -> Result<(), Refusal> {
    let mut news = shared.roster.watch(job);
    loop {
        news.borrow_and_update();
        let stand = shared
            .handle
            .read(move |state| state.jobs().get(&job).map(|record| (record.events, record.state.is_final())))
            .await;
        let (events, ended) = match stand {
            Ok(stand) => stand.ok_or_else(|| views::no_such_job(job))?,
            // The recorded events are still there to follow when a leader is.
            Err(_) if follow => (0, false),
            Err(refusal) => return Err(refusal),
        };
        while next <= events {
            let chunk = shared.history.events(job, next, WATCH_CHUNK.min((events - next + 1) as usize));
            let chunk = chunk.map_err(|error| unavailable(error.to_string()))?;
            if chunk.is_empty() {
                // Recorded, but not in the history yet because the disk is full.
                break;
            }
            for (index, event) in chunk {
                if write_frame(send, &Reply::Event { index, event }).await.is_err() {
                    // The client is gone, and nobody is left to be told.
                    return Ok(());
                }
                next = index + 1;
            }
        }
        if !follow || (ended && next > events) {
            return Ok(());
        }
        tokio::select! {
            _ = send.stopped() => return Ok(()),
            changed = timeout(WATCH_RECHECK, news.changed()) => drop(changed),
        }
    }
}

pub fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message: message.into() }
}

fn misfit(answer: &Answer) -> Refusal {
    unavailable(format!("the cluster gave an answer that does not fit: {answer:?}"))
}

fn name_of(request: &Request) -> &'static str {
    match request {
        Request::Submit(_) => "submit",
        Request::Cancel { .. } => "cancel",
        Request::CreateToken { .. } => "create_token",
        Request::ClusterStatus => "cluster_status",
        Request::Nodes => "nodes",
        Request::Jobs => "jobs",
        Request::Job(_) => "job",
        Request::Checkpoints { .. } => "checkpoints",
        Request::Watch { .. } => "watch",
    }
}
