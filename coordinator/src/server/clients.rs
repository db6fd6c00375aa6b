//! Clients' connections: streams of requests, answered one after another on each stream.

use super::calls::unavailable;
use super::inbox::Event;
use super::{Shared, tokens};
use crate::cluster::Answer;
use crate::cluster::commands::{Change, IntroduceCa};
use crate::control::Input;
use crate::requests;
use fleet_common::codec::{self, CodecError, FRAME_MAX, Frames};
use fleet_common::ids::UserId;
use fleet_common::net::{self, LOGIN_MAX, Login};
use fleet_common::protocol::{ClientFrame, Member, Refusal, RefusalKind, Reply, Request, Role};
use quinn::{Connection, RecvStream, SendStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

/// For the first stream of a connection: who connects has something to ask.
const FIRST_DEADLINE: Duration = Duration::from_secs(10);
/// A connection without a request is closed after this long; its owner makes another one when he needs it.
const IDLE: Duration = Duration::from_secs(60);
/// For a whole request to arrive, once it has begun: the largest one at seven megabits a second.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes taken from a stream at once.
const READ_MAX: usize = 64 << 10;
/// Above this a request needs a share of `LARGE_BYTES` for as long as it is read and answered.
const SMALL: usize = 64 << 10;
/// Events of a watch that are written at once, and their bytes.
const WRITE_MAX: usize = 256;
const WRITE_BYTES: usize = 256 << 10;

/// Serves a connection until it ends or nothing is asked on it.
pub async fn serve(
    shared: Arc<Shared>,
    connection: &Connection,
    caller: Member,
    name: String,
    open: Arc<AtomicUsize>,
) {
    let mut patience = FIRST_DEADLINE;
    let name: Arc<str> = name.into();
    loop {
        match timeout(patience, connection.accept_bi()).await {
            Ok(Ok((send, receive))) => {
                patience = IDLE;
                // quinn bounds the streams that are open at once.
                let stream = Stream {
                    shared: shared.clone(),
                    caller,
                    name: name.clone(),
                    send,
                    open: open.clone(),
                    bytes: Vec::new(),
                };
                open.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(stream.serve(receive));
            }
            Ok(Err(_)) => return,
            Err(_) if open.load(Ordering::Relaxed) > 0 => {}
            Err(_) => return connection.close(net::DONE, b"nothing was asked for a while"),
        }
    }
}

struct Stream {
    shared: Arc<Shared>,
    caller: Member,
    /// In its certificate.
    name: Arc<str>,
    send: SendStream,
    open: Arc<AtomicUsize>,
    bytes: Vec<u8>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stream {
    async fn serve(mut self, mut receive: RecvStream) {
        let mut frames = Frames::new(FRAME_MAX);
        loop {
            let (frame, _room) = match self.request(&mut receive, &mut frames).await {
                Ok(Some(request)) => request,
                Ok(None) => break,
                Err(refusal) => {
                    debug!("a request could not be read: {}", refusal.message);
                    let _ = self.write(&Reply::Refused(refusal)).await;
                    break;
                }
            };
            if !self.answer(frame).await {
                break;
            }
        }
        let _ = self.send.finish(); // fails only on a connection that is gone
    }

    /// The next request, and its share of the room for large ones. `None` at the end.
    async fn request(
        &self,
        receive: &mut RecvStream,
        frames: &mut Frames,
    ) -> Result<Option<(ClientFrame, Option<tokio::sync::OwnedSemaphorePermit>)>, Refusal> {
        let bad = |error: CodecError| invalid(error.to_string());
        let (mut room, mut deadline) = (None, None);
        loop {
            if let Some(frame) = frames.next_versioned().map_err(bad)? {
                return Ok(Some((frame, room)));
            }
            let piece = receive.read_chunk(READ_MAX, true);
            let piece = if frames.is_empty() {
                // Between two requests the stream may rest; the connection's own deadline counts.
                piece.await
            } else {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + REQUEST_DEADLINE);
                let piece = timeout_at(deadline, piece).await;
                piece.map_err(|_| unavailable("the request did not arrive in time; try again"))?
            };
            match piece {
                Ok(Some(piece)) => frames.push(&piece.bytes),
                Ok(None) if frames.is_empty() => return Ok(None),
                Ok(None) => return Err(bad(CodecError::Truncated)),
                Err(_) => return Ok(None),
            }
            if frames.len() > SMALL && room.is_none() {
                let all = self.shared.large.clone();
                let share = timeout(REQUEST_DEADLINE, all.acquire_many_owned(FRAME_MAX as u32)).await;
                room =
                    Some(share.ok().and_then(Result::ok).ok_or_else(|| {
                        unavailable("many large requests come at the same time; try again")
                    })?);
                // Meanwhile nothing was read.
                deadline = None;
            }
        }
    }

    /// Whether another request may follow.
    async fn answer(&mut self, frame: ClientFrame) -> bool {
        let name = requests::name(&frame.request);
        if let Request::Watch { .. } = frame.request {
            self.shared.metrics.count(name, true);
            self.watch(frame).await;
            return false;
        }
        let begun = std::time::Instant::now();
        let is_change = frame.request.is_change();
        let reply = match self.carry_out(frame).await {
            Ok(reply) => reply,
            Err(refusal) => Reply::Refused(refusal),
        };
        let done = !matches!(reply, Reply::Refused(_));
        if is_change && done {
            self.shared.metrics.committed(begun.elapsed());
        }
        self.shared.metrics.count(name, done);
        self.write(&reply).await.is_ok()
    }

    async fn carry_out(&self, frame: ClientFrame) -> Result<Reply, Refusal> {
        let shared = &self.shared;
        if let Request::Addresses = frame.request {
            return Ok(Reply::Addresses(shared.addresses.borrow().clone()));
        }
        if self.caller.role() != Role::Client {
            let message = format!(
                "the certificate of {} is not a client's; use one made with a token for clients",
                self.caller
            );
            return Err(Refusal { kind: RefusalKind::Forbidden, message });
        }
        match frame.request {
            Request::CreateToken { role, ttl_s, uses } => {
                let stamp = crate::control::stamp(&frame);
                let by = Some(self.user()?);
                let token = tokens::create(shared, stamp, by, tokens::Wish { role, ttl_s, uses }).await?;
                info!("{} made the token {} for a {role:?}", self.caller, token.id);
                Ok(Reply::Token { text: token.to_string() })
            }
            Request::Renew { csr_der } => {
                let Some(admitted) = shared.gate.known(self.caller) else {
                    let message = format!("{} was revoked", self.caller);
                    return Err(Refusal { kind: RefusalKind::Forbidden, message });
                };
                let signed = shared.trust.sign(&csr_der, self.caller, &self.name, admitted.key);
                let (certificate_der, authorities) = signed.map_err(invalid)?;
                Ok(Reply::Certificate { certificate_der, authorities })
            }
            Request::WebLogin { ttl_s, operates } => self.web_login(ttl_s, operates),
            Request::RotateCa => {
                let stamp = crate::control::stamp(&frame);
                self.rotate(stamp).await
            }
            _ => Ok(shared.calls.ask(self.caller, frame).await),
        }
    }

    fn web_login(&self, ttl_s: u64, operates: bool) -> Result<Reply, Refusal> {
        if ttl_s == 0 || ttl_s > LOGIN_MAX.as_secs() {
            return Err(invalid("a login for the page holds for 90 days at most"));
        }
        let user = self.user()?;
        let admitted = self.shared.gate.known(self.caller).ok_or_else(|| Refusal {
            kind: RefusalKind::Forbidden,
            message: format!("{user} was revoked"),
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let login = Login { user, expires: now.saturating_add(ttl_s), operates };
        info!("{user} made a login for the page, which holds for {ttl_s} s (operates: {operates})");
        Ok(Reply::Token { text: self.shared.trust.log_in(&login, &admitted.key) })
    }

    fn user(&self) -> Result<UserId, Refusal> {
        match self.caller {
            Member::Client(user) => Ok(user),
            Member::Worker(_) | Member::Coordinator(_) => Err(invalid("this is for clients")),
        }
    }

    /// Makes a CA that is to follow. Its key is on this disk before anybody hears of it.
    async fn rotate(&self, stamp: crate::cluster::session::Stamp) -> Result<Reply, Refusal> {
        let (shared, user) = (&self.shared, self.user()?);
        if !shared.gate.is_admin(self.caller) {
            // Before a key is made for nothing; the state has the last word.
            let message = format!("only an admin replaces the CA, and {user} is none");
            return Err(Refusal { kind: RefusalKind::Forbidden, message });
        }
        let der = shared.trust.make_next().map_err(|error| invalid(format!("{error:#}")))?;
        shared.calls.inbox().must_take(Event::Input(Input::HoldsCa(der.clone())));
        let change = Change::IntroduceCa(IntroduceCa { der, holder: shared.me });
        match shared.calls.propose(stamp, Some(user), change).await? {
            Answer::Rejected(refusal) => Err(refusal),
            _ => Ok(Reply::Done),
        }
    }

    async fn watch(&mut self, frame: ClientFrame) {
        let mut watching = match self.shared.calls.watch(self.caller, frame) {
            Ok(watching) => watching,
            Err(refusal) => {
                let _ = self.write(&Reply::Refused(refusal)).await; // a caller that is gone needs none
                return;
            }
        };
        loop {
            let reply = tokio::select! {
                reply = watching.next() => reply,
                _ = self.send.stopped() => return,
            };
            let reply = reply.unwrap_or_else(|| {
                Reply::Refused(unavailable("this coordinator is stopping; ask another one"))
            });
            let mut last = !matches!(reply, Reply::Event { .. });
            self.bytes.clear();
            let mut encoded = codec::append_frame(&reply, &mut self.bytes);
            for _ in 1..WRITE_MAX {
                if last || encoded.is_err() || self.bytes.len() > WRITE_BYTES {
                    break;
                }
                let Some(reply) = watching.try_next() else { break };
                last = !matches!(reply, Reply::Event { .. });
                encoded = codec::append_frame(&reply, &mut self.bytes);
            }
            if encoded.is_err() || self.send.write_all(&self.bytes).await.is_err() || last {
                return;
            }
        }
    }

    async fn write(&mut self, reply: &Reply) -> Result<(), ()> {
        self.bytes.clear();
        if let Err(error) = codec::append_frame(reply, &mut self.bytes) {
            let refusal = Reply::Refused(invalid(format!("the answer cannot be sent: {error}")));
            codec::append_frame(&refusal, &mut self.bytes).map_err(|_| ())?;
        }
        self.send.write_all(&self.bytes).await.map_err(|_| ())
    }
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message: message.into() }
}
