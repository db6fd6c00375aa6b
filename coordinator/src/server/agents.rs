//! One agent's connection: its greeting, its orders, its events.
//!
//! Orders follow from the state, so a lost wake-up or connection costs nothing. Events are acknowledged only when they are committed,
//! and heartbeats never touch the log.

use super::Shared;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, DescribeNode, FailJob, RecordEvents};
use crate::cluster::members::NodeRecord;
use crate::cluster::orders::GangStanding;
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::events::EventBatch;
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::{AgentHello, FromAgent, PROTOCOL_VERSION, RefusalKind, ToAgent};
use quinn::{Connection, RecvStream, SendStream};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// For the stream and the greeting on it.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Batches of one agent that wait for the log. The stream waits beyond it, and the agent keeps what is not acknowledged.
const BATCHES_MAX: usize = 16;
/// Messages to one agent that wait for the stream.
const OUTBOX_MAX: usize = 256;
/// Between attempts to record events while nothing can be written.
const RETRY: Duration = Duration::from_millis(200);

/// Why a connection ends.
enum End {
    /// The agent is told; it may come back unless `fatal`.
    Refused {
        message: String,
        fatal: bool,
    },
    Gone(String),
}

fn gone(error: impl std::fmt::Display) -> End {
    End::Gone(error.to_string())
}

fn refused(message: impl Into<String>, fatal: bool) -> End {
    End::Refused { message: message.into(), fatal }
}

pub async fn serve(shared: &Arc<Shared>, connection: &Connection, node: NodeId) {
    let stream = timeout(HELLO_DEADLINE, connection.accept_bi()).await;
    let Ok(Ok((mut send, receive))) = stream else {
        return connection.close(1u32.into(), b"a worker opens a stream and greets");
    };
    let end = converse(shared, connection, node, &mut send, receive).await;
    shared.roster.disconnected(node, connection);
    shared.roster.plan.notify_one();
    match end {
        End::Refused { message, fatal } => {
            info!("{node} was sent away: {message}");
            let _ = write_frame(&mut send, &ToAgent::Refused { message: message.clone(), fatal }).await;
            let _ = send.finish();
            // The agent closes when it has read the reason.
            let _ = timeout(HELLO_DEADLINE, connection.closed()).await;
            connection.close(1u32.into(), message.as_bytes());
        }
        End::Gone(why) => {
            info!("{node} is out of touch: {why}");
            connection.close(0u32.into(), b"");
        }
    }
}

async fn converse(
    shared: &Arc<Shared>,
    connection: &Connection,
    node: NodeId,
    send: &mut SendStream,
    mut receive: RecvStream,
) -> End {
    let hello = match timeout(HELLO_DEADLINE, read_frame(&mut receive)).await {
        Ok(Ok(Some(FromAgent::Hello(hello)))) => hello,
        Ok(Err(error)) => return gone(error),
        _ => return refused("a worker greets first", true),
    };
    if let Err(end) = greet(shared, node, &hello).await {
        return end;
    }
    let wake = shared.roster.connected(node, connection);
    info!("{node} ({}) is connected with {} slots", hello.name, hello.slots);
    let (outbox, out) = mpsc::channel(OUTBOX_MAX);
    let (batches, to_record) = mpsc::channel(BATCHES_MAX);
    tokio::select! {
        end = listen(shared, node, &mut receive, batches) => end,
        end = record(shared, node, to_record, outbox) => end,
        end = speak(shared, node, &hello, send, &wake, out) => end,
    }
}

/// Registers what the node offers, and gives up the jobs that its agent has lost.
async fn greet(shared: &Shared, node: NodeId, hello: &AgentHello) -> Result<(), End> {
    if hello.version != PROTOCOL_VERSION {
        let ours = PROTOCOL_VERSION;
        let message = format!(
            "this cluster speaks version {ours} of the protocol, the worker {}; install the same version of fleet",
            hello.version
        );
        return Err(refused(message, true));
    }
    let gangs = hello.gangs.clone();
    let seen =
        shared.handle.read(move |state| (state.nodes().get(&node).cloned(), state.lost_gangs(node, &gangs)));
    let (known, lost) = seen.await.map_err(|refusal| refused(refusal.message, false))?;
    if !known.is_some_and(|record| as_described(&record, hello)) {
        let describe = DescribeNode {
            node,
            name: hello.name.clone(),
            slots: hello.slots,
            device: hello.device.clone(),
            version: hello.program_version.clone(),
            labels: hello.labels.clone(),
            host: hello.host.clone(),
        };
        commit(shared, Change::DescribeNode(describe)).await?;
    }
    for (job, generation) in lost {
        let message = format!(
            "agent restarted: the worker on {} came back without {job}; its ranks are gone",
            hello.name
        );
        commit(shared, Change::FailJob(FailJob { job, generation, node, message })).await?;
    }
    Ok(())
}

fn as_described(record: &NodeRecord, hello: &AgentHello) -> bool {
    !record.lost
        && record.name == hello.name
        && record.slots == hello.slots
        && record.device == hello.device
        && record.version == hello.program_version
        && record.labels == hello.labels
        && record.host == hello.host
}

async fn commit(shared: &Shared, change: Change) -> Result<(), End> {
    match shared.handle.propose(None, change).await {
        Ok(Answer::Rejected(refusal)) => Err(refused(refusal.message, true)),
        Ok(_) => Ok(()),
        Err(refusal) => Err(refused(refusal.message, false)),
    }
}

/// Reads until the connection ends.
async fn listen(
    shared: &Shared,
    node: NodeId,
    receive: &mut RecvStream,
    batches: mpsc::Sender<EventBatch>,
) -> End {
    loop {
        match read_frame(receive).await {
            Ok(Some(FromAgent::Heartbeat { .. })) => shared.roster.heard(node),
            Ok(Some(FromAgent::Events(batch))) => {
                shared.roster.heard(node);
                if batches.send(batch).await.is_err() {
                    return gone("its events cannot be recorded any more");
                }
            }
            Ok(Some(FromAgent::Hello(_))) => return refused("a worker greets once per connection", false),
            Ok(None) => return gone("it closed the connection"),
            Err(error) => return gone(error),
        }
    }
}

/// Commits events, in order, and acknowledges them.
async fn record(
    shared: &Shared,
    node: NodeId,
    mut batches: mpsc::Receiver<EventBatch>,
    outbox: mpsc::Sender<ToAgent>,
) -> End {
    // Halves of a batch that was too large for the log, the first one last.
    let mut rest: Vec<EventBatch> = Vec::new();
    loop {
        let Some(batch) = (match rest.pop() {
            Some(batch) => Some(batch),
            None => batches.recv().await,
        }) else {
            return gone("it closed the connection");
        };
        let (job, generation) = (batch.job, batch.generation);
        let change = Change::RecordEvents(RecordEvents { node, batch: batch.clone() });
        let told = match shared.metrics.time_commit(shared.handle.propose(None, change)).await {
            Ok(Answer::EventsTaken { seq }) => ToAgent::EventsCommitted { job, generation, seq },
            Ok(Answer::EventsGap { next_seq }) => {
                rest.clear();
                ToAgent::ResendEvents { job, generation, next_seq }
            }
            Ok(other) => return refused(format!("the events of {job} cannot be recorded: {other:?}"), false),
            Err(refusal) if refusal.kind == RefusalKind::Invalid && batch.events.len() > 1 => {
                rest.extend(halves(batch));
                continue;
            }
            Err(refusal) if refusal.kind == RefusalKind::Invalid => {
                return refused(format!("an event of {job}: {}", refusal.message), true);
            }
            Err(refusal) => {
                debug!("events of {job} wait: {}", refusal.message);
                rest.push(batch);
                sleep(RETRY).await;
                continue;
            }
        };
        if outbox.send(told).await.is_err() {
            return gone("nothing can be sent to it any more");
        }
    }
}

fn halves(mut batch: EventBatch) -> [EventBatch; 2] {
    let later = batch.events.split_off(batch.events.len() / 2);
    let first_seq = batch.first_seq + batch.events.len() as u64;
    [EventBatch { first_seq, events: later, ..batch.clone() }, batch]
}

/// Sends the welcome, how its gangs stand, and from then on orders and acknowledgements.
async fn speak(
    shared: &Shared,
    node: NodeId,
    hello: &AgentHello,
    send: &mut SendStream,
    wake: &Notify,
    mut out: mpsc::Receiver<ToAgent>,
) -> End {
    let gangs = hello.gangs.clone();
    let standing = shared.handle.read(move |state| {
        gangs
            .into_iter()
            .map(|(job, generation)| (job, generation, state.gang_standing(node, job, generation)))
            .collect::<Vec<_>>()
    });
    let standing = match standing.await {
        Ok(standing) => standing,
        Err(refusal) => return refused(refusal.message, false),
    };
    let mut first = vec![ToAgent::Welcome { node }];
    for (job, generation, standing) in standing {
        let (seq, wanted) = match standing {
            GangStanding::Wanted { seq } => (seq, true),
            GangStanding::Over { seq } => (seq, false),
            GangStanding::Unwanted => (0, false),
        };
        if seq > 0 {
            first.push(ToAgent::EventsCommitted { job, generation, seq });
        }
        if !wanted {
            first.push(ToAgent::StopGang { job, generation, now: true });
        }
    }
    for message in first {
        if let Err(error) = write_frame(send, &message).await {
            return gone(error);
        }
    }
    let mut told: BTreeSet<Told> =
        hello.gangs.iter().map(|(job, generation)| Told::Start(*job, *generation)).collect();
    loop {
        let orders = match shared
            .handle
            .read(move |state| (state.nodes().get(&node).is_some_and(|node| node.lost), state.orders(node)))
            .await
        {
            Ok((true, _)) => return refused("the cluster has given this node up; greet again", false),
            Ok((false, orders)) => orders,
            // Not now; the next wake-up or try asks again.
            Err(refusal) => {
                warn!("the orders of {node} wait: {}", refusal.message);
                sleep(RETRY).await;
                continue;
            }
        };
        for order in orders {
            if told.insert(Told::from(&order))
                && let Err(error) = write_frame(send, &order).await
            {
                return gone(error);
            }
        }
        loop {
            tokio::select! {
                () = wake.notified() => break,
                message = out.recv() => match message {
                    Some(message) => if let Err(error) = write_frame(send, &message).await {
                        return gone(error);
                    },
                    None => return gone("its events cannot be recorded any more"),
                },
            }
        }
    }
}

/// An order that was sent on this connection already.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Start(JobId, Generation),
    Stop(JobId, Generation, bool),
    Other,
}

impl From<&ToAgent> for Told {
    fn from(order: &ToAgent) -> Told {
        match order {
            ToAgent::StartGang(gang) => Told::Start(gang.job, gang.generation),
            ToAgent::StopGang { job, generation, now } => Told::Stop(*job, *generation, *now),
            _ => Told::Other,
        }
    }
}
