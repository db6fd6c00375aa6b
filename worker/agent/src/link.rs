//! The connection to the coordinator: kept for ever, with growing pauses between attempts. It carries messages and knows nothing of
//! their meaning.

use crate::backoff::Backoff;
use fleet_common::codec;
use fleet_common::net::{self, Identity, NetError};
use fleet_common::protocol::{FromAgent, ToAgent};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rand::Rng;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Before the first connection: so long is a coordinator that does not answer tried.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);
/// A connection that lasted this long was a good one; the next attempt comes at once.
const GOOD_CONNECTION: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub enum LinkEvent {
    /// What is sent here goes out on the new connection. Unbounded: the agent keeps a limit on what is in flight.
    Connected(mpsc::UnboundedSender<FromAgent>),
    Message(ToAgent),
    Disconnected,
    /// The first connection could not be made; nothing follows.
    Hopeless(NetError),
}

/// Keeps a connection until `events` is closed.
pub async fn keep(
    addrs: Vec<String>,
    identity: Identity,
    events: mpsc::Sender<LinkEvent>,
    mut rng: impl Rng,
) {
    let begin = Instant::now();
    let mut backoff = Backoff::default();
    let mut was_connected = false;
    while !events.is_closed() {
        let since = Instant::now();
        match connect(&addrs, &identity).await {
            Ok((connection, send, receive)) => {
                was_connected = true;
                let reason = serve(&connection, send, receive, &events).await;
                connection.close(VarInt::from_u32(0), b"the agent closes this connection");
                tracing::warn!(%reason, "lost the coordinator; reconnecting");
                if events.send(LinkEvent::Disconnected).await.is_err() {
                    return;
                }
                if since.elapsed() > GOOD_CONNECTION {
                    backoff.reset();
                }
            }
            Err(error) => {
                let refused = matches!(error, NetError::Refused(_) | NetError::Tls(_));
                if !was_connected && (refused || begin.elapsed() > FIRST_PATIENCE) {
                    let _ = events.send(LinkEvent::Hopeless(error)).await;
                    return;
                }
                tracing::debug!(%error, "no connection yet");
            }
        }
        tokio::time::sleep(backoff.wait(&mut rng)).await;
    }
}

async fn connect(
    addrs: &[String],
    identity: &Identity,
) -> Result<(Connection, SendStream, RecvStream), NetError> {
    let connection = net::connect(addrs, identity).await?;
    let (send, receive) =
        connection.open_bi().await.map_err(|error| NetError::Lost(net::describe(&error)))?;
    Ok((connection, send, receive))
}

/// Passes messages both ways until the connection ends, and says why it did.
async fn serve(
    connection: &Connection,
    mut send: SendStream,
    mut receive: RecvStream,
    events: &mpsc::Sender<LinkEvent>,
) -> String {
    let (outbox, mut outgoing) = mpsc::unbounded_channel::<FromAgent>();
    if events.send(LinkEvent::Connected(outbox)).await.is_err() {
        return "the agent ends".to_owned();
    }
    let mut writer = tokio::spawn(async move {
        while let Some(message) = outgoing.recv().await {
            codec::write_frame(&mut send, &message).await?;
        }
        let _ = send.finish(); // fails only on a connection that is gone
        Ok::<_, codec::CodecError>(())
    });
    let reason = loop {
        let message = tokio::select! {
            message = codec::read_frame(&mut receive) => message,
            written = &mut writer => match written {
                Ok(Err(error)) => break closed(connection, &error),
                _ => break "the agent ends".to_owned(),
            },
        };
        match message {
            Ok(Some(message)) => {
                if events.send(LinkEvent::Message(message)).await.is_err() {
                    break "the agent ends".to_owned();
                }
            }
            Ok(None) => break "the coordinator closed the stream".to_owned(),
            Err(error) => break closed(connection, &error),
        }
    };
    writer.abort();
    reason
}

/// The connection's own reason says more than the stream's.
fn closed(connection: &Connection, error: &codec::CodecError) -> String {
    connection.close_reason().map_or_else(|| error.to_string(), |reason| net::describe(&reason))
}
