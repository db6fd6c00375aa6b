//! The coordinator as a process: a raft thread, a thread for each of its two sockets, and HTTP for people beside the clients' one.
//!
//! Everything here may be lost and started again: what is outstanding follows from the state and from what agents say when they
//! come back.

mod agents;
pub mod backup;
pub mod behind;
mod calls;
mod changes;
mod clients;
mod credentials;
mod curves;
mod custody;
mod desk;
mod door;
mod driver;
mod entrance;
mod gate;
mod http;
mod inbox;
mod joins;
mod metrics;
pub mod operator;
mod peers;
mod places;
pub mod restore;
mod rotation;
mod setup;
mod sockets;
mod space;
mod streams;
mod tokens;
mod trust;

use crate::cluster::authorities::Cas;
use crate::control::{Control, Myself, Status};
use crate::raft::history::History;
use crate::targets;
use anyhow::{Context, Result, bail};
use calls::Calls;
use door::Door;
use driver::{Surroundings, Thread};
use fleet_common::codec::FRAME_MAX;
use fleet_common::endpoint::Endpoint;
use fleet_common::http::host_of;
use fleet_common::ids::ReplicaId;
use fleet_common::metrics::target;
use fleet_common::net::{
    self, Accepted, CERTIFICATE_LIFE, Identity, JoinToken, KeyHash, NetError, Peer, Socket, Turned,
};
use fleet_common::process;
use fleet_common::protocol::{CoordinatorAddress, Member, Role};
use gate::{Gate, Verdict};
use inbox::Inbox;
use metrics::{Metrics, Refused};
use peers::{Knocks, Peers};
pub use places::Places;
use sockets::Lane;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tracing::{debug, info, warn};
use trust::Trust;

/// Room for large requests that are read or answered at the same time.
const LARGE_BYTES: usize = 8 * FRAME_MAX;
/// For a cluster of one to lead itself.
const ALONE_DEADLINE: Duration = Duration::from_secs(10);
/// For a look at a newer state, of which who connects hears before he gives up.
const LOOK_DEADLINE: Duration = Duration::from_millis(800);
/// For another coordinator to take over from one that is stopped.
const HAND_OVER: Duration = Duration::from_millis(500);

/// What `coordinator start` was told.
#[derive(Clone, Debug)]
pub struct Options {
    pub data_dir: PathBuf,
    /// Where to listen. What is not given is as at the last start.
    pub places: Places,
    /// Refuse to make a new cluster.
    pub expect_existing: bool,
    /// In listings.
    pub name: Option<String>,
    pub certificate_life: Duration,
}

impl Options {
    /// On loopback, with free ports.
    pub fn local(data_dir: PathBuf) -> Options {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Options {
            data_dir,
            places: Places { listen: Some(any), http: Some(any), ..Places::default() },
            expect_existing: false,
            name: None,
            certificate_life: CERTIFICATE_LIFE,
        }
    }
}

/// What all connections share.
pub(crate) struct Shared {
    me: ReplicaId,
    calls: Calls,
    gate: Arc<Gate>,
    trust: Arc<Trust>,
    knocks: Knocks,
    addresses: watch::Receiver<Vec<CoordinatorAddress>>,
    status: watch::Receiver<Status>,
    metrics: Metrics,
    curves: curves::Curves,
    streams: streams::Streams,
    large: Arc<Semaphore>,
    /// Host names under which HTTP may be asked, besides loopback.
    hosts: Vec<String>,
    door: Door,
    asked: targets::Asked,
}

/// A running coordinator. Dropping it without `stop` is like a crash, which is safe.
pub struct Coordinator {
    endpoint: Endpoint,
    inbox: Inbox,
    status: watch::Receiver<Status>,
    sockets: [quinn::Endpoint; 2],
    thread: Option<Thread>,
    lanes: [Lane; 2],
    _lock: std::fs::File,
}

impl Coordinator {
    /// Becomes a replica of the cluster of this token, which is a coordinator's, and starts. The directory must be empty.
    pub async fn join(addrs: &[String], token: &JoinToken, options: Options) -> Result<Coordinator> {
        let dir = &options.data_dir;
        let lock = setup::lock_empty(dir)?;
        options.places.or_as_before(dir)?.check()?;
        let name = options.name.clone().unwrap_or_else(|| "coordinator".to_owned());
        setup::begin_joining(dir)?;
        let joined = match net::join(addrs, token, &name).await {
            Ok(joined) => joined,
            Err(error) => {
                setup::give_up_joining(dir);
                return Err(error.into());
            }
        };
        setup::store_joined(dir, &joined)?;
        info!("joined cluster {} as {}", joined.identity.cluster_id, joined.identity.member);
        drop(lock);
        Coordinator::start(Options { expect_existing: true, ..options }).await
    }

    /// Starts on a data directory, making a new cluster if it is empty. Returns when it listens; a cluster of one leads then.
    pub async fn start(options: Options) -> Result<Coordinator> {
        let places = options.places.or_as_before(&options.data_dir)?;
        places.check()?;
        let opened = setup::open(&options)?;
        let (clients, members) = (Lane::start("clients")?, Lane::start("members")?);
        let sockets =
            sockets::listen(&places, &options.data_dir, &opened.identity, &clients, &members).await?;
        let me = opened.replica;
        let address = CoordinatorAddress {
            replica: me,
            client: sockets.client_address.clone(),
            member: sockets.member_address.clone(),
        };
        if let setup::Begin::Continue(_) = opened.begin {
            refuse_a_copy(&options.data_dir, &address, &opened.identity).await?;
        }
        places.store(&options.data_dir)?;
        let name = setup::name(&options, me);
        let seeds = opened.coordinators.clone();
        let history = History::new(opened.disk.clone());
        let metrics = Metrics::new(opened.disk.syncs().clone(), space::probe(&options.data_dir));
        let (lock, custody, identity, replica) = opened.begin(&address, &name)?;
        let ca = custody.present().clone();

        let http_at = sockets.http.local_addr()?;
        let is_guarded = !http_at.ip().is_loopback();
        let http = targets::said(&reached_at(http_at, &address.client), is_guarded);
        let endpoint = Endpoint {
            pid: std::process::id(),
            pid_start: process::started(std::process::id()),
            replica: me,
            quic: address.client.clone(),
            member: address.member.clone(),
            http: http_at.to_string(),
            cluster_id: ca.cluster_id().to_owned(),
            ca_fingerprint: ca.fingerprint(),
            coordinators: seeds.iter().map(|seed| seed.client.clone()).collect(),
        };
        let dir = options.data_dir.clone();
        let (inbox, gate) = (Inbox::default(), Gate::new(ca.cluster_id(), me));
        let trust = Arc::new(Trust::new(custody, options.certificate_life, identity, &dir));
        let knocks = Knocks::default();
        let (publish_addresses, addresses) = watch::channel(Vec::new());
        let (publish_cas, cas) = watch::channel(Cas::default());
        let means = peers::Means {
            runtime: members.handle().clone(),
            inbox: inbox.clone(),
            trust: trust.clone(),
            gate: gate.clone(),
            knocks: knocks.clone(),
            process: rand::random::<u64>().max(1),
        };
        let around = Surroundings {
            inbox: inbox.clone(),
            gate: gate.clone(),
            peers: Peers::new(me, &seeds, means),
            space: space::Watermark::new(space::probe(&dir)),
            addresses: publish_addresses,
            trust: trust.clone(),
            cas: publish_cas,
            round: metrics.round.clone(),
        };
        let is_alone = replica.is_alone();
        let begun = Instant::now();
        let myself = Myself {
            address,
            name,
            version: setup::VERSION.to_owned(),
            http: http.clone(),
            seeds: seeds.iter().map(|seed| seed.replica).filter(|seed| *seed != me).collect(),
        };
        let control = Control::new(replica, history, myself, rand::random(), driver::now(begun));
        let (status, thread) =
            driver::spawn(control, begun, around).context("cannot start the raft thread")?;

        let hosts = places.hosts(&endpoint);
        let door = match is_guarded {
            false => Door::Loopback,
            true => Door::guarded(trust.clone(), gate.clone(), hosts.clone(), places.certificate())?,
        };
        let shared = Arc::new(Shared {
            me,
            calls: Calls::new(inbox.clone()),
            gate,
            trust,
            knocks,
            addresses,
            status: status.clone(),
            metrics,
            curves: curves::Curves::default(),
            streams: streams::Streams::default(),
            large: Arc::new(Semaphore::new(LARGE_BYTES)),
            hosts,
            door,
            asked: targets::Asked { host: host_of(&endpoint.quic).to_owned(), http },
        });
        let both = [(Socket::Clients, sockets.clients.clone()), (Socket::Members, sockets.members.clone())];
        members.handle().spawn(accept(shared.clone(), Socket::Members, sockets.members.clone()));
        clients.handle().spawn(accept(shared.clone(), Socket::Clients, sockets.clients.clone()));
        let http = sockets.http.into_std()?;
        clients.handle().spawn(rotation::follow(shared.clone(), cas.clone(), both, dir.clone()));
        clients.handle().spawn(streams::look_out(shared.clone()));
        let serving = shared.clone();
        clients.handle().spawn(async move {
            match tokio::net::TcpListener::from_std(http) {
                Ok(listener) => http::run(serving, listener).await,
                Err(error) => warn!("HTTP is not served: {error}"),
            }
        });

        let coordinator = Coordinator {
            endpoint,
            inbox,
            status,
            sockets: [sockets.clients, sockets.members],
            thread: Some(thread),
            lanes: [clients, members],
            _lock: lock,
        };
        coordinator.ready(&dir, shared, cas, is_alone).await
    }

    /// Lets others find it. A cluster of one is ready when it leads and has its credentials; a replica among others when it listens.
    async fn ready(
        mut self,
        dir: &std::path::Path,
        shared: Arc<Shared>,
        cas: watch::Receiver<Cas>,
        is_alone: bool,
    ) -> Result<Coordinator> {
        if is_alone {
            let mut status = self.status.clone();
            let leads = status.wait_for(|status| status.leading_since_ms.is_some());
            let wait = timeout(ALONE_DEADLINE, async {
                leads.await.context("the raft thread ended while starting")?;
                credentials::write(dir, &shared).await
            });
            let thread = self.thread.as_mut().context("it was just started")?;
            let waited = tokio::select! {
                waited = wait => waited,
                error = thread.failed() => return Err(error),
            };
            match waited {
                Ok(done) => done?,
                Err(_) => {
                    let why = self.status.borrow().read_only.clone();
                    let why = why.map_or_else(String::new, |why| format!(": {why}"));
                    bail!("no leader after {} s{why}", ALONE_DEADLINE.as_secs());
                }
            }
        }
        let addresses = shared.addresses.clone();
        self.endpoint.coordinators =
            client_addresses(&addresses.borrow(), self.endpoint.coordinators.clone());
        self.endpoint.store(dir)?;
        let lane = self.lanes[0].handle();
        lane.spawn(keep_endpoint(dir.to_owned(), self.endpoint.clone(), addresses, cas));
        lane.spawn(credentials::keep(dir.to_owned(), shared));
        info!(
            "{} is listening on {} (members {}, HTTP {}); join a worker with: worker join {} --token-file {}",
            self.endpoint.replica,
            self.endpoint.quic,
            self.endpoint.member,
            self.endpoint.http,
            self.endpoint.quic,
            credentials::token_path(dir, Role::Worker).display()
        );
        Ok(self)
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Returns when the coordinator cannot go on, with the reason.
    pub async fn failed(&mut self) -> anyhow::Error {
        match &mut self.thread {
            Some(thread) => thread.failed().await,
            None => std::future::pending().await,
        }
    }

    /// Stops cleanly: leadership goes to another one, peers are told, the log is closed.
    pub async fn stop(mut self) {
        let leads = |status: &Status| status.leading_since_ms.is_some();
        if leads(&self.status.borrow()) {
            self.inbox.must_take(inbox::Event::Input(crate::control::Input::StepDown));
            // One that is alone, or whose others are away, goes anyway.
            let _ = timeout(HAND_OVER, self.status.wait_for(|status| !leads(status))).await;
        }
        for socket in &self.sockets {
            socket.close(net::DONE, b"the coordinator is stopping");
        }
        if let Some(thread) = self.thread.take() {
            thread.stop().await;
        }
        for socket in &self.sockets {
            // Peers that are gone already do not answer.
            let _ = timeout(HAND_OVER, socket.wait_idle()).await;
        }
    }
}

/// A replica that listens elsewhere than at its last start asks there first: should it answer itself, this is a copy of its directory.
async fn refuse_a_copy(dir: &std::path::Path, now: &CoordinatorAddress, me: &Identity) -> Result<()> {
    let Some(before) = setup::last_endpoint(dir) else { return Ok(()) };
    if before.replica != now.replica || before.member == now.member {
        return Ok(());
    }
    match net::connect(std::slice::from_ref(&before.member), me).await {
        Err(net::NetError::Refused(why)) if why.contains(gate::TWICE) => {
            bail!("{why}; {} is one", dir.display())
        }
        // Nobody is there any more, or somebody else.
        _ => Ok(()),
    }
}

/// Keeps in the data directory where the coordinators are and which CA they have: for `fleet` on this machine, and for the next start.
async fn keep_endpoint(
    dir: PathBuf,
    mut endpoint: Endpoint,
    mut addresses: watch::Receiver<Vec<CoordinatorAddress>>,
    mut cas: watch::Receiver<Cas>,
) {
    loop {
        let (known, ca) = (addresses.borrow_and_update().clone(), cas.borrow_and_update().der.clone());
        if !ca.is_empty() {
            endpoint.ca_fingerprint = net::fingerprint(&ca);
        }
        if !known.is_empty() {
            endpoint.coordinators = client_addresses(&known, Vec::new());
            let kept = setup::store_coordinators(&dir, &known).and_then(|()| Ok(endpoint.store(&dir)?));
            if let Err(error) = kept {
                warn!("where the coordinators are was not written down: {error:#}");
            }
        }
        let changed = tokio::select! {
            changed = addresses.changed() => changed,
            changed = cas.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

fn client_addresses(known: &[CoordinatorAddress], otherwise: Vec<String>) -> Vec<String> {
    // One that was just restored from a backup has no address yet.
    let known: Vec<String> =
        known.iter().map(|address| address.client.clone()).filter(|address| !address.is_empty()).collect();
    if known.is_empty() { otherwise } else { known }
}

async fn accept(shared: Arc<Shared>, socket: Socket, endpoint: quinn::Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let proven = incoming.remote_address_validated();
        match shared.gate.incoming(socket, incoming.remote_address().ip(), proven) {
            Verdict::Shake(pass) => drop(tokio::spawn(serve(shared.clone(), socket, incoming, pass))),
            // One that cannot be asked to prove itself has done so.
            Verdict::Prove => drop(incoming.retry()),
            Verdict::Refuse => {
                shared.metrics.refused(Refused::Busy);
                incoming.refuse();
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, socket: Socket, incoming: quinn::Incoming, shaking: gate::Pass) {
    let from = incoming.remote_address();
    let mark = shared.trust.authorities().mark();
    let accepted =
        net::accept(incoming, socket, mark, |peer, key| admit(&shared, socket, from.ip(), peer, key)).await;
    drop(shaking);
    let (connection, accepted) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => {
            shared.metrics.refused(why_refused(&error));
            return debug!("{from} did not get in: {error}");
        }
    };
    let peer = match accepted {
        Accepted::Join => {
            return match shared.gate.joiner(from.ip()) {
                Some(pass) => joins::serve(&shared, &connection, pass).await,
                None => {
                    shared.metrics.refused(Refused::Busy);
                    connection.close(net::BUSY, b"too many are joining at once; try again");
                }
            };
        }
        Accepted::Peer(peer) => peer,
    };
    let Some((_pass, open)) = shared.gate.enter(socket, peer.member, &connection) else {
        return shared.metrics.refused(Refused::Busy);
    };
    rotation::note(&shared, peer.member, &connection);
    match (socket, peer.member) {
        (Socket::Clients, member) => {
            clients::serve(shared.clone(), &connection, member, peer.name, open).await
        }
        (Socket::Members, Member::Worker(node)) => {
            agents::serve(&shared, &connection, node, &peer.name).await
        }
        (Socket::Members, Member::Coordinator(replica)) => {
            net::widen(&connection);
            peers::serve(shared.calls.inbox(), &shared.knocks, &shared.gate, &connection, replica).await;
        }
        // The gate lets none in.
        (Socket::Members, Member::Client(_)) => connection.close(net::REFUSED, b"not here"),
    }
}

/// Where others reach what listens here; `client` is where they reach its other socket.
fn reached_at(listening: SocketAddr, client: &str) -> String {
    match listening.ip().is_unspecified() {
        true => target::join(host_of(client), listening.port()),
        false => listening.to_string(),
    }
}

fn why_refused(error: &NetError) -> Refused {
    match error {
        NetError::Lost(_) => Refused::Handshake,
        NetError::Later(_) => Refused::Later,
        NetError::Revoked(_) => Refused::Revoked,
        _ => Refused::Forbidden,
    }
}

/// Whether the holder of a certificate is let in: what he is to this state, or else to one that has everything which was acknowledged.
async fn admit(
    shared: &Shared,
    socket: Socket,
    from: IpAddr,
    peer: Peer,
    key: KeyHash,
) -> Result<(), Turned> {
    if shared.gate.admit(socket, &peer, &key)? {
        return Ok(());
    }
    let later =
        |why: &str| Turned::Later(format!("whether {} is a member cannot be told: {why}", peer.member));
    if shared.status.borrow().leader.is_none() {
        return Err(later("no coordinator leads at the moment; try again, or ask another one"));
    }
    let Some(_pass) = shared.gate.stranger(from) else { return Err(later("too much is asked; try again")) };
    match timeout(LOOK_DEADLINE, shared.calls.look()).await {
        Ok(Ok(())) => {}
        Ok(Err(refusal)) => return Err(later(&refusal.message)),
        Err(_) => return Err(later("no coordinator leads at the moment; try again, or ask another one")),
    }
    match shared.gate.admit(socket, &peer, &key)? {
        true => Ok(()),
        false => {
            warn!("{from} shows a certificate of {}, whom this cluster never admitted", peer.member);
            Err(gate::stranger(peer.member))
        }
    }
}
