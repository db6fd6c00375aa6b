//! The raft thread: it alone touches the replica. Others hand it proposals and reads through a bounded inbox.
//!
//! All proposals that wait are made together and share one sync of the disk. A proposal that was answered with `Unavailable` may still
//! happen; sending it again with the same sequence number is safe.

use super::space::{Probe, RESERVE_BYTES, RESUME_BYTES};
use crate::cluster::commands::Change;
use crate::cluster::session::RequestId;
use crate::cluster::{Answer, Command, Effect, State};
use crate::raft::disk::Disk;
use crate::raft::replica::{Declined, Replica, ReplicaError, Ticket};
use anyhow::anyhow;
use fleet_common::protocol::{Refusal, RefusalKind};
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, timeout};
use tracing::{info, warn};

/// Proposals and reads that wait for the raft thread.
const INBOX_MAX: usize = 4_096;
/// Inputs taken in one round, so that one sync serves many and none waits for ever.
const ROUND_MAX: usize = 512;
/// Raft's unit of time; elections take 10 to 20 of them.
const TICK: Duration = Duration::from_millis(50);
/// Ticks between looks at the free space.
const SPACE_TICKS: u64 = 5;
/// A caller gives up after this long. Longer than an election.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// How the replica stands, for everybody to see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    pub leader: Option<u64>,
    pub term: u64,
    pub commit_index: u64,
    pub applied_index: u64,
    /// Since when this replica leads, confirmed by a quorum.
    pub leading_since: Option<Instant>,
    /// Why writes are refused.
    pub read_only: Option<String>,
}

type Look = Box<dyn FnOnce(&State) + Send>;
type Wake = Box<dyn Fn(&[Effect]) + Send>;

enum Input {
    Propose { request: Option<RequestId>, change: Change, answer: oneshot::Sender<Result<Answer, Refusal>> },
    Read(Look),
}

/// The way to the raft thread. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    inbox: mpsc::Sender<Input>,
    status: watch::Receiver<Status>,
}

impl Handle {
    /// Makes a change durable. A change that was refused by the state machine is an answer; `Err` means that it is unknown whether it
    /// will happen.
    pub async fn propose(&self, request: Option<RequestId>, change: Change) -> Result<Answer, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.hand_in(Input::Propose { request, change, answer }, answered).await?
    }

    /// Looks at a state that has everything which was acknowledged before the call. `look` runs on the raft thread: it must be quick.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&State) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let (seen, result) = oneshot::channel();
        let look = move |state: &State| {
            // The caller may have given up.
            let _ = seen.send(look(state));
        };
        self.hand_in(Input::Read(Box::new(look)), result).await
    }

    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits until this replica leads.
    pub async fn until_leading(&self) -> anyhow::Result<()> {
        let mut status = self.status.clone();
        let led = timeout(ANSWER_DEADLINE, status.wait_for(|status| status.leading_since.is_some())).await;
        match led {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(anyhow!("the raft thread ended while starting")),
            Err(_) => Err(anyhow!(
                "no leader after {} s{}",
                ANSWER_DEADLINE.as_secs(),
                reason(self.status().read_only)
            )),
        }
    }

    async fn hand_in<T>(&self, input: Input, result: oneshot::Receiver<T>) -> Result<T, Refusal> {
        let work = async {
            self.inbox.send(input).await.map_err(|_| unavailable("the coordinator is stopping"))?;
            result.await.map_err(|_| unavailable("leadership moved before this was done; try again"))
        };
        timeout(ANSWER_DEADLINE, work)
            .await
            .unwrap_or_else(|_| Err(unavailable("not done in time; try again")))
    }
}

fn reason(read_only: Option<String>) -> String {
    read_only.map_or_else(String::new, |why| format!(": {why}"))
}

pub fn unavailable(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Unavailable, message: message.into() }
}

/// A look at the state that waits for its turn.
struct WaitingRead {
    look: Look,
    since: Instant,
}

pub struct Driver<D: Disk> {
    replica: Replica<D>,
    space: Probe,
    wake: Wake,
    proposals: BTreeMap<Ticket, oneshot::Sender<Result<Answer, Refusal>>>,
    reads: BTreeMap<Ticket, WaitingRead>,
    next_ticket: Ticket,
    ticks: u64,
    low_space: Option<String>,
    leading_since: Option<(u64, Instant)>,
}

/// The running thread.
pub struct Thread {
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<Result<(), ReplicaError>>,
}

impl Thread {
    /// Returns when the thread ended without being asked to.
    pub async fn failed(&mut self) -> anyhow::Error {
        match (&mut self.ended).await {
            Ok(Ok(())) => anyhow!("the raft thread ended"),
            Ok(Err(error)) => anyhow::Error::new(error),
            Err(_) => anyhow!("the raft thread panicked; this is a bug in fleet"),
        }
    }

    pub async fn stop(self) {
        // A thread that is gone already has stopped.
        let _ = self.stop.send(true);
        let _ = self.ended.await;
    }
}

impl<D: Disk> Driver<D> {
    pub fn new(replica: Replica<D>, space: Probe, wake: Wake) -> Self {
        Driver {
            replica,
            space,
            wake,
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
            // Tickets are in the log, and a ticket of an earlier life must not be taken for one of this.
            next_ticket: rand::random(),
            ticks: 0,
            low_space: None,
            leading_since: None,
        }
    }

    pub fn spawn(mut self) -> std::io::Result<(Handle, Thread)> {
        let (inbox, inputs) = mpsc::channel(INBOX_MAX);
        let (publish, status) = watch::channel(Status::default());
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        std::thread::Builder::new().name("raft".into()).spawn(move || {
            let result = runtime.block_on(self.run(inputs, publish, stopped));
            // The disk is closed before anybody hears of the end.
            drop(self);
            let _ = end.send(result);
        })?;
        Ok((Handle { inbox, status }, Thread { stop, ended }))
    }

    async fn run(
        &mut self,
        mut inputs: mpsc::Receiver<Input>,
        publish: watch::Sender<Status>,
        mut stopped: watch::Receiver<bool>,
    ) -> Result<(), ReplicaError> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.round()?;
            publish.send_if_modified(|status| {
                let now = self.status();
                let changed = *status != now;
                *status = now;
                changed
            });
            tokio::select! {
                biased;
                _ = stopped.changed() => return Ok(()),
                _ = ticks.tick() => self.tick()?,
                input = inputs.recv() => match input {
                    Some(input) => self.take(input),
                    None => return Ok(()),
                },
            }
            for _ in 0..ROUND_MAX {
                let Ok(input) = inputs.try_recv() else { break };
                self.take(input);
            }
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Propose { request, change, answer } => {
                if let Err(refusal) = self.propose(request, change) {
                    let _ = answer.send(Err(refusal));
                } else {
                    self.proposals.insert(self.next_ticket, answer);
                }
            }
            // Nobody else can have changed anything: a full disk does not keep a lone replica from answering.
            Input::Read(look) if self.replica.is_alone() && self.replica.full().is_some() => {
                look(self.replica.state())
            }
            Input::Read(look) => {
                self.next_ticket = self.next_ticket.wrapping_add(1);
                self.reads.insert(self.next_ticket, WaitingRead { look, since: Instant::now() });
                self.replica.read_index(self.next_ticket);
            }
        }
    }

    fn propose(&mut self, request: Option<RequestId>, change: Change) -> Result<(), Refusal> {
        if let Some(why) = &self.low_space {
            return Err(unavailable(why.clone()));
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.next_ticket = self.next_ticket.wrapping_add(1);
        let command = Command { unix_ms: now.as_millis() as u64, request, why: None, change };
        self.replica.propose(self.next_ticket, &command).map_err(|declined| match declined {
            Declined::NotLeader => unavailable("this coordinator does not lead at the moment; try again"),
            Declined::Busy => unavailable("too much is waiting to be written; try again"),
            Declined::DiskFull(why) | Declined::Misfit(why) => unavailable(why),
            Declined::Pending => unavailable("another change of the coordinators is under way; try again"),
            Declined::TooLarge => {
                Refusal { kind: RefusalKind::Invalid, message: "this request is too large".into() }
            }
        })
    }

    fn tick(&mut self) -> Result<(), ReplicaError> {
        self.replica.tick();
        self.ticks += 1;
        if self.ticks % SPACE_TICKS == 1 {
            self.look_at_space()?;
            self.reads.retain(|_, read| read.since.elapsed() < ANSWER_DEADLINE);
            for ticket in self.reads.keys() {
                self.replica.read_index(*ticket);
            }
        }
        Ok(())
    }

    fn look_at_space(&mut self) -> Result<(), ReplicaError> {
        let Some(free) = (self.space)() else { return Ok(()) };
        let limit = if self.low_space.is_some() { RESUME_BYTES } else { RESERVE_BYTES };
        let low = free < limit;
        match (&self.low_space, low) {
            (None, true) => {
                let why = format!(
                    "the coordinator's disk has only {} MiB free; nothing is recorded until there are {} MiB",
                    free >> 20,
                    RESUME_BYTES >> 20
                );
                warn!("{why}");
                self.low_space = Some(why);
            }
            (Some(_), false) => {
                info!("the disk has room again: {} MiB", free >> 20);
                self.low_space = None;
            }
            _ => {}
        }
        if !low && self.replica.full().is_some() {
            self.replica.recover()?;
        }
        Ok(())
    }

    fn round(&mut self) -> Result<(), ReplicaError> {
        // One voter for now: raft has nobody to send to.
        let output = self.replica.process(&mut |_| {})?;
        for (ticket, answer) in output.answers {
            if let Some(caller) = self.proposals.remove(&ticket) {
                let _ = caller.send(Ok(answer));
            }
        }
        for ticket in output.reads {
            if let Some(read) = self.reads.remove(&ticket) {
                (read.look)(self.replica.state());
            }
        }
        if !output.effects.is_empty() {
            (self.wake)(&output.effects);
        }
        if let Some(why) = self.replica.full() {
            self.give_up(&format!("{why}; this is recorded when there is room, if it still can be"));
            for (_, read) in std::mem::take(&mut self.reads) {
                if self.replica.is_alone() {
                    (read.look)(self.replica.state());
                }
            }
        }
        let term = self.replica.term();
        match self.leading_since {
            Some((led, _)) if led != term || !self.replica.leads() => {
                self.leading_since = None;
                self.give_up("leadership moved before this was done; try again");
            }
            None if self.replica.leads() => self.leading_since = Some((term, Instant::now())),
            _ => {}
        }
        Ok(())
    }

    fn give_up(&mut self, why: &str) {
        for (_, caller) in std::mem::take(&mut self.proposals) {
            let _ = caller.send(Err(unavailable(why)));
        }
    }

    fn status(&self) -> Status {
        Status {
            leader: self.replica.leader(),
            term: self.replica.term(),
            commit_index: self.replica.commit_index(),
            applied_index: self.replica.applied_index(),
            leading_since: self.leading_since.map(|(_, since)| since),
            read_only: self.replica.full().map(str::to_owned).or_else(|| self.low_space.clone()),
        }
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
