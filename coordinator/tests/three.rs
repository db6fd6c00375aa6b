//! Three coordinators in one process, over their real protocols: joining, being asked anywhere, agents anywhere, losing one.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::*;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{self, ClusterCa, Identity};
use fleet_common::protocol::*;
use fleet_coordinator::server::{Coordinator, Options, backup, restore};
use std::time::{Duration, Instant};
use tempfile::{TempDir, tempdir};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Three {
    dirs: Vec<TempDir>,
    coordinators: Vec<Coordinator>,
}

/// Waits until an answer is as wanted.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}

impl Three {
    async fn start() -> Three {
        let dir = tempdir().unwrap();
        let first = Coordinator::start(options(dir.path())).await.unwrap();
        let mut three = Three { dirs: vec![dir], coordinators: vec![first] };
        for _ in 0..2 {
            three.add().await;
        }
        three
    }

    /// Joins one more, and waits until it votes.
    async fn add(&mut self) {
        let mut client = self.client(0).await;
        let request = Request::CreateToken { role: Role::Coordinator, ttl_s: 60, uses: 1 };
        let Reply::Token { text } = client.ask(request).await else { panic!() };
        let token = text.parse().unwrap();
        let dir = tempdir().unwrap();
        let joined = Coordinator::join(&self.client_addresses(), &token, options(dir.path())).await.unwrap();
        let id = joined.endpoint().replica;
        self.dirs.push(dir);
        self.coordinators.push(joined);
        self.until_votes(&mut client, id).await;
    }

    async fn until_votes(&self, client: &mut Client, id: ReplicaId) {
        until("the new replica votes", async || match client.ask(Request::Coordinators).await {
            Reply::Coordinators(views) => {
                views.iter().any(|view| view.address.replica == id && view.voter).then_some(())
            }
            Reply::Refused(refusal) if refusal.kind.is_passing() => None,
            other => panic!("{other:?}"),
        })
        .await;
    }

    fn client_addresses(&self) -> Vec<String> {
        self.coordinators.iter().map(|coordinator| coordinator.endpoint().quic.clone()).collect()
    }

    /// A client of this one of them.
    async fn client(&self, index: usize) -> Client {
        let dir = self.dirs[0].path();
        let identity = Identity::load(&dir.join("client")).unwrap().unwrap();
        let mut client = Client::connect(&identity, &self.coordinators[index]).await;
        client.id = fleet_common::ids::ClientId(rand_id());
        client
    }

    fn leader(&self) -> impl AsyncFnMut() -> Option<ReplicaId> {
        let identity = Identity::load(&self.dirs[0].path().join("client")).unwrap().unwrap();
        let addresses = self.client_addresses();
        async move || {
            let connection = net::connect(&addresses, &identity).await.ok()?;
            let mut client = Client::over(connection);
            match client.ask(Request::ClusterStatus).await {
                Reply::Cluster(view) => view.leader,
                _ => None,
            }
        }
    }
}

fn rand_id() -> u128 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static LAST: AtomicU64 = AtomicU64::new(100);
    LAST.fetch_add(1, Ordering::Relaxed).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_of_three_answers_anybody_and_one_may_be_lost() {
    let mut three = Three::start().await;
    for index in 0..3 {
        let mut client = three.client(index).await;
        let job = client.submit(1).await;
        assert_eq!(client.job(job).await.job, job, "asked of coordinator {index}");
    }
    // An agent of a follower gets its orders, whoever leads.
    let mut agent = Agent::join(three.dirs[0].path(), &three.coordinators[2], 4).await;
    let gang = agent.gang().await;
    agent.events((gang.job, 1), 1, vec![started()]).await;
    let committed = ToAgent::EventsCommitted { job: gang.job, generation: 1, seq: 1 };
    // The other two jobs are for it as well.
    while agent.next().await != committed {}

    let leader = until("a leader", three.leader()).await;
    let lost = three.coordinators.iter().position(|c| c.endpoint().replica == leader).unwrap();
    // Without a word, as a crash.
    drop(three.coordinators.remove(lost));
    let client = three.client(0).await;
    let job = until("the others go on", async || match client.send(900, program(1)).await {
        Reply::Submitted { job } => Some(job),
        Reply::Refused(refusal) if refusal.kind.is_passing() => None,
        other => panic!("{other:?}"),
    })
    .await;
    assert_eq!(client.send(900, program(1)).await, Reply::Submitted { job }, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_leader_counts_the_nodes_that_are_connected() {
    let three = Three::start().await;
    let _agent = Agent::join(three.dirs[0].path(), &three.coordinators[1], 4).await;
    let leader = until("a leader", three.leader()).await;
    for coordinator in &three.coordinators {
        let leads = coordinator.endpoint().replica == leader;
        until("the metrics of this one are right", async || {
            let mut stream = tokio::net::TcpStream::connect(&coordinator.endpoint().http).await.unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            let known = text.contains("\nfleet_nodes_connected 1\n") && text.contains("\nfleet_slots 4\n");
            assert!(leads || !text.contains("fleet_nodes_connected") && !text.contains("fleet_slots "));
            (text.contains("\nfleet_nodes 1\n") && (known || !leads)).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joined_coordinator_has_keys_of_its_own_and_comes_back_by_itself() {
    let mut three = Three::start().await;
    let ca = |index: usize| ClusterCa::load(&three.dirs[index].path().join("cluster")).unwrap().unwrap();
    assert_eq!(ca(0).fingerprint(), ca(2).fingerprint());
    for secret in ["cluster/ca.key", "identity/key.pem"] {
        let file = std::fs::metadata(three.dirs[2].path().join(secret)).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&file.permissions()) & 0o777, 0o600, "{secret}");
    }
    let last = three.coordinators.pop().unwrap();
    let (id, address) = (last.endpoint().replica, last.endpoint().quic.clone());
    assert_eq!(id, ReplicaId(3));
    last.stop().await;
    let options = Options { expect_existing: true, ..options(three.dirs[2].path()) };
    let again = Coordinator::start(options).await.unwrap();
    assert_eq!((again.endpoint().replica, &again.endpoint().quic), (id, &address));
    three.coordinators.push(again);
    let mut client = three.client(2).await;
    until("it serves again", async || match client.ask(Request::Jobs { all: None }).await {
        Reply::Jobs(_) => Some(()),
        _ => None,
    })
    .await;
    // It has learned where the others are.
    let endpoint = fleet_common::endpoint::Endpoint::load(three.dirs[2].path()).unwrap().unwrap();
    assert_eq!(endpoint.coordinators.len(), 3, "{endpoint:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_coordinator_ends_and_says_why() {
    let mut three = Three::start().await;
    let mut client = three.client(0).await;
    let mut removed = three.coordinators.pop().unwrap();
    let id = removed.endpoint().replica;
    until("it is taken out", async || match client.ask(Request::RemoveCoordinator(id)).await {
        Reply::Done => Some(()),
        Reply::Refused(refusal) if refusal.kind.is_passing() => None,
        other => panic!("{other:?}"),
    })
    .await;
    let why = tokio::time::timeout(DEADLINE, removed.failed()).await.unwrap().to_string();
    assert!(why.contains("removed") || why.contains("taken out"), "{why}");
    let Reply::Coordinators(views) = client.ask(Request::Coordinators).await else { panic!() };
    assert_eq!(views.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_coordinator_becomes_a_cluster_of_one() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let job = client.submit(1).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 4).await;
    agent.gang().await;
    agent.events((job, 1), 1, vec![started(), succeeded()]).await;
    agent.next().await;
    let others: Vec<_> = { vec![client.submit(1).await, client.submit(1).await] };
    let file = dir.path().join("backup");
    let summary =
        backup::backup(backup::Wanted { data_dir: dir.path(), out: &file, salvage: false, at_least: 0 })
            .unwrap();
    assert_eq!(summary.cluster_id, coordinator.endpoint().cluster_id);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read(&file).unwrap();
    assert!(String::from_utf8_lossy(&text[..400]).contains("private key"));
    coordinator.stop().await;

    let restored = tempdir().unwrap();
    let place = restored.path().join("data");
    assert_eq!(restore::restore(&file, &Options::local(place.clone())).unwrap(), summary);
    let refused = restore::restore(&file, &Options::local(place.clone())).unwrap_err().to_string();
    assert!(refused.contains("has a coordinator already"), "{refused}");
    let coordinator = start(&place).await;
    assert!(coordinator.endpoint().replica > ReplicaId(100), "no id that the old cluster may have given out");
    let mut client = Client::local(&place, &coordinator).await;
    assert_eq!(client.job(job).await.state, JobState::Succeeded);
    assert_eq!(client.watch(job, 1, true).await.len(), 2);
    client.seq = 100;
    let next = client.submit(1).await;
    assert!(
        others.iter().all(|other| other.0 + 100_000 < next.0),
        "no number that was given out after the backup"
    );
    // A worker of then is one of now.
    Agent::greet(agent.identity.clone(), &coordinator, 4, vec![]).await;

    let mut damaged = text.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    for bytes in [&damaged[..], &text[..text.len() - 1], b"something else\n"] {
        std::fs::write(&file, bytes).unwrap();
        let elsewhere = restored.path().join("elsewhere");
        let error = restore::restore(&file, &Options::local(elsewhere.clone())).unwrap_err();
        assert!(format!("{error:#}").contains("cannot be restored"), "{error:#}");
        assert!(!elsewhere.join("cluster").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_worker_is_cut_off_at_once_and_stays_out() {
    let three = Three::start().await;
    let agent = Agent::join(three.dirs[0].path(), &three.coordinators[1], 1).await;
    let (node, identity) = (agent.node(), agent.identity.clone());
    let mut client = three.client(2).await;
    let begun = Instant::now();
    assert_eq!(client.ask(Request::Revoke(Member::Worker(node))).await, Reply::Done);
    let why = agent.closed().await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(why.contains("was revoked"), "{why}");
    for coordinator in &three.coordinators {
        until("it is refused everywhere", async || {
            match net::connect(&[coordinator.endpoint().member.clone()], &identity).await {
                Err(net::NetError::Revoked(why)) => Some(why),
                _ => None,
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_directory_is_no_cluster_where_one_is_expected() {
    let dir = tempdir().unwrap();
    let options = Options { expect_existing: true, ..options(dir.path()) };
    let error = Coordinator::start(options).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("--expect-existing"), "{error}");
    assert!(!dir.path().join("cluster").exists());
}
