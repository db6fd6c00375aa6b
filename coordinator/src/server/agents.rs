//! An agent's connection: one stream, on which `Control` and the agent speak. Here are only deadlines, credits and heartbeats.

use super::Shared;
use super::desk::Down;
use super::inbox::Event;
use crate::control::{AGENT_BATCHES_MAX, Input, Session};
use fleet_common::codec::{self, CodecError, FRAME_MAX, Frames};
use fleet_common::ids::NodeId;
use fleet_common::net;
use fleet_common::protocol::{FromAgent, Member, ToAgent};
use quinn::{Connection, RecvStream, SendStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tracing::{debug, info};

/// For the stream of an agent that has connected.
const STREAM_DEADLINE: Duration = Duration::from_secs(5);
/// For an agent to close when it was told why it must go.
const LEAVE_DEADLINE: Duration = Duration::from_secs(2);
/// Between certificates for one agent: each costs a signature.
const SIGN_EVERY: Duration = Duration::from_secs(1);
/// Bytes taken from the stream at once.
const READ_MAX: usize = 64 << 10;
/// Messages written at once.
const WRITE_MAX: usize = 64;

/// Tells of the session's end however it comes.
struct Attendance<'a> {
    shared: &'a Shared,
    session: Session,
}

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        let lost = Input::AgentLost { session: self.session };
        self.shared.calls.inbox().must_take(Event::Input(lost));
    }
}

pub async fn serve(shared: &Arc<Shared>, connection: &Connection, node: NodeId, name: &str) {
    let stream = timeout(STREAM_DEADLINE, connection.accept_bi()).await;
    let Ok(Ok((send, receive))) = stream else {
        return connection.close(net::REFUSED, b"a worker opens a stream and greets");
    };
    let session = shared.calls.next_session();
    let (sink, down) = mpsc::unbounded_channel();
    let (say, said) = mpsc::channel(WRITE_MAX);
    let inbox = shared.calls.inbox();
    inbox.put(vec![Event::Agent(session, node, sink)]).await;
    let attendance = Attendance { shared, session };
    let credit = Semaphore::new(AGENT_BATCHES_MAX);
    let agent = Agent { shared, node, name, session, connection, credit: &credit, say };
    let why = tokio::select! {
        why = agent.listen(receive) => why,
        why = speak(shared, connection, send, down, said, &credit) => why,
    };
    drop(attendance);
    debug!("{node} is out of touch: {why}");
    connection.close(net::DONE, why.as_bytes());
}

struct Agent<'a> {
    shared: &'a Shared,
    node: NodeId,
    name: &'a str,
    session: Session,
    connection: &'a Connection,
    credit: &'a Semaphore,
    /// What the driver itself answers. Lost where the agent does not read.
    say: mpsc::Sender<ToAgent>,
}

impl Agent<'_> {
    /// Reads until the stream ends, and says why it did.
    async fn listen(&self, mut receive: RecvStream) -> String {
        let inbox = self.shared.calls.inbox();
        let mut frames = Frames::new(FRAME_MAX);
        let mut signed_at: Option<Instant> = None;
        loop {
            match receive.read_chunk(READ_MAX, true).await {
                Ok(Some(piece)) => frames.push(&piece.bytes),
                Ok(None) => return "it closed the connection".to_owned(),
                Err(error) => return error.to_string(),
            }
            loop {
                let message = match frames.next_versioned() {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(error @ CodecError::Version(_)) => {
                        let message = error.to_string();
                        let _ = self.say.try_send(ToAgent::Refused { message: message.clone(), fatal: true });
                        // It leaves when it has read that.
                        let _ = timeout(LEAVE_DEADLINE, self.connection.closed()).await;
                        return message;
                    }
                    Err(error) => return error.to_string(),
                };
                match message {
                    FromAgent::Heartbeat { unix_ms } => {
                        inbox.heard(self.node);
                        let _ = self.say.try_send(ToAgent::Heard { unix_ms });
                    }
                    // It asks again when it was asked too often.
                    FromAgent::Renew { .. } if signed_at.is_some_and(|at| at.elapsed() < SIGN_EVERY) => {}
                    FromAgent::Renew { csr_der } => {
                        signed_at = Some(Instant::now());
                        let node = Member::Worker(self.node);
                        let Some(admitted) = self.shared.gate.known(node) else {
                            return format!("{node} was revoked");
                        };
                        match self.shared.trust.sign(&csr_der, node, self.name, admitted.key) {
                            Ok((certificate_der, authorities)) => {
                                let _ =
                                    self.say.try_send(ToAgent::Certificate { certificate_der, authorities });
                            }
                            Err(why) => return why,
                        }
                    }
                    message => {
                        if matches!(message, FromAgent::Events(_)) {
                            let Ok(credit) = self.credit.acquire().await else { break };
                            credit.forget();
                        }
                        inbox.put(vec![Event::Input(Input::Agent { session: self.session, message })]).await;
                    }
                }
            }
        }
    }
}

/// Writes what `Control` and the driver say, as much at once as waits, until the session is closed.
async fn speak(
    shared: &Shared,
    connection: &Connection,
    mut send: SendStream,
    mut down: mpsc::UnboundedReceiver<Down>,
    mut said: mpsc::Receiver<ToAgent>,
    credit: &Semaphore,
) -> String {
    let (mut downs, mut bytes) = (Vec::new(), Vec::new());
    loop {
        let (mut taken, mut end) = (0, None);
        bytes.clear();
        let mut encode = |message: &ToAgent| codec::append_frame(message, &mut bytes);
        let encoded = tokio::select! {
            count = down.recv_many(&mut downs, WRITE_MAX) => {
                if count == 0 {
                    return "this coordinator is stopping".to_owned();
                }
                downs.drain(..).try_for_each(|down| match down {
                    Down::Say(message) if matches!(*message, ToAgent::Welcome { .. }) => {
                        let coordinators = shared.addresses.borrow().clone();
                        let mark = shared.trust.authorities().mark();
                        encode(&message)
                            .and_then(|()| encode(&ToAgent::Coordinators(coordinators)))
                            .and_then(|()| encode(&ToAgent::Authorities { mark }))
                    }
                    Down::Say(message) => encode(&message),
                    Down::Taken => {
                        taken += 1;
                        Ok(())
                    }
                    Down::Close { message, fatal } => {
                        end = Some(message.clone());
                        encode(&ToAgent::Refused { message, fatal })
                    }
                })
            }
            Some(message) = said.recv() => encode(&message),
        };
        if let Err(error) = encoded {
            return error.to_string();
        }
        if let Err(error) = send.write_all(&bytes).await {
            return error.to_string();
        }
        // Only what was written gives credit back: an agent that does not listen is not listened to.
        credit.add_permits(taken);
        if let Some(why) = end {
            info!("an agent was sent away: {why}");
            let _ = send.finish();
            let _ = timeout(LEAVE_DEADLINE, connection.closed()).await;
            return why;
        }
    }
}
