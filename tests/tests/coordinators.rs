//! Several coordinators as real processes: killed, joined, removed, flooded, shown the wrong certificates.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::ClientId;
use fleet_common::net::{self, Identity, JoinToken};
use fleet_common::protocol::*;
use fleet_tests::{Coordinators, Running, Standing, TinyJob, World, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

fn work() -> Request {
    let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() };
    Request::Submit(SubmitJob {
        world_size: 1,
        work: Work::Program(program),
        wish: Wish { queue: true, ..Wish::default() },
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn local(cluster: &Standing) -> Identity {
    Identity::load(&cluster.data_dir.join("client")).unwrap().unwrap()
}

/// How many changes one client may have made by now. It ends when nobody can allow more.
type Allowance = tokio::sync::watch::Receiver<usize>;

async fn ask(connection: &quinn::Connection, frame: &ClientFrame) -> Option<Reply> {
    let asked = async {
        let (mut send, mut receive) = connection.open_bi().await.ok()?;
        fleet_common::codec::write_frame(&mut send, frame).await.ok()?;
        fleet_common::codec::read_frame::<_, Reply>(&mut receive).await.ok()?
    };
    tokio::time::timeout(Duration::from_secs(3), asked).await.ok()?
}

/// Submits as many jobs as it may, asking one coordinator after the other until one answers, as `fleet` does, and tells of each that
/// was acknowledged.
async fn submit(
    addresses: Vec<String>,
    identity: Identity,
    client: u128,
    mut allowed: Allowance,
    told: tokio::sync::mpsc::UnboundedSender<()>,
) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let mut order = addresses;
    'connect: loop {
        order.rotate_left(1);
        let Ok(connection) = net::connect(&order, &identity).await else { continue };
        while allowed.wait_for(|allowed| *allowed > acknowledged.len()).await.is_ok() {
            let seq = acknowledged.len() as u64 + 1;
            match ask(&connection, &ClientFrame::change(ClientId(client), seq, work())).await {
                Some(Reply::Submitted { job }) => acknowledged.push(job.to_string()),
                Some(Reply::Refused(refusal)) if !refusal.kind.is_passing() => {
                    panic!("{}", refusal.message)
                }
                _ => continue 'connect,
            }
            let _ = told.send(());
        }
        return acknowledged;
    }
}

/// Requests of one flooding client that are open at the same time.
const FLOOD: u128 = 64;

/// Asks as fast as it is answered, whatever the answer: changes and costly questions, many at a time.
async fn flood(address: String, identity: Identity, client: u128) {
    let connection = net::connect(&[address], &identity).await.unwrap();
    let mut streams = tokio::task::JoinSet::new();
    for stream in 0..FLOOD {
        let connection = connection.clone();
        streams.spawn(async move {
            for seq in 1.. {
                let request = if stream % 2 == 0 { work() } else { Request::Jobs { all: None } };
                ask(&connection, &ClientFrame::change(ClientId(client * FLOOD + stream), seq, request)).await;
            }
        });
    }
    while streams.join_next().await.is_some() {}
}

fn addresses(all: &[Standing]) -> Vec<String> {
    all.iter().map(|standing| standing.endpoint.quic.clone()).collect()
}

fn leader(world: &World, cluster: &Standing) -> Option<String> {
    let views = world.coordinators(cluster);
    let leads = views.iter().find(|view| view["leads"] == true)?;
    leads["address"].as_str().map(str::to_owned)
}

#[test]
fn a_leader_that_is_killed_in_the_middle_of_submits_loses_nothing_acknowledged() {
    let world = World::new();
    let mut all = world.three_coordinators();
    let (addresses, identity) = (addresses(&all), local(&all[0]));
    let runtime = runtime();
    let (allow, allowance) = tokio::sync::watch::channel(0);
    let (told, mut acknowledgements) = tokio::sync::mpsc::unbounded_channel();
    let clients: Vec<_> = (1..=4)
        .map(|client| {
            let (addresses, identity) = (addresses.clone(), identity.clone());
            runtime.spawn(submit(addresses, identity, client, allowance.clone(), told.clone()))
        })
        .collect();
    for round in 1..=3 {
        let mut found = None;
        eventually("a leader", || {
            found = all.iter().position(|one| leader(&world, &all[0]).as_ref() == Some(&one.endpoint.quic));
            found.is_some()
        });
        // In the middle: a few of this round's 320 are acknowledged, most are not. All together stay below the limit of 1,000 jobs.
        allow.send_replace(round * 80);
        runtime.block_on(async {
            for _ in 0..20 {
                acknowledgements.recv().await.unwrap();
            }
        });
        let killed = all.remove(found.unwrap());
        let dir = killed.data_dir.clone();
        drop(killed); // kill -9
        all.push(world.restart_coordinator(&dir));
        runtime.block_on(async {
            for _ in 20..320 {
                acknowledgements.recv().await.unwrap();
            }
        });
    }
    drop(allow);
    let mut acknowledged = BTreeSet::new();
    let mut count = 0;
    for client in clients {
        let jobs = runtime.block_on(client).unwrap();
        count += jobs.len();
        acknowledged.extend(jobs);
    }
    assert_eq!(acknowledged.len(), count, "two submits got the same job");
    // Every coordinator has them all.
    for one in &all {
        let args = ["jobs", "--json", "--cluster", one.cluster()];
        let done = world.run("fleet", &args).expect(0);
        let listed: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
        let listed: BTreeSet<String> =
            listed.as_array().unwrap().iter().map(|job| job["job"].as_str().unwrap().to_owned()).collect();
        assert_eq!(listed, acknowledged);
    }
}

#[test]
fn a_coordinator_is_taken_out_and_another_takes_its_place_under_a_new_number() {
    let world = World::new();
    let all = world.three_coordinators();
    let gone = &all[1];
    world.run("fleet", &["coordinators", "remove", "replica-2", "--cluster", all[0].cluster()]).expect(0);
    gone.process.until_it_says("removed");
    let joined = world.join_coordinator(&all[0], &world.path("coordinator-4"), &[]);
    assert_eq!(joined.endpoint.replica.0, 4);
    eventually("the new one votes", || {
        let views = world.coordinators(&all[0]);
        views.len() == 3 && views.iter().all(|view| view["voter"] == true)
    });
    // The one that was taken out does not come back.
    let mut again = world.command("coordinator");
    again
        .args(["start", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir"])
        .arg(&gone.data_dir);
    gone.process.signal(Signal::SIGKILL);
    let environment = format!("/proc/{}/environ", gone.process.pid());
    eventually("its process is gone", || !fs::read(&environment).is_ok_and(|found| !found.is_empty()));
    Running::start(again).finish().expect(4).says("removed");
}

#[test]
fn a_certificate_does_the_work_of_its_role_only() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let (quic, member) = (cluster.endpoint.quic.clone(), cluster.endpoint.member.clone());
    let token = |role: &str| world.token(&cluster, &["--role", role]).parse::<JoinToken>().unwrap();
    let (worker, coordinator) = (token("worker"), token("coordinator"));
    runtime().block_on(async {
        let join = async |token: &JoinToken| {
            net::join(std::slice::from_ref(&quic), token, "x").await.unwrap().identity
        };
        let (worker, coordinator) = (join(&worker).await, join(&coordinator).await);
        let refused = async |at: &String, identity: &Identity| {
            net::connect(std::slice::from_ref(at), identity).await.map(|_| ()).unwrap_err().to_string()
        };
        assert!(refused(&member, &local(&cluster)).await.contains("is for workers and coordinators"));
        assert!(refused(&quic, &coordinator).await.contains("is for clients"));
        // A worker learns at the clients' socket where its own is, and nothing else.
        let connection = net::connect(std::slice::from_ref(&quic), &worker).await.unwrap();
        let ask =
            async |request| ask(&connection, &ClientFrame::change(ClientId(1), 1, request)).await.unwrap();
        let Reply::Addresses(known) = ask(Request::Addresses).await else { panic!() };
        assert_eq!(known[0].member, member);
        for request in
            [work(), Request::Nodes, Request::CreateToken { role: Role::Client, ttl_s: 9, uses: 1 }]
        {
            let Reply::Refused(refusal) = ask(request).await else { panic!() };
            assert_eq!(refusal.kind, RefusalKind::Forbidden, "{}", refusal.message);
        }
        // A coordinator's work is not done by a worker's certificate: its streams are not read as such.
        let connection = net::connect(std::slice::from_ref(&member), &worker).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        let frame = ClientFrame::query(Request::Nodes);
        fleet_common::codec::write_frame(&mut send, &frame).await.unwrap();
        connection.closed().await;
    });
}

#[test]
fn a_thousand_silent_connections_and_a_flood_starve_nobody() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _worker = world.worker(&cluster, 1);
    let identity = local(&cluster);
    let runtime = runtime();
    let quic = cluster.endpoint.quic.clone();
    let token: JoinToken = world.token(&cluster, &["--role", "client"]).parse().unwrap();
    let other = runtime.block_on(net::join(std::slice::from_ref(&quic), &token, "other")).unwrap().identity;
    let silent = runtime.spawn({
        let (quic, identities) = (quic.clone(), [identity.clone(), other]);
        async move {
            let mut held = Vec::new();
            while held.len() < 1000 {
                let identity = &identities[held.len() % 2];
                match net::connect(std::slice::from_ref(&quic), identity).await {
                    Ok(connection) => held.push(connection),
                    Err(net::NetError::Unreachable(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            held
        }
    });
    let floods: Vec<_> = (0..4)
        .map(|client| {
            let (quic, identity) = (quic.clone(), identity.clone());
            runtime.spawn(flood(quic, identity, 1000 + client))
        })
        .collect();
    let held = runtime.block_on(silent).unwrap();
    assert_eq!(held.len(), 1000);
    // Meanwhile heartbeats arrive and other clients are answered.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        let asked = Instant::now();
        let done = world.run("fleet", &["nodes", "--json", "--cluster", cluster.cluster()]).expect(0);
        let nodes: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
        assert_eq!(nodes[0]["connected"], true, "{nodes}");
        assert!(nodes[0]["heard_ms_ago"].as_u64().unwrap() < 3_000, "{nodes}");
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    }
    floods.iter().for_each(|flood| flood.abort());
}

#[test]
fn tokens_end_and_are_used_up() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let join = |token: &str, dir: &str| {
        let mut command = world.command("coordinator");
        command.args(["join", &cluster.endpoint.quic, "--token", token]);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir"]).arg(world.path(dir));
        Running::start(command)
    };
    let short = world.token(&cluster, &["--role", "coordinator", "--ttl", "1s"]);
    let made = SystemTime::now();
    eventually("a second has passed", || made.elapsed().unwrap() > Duration::from_millis(1100));
    join(&short, "late").finish().expect(2).says("has expired");
    assert!(!world.path("late/identity").exists());
    let once = world.token(&cluster, &["--role", "coordinator"]);
    let first = join(&once, "second");
    let first = world.standing(first, &world.path("second"));
    join(&once, "third").finish().expect(2).says("used up");
    drop(first);
    let worker = world.token(&cluster, &["--role", "worker"]);
    join(&worker, "wrong").finish().expect(2).says("not for a coordinator");
}

#[test]
fn certificates_are_renewed_before_they_end() {
    let world = World::new();
    let data = world.path("cluster");
    let mut command = world.command("coordinator");
    command.args(["start", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--certificate-life", "6s"]);
    command.arg("--data-dir").arg(&data);
    let cluster = world.standing(Running::start(command), &data);
    let worker = world.worker(&cluster, 1);
    let until = |dir: &Path| {
        let identity = Identity::load(dir).unwrap().unwrap();
        SystemTime::now() + identity.remaining(SystemTime::now())
    };
    let places = [data.join("identity"), data.join("client"), world.path("node/identity")];
    let first = places.each_ref().map(|place| until(place));
    eventually("all have outlived their first certificate", || {
        places.iter().zip(&first).all(|(place, first)| until(place) > *first + Duration::from_secs(6))
    });
    world.run("fleet", &["nodes", "--cluster", cluster.cluster()]).expect(0);
    // The worker needs its own to come back.
    drop(cluster);
    let cluster = world.restart_coordinator(&data);
    eventually("the worker is back", || {
        let done = world.run("fleet", &["nodes", "--json", "--cluster", cluster.cluster()]);
        done.stdout.concat().contains("\"connected\":true")
    });
    drop(worker);
}

#[test]
fn a_damaged_log_stops_its_coordinator_which_is_replaced() {
    let world = World::new();
    let mut all = world.three_coordinators();
    let broken = all.pop().unwrap();
    let dir = broken.data_dir.clone();
    drop(broken);
    let raft = dir.join("raft");
    let newest = fs::read_dir(&raft).unwrap().flatten().map(|entry| entry.path());
    let logs: Vec<_> = newest.filter(|path| path.extension().is_some_and(|ext| ext == "log")).collect();
    assert!(!logs.is_empty());
    for log in logs {
        let mut bytes = fs::read(&log).unwrap();
        let some = bytes.len() / 3;
        bytes[some..some + 64].iter_mut().for_each(|byte| *byte ^= 0x55);
        fs::write(&log, bytes).unwrap();
    }
    let mut command = world.command("coordinator");
    command.args(["start", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir"]).arg(&dir);
    let stopped = Running::start(command).finish().expect(4);
    stopped.says(&raft.display().to_string());
    world.run("fleet", &["coordinators", "remove", "replica-3", "--cluster", all[0].cluster()]).expect(0);
    fs::rename(&dir, world.path("set-aside")).unwrap();
    let joined = world.join_coordinator(&all[0], &dir, &[]);
    assert_eq!(joined.endpoint.replica.0, 4);
}

#[test]
fn the_leader_is_taken_out_while_a_job_trains_and_no_step_is_lost() {
    let world = World::new();
    let all = Coordinators::start(&world, 3);
    let _worker = all.worker(0, 2);
    let job = world.job(&TinyJob { max_steps: 300, ..TinyJob::default() }).display().to_string();
    let submitted = all.ask(&["submit", "-n", "2", &job]);
    let job = submitted["job"].as_str().unwrap().to_owned();
    let step = |all: &Coordinators<'_>| all.ask(&["status", &job])["step"].as_u64();
    eventually("some steps are done", || step(&all) >= Some(10));
    let mut leader = None;
    eventually("somebody leads", || {
        leader = all.leader();
        leader.is_some()
    });
    let leader = leader.unwrap();
    let id = format!("replica-{}", leader + 1);
    all.ask(&["coordinators", "remove", &id]);
    eventually("the others lead", || all.leader().is_some_and(|new| new != leader));
    let status = all.ask(&["status"]);
    assert_ne!(status["leader"]["id"], id.as_str());
    assert!(
        status["leader"]["address"]
            .as_str()
            .is_some_and(|address| all.addresses().iter().any(|known| known == address)),
        "{status}"
    );
    assert_eq!(status["nodes"].as_array().map(Vec::len), Some(1), "{status}");
    assert_eq!(status["jobs"][0]["job"], job.as_str(), "{status}");
    eventually("the job is done", || all.ask(&["status", &job])["state"] == "succeeded");
    let cluster = all.data_dir(0).display().to_string();
    let logs = world.run("fleet", &["logs", &job, "--json", "--cluster", &cluster]).expect(0);
    let steps: Vec<u64> = logs.losses().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, (1..=300).collect::<Vec<_>>());
    assert_eq!(all.ask(&["status", &job])["generation"], 1, "its ranks never noticed");
}

#[test]
fn without_a_majority_what_one_coordinator_has_can_still_be_read() {
    let world = World::new();
    let mut all = Coordinators::start(&world, 3);
    let cluster = all.data_dir(0).display().to_string();
    let fleet = |args: &[&str]| world.run("fleet", &[&["--cluster", &cluster], args].concat());
    let submitted = fleet(&["submit", "--queue", "--json", "--", "true"]).expect(0);
    let job = submitted.json()[0]["job"].as_str().unwrap().to_owned();
    all.ask(&["cancel", &job]);
    let known = |all: &Coordinators<'_>| {
        let jobs = all.client(0).stale(Request::Jobs { all: None });
        matches!(jobs, Ok(Reply::Jobs(jobs)) if jobs.items.iter().any(|view| view.state.is_final()))
    };
    eventually("it is known at the one that stays", || known(&all));
    all.kill(1);
    all.kill(2);
    let told = fleet(&["--stale", "logs", &job, "--json"]).expect(0);
    assert_eq!(told.events("finished").len(), 1, "{}", told.all());
    for query in [&["jobs"][..], &["status"], &["nodes"], &["events"], &["top"], &["logs"]] {
        fleet(&[&["--stale"], query, &["--json"]].concat()).expect(0);
    }
    fleet(&["logs", &job]).expect(3);
}

#[test]
fn several_coordinators_and_a_user_who_logged_in_outlive_their_first_certificates() {
    let world = World::new();
    let data = world.path("coordinator-1");
    let short = ["--certificate-life", "6s"];
    let mut command = world.command("coordinator");
    command.args(["start", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]).args(short);
    command.arg("--data-dir").arg(&data);
    let mut all = vec![world.standing(Running::start(command), &data)];
    for number in 2..=3 {
        let joined = world.join_coordinator(&all[0], &world.path(&format!("coordinator-{number}")), &short);
        all.push(joined);
    }
    let token = world.write("client.token", world.token(&all[0], &["--role", "client"]));
    let quic = all[1].endpoint.quic.clone();
    world.run("fleet", &["login", &quic, "--token-file", token.to_str().unwrap()]).expect(0);
    let end = |standing: &Standing| {
        let identity = Identity::load(&standing.data_dir.join("identity")).unwrap().unwrap();
        SystemTime::now() + identity.remaining(SystemTime::now())
    };
    let first: Vec<SystemTime> = all.iter().map(end).collect();
    let logged_in = SystemTime::now();
    eventually("all have outlived two certificates", || {
        let done = world.run("fleet", &["nodes", "--cluster", &quic]).expect(0);
        assert!(!done.stderr.contains("not renewed"), "{}", done.all());
        let outlived = |(one, first): (&Standing, &SystemTime)| end(one) > *first + Duration::from_secs(6);
        all.iter().zip(&first).all(outlived) && logged_in.elapsed().unwrap() > Duration::from_secs(13)
    });
    // They still hear each other: a change needs two of them.
    world.run("fleet", &["submit", "--queue", "--cluster", &quic, "--", "true"]).expect(0);
}
