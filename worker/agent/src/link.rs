//! The connection to a coordinator: kept for ever, to whichever answers, with growing pauses between attempts. It carries messages and
//! knows nothing of their meaning, but for those that are about connections: where the coordinators are, and the node's certificate.

use crate::backoff::Backoff;
use crate::coordinators::{self, Coordinators};
use crate::panics;
use fleet_common::codec::{self, FRAME_MAX, Frames};
use fleet_common::net::{self, Identity, NetError, Socket};
use fleet_common::protocol::{ClientFrame, CoordinatorAddress, FromAgent, Reply, Request, ToAgent};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use rand::Rng;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Before the first connection: so long is a cluster that does not answer tried.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// A connection that lasted this long was a good one; the next attempt comes at once.
const GOOD_CONNECTION: Duration = Duration::from_secs(2);
/// For a coordinator to say where the others are.
const ADDRESSES_DEADLINE: Duration = Duration::from_secs(2);
/// Between requests for a certificate where the CA is another one; a coordinator may be a moment behind.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// At the longest between looks at how long the certificate holds.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// Bytes taken from the stream at once.
const READ_MAX: usize = 64 << 10;

#[derive(Debug)]
pub enum LinkEvent {
    /// What is sent here goes out on the new connection. Unbounded: the agent keeps a limit on what is in flight.
    Connected(mpsc::UnboundedSender<FromAgent>),
    Message(ToAgent),
    Disconnected,
    /// There will be no connection: the first one could not be made, or the node was cut off. Nothing follows.
    Hopeless(NetError),
}

/// What a link needs to know of its node.
pub struct Node {
    pub identity: Identity,
    pub identity_dir: PathBuf,
    pub coordinators: Coordinators,
    /// Shows the newest identity to whoever else needs it.
    pub shown: watch::Sender<Identity>,
    /// `Authorities::mark` of what the cluster says is to be trusted.
    pub mark: Option<[u8; 32]>,
}

/// Keeps a connection until `events` is closed.
pub async fn keep(mut node: Node, events: mpsc::Sender<LinkEvent>, mut rng: impl Rng) {
    let begin = Instant::now();
    let mut backoff = Backoff::default();
    let (mut was_connected, mut told) = (false, false);
    while !events.is_closed() {
        let since = Instant::now();
        let known = node.coordinators.known(&mut rng);
        match connect(&known, node.coordinators.given(), &node.identity).await {
            Ok(Reached::Members(connection, send, receive)) => {
                (was_connected, told) = (true, false);
                let reason = serve(&connection, send, receive, &mut node, &events).await;
                connection.close(net::DONE, b"the agent closes this connection");
                if let Some(why) = cut_off(&connection) {
                    let _ = events.send(LinkEvent::Hopeless(NetError::Revoked(why))).await;
                    return;
                }
                tracing::warn!(%reason, "lost the coordinator; reconnecting");
                if events.send(LinkEvent::Disconnected).await.is_err() {
                    return;
                }
                if since.elapsed() > GOOD_CONNECTION {
                    backoff.reset();
                }
            }
            Ok(Reached::Clients(told)) => {
                let news = told.iter().any(|told| !known.contains(&told.member));
                node.coordinators.learn(told);
                if news {
                    continue;
                }
                tracing::debug!("no coordinator answers at its address for members");
            }
            Err(error) => {
                let error = coordinators::with_the_way_out(error, &node.identity_dir);
                let foreign = matches!(error, NetError::OtherCluster(_));
                if foreign && was_connected && !std::mem::replace(&mut told, true) {
                    tracing::warn!("{error}");
                }
                let refused = foreign || matches!(error, NetError::Refused(_) | NetError::Tls(_));
                let hopeless = !was_connected && (refused || begin.elapsed() > FIRST_PATIENCE);
                if hopeless || matches!(error, NetError::Revoked(_)) {
                    let _ = events.send(LinkEvent::Hopeless(error)).await;
                    return;
                }
                tracing::debug!(%error, "no connection yet");
            }
        }
        tokio::time::sleep(backoff.wait(&mut rng)).await;
    }
}

enum Reached {
    Members(Connection, SendStream, RecvStream),
    /// It was the socket for clients, which says where the others are.
    Clients(Vec<CoordinatorAddress>),
}

/// First to where the cluster said, then to where the operator did: that may be an address for clients, or an old one.
async fn connect(known: &[String], given: &[String], identity: &Identity) -> Result<Reached, NetError> {
    let reached = match known {
        [] => net::reach(given, identity).await,
        known => match net::reach(known, identity).await {
            Err(silence @ NetError::Unreachable(_)) => {
                let reached = net::reach(given, identity).await;
                reached
                    .map_err(|error| if matches!(error, NetError::OtherCluster(_)) { error } else { silence })
            }
            reached => reached,
        },
    };
    let net::Reached { connection, socket, .. } = reached?;
    let lost = |error: ConnectionError| NetError::Lost(net::describe(&error));
    let (mut send, mut receive) = connection.open_bi().await.map_err(lost)?;
    if socket == Socket::Members {
        return Ok(Reached::Members(connection, send, receive));
    }
    let frame = ClientFrame::query(Request::Addresses);
    let asked = timeout(ADDRESSES_DEADLINE, async {
        codec::write_frame(&mut send, &frame).await?;
        codec::read_frame(&mut receive).await
    });
    let reply = asked.await.map_err(|_| NetError::Lost("the coordinator did not answer".to_owned()))?;
    connection.close(net::DONE, b"");
    match reply {
        Ok(Some(Reply::Addresses(known))) => Ok(Reached::Clients(known)),
        Ok(Some(Reply::Refused(refusal))) => Err(NetError::Refused(refusal.message)),
        Ok(_) => Err(NetError::Lost("the coordinator gave an answer of another kind".to_owned())),
        Err(error) => Err(NetError::Lost(error.to_string())),
    }
}

/// Passes messages both ways until the connection ends, and says why it did.
async fn serve(
    connection: &Connection,
    mut send: SendStream,
    mut receive: RecvStream,
    node: &mut Node,
    events: &mpsc::Sender<LinkEvent>,
) -> String {
    let (outbox, mut outgoing) = mpsc::unbounded_channel::<FromAgent>();
    if events.send(LinkEvent::Connected(outbox)).await.is_err() {
        return "the agent ends".to_owned();
    }
    let (ask, mut asked) = mpsc::channel::<FromAgent>(1);
    let mut writer = tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                Some(message) = asked.recv() => message,
                message = outgoing.recv() => match message {
                    Some(message) => message,
                    None => break,
                },
            };
            codec::write_frame(&mut send, &message).await?;
        }
        let _ = send.finish(); // fails only on a connection that is gone
        Ok::<_, codec::CodecError>(())
    });
    let mut frames = Frames::new(FRAME_MAX);
    // Not at once: the agent greets first.
    let mut look = Instant::now() + look_after(node);
    let reason = loop {
        let piece = tokio::select! {
            piece = receive.read_chunk(READ_MAX, true) => piece,
            written = &mut writer => match written {
                Ok(Err(error)) => break closed(connection, &error.to_string()),
                Ok(Ok(())) => break "the agent closes this connection".to_owned(),
                Err(panic) => break panics::said(panic),
            },
            () = tokio::time::sleep_until(look.into()) => {
                renew(node, &ask);
                look = Instant::now() + look_after(node);
                continue;
            }
        };
        match piece {
            Ok(Some(piece)) => frames.push(&piece.bytes),
            Ok(None) => break "the coordinator closed the stream".to_owned(),
            Err(error) => break closed(connection, &error.to_string()),
        }
        let behind = is_behind(node);
        if let Err(reason) = pass_on(&mut frames, node, events).await {
            break reason;
        }
        if is_behind(node) && !behind {
            look = Instant::now();
        }
    };
    writer.abort();
    reason
}

/// Hands all whole messages to whom they are for.
async fn pass_on(
    frames: &mut Frames,
    node: &mut Node,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<(), String> {
    while let Some(message) = frames.next_frame().map_err(|error| error.to_string())? {
        match message {
            ToAgent::Heard { .. } => {}
            ToAgent::Coordinators(known) => node.coordinators.learn(known),
            ToAgent::Authorities { mark } => node.mark = Some(mark),
            ToAgent::Certificate { certificate_der, authorities } => {
                let renewed = node.identity.renewed(certificate_der, authorities).and_then(|renewed| {
                    let stored = renewed.store_renewed(&node.identity_dir, &node.identity);
                    stored.map_err(|error| error.to_string())?;
                    let moved = renewed.is_of_issuing_ca() && !node.identity.is_of_same_ca(&renewed);
                    node.shown.send_replace(renewed.clone());
                    node.identity = renewed;
                    Ok(moved)
                });
                match renewed {
                    // It counts as moved when it has shown its new certificate.
                    Ok(true) => {
                        return Err("the cluster has another CA; connecting with its certificate".to_owned());
                    }
                    Ok(false) => tracing::info!("renewed this node's certificate"),
                    Err(error) => tracing::warn!(%error, "this node's certificate was not renewed"),
                }
            }
            message => {
                let passed = events.send(LinkEvent::Message(message)).await;
                passed.map_err(|_| "the agent ends".to_owned())?;
            }
        }
    }
    Ok(())
}

/// The cluster trusts other CAs than this node.
fn is_behind(node: &Node) -> bool {
    node.mark.is_some_and(|mark| mark != node.identity.authorities.mark())
        || !node.identity.is_of_issuing_ca()
}

/// Asks for a new certificate where that is due. What does not come is asked for again.
fn renew(node: &Node, ask: &mpsc::Sender<FromAgent>) {
    if !node.identity.is_due(SystemTime::now()) && !is_behind(node) {
        return;
    }
    match node.identity.signing_request() {
        Ok(csr_der) => drop(ask.try_send(FromAgent::Renew { csr_der })),
        Err(error) => tracing::warn!(%error, "no new certificate can be asked for"),
    }
}

/// A hundredth of what is left, so that a renewal has many chances.
fn look_after(node: &Node) -> Duration {
    let left = node.identity.remaining(SystemTime::now()) / 100;
    let longest = if is_behind(node) { ASK_EVERY } else { LOOK_EVERY };
    left.clamp(Duration::from_millis(20), longest)
}

/// The connection's own reason says more than the stream's.
fn closed(connection: &Connection, error: &str) -> String {
    connection.close_reason().map_or_else(|| error.to_owned(), |reason| net::describe(&reason))
}

/// Why this node may not come back, if so.
fn cut_off(connection: &Connection) -> Option<String> {
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) if close.error_code == net::REVOKED => {
            Some(String::from_utf8_lossy(&close.reason).into_owned())
        }
        _ => None,
    }
}
