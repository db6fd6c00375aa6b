//! Clients: one stream per request. Changes go through the log and are answered when they are durable; queries look at a state that has
//! everything which was acknowledged before.

use super::Shared;
use super::driver::unavailable;
use super::views;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, CreateToken};
use crate::cluster::session::RequestId;
use crate::requests;
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::JobId;
use fleet_common::net::JoinToken;
use fleet_common::protocol::{ClientFrame, PROTOCOL_VERSION, Refusal, RefusalKind, Reply, Request, Role};
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
    let name = requests::name(&frame.request);
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
        Request::CreateToken { role, ttl_s, uses } => create_token(shared, id, role, ttl_s, uses).await,
        Request::Watch { .. } => Err(invalid("a watch has many answers")),
        request if request.is_change() => {
            let change = requests::change(request)?;
            let name = change.name();
            let answer = shared.metrics.time_commit(shared.handle.propose(Some(id), change)).await?;
            let reply = requests::reply(answer)?;
            info!("a client's {name} was carried out");
            Ok(reply)
        }
        request => views::ask(shared, request).await,
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
        let stand = views::events(shared, job).await;
        let (events, ended) = match stand {
            Ok(stand) => stand,
            // The recorded events are still there to follow when a leader is.
            Err(refusal) if follow && refusal.kind == RefusalKind::Unavailable => (0, false),
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
