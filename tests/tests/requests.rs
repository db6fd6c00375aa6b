//! What commands say of their changes, when coordinators and the commands themselves die in the middle.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::protocol::{Program, Reply, Request, SubmitJob, Wish, Work};
use fleet_tests::submits::{self, Load};
use fleet_tests::{Client, Relay, Running, Standing, World, eventually};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io::{ErrorKind, Write};
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;

const ANY: &str = "127.0.0.1:0";

fn client(cluster: &Standing) -> Client {
    Client::new(&cluster.data_dir.join("client"), vec![cluster.endpoint.quic.clone()])
}

/// Names of all jobs.
fn names(client: &mut Client) -> Vec<String> {
    match client.query(Request::Jobs { all: None }) {
        Ok(Reply::Jobs(jobs)) => jobs.items.into_iter().map(|job| job.name).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn many_submits_while_leaders_and_clients_are_killed_are_each_one_job_or_honestly_unknown() {
    let world = World::new();
    let kill_every = Duration::from_millis(1_500);
    let load = Load { submits: 60, parallel: 12, kill_every, killed_percent: 15, seed: 7 };
    let (tally, broken) = submits::run(&world, load);
    assert!(broken.is_empty(), "{broken:#?}\n{tally:?}");
    assert!(tally.acknowledged >= 30, "all that have a name, at least: {tally:?}");
    assert!(tally.leaders_killed > 0 && tally.clients_killed > 0, "nothing was put to the test: {tally:?}");
}

#[test]
fn a_client_killed_between_the_answer_and_its_print_has_made_one_job_that_its_name_finds() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let submit = |program: &str| {
        let mut command = world.command("fleet");
        command.args(["submit", "--queue", "--id", "nightly", "--cluster", cluster.cluster(), "--", program]);
        command
    };
    // A pipe that is full: the command waits in its print until it is killed.
    let (reader, mut pipe) = std::io::pipe().unwrap();
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while pipe.write(&[b'-'; 4096]).map_or_else(|error| error.kind() != ErrorKind::WouldBlock, |_| true) {}
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let mut killed = submit("nightly.sh").stdin(Stdio::null()).stdout(pipe).spawn().unwrap();
    let mut asking = client(&cluster);
    eventually("the job is there", || names(&mut asking) == ["nightly.sh"]);
    killed.kill().unwrap();
    killed.wait().unwrap();
    drop(reader);
    for _ in 0..2 {
        let done = Running::start(submit("nightly.sh")).finish().expect(0);
        assert_eq!(done.stdout, ["job-1"], "{}", done.all());
    }
    let other = Running::start(submit("other.sh")).finish().expect(2);
    other.says("`nightly` is job-1");
    assert_eq!(names(&mut asking), ["nightly.sh"]);
}

#[test]
fn a_change_whose_answer_is_lost_is_called_unknown_with_an_exit_code_of_its_own() {
    let world = World::new();
    let data = world.path("cluster");
    let free = UdpSocket::bind(ANY).unwrap();
    let listen = free.local_addr().unwrap();
    // An answer is on its way for so long: time to lose it.
    let relay = Relay::start(listen, Duration::from_millis(200)).unwrap();
    drop(free);
    let advertised = relay.address.to_string();
    let mut command = world.command("coordinator");
    command.args(["start", "--data-dir", "cluster", "--listen", &listen.to_string()]);
    command.args(["--advertise", &advertised, "--http", ANY]);
    let cluster = world.standing(Running::start(command), &data);
    let mut near = Client::new(&cluster.data_dir.join("client"), vec![listen.to_string()]);
    eventually("there is a token", || data.join("tokens/client.token").exists());
    let token = data.join("tokens/client.token").display().to_string();
    let login = ["login", &advertised, "--token-file", &token, "--name", "far"];
    world.run("fleet", &login).expect(0);
    for n in 0..10 {
        let name = format!("try-{n}");
        let far = world.start("fleet", &["submit", "--queue", "--cluster", "far", "--", &name]);
        eventually("the job is there", || names(&mut near).contains(&name));
        relay.cut(true);
        let done = far.finish();
        relay.cut(false);
        assert_eq!(names(&mut near).iter().filter(|other| **other == name).count(), 1);
        match done.code() {
            // The machine was too slow to cut the way in time.
            0 => assert!(done.stdout.concat().starts_with("job-"), "{}", done.all()),
            code => {
                assert_eq!(code, 6, "{}", done.all());
                let line = done.says("error: the job may or may not have been submitted");
                assert!(line.contains("`fleet jobs`") && line.contains("--id"), "{line}");
                return;
            }
        }
    }
    panic!("no answer could be lost before it arrived");
}

#[test]
fn a_coordinator_that_is_not_there_is_no_reason_for_doubt() {
    let world = World::new();
    let data = world.path("cluster");
    let cluster = world.coordinator(&data, ANY);
    eventually("there is a credential", || data.join("client/identity.json").exists());
    let at = cluster.cluster().to_owned();
    drop(cluster);
    let done = world.run("fleet", &["cancel", "job-1", "--cluster", &at]).expect(3);
    assert!(!done.stderr.contains("may or may not"), "{}", done.all());
}

#[test]
fn at_a_limit_of_the_cluster_later_is_said_and_nothing_is_done() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let mut asking = client(&cluster);
    let work = Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() });
    let wish = Wish { queue: true, ..Wish::default() };
    for _ in 0..1_000 {
        let job = SubmitJob { world_size: 1, work: work.clone(), wish: wish.clone() };
        assert!(matches!(asking.change(Request::Submit(job)), Ok(Reply::Submitted { .. })));
    }
    let submit = || world.run("fleet", &["submit", "--queue", "--cluster", cluster.cluster(), "--", "more"]);
    submit().expect(5).says("1000 jobs are unfinished, which is the limit; cancel some or wait");
    world.run("fleet", &["cancel", "--now", "job-1", "--cluster", cluster.cluster()]).expect(0);
    submit().expect(0);
}
