//! What this coordinator has seen and who waits for what: agents' connections, signs of life, wake-ups. All of it may be lost.

use crate::cluster::Effect;
use crate::planner::{Observed, Seen};
use fleet_common::ids::{JobId, NodeId};
use quinn::Connection;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Notify, watch};

pub struct Roster {
    started: Instant,
    /// Wakes the planner.
    pub plan: Notify,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    seen: BTreeMap<NodeId, Seen>,
    agents: BTreeMap<NodeId, Agent>,
    /// Those who watch a job.
    watchers: BTreeMap<JobId, watch::Sender<()>>,
}

struct Agent {
    connection: Connection,
    wake: Arc<Notify>,
}

impl Roster {
    pub fn new() -> Self {
        Roster { started: Instant::now(), plan: Notify::new(), inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds of the clock that `Observed` uses.
    pub fn now_ms(&self) -> u64 {
        self.ms(Instant::now())
    }

    fn ms(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.started).as_millis() as u64
    }

    pub fn observed(&self, leading_since: Option<Instant>) -> Observed {
        let leader_since_ms = leading_since.map_or_else(|| self.now_ms(), |since| self.ms(since));
        Observed { leader_since_ms, nodes: self.lock().seen.clone() }
    }

    /// An agent greeted on this connection. An older connection of the same node is closed: the newest speaks for the node.
    pub fn connected(&self, node: NodeId, connection: &Connection) -> Arc<Notify> {
        let wake = Arc::new(Notify::new());
        let now = self.now_ms();
        let mut inner = self.lock();
        inner.seen.insert(node, Seen { connected: true, heard_ms: now });
        let agent = Agent { connection: connection.clone(), wake: wake.clone() };
        let older = inner.agents.insert(node, agent);
        drop(inner);
        if let Some(older) = older {
            older.connection.close(1u32.into(), b"this node has connected anew");
        }
        self.plan.notify_one();
        wake
    }

    pub fn heard(&self, node: NodeId) {
        let now = self.now_ms();
        if let Some(seen) = self.lock().seen.get_mut(&node) {
            seen.heard_ms = now;
        }
    }

    /// The connection has ended; if it was the node's newest, the node is out of touch from now.
    pub fn disconnected(&self, node: NodeId, connection: &Connection) {
        let now = self.now_ms();
        let mut inner = self.lock();
        let newest = inner
            .agents
            .get(&node)
            .is_some_and(|agent| agent.connection.stable_id() == connection.stable_id());
        if newest {
            inner.agents.remove(&node);
            inner.seen.insert(node, Seen { connected: false, heard_ms: now });
        }
    }

    pub fn wake(&self, effects: &[Effect]) {
        let inner = self.lock();
        for effect in effects {
            match effect {
                Effect::Plan => self.plan.notify_one(),
                Effect::Node(node) => {
                    if let Some(agent) = inner.agents.get(node) {
                        agent.wake.notify_one();
                    }
                }
                Effect::Members => {}
                Effect::Job(job) => {
                    if let Some(watchers) = inner.watchers.get(job) {
                        watchers.send_replace(());
                    }
                }
            }
        }
    }

    /// Changes whenever the job has new events.
    pub fn watch(&self, job: JobId) -> watch::Receiver<()> {
        let mut inner = self.lock();
        inner.watchers.retain(|of, sender| *of == job || sender.receiver_count() > 0);
        inner.watchers.entry(job).or_insert_with(|| watch::channel(()).0).subscribe()
    }
}
