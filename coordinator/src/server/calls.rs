//! The way of a request to the raft thread and of its answer back.

use super::desk::CallSink;
use super::inbox::{Event, Inbox};
use crate::cluster::Answer;
use crate::cluster::commands::{Change, RedeemToken};
use crate::cluster::session::{RequestId, Stamp};
use crate::control::{Admission, Call, Input, Session};
use fleet_common::ids::UserId;
use fleet_common::metrics::Page;
use fleet_common::protocol::{ClientFrame, Member, Refusal, RefusalKind, Reply};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot};

/// Hands out numbers of calls and sessions, each once. Cheap to clone.
#[derive(Clone)]
pub struct Calls {
    inbox: Inbox,
    last: Arc<AtomicU64>,
}

/// An open call. Its end is told when this is dropped before the last answer came.
pub struct Open {
    call: Call,
    inbox: Inbox,
    answered: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.answered {
            self.inbox.must_take(Event::Input(Input::CallLost(self.call)));
        }
    }
}

/// The answers of a watch.
pub struct Watching {
    open: Open,
    replies: mpsc::UnboundedReceiver<Reply>,
    /// Passed on and not yet told.
    taken: usize,
}

/// So many replies are taken before their credit is given back: a quarter of it.
const TAKEN_MAX: usize = crate::control::REPLIES_MAX / 4;

impl Watching {
    /// The next reply, once the ones before were passed on. After the last one: `None`.
    pub async fn next(&mut self) -> Option<Reply> {
        if self.taken >= TAKEN_MAX {
            let (call, replies) = (self.open.call, std::mem::take(&mut self.taken));
            self.open.inbox.must_take(Event::Input(Input::Taken { call, replies }));
        }
        let reply = self.replies.recv().await;
        match &reply {
            Some(Reply::Event { .. }) => self.taken += 1,
            // The raft thread ends, or this was the last one.
            _ => self.open.answered = true,
        }
        reply
    }

    /// Another reply that waits already.
    pub fn try_next(&mut self) -> Option<Reply> {
        let reply = self.replies.try_recv().ok()?;
        match &reply {
            Reply::Event { .. } => self.taken += 1,
            _ => self.open.answered = true,
        }
        Some(reply)
    }
}

impl Calls {
    pub fn new(inbox: Inbox) -> Calls {
        Calls { inbox, last: Arc::default() }
    }

    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub fn next_session(&self) -> Session {
        self.next()
    }

    fn next(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// One request, one reply.
    pub async fn ask(&self, caller: Member, frame: ClientFrame) -> Reply {
        let (sink, answer) = oneshot::channel();
        let input = |call| Input::Client { call, caller, frame };
        self.answered(input, CallSink::Once(sink), answer).await.unwrap_or_else(Reply::Refused)
    }

    pub fn watch(&self, caller: Member, frame: ClientFrame) -> Result<Watching, Refusal> {
        let (sink, replies) = mpsc::unbounded_channel();
        let open = self.open(|call| Input::Client { call, caller, frame }, CallSink::Many(sink))?;
        Ok(Watching { open, replies, taken: 0 })
    }

    pub async fn join(&self, redeem: RedeemToken, request: RequestId) -> Result<Admission, Refusal> {
        let (sink, answer) = oneshot::channel();
        let input = |call| Input::Join { call, redeem, request };
        self.answered(input, CallSink::Join(sink), answer).await?
    }

    /// A change that this user wants; without one, this coordinator itself.
    pub async fn propose(
        &self,
        request: Stamp,
        by: Option<UserId>,
        change: Change,
    ) -> Result<Answer, Refusal> {
        let (sink, answer) = oneshot::channel();
        let input = |call| Input::Propose { call, request, by, change };
        self.answered(input, CallSink::Propose(sink), answer).await?
    }

    /// Returns when this coordinator's state has everything that was acknowledged before.
    pub async fn look(&self) -> Result<(), Refusal> {
        let (sink, answer) = oneshot::channel();
        self.answered(Input::Look, CallSink::Look(sink), answer).await?
    }

    /// What this coordinator knows, in numbers.
    pub async fn measure(&self) -> Result<Page, Refusal> {
        let (sink, page) = oneshot::channel();
        let offered = self.inbox.offer(vec![Event::Measure(sink)]);
        offered.map_err(|_| unavailable("this coordinator has too much to do; try again"))?;
        page.await.map_err(|_| unavailable("this coordinator is stopping"))
    }

    async fn answered<T>(
        &self,
        input: impl FnOnce(Call) -> Input,
        sink: CallSink,
        answer: oneshot::Receiver<T>,
    ) -> Result<T, Refusal> {
        let mut open = self.open(input, sink)?;
        let answer = answer.await;
        open.answered = true;
        // It was handed over, and may be done.
        let message = "this coordinator is stopping; ask another one".to_owned();
        answer.map_err(|_| Refusal { kind: RefusalKind::Undecided, message })
    }

    fn open(&self, input: impl FnOnce(Call) -> Input, sink: CallSink) -> Result<Open, Refusal> {
        let call = self.next();
        let event = Event::Call(call, input(call), sink);
        match self.inbox.offer(vec![event]) {
            Ok(()) => Ok(Open { call, inbox: self.inbox.clone(), answered: false }),
            Err(_) => Err(unavailable("this coordinator has too much to do; try again, or ask another one")),
        }
    }
}

pub fn unavailable(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Unavailable, message: message.into() }
}
