//! The coordinator over its real protocols, in one process: joining, submitting, watching, agents, restarts, HTTP.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::*;
use fleet_common::events::{CheckpointRecord, EventBody, Shard};
use fleet_common::ids::JobId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::*;
use fleet_coordinator::server::Coordinator;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_submit_is_one_job_also_over_a_restart() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let job = client.submit(2).await;
    assert_eq!(client.send(client.seq, program(2)).await, Reply::Submitted { job });
    let address = coordinator.endpoint().quic.clone();
    coordinator.stop().await;

    let coordinator = start(dir.path()).await;
    assert_eq!(coordinator.endpoint().quic, address, "a restarted coordinator is found where it was");
    let mut again = Client::local(dir.path(), &coordinator).await;
    assert_eq!(again.send(client.seq, program(2)).await, Reply::Submitted { job });
    again.seq = client.seq;
    let next = again.submit(2).await;
    assert_eq!(next, JobId(job.0 + 1));
    let Reply::Jobs(jobs) = again.ask(Request::Jobs { all: None }).await else { panic!() };
    assert_eq!(jobs.items.len(), 2);
    assert!(jobs.items[0].reason.contains("none that takes work is connected"), "{}", jobs.items[0].reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_data_directory_taken_while_it_runs_has_everything_acknowledged() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    for _ in 0..20 {
        client.submit(1).await;
    }
    // What a kill -9 leaves: the files as they are, without any closing.
    let copy = tempdir().unwrap();
    copy_tree(dir.path(), copy.path());
    coordinator.stop().await;
    let coordinator = start(copy.path()).await;
    let mut client = Client::local(copy.path(), &coordinator).await;
    let Reply::Jobs(jobs) = client.ask(Request::Jobs { all: None }).await else { panic!() };
    assert_eq!(jobs.items.len(), 20);
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_from_submit_to_its_last_event_and_a_watcher_sees_all_of_it() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 4).await;
    let job = client.submit(4).await;
    let gang = agent.gang().await;
    assert_eq!((gang.job, gang.generation, gang.world_size), (job, 1, 4));
    let watching = Client::local(dir.path(), &coordinator).await;
    let watch = tokio::spawn(async move { watching.watch(job, 1, true).await });

    agent.events((job, 1), 1, vec![started(), step(1)]).await;
    assert_eq!(agent.next().await, ToAgent::EventsCommitted { job, generation: 1, seq: 2 });
    assert_eq!(client.job(job).await.state, JobState::Running);
    agent.events((job, 1), 5, vec![step(9)]).await;
    assert_eq!(agent.next().await, ToAgent::ResendEvents { job, generation: 1, next_seq: 3 });
    let record = CheckpointRecord {
        step: 2,
        path: "/c/step-2".into(),
        manifest_sha256: "cd".repeat(32),
        bytes: 8,
        loss: 2.0,
        writers: 1,
        disks: vec![0],
        shards: vec![Shard { writer: 0, name: "model".into(), bytes: 8, sha256: "ab".repeat(32) }],
    };
    let listed = CheckpointRecord { disks: vec![], shards: vec![], ..record.clone() };
    agent
        .events(
            (job, 1),
            2,
            vec![step(1), step(2), EventBody::Checkpoint(record.clone()), step(3), succeeded()],
        )
        .await;
    assert_eq!(agent.next().await, ToAgent::EventsCommitted { job, generation: 1, seq: 6 });

    let view = client.job(job).await;
    assert_eq!(
        (view.state, view.step, view.events, view.checkpoint.as_ref()),
        (JobState::Succeeded, 3, 6, Some(&listed))
    );
    let events = watch.await.unwrap();
    assert_eq!(events.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(events[5].1.body, succeeded());
    assert_eq!(client.watch(job, 5, false).await, events[4..]);
    let Reply::Checkpoints(checkpoints) =
        client.ask(Request::Checkpoints { job: Some(job), page: Page::default() }).await
    else {
        panic!()
    };
    assert_eq!(checkpoints.items[0].checkpoint, listed);
    let Reply::Checkpoint(whole) = client.ask(Request::Checkpoint { job, step: 2 }).await else { panic!() };
    assert_eq!(whole.checkpoint, record);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_reaches_the_agent_and_now_follows() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 1).await;
    let job = client.submit(1).await;
    agent.gang().await;
    assert_eq!(client.ask(Request::Cancel { job, now: false }).await, Reply::Done);
    assert_eq!(agent.next().await, ToAgent::StopGang { job, generation: 1, now: false });
    assert_eq!(client.ask(Request::Cancel { job, now: true }).await, Reply::Done);
    assert_eq!(agent.next().await, ToAgent::StopGang { job, generation: 1, now: true });
    agent
        .events((job, 1), 1, vec![EventBody::Finished(fleet_common::events::Outcome::Stopped { steps: 0 })])
        .await;
    agent.next().await;
    assert_eq!(client.job(job).await.state, JobState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_outlives_a_restart_of_the_coordinator() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 2).await;
    let job = client.submit(2).await;
    agent.gang().await;
    agent.events((job, 1), 1, vec![started(), step(1)]).await;
    agent.next().await;
    coordinator.stop().await;

    let coordinator = start(dir.path()).await;
    let mut agent = Agent::greet(agent.vanish(), &coordinator, 2, vec![(job, 1)]).await;
    assert_eq!(agent.next().await, ToAgent::EventsCommitted { job, generation: 1, seq: 2 });
    agent.events((job, 1), 2, vec![step(1), step(2), succeeded()]).await;
    assert_eq!(agent.next().await, ToAgent::EventsCommitted { job, generation: 1, seq: 4 });
    let mut client = Client::local(dir.path(), &coordinator).await;
    let view = client.job(job).await;
    assert_eq!((view.state, view.generation, view.events), (JobState::Succeeded, 1, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_fails_what_it_had_started_and_gets_what_it_had_not() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 2).await;
    let begun = client.submit(1).await;
    agent.gang().await;
    let unheard = client.submit(1).await;
    assert_eq!(agent.gang().await.job, unheard);

    let again = AgentHello { process: 2, lost: vec![(begun, 1)], earlier: vec![1], ..hello() };
    let mut agent = Agent::greet_as(agent.vanish(), &coordinator, 2, again).await;
    let gang = agent.gang().await;
    assert_eq!((gang.job, gang.generation), (unheard, 1));
    let view = client.job(begun).await;
    assert_eq!(view.state, JobState::Failed);
    assert!(view.reason.contains("agent restarted"), "{}", view.reason);
    let events = client.watch(begun, 1, true).await;
    assert!(matches!(events.last().unwrap().1.body, EventBody::Finished(_)));

    // It comes back with the gang that the cluster has given up: it is told to stop it, and to forget its events.
    let again = AgentHello { process: 2, gangs: vec![(begun, 1), (unheard, 1)], ..hello() };
    let mut agent = Agent::greet_as(agent.vanish(), &coordinator, 2, again).await;
    assert_eq!(agent.next().await, ToAgent::StopGang { job: begun, generation: 1, now: true });
    agent.events((begun, 1), 1, vec![step(1), succeeded()]).await;
    assert_eq!(agent.next().await, ToAgent::EventsCommitted { job: begun, generation: 1, seq: 2 });
    assert_eq!(client.job(begun).await.state, JobState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_queue_for_slots_and_impossible_ones_are_refused() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let mut agent = Agent::join(dir.path(), &coordinator, 2).await;
    let Request::Submit(impatient) = program(3) else { unreachable!() };
    let impatient = SubmitJob { wish: Wish::default(), ..impatient };
    let Reply::Refused(refusal) = client.ask(Request::Submit(impatient)).await else { panic!() };
    assert!(
        refusal.kind == RefusalKind::Invalid && refusal.message.contains("2 slots"),
        "{}",
        refusal.message
    );
    let first = client.submit(2).await;
    let second = client.submit(1).await;
    assert_eq!(agent.gang().await.job, first);
    assert!(client.job(second).await.reason.contains("waits for free slots"));
    agent.events((first, 1), 1, vec![succeeded()]).await;
    agent.next().await;
    assert_eq!(agent.gang().await.job, second);
    let Reply::Nodes(nodes) = client.ask(Request::Nodes).await else { panic!() };
    assert_eq!(
        (nodes[0].name.as_str(), nodes[0].connected, nodes[0].slots, nodes[0].slots_used),
        ("box", true, 2, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_in_a_line() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let train = |job_json: &str| {
        Request::Submit(SubmitJob {
            world_size: 1,
            work: Work::Train { job_json: job_json.into() },
            wish: Wish::default(),
        })
    };
    for (request, kind, named) in [
        (train("{}"), RefusalKind::Invalid, "not a job"),
        (program(0), RefusalKind::Invalid, "ranks"),
        (Request::Job(JobId(99)), RefusalKind::NotFound, "job-99"),
        (Request::Cancel { job: JobId(99), now: true }, RefusalKind::NotFound, "job-99"),
        (
            Request::Checkpoints { job: Some(JobId(99)), page: Page::default() },
            RefusalKind::NotFound,
            "job-99",
        ),
        (Request::Watch { job: JobId(99), from: 1, follow: true }, RefusalKind::NotFound, "job-99"),
        (Request::CreateToken { role: Role::Worker, ttl_s: 0, uses: 1 }, RefusalKind::Invalid, "lives"),
    ] {
        let Reply::Refused(refusal) = client.ask(request).await else { panic!() };
        assert!(refusal.kind == kind && refusal.message.contains(named), "{refusal:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lets_in_as_often_as_it_says_and_only_with_its_secret() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let request = Request::CreateToken { role: Role::Client, ttl_s: 60, uses: 1 };
    let Reply::Token { text } = client.ask(request.clone()).await else { panic!() };
    // The answer was lost: what it gave is revoked, and a new request makes another.
    let Reply::Refused(refusal) = client.send(client.seq, request.clone()).await else { panic!() };
    assert_eq!(refusal.kind, RefusalKind::Spent, "{}", refusal.message);
    let lost: net::JoinToken = text.parse().unwrap();
    assert!(
        refusal.message.contains(&lost.id) && refusal.message.contains("earlier try"),
        "{}",
        refusal.message
    );
    assert!(join(&coordinator, &lost, "ann").await.unwrap_err().to_string().contains("not known"));
    let Reply::Token { text } = client.ask(request).await else { panic!() };

    let token: net::JoinToken = text.parse().unwrap();
    let mut forged = token.clone();
    forged.secret = "0".repeat(64);
    assert!(join(&coordinator, &forged, "eve").await.unwrap_err().to_string().contains("not known"));
    let identity = join(&coordinator, &token, "ann").await.unwrap();
    assert_eq!((identity.role(), identity.name.as_str()), (Role::Client, "ann"));
    assert!(join(&coordinator, &token, "bob").await.unwrap_err().to_string().contains("used up"));
    let mut ann = Client::connect(&identity, &coordinator).await;
    assert!(matches!(ann.ask(Request::ClusterStatus).await, Reply::Cluster(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_certificate_does_no_clients_work() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let identity = join(&coordinator, &token(dir.path(), "worker"), "box").await.unwrap();
    let connection = net::connect(&[coordinator.endpoint().quic.clone()], &identity).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let frame = ClientFrame::query(Request::Jobs { all: None });
    fleet_common::codec::write_frame(&mut send, &frame).await.unwrap();
    let answer = fleet_common::codec::read_frame::<_, Reply>(&mut receive).await;
    assert!(!matches!(answer, Ok(Some(Reply::Jobs(_)))));
}

/// A frame as another version of fleet would send it: its version, then what this one does not know.
fn of_the_next_version(before: &[u8]) -> Vec<u8> {
    let body = [before, &[PROTOCOL_VERSION as u8 + 1, 0xFF, 0xFF, 0xFF]].concat();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_named_to_clients_workers_and_coordinators() {
    let named = |text: &str| {
        let both = format!(
            "version {PROTOCOL_VERSION} of the protocol, the other side {}; install the same version of fleet",
            PROTOCOL_VERSION + 1
        );
        assert!(text.contains(&both), "{text}");
    };
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let identity = Identity::load(&dir.path().join("client")).unwrap().unwrap();
    let connection = net::connect(&[coordinator.endpoint().quic.clone()], &identity).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&of_the_next_version(&[])).await.unwrap();
    let Some(Reply::Refused(refusal)) = fleet_common::codec::read_frame(&mut receive).await.unwrap() else {
        panic!()
    };
    named(&refusal.message);

    let members = [coordinator.endpoint().member.clone()];
    let identity = join(&coordinator, &token(dir.path(), "worker"), "box").await.unwrap();
    let connection = net::connect(&members, &identity).await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&of_the_next_version(&[0])).await.unwrap();
    let told: Option<ToAgent> = fleet_common::codec::read_frame(&mut receive).await.unwrap();
    let Some(ToAgent::Refused { message, fatal: true }) = told else { panic!("{told:?}") };
    named(&message);

    let mut client = Client::local(dir.path(), &coordinator).await;
    let request = Request::CreateToken { role: Role::Coordinator, ttl_s: 60, uses: 1 };
    let Reply::Token { text } = client.ask(request).await else { panic!() };
    let identity = join(&coordinator, &text.parse().unwrap(), "other").await.unwrap();
    let connection = net::connect(&members, &identity).await.unwrap();
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&of_the_next_version(&[])).await.unwrap();
    named(&net::describe(&tokio::time::timeout(DEADLINE, connection.closed()).await.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_a_clock_that_is_hours_off_is_good_and_one_of_next_month_is_not() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let ca = net::ClusterCa::load(&dir.path().join("cluster")).unwrap().unwrap();
    let (now, hour) = (std::time::SystemTime::now(), Duration::from_secs(3600));
    let local = Identity::load(&dir.path().join("client")).unwrap().unwrap();
    let csr = local.signing_request().unwrap();
    let issued = |at| {
        let certificate_der = ca.sign(&csr, local.member, "ann", at, net::CERTIFICATE_LIFE).unwrap();
        Identity { certificate_der, ..local.clone() }
    };
    for good in [now - 6 * hour, now + 6 * hour] {
        let mut client = Client::connect(&issued(good), &coordinator).await;
        assert!(matches!(client.ask(Request::ClusterStatus).await, Reply::Cluster(_)));
    }
    let at = [coordinator.endpoint().quic.clone()];
    let error = net::connect(&at, &issued(now + 24 * 30 * hour)).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("not valid yet; compare the clocks"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_data_directory_has_one_coordinator_and_private_keys() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let error = Coordinator::start(options(dir.path())).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("another coordinator runs on"), "{error}");
    let other = tempdir().unwrap();
    let taken = coordinator.endpoint().quic.parse().unwrap();
    let mut options = options(other.path());
    options.places.listen = Some(taken);
    let error = Coordinator::start(options).await;
    assert!(error.map(|_| ()).unwrap_err().to_string().contains("stop what uses that port"));
    for secret in
        ["cluster/ca.key", "identity/key.pem", "client/key.pem", "tokens/worker.token", "tokens/client.token"]
    {
        let mode = std::fs::metadata(dir.path().join(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    let identity = Identity::load(&dir.path().join("client")).unwrap().unwrap();
    assert_eq!(identity.cluster_id, coordinator.endpoint().cluster_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_dropped_has_closed_its_disk() {
    let dir = tempdir().unwrap();
    for _ in 0..20 {
        // RocksDB refuses a directory that is open, and aborts a process that ends before it is closed.
        drop(start(dir.path()).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_log_is_not_replaced_by_an_empty_one() {
    let dir = tempdir().unwrap();
    start(dir.path()).await.stop().await;
    std::fs::remove_dir_all(dir.path().join("raft")).unwrap();
    let error = Coordinator::start(options(dir.path())).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("is gone"), "{error}");
}

async fn get(coordinator: &Coordinator, request: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(&coordinator.endpoint().http).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_http_connections_make_room_for_one_that_asks() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(tokio::net::TcpStream::connect(&coordinator.endpoint().http).await.unwrap());
    }
    // Less than any of them may stay silent.
    let asked = get(&coordinator, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let answer = timeout(Duration::from_secs(3), asked).await.expect("it does not wait for the silent ones");
    assert_eq!(answer, (200, "ok\n".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_drips_in_is_refused_and_its_room_is_given_back() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let identity = Identity::load(&dir.path().join("client")).unwrap().unwrap();
    let connection = net::connect(&[coordinator.endpoint().quic.clone()], &identity).await.unwrap();
    let begun = std::time::Instant::now();
    // As many as there is room for; each says that it is as long as may be, and comes with its first large piece.
    let drips = (0..8).map(|_| {
        let connection = connection.clone();
        tokio::spawn(async move {
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let length = (fleet_common::codec::FRAME_MAX as u32).to_le_bytes();
            send.write_all(&[&length[..], &[0; 128 << 10]].concat()).await.unwrap();
            let mut drops = tokio::time::interval(Duration::from_millis(500));
            loop {
                tokio::select! {
                    _ = drops.tick() => drop(send.write_all(&[0]).await),
                    reply = fleet_common::codec::read_frame::<_, Reply>(&mut receive) => return reply,
                }
            }
        })
    });
    for drip in drips.collect::<Vec<_>>() {
        let Ok(Some(Reply::Refused(refusal))) = drip.await.unwrap() else { panic!("it was not refused") };
        assert!(refusal.message.contains("did not arrive in time"), "{}", refusal.message);
    }
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn http_answers_people_and_nobody_else() {
    let dir = tempdir().unwrap();
    let coordinator = start(dir.path()).await;
    let mut client = Client::local(dir.path(), &coordinator).await;
    let job = client.submit(1).await;
    let path = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(get(&coordinator, &path("/healthz")).await, (200, "ok\n".into()));
    let (status, body) = get(&coordinator, &path("/metrics")).await;
    assert!(
        status == 200
            && body.contains("\nfleet_jobs{state=\"queued\"} 1\n")
            && body.contains("fleet_commit_seconds_count 1"),
        "{body}"
    );
    let (_, body) = get(&coordinator, &path("/api/v1/jobs")).await;
    let jobs: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((jobs[0]["job"].as_u64(), jobs[0]["state"].as_str()), (Some(job.0), Some("queued")));
    let (status, body) = get(&coordinator, &path(&format!("/api/v1/jobs/{job}"))).await;
    assert!(status == 200 && !body.contains("hidden"), "{body}");
    for (request, expected) in [
        (path("/api/v1/nodes"), 200),
        (path("/api/v1/checkpoints"), 200),
        (path("/api/v1/jobs/99"), 404),
        (path("/api/v1/jobs/x"), 400),
        (path("/secret"), 404),
        ("POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n".into(), 405),
        ("GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n".into(), 421),
        ("GET /healthz HTTP/1.1\r\n\r\n".into(), 400),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "y".repeat(20_000)), 431),
    ] {
        assert_eq!(get(&coordinator, &request).await.0, expected, "{}", &request[..40.min(request.len())]);
    }
}
