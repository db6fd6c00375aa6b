//! Three coordinators and two nodes, each with a network of its own that is cut, loses packets, is slow or far away.
//!
//! Skipped, with the reason printed, where network namespaces are not allowed.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::{JobId, RunId};
use fleet_common::protocol::{JobState, Point, Program, Reply, Request, RunKey, SubmitJob, Wish, Work};
use fleet_tests::{Client, Coordinators, Network, Running, World, eventually};
use std::time::Duration;

/// Hosts 0 to 2 are coordinators, 3 and 4 are nodes.
const COORDINATORS: usize = 3;
const HOSTS: usize = 5;

struct Scene<'a> {
    network: &'a Network,
    coordinators: Coordinators<'a>,
    _nodes: [Running; 2],
    client: Client,
    run: RunId,
    recorded: u64,
}

impl<'a> Scene<'a> {
    fn new(world: &'a World, network: &'a Network) -> Scene<'a> {
        let coordinators = Coordinators::on(world, network, COORDINATORS);
        let nodes = [coordinators.worker(3, 2), coordinators.worker(4, 2)];
        let mut client = coordinators.any_client();
        let Ok(Reply::RunStarted(run)) = client.change(Request::StartRun { name: "net".into() }) else {
            panic!("no run")
        };
        Scene { network, coordinators, _nodes: nodes, client, run, recorded: 0 }
    }

    fn leader(&self) -> usize {
        let mut leader = None;
        eventually("somebody leads", || {
            leader = self.coordinators.leader();
            leader.is_some()
        });
        leader.unwrap()
    }

    /// Records points, each of which must be acknowledged by somebody.
    fn writes(&mut self, count: u64) {
        for _ in 0..count {
            self.recorded += 1;
            let (step, value) = (self.recorded, self.recorded as f64);
            let points = vec![Point { series: "n".into(), step, value, unix_ms: step }];
            let reply = self.client.change(Request::RecordMetrics { run: self.run, points });
            assert_eq!(reply, Ok(Reply::Done));
        }
    }

    /// Every acknowledged point is there, once, whoever is asked.
    fn has_all_everywhere(&self) {
        for n in 0..COORDINATORS {
            let mut client = self.coordinators.client(n);
            let query = Request::RunMetrics { run: RunKey::Own(self.run), from: 1 };
            let Ok(Reply::Points { points, .. }) = client.query(query) else { panic!("no points from {n}") };
            let steps: Vec<u64> = points.iter().map(|point| point.step).collect();
            assert_eq!(steps, (1..=self.recorded).collect::<Vec<_>>(), "coordinator {n}");
        }
    }

    /// Two ranks of a program start and end.
    fn runs_a_job(&mut self) {
        let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() };
        let submit = SubmitJob { world_size: 2, work: Work::Program(program), wish: Wish::default() };
        let submitted = self.client.change(Request::Submit(submit));
        let Ok(Reply::Submitted { job }) = submitted else { panic!("{submitted:?}") };
        eventually("the job succeeds", || self.state(job) == Some(JobState::Succeeded));
    }

    fn state(&mut self, job: JobId) -> Option<JobState> {
        match self.client.query(Request::Job(job)) {
            Ok(Reply::Job(view)) => Some(view.state),
            _ => None,
        }
    }

    fn term(&mut self) -> u64 {
        match self.client.query(Request::ClusterStatus) {
            Ok(Reply::Cluster(view)) => view.term,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_minority_that_is_cut_off_misses_nothing_in_the_end() {
    let world = World::new();
    let Some(network) = Network::new(HOSTS) else { return };
    let mut scene = Scene::new(&world, &network);
    let cut = (scene.leader() + 1) % COORDINATORS;
    scene.writes(5);
    network.isolate(cut);
    scene.writes(20);
    scene.runs_a_job();
    let mut alone = scene.coordinators.client(cut);
    alone.patience = Duration::from_secs(2);
    assert!(alone.query(Request::ClusterStatus).is_err(), "a query was answered without a quorum");
    assert!(alone.stale(Request::ClusterStatus).is_ok(), "a stale query needs nobody");
    network.heal();
    scene.writes(5);
    scene.has_all_everywhere();
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_cannot_acknowledge_anything() {
    let world = World::new();
    let Some(network) = Network::new(HOSTS) else { return };
    let mut scene = Scene::new(&world, &network);
    let old = scene.leader();
    scene.writes(5);
    network.isolate(old);
    let mut deposed = scene.coordinators.client(old);
    deposed.patience = Duration::from_secs(3);
    assert!(deposed.change(Request::StartRun { name: "nobody".into() }).is_err());
    // Asks the others only.
    let rest = (0..COORDINATORS).filter(|n| *n != old).map(|n| scene.coordinators.addresses()[n].clone());
    scene.client = Client::new(&scene.coordinators.data_dir(0).join("client"), rest.collect());
    scene.writes(20);
    scene.runs_a_job();
    network.heal();
    scene.writes(5);
    scene.has_all_everywhere();
}

#[test]
fn a_leader_whose_words_do_not_arrive_gives_way() {
    let world = World::new();
    let Some(network) = Network::new(HOSTS) else { return };
    let mut scene = Scene::new(&world, &network);
    let old = scene.leader();
    for other in (0..HOSTS).filter(|other| *other != old) {
        network.cut(old, other);
    }
    let rest = (0..COORDINATORS).filter(|n| *n != old).map(|n| scene.coordinators.addresses()[n].clone());
    scene.client = Client::new(&scene.coordinators.data_dir(0).join("client"), rest.collect());
    scene.writes(20);
    scene.runs_a_job();
    network.heal();
    scene.has_all_everywhere();
}

#[test]
fn a_fifth_of_all_packets_lost_loses_nothing() {
    let world = World::new();
    let Some(network) = Network::new(HOSTS) else { return };
    let mut scene = Scene::new(&world, &network);
    network.lose(20);
    scene.writes(30);
    scene.runs_a_job();
    network.heal();
    scene.has_all_everywhere();
}

#[test]
fn a_slow_link_slows_and_breaks_nothing() {
    let world = World::new();
    let Some(network) = Network::new(HOSTS) else { return };
    let mut scene = Scene::new(&world, &network);
    let slow = (scene.leader() + 1) % COORDINATORS;
    scene.network.slow(slow, "512kbit");
    let term = scene.term();
    scene.writes(30);
    scene.runs_a_job();
    scene.has_all_everywhere();
    assert_eq!(scene.term(), term, "a slow follower made an election");
}

#[test]
fn coordinators_that_are_far_apart_agree_without_elections() {
    let world = World::new();
    // A twentieth of a second each way.
    let coordinators = Coordinators::far_apart(&world, COORDINATORS, Duration::from_millis(50));
    let mut client = coordinators.any_client();
    let term = |client: &mut Client| match client.query(Request::ClusterStatus) {
        Ok(Reply::Cluster(view)) => view.term,
        other => panic!("{other:?}"),
    };
    let before = term(&mut client);
    for n in 0..30 {
        let reply = client.change(Request::StartRun { name: format!("far-{n}") });
        assert!(matches!(reply, Ok(Reply::RunStarted(_))), "{reply:?}");
    }
    assert_eq!(term(&mut client), before, "delay made an election");
}
