//! The links to the other coordinators: one connection from here to each of them, with raft's messages in order on one stream and
//! pieces of snapshots on another.
//!
//! Nothing here makes the raft thread wait: what finds no room is dropped, and sent again by who needs it. A link is made anew as soon as
//! it is lost, and at once when the other side shows that it is there by connecting itself.

use super::gate::Gate;
use super::inbox::{Event, Inbox};
use super::trust::Trust;
use crate::control::{Input, PeerMessage};
use fleet_common::codec::{self, Frames};
use fleet_common::ids::ReplicaId;
use fleet_common::net::{self, KeyHash, NetError};
use fleet_common::protocol::{CoordinatorAddress, Member, PROTOCOL_VERSION, PeerHello};
use quinn::{Connection, RecvStream, SendStream};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

/// Messages that wait for a stream: some seconds of a busy leader. A peer that is slower gets raft's messages again later.
const QUEUE_MAX: usize = 1_024;
/// Pieces of a snapshot, asked for one by one.
const BULK_MAX: usize = 16;
/// Messages that are written at once.
const WRITE_MAX: usize = 128;
/// Coordinators that are only known from others.
const INTRODUCED_MAX: usize = 32;
/// Between attempts to connect.
const RETRY: Duration = Duration::from_millis(100);
/// Between lines in the log about a peer that does not answer.
const SAY_EVERY: u32 = 300;
/// Raft's messages first.
const RAFT_PRIORITY: i32 = 1;
/// Between looks at whether last words have arrived.
const FINISHED_EVERY: Duration = Duration::from_millis(5);
/// Bytes taken from a stream at once.
const READ_MAX: usize = 256 << 10;

/// Wakes the links to coordinators that connect to this one.
pub type Knocks = Arc<Mutex<BTreeMap<ReplicaId, Arc<Knock>>>>;

/// What a coordinator shows by connecting to this one.
#[derive(Default)]
pub struct Knock {
    /// It is there.
    came: Notify,
    /// It is another process than before: a connection to the earlier one is dead.
    anew: Notify,
    process: AtomicU64,
}

impl Knock {
    fn says_hello(&self, process: u64) {
        if ![0, process].contains(&self.process.swap(process, Ordering::Relaxed)) {
            self.anew.notify_waiters();
        }
    }
}

/// What links are made of.
#[derive(Clone)]
pub struct Means {
    pub runtime: tokio::runtime::Handle,
    pub inbox: Inbox,
    pub trust: Arc<Trust>,
    pub gate: Arc<Gate>,
    pub knocks: Knocks,
    /// Of this coordinator's process.
    pub process: u64,
}

/// Belongs to the raft thread.
pub struct Peers {
    me: ReplicaId,
    links: BTreeMap<ReplicaId, Link>,
    /// Of which the state has not heard, and others have.
    introduced: BTreeMap<ReplicaId, CoordinatorAddress>,
    means: Means,
}

struct Link {
    raft: mpsc::Sender<PeerMessage>,
    bulk: mpsc::Sender<PeerMessage>,
    up: Arc<AtomicBool>,
    address: watch::Sender<String>,
    /// Last words were sent: the task ends when they have arrived.
    is_last: bool,
    task: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peers {
    /// `seeds` are where others were when this coordinator was last told.
    pub fn new(me: ReplicaId, seeds: &[CoordinatorAddress], means: Means) -> Peers {
        let mut peers = Peers { me, links: BTreeMap::new(), introduced: BTreeMap::new(), means };
        peers.follow(seeds);
        peers
    }

    /// Takes over where the others are. Without any, as before the first snapshot, what is known stays.
    pub fn follow(&mut self, addresses: &[CoordinatorAddress]) {
        if addresses.is_empty() {
            return;
        }
        let gone = |replica: &ReplicaId| {
            addresses.iter().all(|address| address.replica != *replica)
                && !self.introduced.contains_key(replica)
        };
        for replica in self.links.keys().filter(|replica| gone(replica)).copied().collect::<Vec<_>>() {
            self.links.remove(&replica);
            self.means.knocks.lock().unwrap_or_else(PoisonError::into_inner).remove(&replica);
        }
        addresses.iter().for_each(|address| self.reach(address));
    }

    fn reach(&mut self, address: &CoordinatorAddress) {
        if address.replica == self.me {
            return;
        }
        match self.links.get(&address.replica) {
            Some(link) => {
                link.address.send_if_modified(|known| {
                    let moved = *known != address.member;
                    known.clone_from(&address.member);
                    moved
                });
            }
            None => drop(self.links.insert(address.replica, self.link(address))),
        }
    }

    /// Coordinators that joined while this one was away, as others know them: without them it may never hear of them, should one of them
    /// lead.
    pub fn introduce<'a>(&mut self, unheard: impl Iterator<Item = &'a CoordinatorAddress>) {
        for address in unheard {
            if self.introduced.len() < INTRODUCED_MAX || self.introduced.contains_key(&address.replica) {
                self.introduced.insert(address.replica, address.clone());
                self.reach(address);
            }
        }
    }

    /// Those of whom the state has heard are in it, or gone.
    pub fn keep_introduced(&mut self, unheard: impl Fn(ReplicaId) -> bool) {
        self.introduced.retain(|replica, _| unheard(*replica));
    }

    fn link(&self, to: &CoordinatorAddress) -> Link {
        let (raft, raft_queue) = mpsc::channel(QUEUE_MAX);
        let (bulk, bulk_queue) = mpsc::channel(BULK_MAX);
        let (address, at) = watch::channel(to.member.clone());
        let (up, knock) = (Arc::new(AtomicBool::new(false)), Arc::new(Knock::default()));
        self.means.knocks.lock().unwrap_or_else(PoisonError::into_inner).insert(to.replica, knock.clone());
        let keeper = Keeper {
            to: to.replica,
            at,
            raft: raft_queue,
            bulk: bulk_queue,
            up: up.clone(),
            knock,
            means: self.means.clone(),
        };
        let task = self.means.runtime.spawn(keeper.run()).abort_handle();
        Link { raft, bulk, up, address, is_last: false, task }
    }

    /// Says who the coordinators are. Whoever connects later is told then.
    pub fn tell(&mut self, coordinators: Vec<(CoordinatorAddress, KeyHash)>) {
        for to in self.links.keys().copied().collect::<Vec<_>>() {
            self.send(to, PeerMessage::Coordinators(coordinators.clone()));
        }
    }

    /// Sends if it can. What is lost is sent again by who needs it, but for last words, which wait for a connection: see [`Self::finish`].
    pub fn send(&mut self, to: ReplicaId, message: PeerMessage) {
        let Some(link) = self.links.get_mut(&to) else { return };
        let last = matches!(message, PeerMessage::Stops { .. });
        link.is_last |= last;
        // Raft's messages to one that is not there are stale when it comes.
        if !link.up.load(Ordering::Relaxed) && !last {
            return;
        }
        let bulky =
            matches!(message, PeerMessage::Chunk(_) | PeerMessage::Rows(_) | PeerMessage::Output { .. });
        let queue = if bulky { &link.bulk } else { &link.raft };
        let _ = queue.try_send(message);
    }

    /// Makes the calling thread wait until the others have this coordinator's last words, if it has said any, and no longer than
    /// `patience`.
    pub fn finish(&mut self, patience: Duration) {
        self.links.retain(|_, link| link.is_last);
        let end = Instant::now() + patience;
        while Instant::now() < end && !self.links.values().all(|link| link.task.is_finished()) {
            std::thread::sleep(FINISHED_EVERY);
        }
    }
}

/// The task that keeps one link.
struct Keeper {
    to: ReplicaId,
    at: watch::Receiver<String>,
    raft: mpsc::Receiver<PeerMessage>,
    bulk: mpsc::Receiver<PeerMessage>,
    up: Arc<AtomicBool>,
    knock: Arc<Knock>,
    means: Means,
}

impl Keeper {
    async fn run(mut self) {
        let (mut failures, mut attempts) = (0u32, 0u32);
        loop {
            let address = self.at.borrow_and_update().clone();
            let attempt = tokio::select! {
                attempt = connect(&address, self.to, &self.means, attempts) => attempt,
                // It has just come up, or moved: what was sent before that is lost.
                () = self.knock.came.notified() => continue,
                _ = self.at.changed() => continue,
            };
            match attempt {
                Ok(connection) => {
                    info!("connected to {} at {address}", self.to);
                    failures = 0;
                    let ended = self.serve(&connection).await;
                    self.up.store(false, Ordering::Relaxed);
                    connection.close(net::DONE, b"");
                    let Err(why) = ended else { return };
                    info!("lost the connection to {}: {why}", self.to);
                    let _ = self.means.inbox.offer(vec![Event::Input(Input::PeerLost(self.to))]);
                }
                Err(NetError::Revoked(why)) => {
                    // For ever: there is nothing more to say to each other.
                    warn!("{} says: {why}", self.to);
                    return self.means.inbox.must_take(Event::Input(Input::RefusedBy(self.to)));
                }
                Err(error) => {
                    if failures.is_multiple_of(SAY_EVERY) {
                        warn!("cannot reach {}: {error}", self.to);
                    }
                    failures += 1;
                    attempts = attempts.wrapping_add(1);
                    debug!("no connection to {}: {error}", self.to);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = self.knock.came.notified() => {}
            }
        }
    }

    /// Writes what is to be sent until the last words have arrived, or the connection ends, and says why it did.
    async fn serve(&mut self, connection: &Connection) -> Result<(), String> {
        let streams = async {
            let (raft, bulk) = (connection.open_uni().await?, connection.open_uni().await?);
            let _ = raft.set_priority(RAFT_PRIORITY); // only a closed stream has none
            Ok::<_, quinn::ConnectionError>((raft, bulk))
        };
        let (raft, bulk) = match streams.await {
            Ok(streams) => streams,
            Err(error) => return Err(net::describe(&error)),
        };
        let mut first = vec![PeerMessage::Coordinators(self.means.gate.roster())];
        // What waits is of an earlier connection.
        while let Ok(message) = self.raft.try_recv() {
            first.extend(matches!(message, PeerMessage::Stops { .. }).then_some(message));
        }
        while self.bulk.try_recv().is_ok() {}
        self.up.store(true, Ordering::Relaxed);
        let mut address = self.at.clone();
        tokio::select! {
            ended = pump(first, &mut self.raft, raft, self.means.process) => ended,
            ended = pump(Vec::new(), &mut self.bulk, bulk, self.means.process) => ended,
            () = self.knock.anew.notified() => Err("its process has started anew".to_owned()),
            error = connection.closed() => Err(net::describe(&error)),
            _ = address.changed() => Err("it has moved".to_owned()),
        }
    }
}

/// Secrets go over this connection: who answers must have the key that the cluster's records say, as far as they are known here. Where they
/// are not, the cluster has said that this coordinator is there.
async fn connect(address: &str, to: ReplicaId, means: &Means, attempt: u32) -> Result<Connection, NetError> {
    let identity = means.trust.for_attempt(attempt).map_err(NetError::Tls)?;
    let connection = net::connect(&[address.to_owned()], &identity).await?;
    let (peer, certificate) = (net::remote(&connection), net::remote_certificate(&connection));
    let certificate = certificate.map_err(NetError::Refused)?;
    let key = net::key_hash(&certificate).map_err(NetError::Refused)?;
    let known = means.gate.known(Member::Coordinator(to)).is_some_and(|admitted| admitted.key == key);
    let proven = known || means.trust.is_accepted(&certificate);
    match peer {
        Ok(peer) if peer.member == Member::Coordinator(to) && proven && means.gate.may_be(to, &key) => {
            means.gate.vouch([(to, key)]);
            Ok(connection)
        }
        Ok(peer) => {
            connection.close(net::REFUSED, b"another coordinator is expected here");
            let why = format!(
                "{address}: {} answers there, not {to} with the key that it joined with",
                peer.member
            );
            Err(NetError::Refused(why))
        }
        Err(why) => Err(NetError::Refused(why)),
    }
}

/// Writes messages, as many at once as wait, until last words have arrived.
async fn pump(
    first: Vec<PeerMessage>,
    queue: &mut mpsc::Receiver<PeerMessage>,
    mut stream: SendStream,
    process: u64,
) -> Result<(), String> {
    let (mut messages, mut bytes) = (first, Vec::new());
    let hello = PeerHello { version: PROTOCOL_VERSION, process };
    codec::write_frame(&mut stream, &hello).await.map_err(|error| error.to_string())?;
    while !messages.is_empty() || queue.recv_many(&mut messages, WRITE_MAX).await > 0 {
        let mut last = false;
        for message in messages.drain(..) {
            last |= matches!(message, PeerMessage::Stops { .. });
            if let Err(error) = codec::append_frame(&message, &mut bytes) {
                warn!("a message to another coordinator cannot be sent: {error}");
            }
        }
        stream.write_all(&bytes).await.map_err(|error| error.to_string())?;
        if last {
            stream.finish().map_err(|error| error.to_string())?;
            stream.stopped().await.map_err(|error| error.to_string())?;
            return Ok(());
        }
        bytes.clear();
        bytes.shrink_to(READ_MAX);
    }
    Err("this coordinator stops".to_owned())
}

/// Serves a connection that another coordinator made to this one, until it ends.
pub async fn serve(
    inbox: &Inbox,
    knocks: &Knocks,
    gate: &Arc<Gate>,
    connection: &Connection,
    from: ReplicaId,
) {
    let knock = knocks.lock().unwrap_or_else(PoisonError::into_inner).get(&from).cloned();
    let knock = knock.unwrap_or_default();
    knock.came.notify_waiters();
    let mut streams = tokio::task::JoinSet::new();
    while let Ok(stream) = connection.accept_uni().await {
        let (inbox, gate, connection) = (inbox.clone(), gate.clone(), connection.clone());
        let knock = knock.clone();
        streams.spawn(async move {
            if let Err(why) = listen(&inbox, &gate, &knock, stream, from).await {
                connection.close(net::REFUSED, why.as_bytes());
            }
        });
    }
    // What came before the end is read to its end.
    while streams.join_next().await.is_some() {}
}

/// Hands in what comes. Where there is no room it is dropped, as a network would.
async fn listen(
    inbox: &Inbox,
    gate: &Gate,
    knock: &Knock,
    mut stream: RecvStream,
    from: ReplicaId,
) -> Result<(), String> {
    let mut frames = Frames::new(codec::FRAME_MAX);
    let mut greeted = false;
    while let Ok(Some(piece)) = stream.read_chunk(READ_MAX, true).await {
        frames.push(&piece.bytes);
        if !greeted {
            let hello = frames.next_versioned::<PeerHello>().map_err(|error| error.to_string())?;
            greeted = hello.is_some();
            let Some(hello) = hello else { continue };
            knock.says_hello(hello.process);
        }
        let mut events = Vec::new();
        while let Some(message) = frames.next_frame().map_err(|error| error.to_string())? {
            if let PeerMessage::Coordinators(known) = &message {
                gate.vouch(known.iter().map(|(address, key)| (address.replica, *key)));
            }
            events.push(Event::Input(Input::Peer { from, message }));
        }
        if !events.is_empty()
            && let Err(lost) = inbox.offer(events)
        {
            debug!("{} messages of {from} found no room", lost.len());
        }
    }
    Ok(())
}
