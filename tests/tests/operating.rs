//! What docs/operating.md and docs/security.md promise, by the real programs: addresses, backups, tokens, revocation, copies, disks.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::JobId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, Reply, Request};
use fleet_tests::{Finished, Running, Standing, World, eventually, http, program};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const ANY: &str = "127.0.0.1:0";

fn start(world: &World, args: &[&str]) -> Running {
    let mut command = world.command("coordinator");
    command.arg("start").args(args);
    Running::start(command)
}

/// `fleet COMMAND` of this cluster.
fn fleet(world: &World, cluster: &Standing, args: &[&str]) -> Finished {
    let mut command = world.command("fleet");
    command.args(args).env("FLEET_CLUSTER", cluster.cluster());
    Running::start(command).finish()
}

fn ask(world: &World, cluster: &Standing, args: &[&str]) -> Value {
    let done = fleet(world, cluster, &[args, &["--json"]].concat()).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
}

/// A job that waits for a node. What is printed is its name.
fn submit(world: &World, cluster: &Standing) -> Finished {
    fleet(world, cluster, &["submit", "-n", "1", "--queue", "--json", "--", "true"])
}

fn jobs(world: &World, cluster: &Standing) -> usize {
    ask(world, cluster, &["jobs"]).as_array().unwrap().len()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_address_that_nobody_could_use_is_not_recorded() {
    let world = World::new();
    let listen = ["--listen", "0.0.0.0:0", "--http", ANY, "--data-dir", "cluster"];
    start(&world, &listen).finish().expect(4).says("pass --advertise HOST:PORT");
    assert!(!world.path("cluster/cluster").exists(), "nothing was begun");
    let process = start(&world, &[&listen[..], &["--advertise", "localhost:7070"]].concat());
    let standing = world.standing(process, &world.path("cluster"));
    assert_eq!(standing.endpoint.quic, "localhost:7070");
    assert!(standing.endpoint.member.starts_with("localhost:"), "{}", standing.endpoint.member);
}

#[test]
fn a_restart_without_options_listens_where_it_listened() {
    let world = World::new();
    let data = world.path("cluster");
    let first = world.coordinator(&data, ANY);
    let (quic, member) = (first.endpoint.quic.clone(), first.endpoint.member.clone());
    let http = first.endpoint.http.clone();
    drop(first);
    let process = start(&world, &["--expect-existing", "--data-dir", "cluster"]);
    let again = world.standing(process, &data);
    assert_eq!((&again.endpoint.quic, &again.endpoint.member, &again.endpoint.http), (&quic, &member, &http));
    jobs(&world, &again);
}

#[test]
fn a_coordinator_that_has_moved_is_found_by_the_others() {
    let world = World::new();
    let mut all = world.three_coordinators();
    for turn in 0..all.len() {
        let before = all.remove(0);
        let (dir, replica) = (before.data_dir.clone(), before.endpoint.replica.to_string());
        drop(before);
        let listen = format!("127.0.0.{}:0", turn + 2);
        let data = dir.display().to_string();
        let args = ["--expect-existing", "--data-dir", &data, "--listen", &listen, "--http", ANY];
        let back = world.standing(start(&world, &args), &dir);
        eventually("the others have its address, and it follows", || {
            let views = world.coordinators(&all[0]);
            let view = views.iter().find(|view| view["replica"] == replica);
            view.is_some_and(|view| view["address"] == back.endpoint.quic && view["alive"] == true)
        });
        all.push(back);
    }
}

#[test]
fn a_login_learns_of_coordinators_that_joined_after_it() {
    let world = World::new();
    let first = world.coordinator(&world.path("coordinator-1"), ANY);
    let token = first.data_dir.join("tokens/client.token").display().to_string();
    let login = |name: &str| {
        let args = ["login", &first.endpoint.quic, "--token-file", &token, "--name", name];
        let said = world.run("fleet", &args).expect(0).stdout.concat();
        assert!(said.contains("logged in as user-"), "{said}");
    };
    let jobs = |name: &str| world.run("fleet", &["jobs", "--cluster", name]);
    login("often");
    login("asks");
    // Nobody has said which.
    world.run("fleet", &["jobs"]).expect(3).says("asks, often");
    let joined: Vec<Standing> = (2..=3)
        .map(|n| world.join_coordinator(&first, &world.path(&format!("coordinator-{n}")), &[]))
        .collect();
    eventually("three coordinators vote", || {
        world.coordinators(&joined[0]).iter().filter(|view| view["voter"] == true).count() == 3
    });
    world.run("fleet", &["coordinators", "ls", "--cluster", "asks"]).expect(0);
    // As after the time that passes between two commands.
    let known = world.path("home/.local/state/fleet/clusters/often/cluster.json");
    let file = fs::File::options().write(true).open(&known).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(60)).unwrap();
    jobs("often").expect(0);
    drop(first);
    for name in ["asks", "often"] {
        jobs(name).expect(0);
    }
}

#[test]
fn a_second_cluster_on_a_host_does_not_take_the_first_ones_name() {
    let world = World::new();
    let clusters = [1, 2].map(|n| world.coordinator(&world.path(&format!("cluster-{n}")), ANY));
    let login = |cluster: &Standing, more: &[&str]| {
        let token = cluster.data_dir.join("tokens/client.token").display().to_string();
        let args = [&["login", &cluster.endpoint.quic, "--token-file", &token], more].concat();
        let said = world.run("fleet", &args).expect(0).stdout.concat();
        said.split_once("--cluster ").and_then(|(_, name)| name.split(' ').next()).unwrap().to_owned()
    };
    let [first, second] = &clusters;
    assert_eq!(login(first, &[]), "127.0.0.1");
    let long = second.endpoint.quic.replace(':', "-");
    assert_eq!(login(second, &[]), long);
    for name in ["127.0.0.1", &long, &first.endpoint.quic, &second.endpoint.quic] {
        world.run("fleet", &["nodes", "--cluster", name]).expect(0);
    }
    // The same cluster again is the same login.
    assert_eq!(login(first, &[]), "127.0.0.1");
    // Who names it means it.
    assert_eq!(login(second, &["--name", "127.0.0.1"]), "127.0.0.1");
}

#[test]
fn a_command_says_what_came_of_it() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    submit(&world, &cluster).expect(0);
    fleet(&world, &cluster, &["cancel", "job-1"]).expect(0);
    let again = fleet(&world, &cluster, &["cancel", "job-1"]).expect(0).stdout.concat();
    assert!(again.contains("job-1 has ended: cancelled"), "{again}");
    // What could not be written was not printed.
    let into_a_full_disk = |line: &str| {
        let mut command = world.enter(Command::new("sh"));
        command.args(["-c", &format!("exec \"$0\" {line} > /dev/full")]).arg(program("fleet"));
        Running::start(command).finish().expect(4).says("No space left");
    };
    into_a_full_disk("jobs --cluster cluster/");
    into_a_full_disk("launch --help");
}

#[test]
fn a_join_that_is_refused_leaves_nothing_and_one_that_was_interrupted_is_no_coordinator() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let token = world.token(&cluster, &["--role", "coordinator"]);
    // As kill -9 leaves it, with the CA written and the identity not.
    let half = world.path("half");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("joining.json"), "{\"complete\":false}\n").unwrap();
    let copied = Command::new("cp").arg("-r").arg(cluster.data_dir.join("cluster")).arg(&half).status();
    assert!(copied.unwrap().success());
    for more in [&[][..], &["--expect-existing"]] {
        let args = [&["--listen", ANY, "--http", ANY, "--data-dir", "half"], more].concat();
        start(&world, &args).finish().expect(4).says("`coordinator join` was interrupted in half");
    }
    let mut command = world.command("coordinator");
    command.args(["join", &cluster.endpoint.quic, "--token", &token, "--data-dir", "half"]);
    command.args(["--listen", ANY, "--http", ANY]);
    let joined = world.standing(Running::start(command), &half);
    assert_eq!(joined.endpoint.cluster_id, cluster.endpoint.cluster_id);
    assert_eq!(joined.endpoint.replica.0, 2);
    let mut command = world.command("coordinator");
    command.args(["join", &cluster.endpoint.quic, "--token", &token, "--data-dir", "late"]);
    Running::start(command).finish().expect(2).says("used up");
    let left: Vec<_> =
        fs::read_dir(world.path("late")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[test]
fn a_backup_says_that_it_has_the_ca_key_and_is_private_and_becomes_a_cluster() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    submit(&world, &cluster).expect(0);
    let backup = || world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", "saved"]);
    // What a killed one left goes.
    let (saved, left) = (world.path("saved"), world.path(".saved.Ab3dEf.tmp"));
    fs::write(&left, "stale").unwrap();
    let said = backup().expect(0).stdout.concat();
    assert!(said.contains("contains the CA's private key"), "{said}");
    assert!(mode(&saved) == 0o600 && !left.exists());
    let first_line: Vec<u8> =
        fs::read(&saved).unwrap().into_iter().take_while(|byte| *byte != b'\n').collect();
    assert!(String::from_utf8_lossy(&first_line).contains("private key of the cluster's CA"));

    let id = cluster.endpoint.cluster_id.clone();
    drop(cluster);
    let restore = || world.run("coordinator", &["restore", "saved", "--data-dir", "restored"]);
    let said = restore().expect(0).stdout.concat();
    assert!(said.contains(&id) && said.contains("coordinator start --data-dir restored"), "{said}");
    restore().expect(4).says("has a coordinator already");
    assert_eq!(mode(&world.path("restored/cluster/ca.key")), 0o600);
    let restored = world.coordinator(&world.path("restored"), ANY);
    assert_eq!(restored.endpoint.cluster_id, id);
    assert!(restored.endpoint.replica.0 > 1, "a number of its own");
    assert_eq!(jobs(&world, &restored), 1);
}

#[test]
fn the_ca_key_is_in_no_log_and_no_snapshot() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    submit(&world, &cluster).expect(0);
    let second = world.join_coordinator(&cluster, &world.path("second"), &[]);
    world.token(&cluster, &["--role", "coordinator"]);
    eventually("the new one has the state", || {
        fleet(&world, &second, &["jobs", "--stale"]).stdout.concat().contains("job-1")
    });
    let pem = fs::read_to_string(cluster.data_dir.join("cluster/ca.key")).unwrap();
    // Of the key as text its second line, which no other key has; of its bytes those that are secret.
    let text = pem.lines().nth(2).unwrap().as_bytes().to_vec();
    let secret = secret_of(&cluster.data_dir);
    let marks =
        [text, secret.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into_bytes(), secret];
    let in_file = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        marks.iter().any(|mark| bytes.windows(mark.len()).any(|window| window == &mark[..]))
    };
    assert!(in_file(&cluster.data_dir.join("cluster/ca.key")), "it would be found");
    for dir in [&cluster.data_dir, &second.data_dir] {
        let files: Vec<PathBuf> =
            fs::read_dir(dir.join("raft")).unwrap().flatten().map(|e| e.path()).collect();
        assert!(files.iter().any(|file| file.extension().is_some_and(|kind| kind == "log")), "{files:?}");
        for file in files {
            assert!(!in_file(&file), "the CA's key is in {}", file.display());
        }
    }
}

/// The private number in a cluster's CA key.
fn secret_of(data_dir: &Path) -> Vec<u8> {
    let ca = fleet_common::net::ClusterCa::load(&data_dir.join("cluster")).unwrap().unwrap();
    let key = ca.key();
    let der = key.secret_der();
    // An octet string of 32 bytes (RFC 5915).
    let at = der.windows(2).position(|pair| pair == [4, 32]).unwrap() + 2;
    der[at..at + 32].to_vec()
}

#[test]
fn a_client_that_is_revoked_is_cut_off_within_a_second_in_the_middle_of_a_watch() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    submit(&world, &cluster).expect(0);
    let token = cluster.data_dir.join("tokens/client.token").display().to_string();
    let quic = &cluster.endpoint.quic;
    world.run("fleet", &["login", quic, "--token-file", &token, "--name", "ann"]).expect(0);
    let identity = world.path("home/.local/state/fleet/clusters/ann");
    let identity = Identity::load(&identity).unwrap().unwrap();
    let mut following = world.start("fleet", &["logs", "job-1", "--follow", "--cluster", "ann"]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (connection, mut watch) = runtime.block_on(async {
        let connection = net::connect(std::slice::from_ref(quic), &identity).await.unwrap();
        let (mut send, watch) = connection.open_bi().await.unwrap();
        let request = Request::Watch { job: JobId(1), from: 1, follow: true };
        write_frame(&mut send, &ClientFrame::query(request)).await.unwrap();
        // Answered in order on one connection: the watch is on its way when this is.
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        write_frame(&mut send, &ClientFrame::query(Request::ClusterStatus)).await.unwrap();
        assert!(matches!(read_frame(&mut receive).await, Ok(Some(Reply::Cluster(_)))));
        (connection, watch)
    });
    following.must_live();
    let ann = identity.member.to_string();
    assert!(fleet(&world, &cluster, &["revoke", &ann]).expect(0).stdout.concat().contains("is cut off"));
    runtime.block_on(async {
        let closed = tokio::time::timeout(Duration::from_secs(1), connection.closed()).await;
        let why = net::describe(&closed.expect("within a second"));
        assert!(why.contains(&format!("{ann} was revoked")), "{why}");
        assert!(read_frame::<_, Reply>(&mut watch).await.is_err());
    });
    assert_ne!(following.finish().code(), 0, "what was followed has not ended");
    world.run("fleet", &["jobs", "--cluster", "ann"]).expect(2).says("was revoked");
    assert_eq!(jobs(&world, &cluster), 1, "others are served");
}

#[test]
fn tokens_are_listed_without_their_secrets_and_end_when_they_are_revoked() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let token = world.token(&cluster, &["--role", "worker", "--uses", "3", "--ttl", "1h"]);
    let parts: Vec<&str> = token.split('_').collect();
    let (id, secret) = (parts[2], parts[3]);
    let list = || ask(&world, &cluster, &["token", "ls"]);
    let listed = list();
    let this = listed.as_array().unwrap().iter().find(|listed| listed["id"] == id).unwrap();
    assert_eq!((&this["role"], &this["uses_left"]), (&"worker".into(), &3.into()), "{this}");
    let table = fleet(&world, &cluster, &["token", "ls"]).expect(0).stdout.join("\n");
    assert!(table.contains(id) && !table.contains(secret) && !listed.to_string().contains(secret), "{table}");
    fleet(&world, &cluster, &["token", "revoke", id]).expect(0);
    assert!(!list().to_string().contains(id));
    let join = ["join", &cluster.endpoint.quic, "--token", &token, "--slots", "1", "--data-dir", "node"];
    world.run("worker", &join).expect(2).says("this token is not known here");
    fleet(&world, &cluster, &["token", "revoke", "nonsense"]).expect(2).says("nonsense");
}

#[test]
fn a_copy_of_a_coordinators_directory_is_refused_and_the_cluster_goes_on() {
    let world = World::new();
    let all = world.three_coordinators();
    let copy = world.path("copy");
    let copied = Command::new("cp").arg("-r").arg(&all[2].data_dir).arg(&copy).status();
    assert!(copied.unwrap().success());
    let args = ["--listen", ANY, "--http", ANY, "--data-dir", "copy"];
    start(&world, &args).finish().expect(4).says("replica-3 runs twice");
    submit(&world, &all[0]).expect(0);
    let views = world.coordinators(&all[0]);
    assert!(views.iter().all(|view| view["voter"] == true && view["alive"] == true), "{views:?}");
    let third = views.iter().find(|view| view["replica"] == "replica-3").unwrap();
    assert_eq!(third["address"], all[2].endpoint.quic.as_str(), "it is found where it was");
}

#[test]
fn a_coordinator_on_a_read_only_disk_refuses_changes_and_goes_on_when_it_can() {
    let world = World::new();
    let disk = world.path("disk");
    fs::create_dir(&disk).unwrap();
    let coordinator = program("coordinator").display().to_string();
    let args = [&coordinator, "start", "--data-dir", "disk/cluster", "--listen", ANY, "--http", ANY];
    let Some(command) = world.on_a_disk_of("96M", &disk, "exec \"$@\"", &args) else { return };
    let process = Running::start(command);
    let pid = process.pid().to_string();
    // The mount is seen through the process that has it.
    let inside = PathBuf::from(format!("/proc/{pid}/root{}", disk.display()));
    let mut cluster = world.standing(process, &inside.join("cluster"));
    let (at, disk) = (cluster.endpoint.http.clone(), disk.display().to_string());
    // From another place: what `fleet` keeps beside the coordinator could not be written either.
    let token = inside.join("cluster/tokens/client.token").display().to_string();
    world.run("fleet", &["login", &cluster.endpoint.quic, "--token-file", &token, "--name", "ann"]).expect(0);
    let submit = || world.run("fleet", &["submit", "-n", "1", "--queue", "--cluster", "ann", "--", "true"]);
    submit().expect(0);
    // A file system with files that are open for writing cannot be made read-only by hand: the same one is mounted over itself.
    let mount = |script: &str| {
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid, "-U", "-m", "--preserve-credentials", "sh", "-c", script, "sh", &disk]);
        command.output().unwrap_or_else(|error| panic!("cannot run nsenter: {error}"))
    };
    let over = mount("mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"");
    if !over.status.success() {
        eprintln!("skipped: {}", String::from_utf8_lossy(&over.stderr));
        return;
    }
    eventually("it says so", || ask(&world, &cluster, &["status"]).to_string().contains("read-only"));
    submit().says("mounted read-only");
    assert!(get(&at, "/healthz").contains("read-only"));
    assert!(get(&at, "/metrics").contains("\nfleet_read_only 1\n"));
    assert_eq!(jobs(&world, &cluster), 1);
    cluster.process.must_live();
    assert!(mount("umount \"$1\"").status.success());
    eventually("it writes again", || submit().code() == 0);
    assert_eq!(jobs(&world, &cluster), 2);
    cluster.process.must_live();
}

/// Head and body of an answer.
fn get(at: &str, path: &str) -> String {
    http::get(at, path).unwrap()
}

#[test]
fn nothing_has_a_socket_beyond_loopback_unless_told_to() {
    let world = World::new();
    let allowed = Command::new("unshare").args(["-Urn", "ip", "link", "set", "lo", "up"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this machine does not allow `unshare -Urn` with `ip`, which default ports need");
        return;
    }
    // A network of its own, in which nobody else has the default ports.
    let coordinator = program("coordinator").display().to_string();
    let mut command = world.enter(Command::new("unshare"));
    command.args(["-Urn", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    command.args([&coordinator, "start", "--data-dir", "cluster"]);
    let cluster = world.standing(Running::start(command), &world.path("cluster"));
    assert_eq!(cluster.endpoint.quic, "127.0.0.1:7070");
    let pid = cluster.process.pid();
    let mut command = world.enter(Command::new("nsenter"));
    command.args(["-t", &pid.to_string(), "-U", "-n", "--preserve-credentials"]);
    command.arg(program("worker")).args([
        "join",
        "127.0.0.1:7070",
        "--token-file",
        "cluster/tokens/worker.token",
    ]);
    let mut worker = Running::start(command);
    worker.until("registration", |line| line["node"].is_string());
    let (of_coordinator, of_worker) = (sockets(pid), sockets(worker.pid()));
    // Two sockets and HTTP; the worker's way to its coordinator.
    assert!(of_coordinator.len() >= 3 && !of_worker.is_empty(), "{of_coordinator:?} {of_worker:?}");
    for address in of_coordinator.iter().chain(&of_worker) {
        // As the kernel writes them: 127.x.x.x and ::1, the bytes of each word backwards.
        let host = address.split(':').next().unwrap();
        let loopback = match host.len() {
            8 => host.ends_with("7F"),
            _ => host == "00000000000000000000000001000000",
        };
        assert!(loopback, "{address} is open to other machines: {of_coordinator:?} {of_worker:?}");
    }
}

/// Local addresses of a process's UDP and TCP sockets.
fn sockets(pid: u32) -> Vec<String> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let own: Vec<String> = links
        .filter_map(|link| {
            let target = fs::read_link(link.path()).ok()?.display().to_string();
            Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let tables = ["udp", "udp6", "tcp", "tcp6"]
        .map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    let rows = tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(|row| {
        let mut fields = row.split_whitespace();
        let (address, inode) = (fields.nth(1)?, fields.nth(7)?);
        own.iter().any(|own| own == inode).then(|| address.to_owned())
    });
    rows.collect()
}
