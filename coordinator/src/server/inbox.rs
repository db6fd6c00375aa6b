//! The way to the raft thread: a bounded queue that it empties in one go, so that one sync of the disk serves all that waits.
//!
//! A plain mutex and condition: the raft thread is no task, and a channel of tokio's would cost it an event loop.

use super::desk::{CallSink, SessionSink};
use crate::control::{Call, Input, Session};
use fleet_common::ids::NodeId;
use fleet_common::metrics::Page;
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Notify, oneshot};

/// What waits for the raft thread: a thousand clients with some requests each, and as much from the others.
const ITEMS_MAX: usize = 16_384;
/// Calls among them: a flood of requests leaves room for agents and the other coordinators.
const CALLS_MAX: usize = ITEMS_MAX / 2;

/// What the tasks that hold connections tell the raft thread.
pub enum Event {
    Input(Input),
    /// A call and where its answers go.
    Call(Call, Input, CallSink),
    /// An agent's connection and where its messages go.
    Agent(Session, NodeId, SessionSink),
    /// What is known here shall go there, in numbers.
    Measure(oneshot::Sender<Page>),
    Stop,
}

#[derive(Default)]
struct Queue {
    events: Vec<Event>,
    /// Of the events, those that are calls.
    calls: usize,
    /// Heartbeats since the last tick; they wake nobody.
    heard: BTreeSet<NodeId>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    room: Notify,
}

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Inbox {
    shared: Arc<Shared>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands in events, all or none; gives them back when there is no room. What comes after the end is lost.
    pub fn offer(&self, events: Vec<Event>) -> Result<(), Vec<Event>> {
        let mut queue = self.lock();
        if queue.closed {
            return Ok(());
        }
        let calls = events.iter().filter(|event| matches!(event, Event::Call(..))).count();
        let crowded = calls > 0 && queue.calls + calls > CALLS_MAX;
        if crowded || queue.events.len() + events.len() > ITEMS_MAX {
            return Err(events);
        }
        queue.calls += calls;
        self.append(queue, events);
        Ok(())
    }

    /// Hands in what must not be lost, however much waits: it was counted before.
    pub fn must_take(&self, event: Event) {
        let queue = self.lock();
        if !queue.closed {
            self.append(queue, vec![event]);
        }
    }

    fn append(&self, mut queue: MutexGuard<'_, Queue>, mut events: Vec<Event>) {
        let was_empty = queue.events.is_empty();
        queue.events.append(&mut events);
        drop(queue);
        if was_empty {
            self.shared.filled.notify_one();
        }
    }

    /// Hands in events as soon as there is room.
    pub async fn put(&self, mut events: Vec<Event>) {
        loop {
            let room = self.shared.room.notified();
            tokio::pin!(room);
            // Before looking, so that room that is made in between is noticed.
            room.as_mut().enable();
            match self.offer(events) {
                Ok(()) => return,
                Err(back) => events = back,
            }
            room.await;
        }
    }

    pub fn heard(&self, node: NodeId) {
        self.lock().heard.insert(node);
    }

    /// The raft thread: all that waits, as soon as there is something or the time has come.
    pub fn take(&self, until: Instant) -> Vec<Event> {
        let mut queue = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !queue.events.is_empty() || left.is_zero() {
                break;
            }
            let waited = self.shared.filled.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let events = std::mem::take(&mut queue.events);
        let calls = std::mem::take(&mut queue.calls);
        drop(queue);
        if events.len() > ITEMS_MAX / 2 || calls > CALLS_MAX / 2 {
            self.shared.room.notify_waiters();
        }
        events
    }

    pub fn take_heard(&self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.lock().heard)
    }

    /// The raft thread has ended: whoever waits for an answer sees his sink dropped.
    pub fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        queue.events.clear();
        drop(queue);
        self.shared.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn tick() -> Event {
        Event::Input(Input::Tick)
    }

    #[test]
    fn what_waits_is_taken_in_one_go_and_an_empty_inbox_waits_for_its_time() {
        let inbox = Inbox::default();
        for _ in 0..3 {
            assert!(inbox.offer(vec![tick()]).is_ok());
        }
        inbox.heard(NodeId(2));
        inbox.heard(NodeId(2));
        let soon = || Instant::now() + Duration::from_millis(5);
        assert_eq!(inbox.take(soon()).len(), 3);
        assert_eq!(inbox.take(soon()).len(), 0);
        assert_eq!(inbox.take_heard().len(), 1);
        inbox.close();
        inbox.must_take(tick());
        assert_eq!(inbox.take(soon()).len(), 0, "nothing is kept after the end");
    }

    #[test]
    fn a_flood_of_calls_leaves_room_for_the_others() {
        let inbox = Inbox::default();
        let call = || Event::Call(1, Input::CallLost(1), CallSink::Once(tokio::sync::oneshot::channel().0));
        (0..CALLS_MAX).for_each(|_| assert!(inbox.offer(vec![call()]).is_ok()));
        assert!(inbox.offer(vec![call()]).is_err());
        assert!(inbox.offer(vec![tick()]).is_ok());
        assert_eq!(inbox.take(Instant::now()).len(), CALLS_MAX + 1);
        assert!(inbox.offer(vec![call()]).is_ok());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_inbox_gives_back_and_lets_those_wait_who_may() {
        let inbox = Inbox::default();
        assert!(inbox.offer((0..ITEMS_MAX).map(|_| tick()).collect()).is_ok());
        assert_eq!(inbox.offer(vec![tick()]).map_err(|back| back.len()), Err(1));
        let (waiting, taking) = (inbox.clone(), inbox.clone());
        let put = tokio::spawn(async move { waiting.put(vec![tick()]).await });
        let taken = tokio::task::spawn_blocking(move || {
            let far = || Instant::now() + Duration::from_secs(60);
            taking.take(far()).len() + taking.take(far()).len()
        });
        put.await.unwrap();
        assert_eq!(taken.await.unwrap(), ITEMS_MAX + 1);
    }
}
