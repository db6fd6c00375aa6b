//! What a client's login, a stolen CA key and a replaced CA are worth, by the real programs.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::endpoint::Endpoint;
use fleet_common::ids::{NodeId, ReplicaId, UserId};
use fleet_common::net::{self, CERTIFICATE_LIFE, ClusterCa, Identity, NetError};
use fleet_common::protocol::*;
use fleet_tests::{Coordinators, Finished, Running, Standing, World, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// What becomes of an attempt to connect with this identity.
fn attempt(address: &str, identity: &Identity) -> Result<(), NetError> {
    runtime().block_on(async {
        let connection = net::connect(&[address.to_owned()], identity).await?;
        connection.close(net::DONE, b"");
        Ok(())
    })
}

/// The reason why this identity is not let in, at the end: a coordinator that cannot tell yet is asked again.
fn refusal(address: &str, identity: &Identity) -> String {
    let mut why = String::new();
    eventually("it is refused", || match attempt(address, identity) {
        Ok(()) => panic!("{} is let in at {address}", identity.member),
        Err(NetError::Refused(said) | NetError::Revoked(said)) => {
            why = said;
            true
        }
        Err(_) => false,
    });
    why
}

fn address_for(endpoint: &fleet_common::endpoint::Endpoint, member: Member) -> String {
    match member {
        Member::Client(_) => endpoint.quic.clone(),
        Member::Worker(_) | Member::Coordinator(_) => endpoint.member.clone(),
    }
}

/// Logs in with this token under this name.
fn login(world: &World, at: &str, token: &str, name: &str) {
    let token = world.write(&format!("{name}.token"), token);
    world.run("fleet", &["login", at, "--token-file", token.to_str().unwrap(), "--name", name]).expect(0);
}

fn login_dir(world: &World, name: &str) -> PathBuf {
    world.path("home/.local/state/fleet/clusters").join(name)
}

fn rotate(world: &World, cluster: &Standing, more: &[&str]) -> Finished {
    world.run("coordinator", &[&["rotate-ca", "--data-dir", cluster.cluster()], more].concat())
}

#[test]
fn an_ordinary_client_cannot_do_an_operators_work_and_an_admin_can() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let quic = &cluster.endpoint.quic;
    let ordinary = fs::read_to_string(cluster.data_dir.join("tokens/client.token")).unwrap();
    login(&world, quic, &ordinary, "ann");
    let ann = |args: &[&str]| world.run("fleet", &[args, &["--cluster", "ann"]].concat());
    let worker = ann(&["token", "create", "--role", "worker"]).expect(0).stdout.concat();
    ann(&["token", "create", "--role", "client"]).expect(0);
    ann(&["submit", "--queue", "--json", "--cluster", "ann", "--", "true"]).expect(0);
    let id = worker.split('_').nth(2).unwrap();
    for forbidden in [
        &["token", "create", "--role", "coordinator"][..],
        &["token", "create", "--role", "admin"],
        &["token", "revoke", id],
        &["revoke", "user-1"],
        &["coordinators", "remove", "replica-1"],
        &["retention", "--age", "1h"],
    ] {
        let told = ann(forbidden).expect(2);
        told.says("only an admin");
        told.says("fleet token create --role admin");
    }
    let admin = world.token(&cluster, &["--role", "admin"]);
    assert!(admin.starts_with("fleet_admin_"), "{admin}");
    login(&world, quic, &admin, "root");
    let root = |args: &[&str]| world.run("fleet", &[args, &["--cluster", "root"]].concat());
    root(&["token", "create", "--role", "coordinator"]).expect(0);
    root(&["token", "revoke", id]).expect(0);
    root(&["revoke", "user-77777777"]).expect(0);
    // HTTP is nobody's.
    for number in ["user-0", "node-0", "replica-0"] {
        root(&["revoke", number]).expect(0);
    }
    for path in ["/metrics", "/api/v1/jobs"] {
        let answer = fleet_tests::http::get(&cluster.endpoint.http, path).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[test]
fn a_stolen_key_of_the_ca_opens_nothing_by_itself() {
    let world = World::new();
    let all = world.three_coordinators();
    let worker = world.worker(&all[0], 1);
    // All that a coordinator's directory has.
    let stolen = ClusterCa::load(&all[2].data_dir.join("cluster")).unwrap().unwrap();
    let forge = |member| stolen.issue(member, "eve", SystemTime::now(), CERTIFICATE_LIFE).unwrap();
    let local = Identity::load(&all[0].data_dir.join("client")).unwrap().unwrap();
    let node = Identity::load(&world.path("node/identity")).unwrap().unwrap();
    let never = [
        Member::Client(UserId(77_777_777)),
        Member::Worker(NodeId(77_777_777)),
        Member::Coordinator(ReplicaId(9)),
        Member::Client(UserId(0)),
    ];
    for one in &all {
        for member in never {
            let why = refusal(&address_for(&one.endpoint, member), &forge(member));
            assert!(why.contains(&format!("{member} was never admitted")), "{why}");
        }
        // Of those who are members the key is missing.
        for member in [local.member, node.member, Member::Coordinator(all[1].endpoint.replica)] {
            if member == Member::Coordinator(one.endpoint.replica) {
                continue;
            }
            let why = refusal(&address_for(&one.endpoint, member), &forge(member));
            assert!(why.contains("not for the key with which"), "{why}");
        }
        attempt(&one.endpoint.quic, &local).unwrap();
    }
    let revoke = ["revoke", "user-77777777", "--cluster", all[0].cluster()];
    assert!(world.run("fleet", &revoke).expect(0).stdout.concat().contains("is cut off"));
    for one in &all {
        eventually("it is known to be revoked", || {
            let forged = forge(Member::Client(UserId(77_777_777)));
            matches!(attempt(&one.endpoint.quic, &forged), Err(NetError::Revoked(why)) if why.contains("was revoked"))
        });
    }
    drop(worker);
}

#[test]
fn whoever_joins_at_one_coordinator_is_let_in_by_all_at_once() {
    let world = World::new();
    let all = world.three_coordinators();
    for (n, one) in all.iter().cycle().take(6).enumerate() {
        let token = world.token(one, &["--role", "client"]).parse().unwrap();
        let at = [one.endpoint.quic.clone()];
        let joined = runtime().block_on(net::join(&at, &token, "ann")).unwrap().identity;
        // Not the one where it joined, which may be a step ahead of the others.
        for other in all.iter().filter(|other| other.endpoint.replica != one.endpoint.replica) {
            let mut last = Ok(());
            eventually("it is let in", || {
                last = attempt(&other.endpoint.quic, &joined);
                // No leader for a moment, on a machine that does much else.
                !matches!(last, Err(NetError::Unreachable(_)))
            });
            last.unwrap_or_else(|error| panic!("client {n}: {error}"));
        }
    }
}

#[test]
fn a_coordinator_that_was_away_lets_in_one_that_joined_meanwhile_and_leads() {
    let world = World::new();
    let mut all = world.three_coordinators();
    // One that has never heard of anybody who is there cannot tell whom to let in.
    let at = |of: &Standing, name: &str| -> u64 {
        let metrics = fleet_tests::http::get(&of.endpoint.http, "/metrics").unwrap();
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {metrics}"))
    };
    let reached = at(&all[0], "fleet_raft_commit_index ");
    eventually("the third knows the others", || at(&all[2], "fleet_raft_applied_index ") >= reached);
    let dir = all.pop().unwrap().data_dir.clone();
    for number in 4..=5 {
        all.push(world.join_coordinator(&all[0], &world.path(&format!("coordinator-{number}")), &[]));
    }
    let views = |of: &Standing| {
        let args = ["coordinators", "ls", "--json", "--stale", "--cluster", of.cluster()];
        let said = world.run("fleet", &args).expect(0).stdout.concat();
        serde_json::from_str::<Vec<Value>>(&said).unwrap()
    };
    eventually("the new ones vote", || {
        world.coordinators(&all[0]).iter().filter(|view| view["voter"] == true).count() == 5
    });
    // One of the old two stays, which knows the new ones; leadership goes to one of whom the one that is away has never heard.
    let leads = |of: &Standing, at: usize| {
        views(of)
            .iter()
            .any(|view| view["leads"] == true && view["address"] == all[at].endpoint.quic.as_str())
    };
    let mut stopped = 0;
    all[stopped].process.signal(Signal::SIGSTOP);
    eventually("a new one leads", || {
        if leads(&all[2], 2) || leads(&all[2], 3) {
            return true;
        }
        if leads(&all[2], 1 - stopped) {
            all[stopped].process.signal(Signal::SIGCONT);
            stopped = 1 - stopped;
            all[stopped].process.signal(Signal::SIGSTOP);
        }
        false
    });
    let back = world.restart_coordinator(&dir);
    // It was killed before it had one; for that it needs the others.
    eventually("it has a credential", || back.data_dir.join("client/identity.json").exists());
    eventually("the one that was away follows", || {
        let view = views(&back);
        view.len() == 5 && view.iter().any(|view| view["leads"] == true)
    });
    world.run("fleet", &["status", "--cluster", back.cluster()]).expect(0);
}

#[test]
fn a_revoked_local_credential_is_replaced_at_the_next_start() {
    let world = World::new();
    let dir = world.path("cluster");
    let cluster = world.coordinator(&dir, "127.0.0.1:0");
    let local = || Identity::load(&dir.join("client")).unwrap();
    let before = local().unwrap();
    login(&world, &cluster.endpoint.quic, &world.token(&cluster, &["--role", "admin"]), "root");
    world.run("fleet", &["revoke", &before.member.to_string(), "--cluster", "root"]).expect(0);
    world.run("fleet", &["jobs", "--cluster", cluster.cluster()]).expect(2).says("was revoked");
    drop(cluster);
    let cluster = world.restart_coordinator(&dir);
    eventually("there is another one", || local().is_some_and(|local| local.member != before.member));
    world.run("fleet", &["token", "create", "--role", "admin", "--cluster", cluster.cluster()]).expect(0);
}

#[test]
fn a_local_credential_that_was_revoked_since_the_last_snapshot_is_replaced_too() {
    let world = World::new();
    let mut all = world.three_coordinators();
    let follower = all.remove(2);
    let dir = follower.data_dir.clone();
    let local = || Identity::load(&dir.join("client")).unwrap();
    eventually("it has a credential", || local().is_some());
    let before = local().unwrap();
    drop(follower);
    // Its disk does not have the revocation when it starts.
    world.run("fleet", &["revoke", &before.member.to_string(), "--cluster", all[0].cluster()]).expect(0);
    let back = world.restart_coordinator(&dir);
    eventually("there is another one", || local().is_some_and(|local| local.member != before.member));
    world.run("fleet", &["token", "create", "--role", "admin", "--cluster", back.cluster()]).expect(0);
}

#[test]
fn everybody_who_is_let_in_is_listed_until_he_is_cut_off() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    login(&world, &cluster.endpoint.quic, &world.token(&cluster, &["--role", "client"]), "alice");
    let members = || {
        let said = world.run("fleet", &["members", "--json", "--cluster", cluster.cluster()]).expect(0);
        serde_json::from_str::<Vec<Value>>(&said.stdout.concat()).unwrap()
    };
    let with = |role: &str| members().into_iter().find(|view| view["role"] == role);
    assert!(with("admin").is_some());
    let first = with("coordinator").unwrap();
    assert_eq!((&first["member"], &first["joined_unix_ms"]), (&json!("replica-1"), &Value::Null));
    let client = with("client").unwrap();
    assert!(client["joined_unix_ms"].as_u64() > Some(0), "{client}");
    let member = client["member"].as_str().unwrap();
    world.run("fleet", &["revoke", member, "--cluster", cluster.cluster()]).expect(0);
    assert_eq!(with("client"), None);
}

#[test]
fn the_ca_is_replaced_while_a_job_runs_and_the_old_one_ends() {
    let world = World::new();
    let all = world.three_coordinators();
    let token = fs::read_to_string(all[0].data_dir.join("tokens/client.token")).unwrap();
    login(&world, &all[1].endpoint.quic, &token, "ann");
    let worker = world.worker(&all[0], 1);
    let gate = world.path("gate");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    let ann = |args: &[&str]| world.run("fleet", &[&["--cluster", "ann"], args].concat());
    let submitted = ann(&["submit", "--json", "--", "sh", "-c", &wait]).expect(0);
    let job = submitted.json()[0]["job"].as_str().unwrap().to_owned();
    let status = || {
        let mut said = Value::Null;
        eventually("the job's status", || {
            let asked = ann(&["status", &job, "--json"]);
            let answered = asked.code() == 0;
            if answered {
                said = asked.json().remove(0);
            }
            answered
        });
        said
    };
    eventually("the job runs", || status()["state"] == "running");

    // What is of the old CA: its key, and identities that it made.
    let old = ClusterCa::load(&all[0].data_dir.join("cluster")).unwrap().unwrap();
    let kept = |dir: &Path| Identity::load(dir).unwrap().unwrap();
    let old_local = kept(&all[0].data_dir.join("client"));
    let old_coordinator = kept(&all[1].data_dir.join("identity"));
    let before = [kept(&login_dir(&world, "ann")), kept(&world.path("node/identity"))];

    let told = ann(&["revoke", "node-1"]).expect(2);
    told.says("only an admin");
    assert!(rotate(&world, &all[0], &["--status"]).expect(0).stdout.concat().contains("no other one"));
    let begun = rotate(&world, &all[0], &[]).expect(0).stdout.concat();
    assert!(begun.contains("both are trusted"), "{begun}");
    rotate(&world, &all[0], &[]).expect(2).says("--finish");
    // Others come while both count.
    login(&world, &all[2].endpoint.quic, &token, "bob");
    let joined = world.join_coordinator(&all[0], &world.path("coordinator-4"), &[]);
    ann(&["jobs"]).expect(0);
    eventually("all have moved", || {
        world.run("fleet", &["jobs", "--cluster", "bob"]).expect(0);
        let said = rotate(&world, &all[0], &["--status"]).expect(0).stdout.concat();
        said.contains("all workers and clients have moved")
    });
    eventually("the new coordinator has the key too", || {
        let finished = rotate(&world, &all[0], &["--finish"]);
        finished.code() == 0 || {
            finished.expect(2).says("has no key of the new CA yet");
            false
        }
    });
    assert_eq!(status()["state"], "running");
    assert_eq!(status()["generation"], 1);

    let mut all: Vec<Standing> = all.into_iter().chain([joined]).collect();
    for one in &all {
        eventually("its CA is the new one", || {
            let ca = ClusterCa::load(&one.data_dir.join("cluster")).ok().flatten();
            let endpoint = Endpoint::load(&one.data_dir).unwrap().unwrap();
            ca.is_some_and(|ca| {
                ca.fingerprint() != old.fingerprint() && ca.fingerprint() == endpoint.ca_fingerprint
            })
        });
        for identity in [&old_local, &before[0]] {
            assert!(matches!(attempt(&one.endpoint.quic, identity), Err(NetError::Refused(_))));
        }
        for identity in [&before[1], &old_coordinator] {
            if identity.member != Member::Coordinator(one.endpoint.replica) {
                assert!(matches!(attempt(&one.endpoint.member, identity), Err(NetError::Refused(_))));
            }
        }
        // Also one that knows the new CA and shows a certificate of the old one, over the right key.
        let now = kept(&login_dir(&world, "ann"));
        let csr = now.signing_request().unwrap();
        let certificate_der = old.sign(&csr, now.member, "ann", SystemTime::now(), CERTIFICATE_LIFE).unwrap();
        let forged = Identity { certificate_der, ..now.clone() };
        assert!(matches!(attempt(&one.endpoint.quic, &forged), Err(NetError::Refused(_))));
        eventually("a member is let in", || attempt(&one.endpoint.quic, &now).is_ok());
    }
    // Tokens ended with the old CA; there are new ones.
    let spent = world.write("spent.token", &token);
    let join = ["login", &all[0].endpoint.quic, "--token-file", spent.to_str().unwrap(), "--name", "eve"];
    world.run("fleet", &join).expect(2).says("CA was replaced");
    eventually("the coordinator has made a new one", || {
        fs::read_to_string(all[0].data_dir.join("tokens/client.token")).unwrap() != token
    });
    let fresh = fs::read_to_string(all[0].data_dir.join("tokens/client.token")).unwrap();
    login(&world, &all[0].endpoint.quic, &fresh, "eve");

    // A restart finds what was decided, and the job ends as it should.
    let first = all.remove(0);
    let dir = first.data_dir.clone();
    drop(first);
    let again = world.restart_coordinator(&dir);
    fs::write(&gate, "").unwrap();
    eventually("the job succeeds", || status()["state"] == "succeeded");
    assert_eq!(status()["generation"], 1);
    world.run("fleet", &["nodes", "--cluster", again.cluster()]).expect(0);
    drop(worker);
}

#[test]
fn a_coordinator_that_dies_in_between_strands_no_replacement() {
    let world = World::new();
    let mut all = Coordinators::start(&world, 3);
    let rotate = |n: usize, more: &[&str]| {
        let dir = all_dir(&world, n);
        world.run("coordinator", &[&["rotate-ca", "--data-dir", &dir], more].concat())
    };
    // One is away: the others wait for it, and go on when it is back.
    all.kill(2);
    let waits = rotate(0, &[]).expect(0).stdout.concat();
    assert!(waits.contains("waits for replica-3"), "{waits}");
    rotate(0, &["--finish", "--force"]).expect(2).says("replica-3 has no key of the new CA yet");
    // The one that made it dies as well; begun anew at another one, once there is a majority again.
    all.kill(0);
    all.start_again(2);
    eventually("another leads", || all.leader().is_some_and(|leader| leader != 0));
    let again = rotate(1, &[]).expect(0).stdout.concat();
    assert!(again.contains("waits for replica-1"), "{again}");
    all.start_again(0);
    eventually("all have the key", || {
        rotate(1, &["--status"]).expect(0).stdout.concat().contains("both are trusted")
    });
    // One is away when the old CA ends, and follows later.
    all.kill(2);
    eventually("another leads", || all.leader().is_some_and(|leader| leader != 2));
    rotate(1, &["--finish", "--force"]).expect(0);
    all.start_again(2);
    let ca = |n: usize| {
        // In the middle of its replacement, key and certificate are not each other's.
        let ca = ClusterCa::load(&Path::new(&all_dir(&world, n)).join("cluster")).ok().flatten();
        ca.map(|ca| ca.fingerprint())
    };
    eventually("all have the same CA", || ca(0).is_some() && ca(0) == ca(1) && ca(1) == ca(2));
    eventually("all follow", || {
        let views = all.client(1).coordinators();
        views.is_ok_and(|views| views.iter().filter(|view| view.alive == Some(true)).count() == 3)
    });
}

fn all_dir(world: &World, n: usize) -> String {
    world.path(&format!("coordinator-{n}")).display().to_string()
}

#[test]
fn one_that_was_away_for_the_whole_replacement_joins_again_with_a_token() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    drop(world.worker(&cluster, 1));
    rotate(&world, &cluster, &[]).expect(0);
    rotate(&world, &cluster, &["--finish"]).expect(2).says("node-1");
    rotate(&world, &cluster, &["--finish", "--force"]).expect(0);
    let quic = cluster.endpoint.quic.clone();
    let join = ["join", &quic, "--device", "cpu", "--slots", "1", "--data-dir", "node"];
    world.run("worker", &join).expect(2).says("replaced while");
    let token = world.token(&cluster, &["--role", "worker"]);
    let mut again = world.start("worker", &[&join[..], &["--token", &token]].concat());
    again.until("registration", |line| line["node"] == "node-2");
}

#[test]
fn a_damaged_file_of_cas_is_noticed_and_mended() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    drop(world.worker(&cluster, 1));
    let token = world.token(&cluster, &["--role", "client"]);
    login(&world, &cluster.endpoint.quic, &token, "ann");
    let damage = |dir: &Path| {
        let path = dir.join("ca.pem");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] = if bytes[middle] == b'A' { b'B' } else { b'A' };
        fs::write(&path, bytes).unwrap();
    };
    for dir in [login_dir(&world, "ann"), world.path("node/identity"), cluster.data_dir.join("identity")] {
        damage(&dir);
        let error = Identity::load(&dir).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("no need to join again"), "{error}");
    }
    world.run("fleet", &["jobs", "--cluster", "ann"]).expect(0).says("it was mended");
    let join = ["join", &cluster.endpoint.quic, "--device", "cpu", "--slots", "1", "--data-dir", "node"];
    let mut worker: Running = world.start("worker", &join);
    worker.until("registration", |line| line["node"] == "node-1");
    let dir = cluster.data_dir.clone();
    drop(cluster);
    let cluster = world.restart_coordinator(&dir);
    world.run("fleet", &["jobs", "--cluster", cluster.cluster()]).expect(0);
    // Where nobody answers, the error says what to do.
    drop(cluster);
    damage(&login_dir(&world, "ann"));
    world.run("fleet", &["jobs", "--cluster", "ann"]).expect(2).says("no need to join again");
}
