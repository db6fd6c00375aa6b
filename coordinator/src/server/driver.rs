//! The raft thread: it alone touches `Control`. It takes all that waits, lets `Control` work with one sync of the disk, and passes
//! on what comes out.

use super::desk::Desk;
use super::gate::Gate;
use super::inbox::{Event, Inbox};
use super::peers::Peers;
use super::space::Watermark;
use super::trust::Trust;
use crate::cluster::State;
use crate::cluster::admitted::Membership;
use crate::cluster::authorities::Cas;
use crate::control::{Action, Control, ControlError, Input, Now, PeerMessage, Status, TICK_MS};
use crate::raft::disk::Disk;
use anyhow::anyhow;
use fleet_common::protocol::{CoordinatorAddress, Member, ToAgent};
use prometheus::Histogram;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

const TICK: Duration = Duration::from_millis(TICK_MS);
/// Ticks between looks at the free space.
const SPACE_TICKS: u64 = 5;

/// Between two times that the same alarm is written.
const ALARM_EVERY: Duration = Duration::from_secs(10);

/// How long the others have to take why this coordinator stops.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Ends a start or a run, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{0}")]
    Removed(String),
}

/// What the thread needs besides `Control`.
pub struct Surroundings {
    pub inbox: Inbox,
    pub gate: Arc<Gate>,
    pub peers: Peers,
    pub space: Watermark,
    /// Where the coordinators are, whenever that changes.
    pub addresses: watch::Sender<Vec<CoordinatorAddress>>,
    pub trust: Arc<Trust>,
    /// How the cluster's CAs stand, whenever that changes.
    pub cas: watch::Sender<Cas>,
    /// Times of the turns.
    pub round: Histogram,
}

pub struct Driver<D: Disk> {
    control: Control<D>,
    around: Surroundings,
    desk: Desk,
    begun: Instant,
    ticks: u64,
    removed: Option<String>,
    alarmed: Option<(String, Instant)>,
}

/// The running thread. Dropping it ends it and waits until the disk is closed: RocksDB aborts a process that ends before.
pub struct Thread {
    inbox: Inbox,
    ended: oneshot::Receiver<Result<(), DriverError>>,
    handle: Option<JoinHandle<()>>,
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

    pub async fn stop(mut self) {
        self.inbox.must_take(Event::Stop);
        // A thread that is gone already has stopped.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.inbox.must_take(Event::Stop);
        // A panic of the thread was told where its end was awaited.
        let _ = self.handle.take().map(JoinHandle::join);
    }
}

/// Starts the thread. `now` at which `control` was made is measured from `begun`.
pub fn spawn<D: Disk>(
    control: Control<D>,
    begun: Instant,
    around: Surroundings,
) -> std::io::Result<(watch::Receiver<Status>, Thread)> {
    let inbox = around.inbox.clone();
    let (publish, status) = watch::channel(control.status());
    let (end, ended) = oneshot::channel();
    let handle = std::thread::Builder::new().name("raft".into()).spawn(move || {
        let inbox = around.inbox.clone();
        let mut driver =
            Driver { control, around, desk: Desk::default(), begun, ticks: 0, removed: None, alarmed: None };
        for der in driver.around.trust.held() {
            driver.control.handle(now(begun), Input::HoldsCa(der));
        }
        driver.members();
        let result = driver.run(&publish);
        if result.is_err() {
            driver.around.peers.finish(LAST_WORDS);
        }
        inbox.close();
        // The disk is closed before anybody hears of the end.
        drop(driver);
        let _ = end.send(result);
    })?;
    Ok((status, Thread { inbox, ended, handle: Some(handle) }))
}

/// Both clocks.
pub fn now(begun: Instant) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { mono_ms: begun.elapsed().as_millis() as u64, unix_ms: unix.as_millis() as u64 }
}

impl<D: Disk> Driver<D> {
    fn run(&mut self, publish: &watch::Sender<Status>) -> Result<(), DriverError> {
        let mut next_tick = Instant::now();
        loop {
            let work_left = self.control.busy();
            let events = self.around.inbox.take(if work_left { Instant::now() } else { next_tick });
            let now = now(self.begun);
            if Instant::now() >= next_tick {
                // Ticks that were missed are not made up for: raft would take them for time that the others were silent.
                next_tick = Instant::now() + TICK;
                self.tick(now);
            }
            for event in events {
                match event {
                    Event::Input(input) => self.input(now, input),
                    Event::Call(call, input, sink) => {
                        self.desk.open(call, sink);
                        self.control.handle(now, input);
                    }
                    Event::Agent(session, node, sink) => {
                        self.desk.connect(session, sink);
                        self.control.handle(now, Input::AgentConnected { session, node });
                    }
                    // Whoever asked may be gone.
                    Event::Measure(sink) => drop(sink.send(self.control.measure(now))),
                    Event::Stop => return Ok(()),
                }
            }
            let peers = &mut self.around.peers;
            let begun = Instant::now();
            let actions = self.control.process(now, &mut |to, message| peers.send(to, message))?;
            self.around.round.observe(begun.elapsed().as_secs_f64());
            for action in actions {
                self.perform(action);
            }
            if let Some(why) = self.removed.take() {
                return Err(DriverError::Removed(why));
            }
            publish.send_if_modified(|status| {
                let new = self.control.status();
                let changed = *status != new;
                *status = new;
                changed
            });
        }
    }

    fn input(&mut self, now: Now, input: Input) {
        match &input {
            Input::CallLost(call) => self.desk.forget(*call),
            Input::AgentLost { session } => self.desk.disconnect(*session),
            Input::Peer { message: PeerMessage::Coordinators(known), .. } => {
                let state = self.control.state();
                let unheard = |replica| state.membership(Member::Coordinator(replica)) == Membership::Unknown;
                let known =
                    known.iter().map(|(address, _)| address).filter(|address| unheard(address.replica));
                self.around.peers.introduce(known);
            }
            _ => {}
        }
        self.control.handle(now, input);
    }

    fn tick(&mut self, now: Now) {
        for node in self.around.inbox.take_heard() {
            self.control.handle(now, Input::AgentHeard { node });
        }
        self.ticks += 1;
        if self.ticks % SPACE_TICKS == 1
            && let Some(room) = self.around.space.look()
        {
            self.control.handle(now, Input::Room(room));
        }
        self.control.handle(now, Input::Tick);
    }

    fn perform(&mut self, action: Action) {
        match self.desk.deliver(action) {
            None => {}
            Some(Action::ToPeer { to, message }) => self.around.peers.send(to, message),
            Some(Action::Members) => self.members(),
            Some(Action::Admitted(members)) => self.around.gate.add(self.control.state(), &members),
            Some(Action::SendCa { to, der }) => {
                if let Some(key) = self.around.trust.key_of(&der) {
                    info!("{to} gets the key of the cluster's next CA");
                    self.around.peers.send(to, PeerMessage::Ca { der, key });
                }
            }
            Some(Action::KeepCa { der, key }) => match self.around.trust.keep(der.clone(), &key) {
                Ok(()) => self.control.handle(now(self.begun), Input::HoldsCa(der)),
                Err(error) => warn!("the key of the cluster's next CA was not kept: {error:#}"),
            },
            Some(Action::Decided(why)) => info!("{why}"),
            Some(Action::Alarm(what)) => self.alarm(&what),
            Some(Action::Removed(why)) => self.removed = Some(why),
            Some(other) => tracing::error!("nobody carries out {other:?}; this is a bug in fleet"),
        }
    }

    /// The same is not said again and again.
    fn alarm(&mut self, what: &str) {
        let now = Instant::now();
        if self.alarmed.as_ref().is_none_or(|(said, at)| said != what || now >= *at + ALARM_EVERY) {
            error!("{what}");
            self.alarmed = Some((what.to_owned(), now));
        }
    }

    /// Coordinators, addresses or revocations may be others now.
    fn members(&mut self) {
        let state = self.control.state();
        self.around.gate.follow(state);
        let addresses = addresses(state);
        let unheard = |replica| state.membership(Member::Coordinator(replica)) == Membership::Unknown;
        self.around.peers.keep_introduced(unheard);
        self.around.peers.follow(&addresses);
        self.around.peers.tell(self.around.gate.roster());
        self.cas();
        if addresses.is_empty() || *self.around.addresses.borrow() == addresses {
            return;
        }
        self.desk.say_to_all(&ToAgent::Coordinators(addresses.clone()));
        self.around.addresses.send_replace(addresses);
    }
}

impl<D: Disk> Driver<D> {
    /// Which CAs count may be others now.
    fn cas(&mut self) {
        let cas = self.control.state().cas().clone();
        if *self.around.cas.borrow() == cas {
            return;
        }
        if let Some(trusted) = cas.trusted() {
            self.desk.say_to_all(&ToAgent::Authorities { mark: trusted.mark() });
        }
        self.around.cas.send_replace(cas);
    }
}

fn addresses(state: &State) -> Vec<CoordinatorAddress> {
    state.replicas().values().map(|replica| replica.address.clone()).collect()
}
