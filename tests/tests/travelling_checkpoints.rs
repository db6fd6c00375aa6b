//! Jobs that go on on other nodes where no file system is shared: every node has a disk of its own, under the same path.
//!
//! Skipped, with the reason printed, where network namespaces are not allowed.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, JobView, Reply, Request};
use fleet_tests::{Client, Coordinators, Network, Running, TinyJob, World, eventually};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Host 0 has the coordinator, 1 to 3 are nodes.
struct Scene<'a> {
    world: &'a World,
    coordinators: Coordinators<'a>,
    nodes: Vec<Option<Running>>,
}

impl<'a> Scene<'a> {
    fn new(world: &'a World, network: &'a Network) -> Scene<'a> {
        let coordinators = Coordinators::on(world, network, 1);
        let nodes = (1..=3).map(|host| Some(coordinators.worker_with_disk(host, 2))).collect();
        Scene { world, coordinators, nodes }
    }

    fn submit(&self, ranks: &str, nodes: &str, job: &TinyJob, more: &[&str]) -> JobId {
        let file = self.world.job(job).display().to_string();
        let args = [&["submit", "-n", ranks, "--nodes", nodes, &file][..], more].concat();
        self.coordinators.ask(&args)["job"].as_str().unwrap().parse().unwrap()
    }

    fn client(&self) -> Client {
        self.coordinators.any_client()
    }

    fn view(&self, client: &mut Client, id: JobId) -> Option<JobView> {
        match client.query(Request::Job(id)) {
            Ok(Reply::Job(view)) => Some(*view),
            _ => None,
        }
    }

    fn until(&self, id: JobId, what: &str, is: impl Fn(&JobView) -> bool) -> JobView {
        let (mut client, mut last) = (self.client(), None);
        eventually(what, || {
            last = self.view(&mut client, id);
            last.as_ref().is_some_and(&is)
        });
        last.unwrap()
    }

    fn ended(&self, id: JobId) -> JobView {
        self.until(id, "the job ends", |view| view.state.is_final())
    }

    fn events(&self, id: JobId, kind: &str) -> Vec<Value> {
        let cluster = self.coordinators.data_dir(0).display().to_string();
        let args = ["logs", &id.to_string(), "--json", "--cluster", &cluster];
        let lines = self.world.run("fleet", &args).expect(0).stdout;
        let events = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event["event"] == kind).collect()
    }

    /// The last loss of each step: as text they are the same where their bits are.
    fn losses(&self, id: JobId) -> BTreeMap<u64, String> {
        let steps = self.events(id, "step").into_iter();
        steps.map(|event| (event["step"].as_u64().unwrap(), event["loss"].to_string())).collect()
    }

    fn lines(&self, id: JobId) -> String {
        let lines = self.events(id, "log").into_iter();
        lines
            .map(|event| event["line"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// A checkpoint on the disk of a node.
    fn on(&self, host: usize, run: &str, step: u64) -> PathBuf {
        self.world.path(&format!("disk-{host}/checkpoints/{run}/step-{step:08}"))
    }
}

const LONG: TinyJob = TinyJob { run_name: "long", max_steps: 120, batch_size: 2, save_steps: 10, more: "" };

#[test]
fn a_job_that_leaves_a_node_goes_on_elsewhere_as_if_it_had_not() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let scene = Scene::new(&world, &network);
    let straight = scene.submit("4", "2", &TinyJob { run_name: "straight", max_steps: 300, ..LONG }, &[]);
    assert_eq!(scene.ended(straight).state, JobState::Succeeded);
    let id = scene.submit("4", "2", &TinyJob { max_steps: 300, ..LONG }, &[]);
    let begun = scene.until(id, "it has saved", |view| view.checkpoint.is_some() && view.step > 12);
    // Its first node has the checkpoints, and is drained.
    let first = begun.parts[0].name.clone();
    let host: usize = first.strip_prefix("box-").unwrap().parse().unwrap();
    scene.coordinators.ask(&["drain", &first, "--now"]);
    let ended = scene.ended(id);
    assert_eq!((ended.state, ended.generation), (JobState::Succeeded, 2), "{:?}", ended.error);
    assert!(ended.parts.iter().all(|part| part.name != first), "{:?}", ended.parts);
    let lines = scene.lines(id);
    assert!(lines.contains("fetching the checkpoint of step") && lines.contains(&first), "{lines}");
    let (straight, moved) = (scene.losses(straight), scene.losses(id));
    assert_eq!(straight, moved, "the same losses, bit for bit");
    // The last one lies where it was written, and the listing says so.
    let listed = scene.coordinators.ask(&["checkpoints", "ls", &id.to_string()]);
    let last = listed.as_array().unwrap().iter().max_by_key(|view| view["step"].as_u64()).unwrap().clone();
    assert_eq!(last["places"][0]["name"].as_str(), Some(ended.parts[0].name.as_str()), "{last}");
    assert!(!scene.on(host, "long", 300).exists());
    // What it left behind has been replaced since, and goes.
    let left = world.path(&format!("disk-{host}/checkpoints/long"));
    eventually("its old checkpoints are removed from the node that it left", || {
        let mut entries = std::fs::read_dir(&left).into_iter().flatten().flatten();
        !entries.any(|entry| entry.file_name().to_string_lossy().starts_with("step-"))
    });
}

#[test]
fn a_job_leaves_no_copies_of_another_s_checkpoint_from_which_it_went_on() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let scene = Scene::new(&world, &network);
    let host_of = |name: &str| name.strip_prefix("box-").unwrap().parse::<usize>().unwrap();
    let ended = scene.ended(scene.submit("1", "1", &LONG, &[]));
    let (first, name) = (host_of(&ended.parts[0].name), ended.parts[0].name.clone());
    scene.coordinators.ask(&["drain", &name]);
    let path = world.path("out/checkpoints/long/step-00000120").display().to_string();
    let resume = format!("resume_from_checkpoint={path}");
    let job = TinyJob { run_name: "on", max_steps: 260, ..LONG };
    let id = scene.submit("2", "2", &job, &["--set", &resume]);
    let others = [1, 2, 3].into_iter().filter(|host| *host != first);
    let ended = scene.ended(id);
    assert_eq!(ended.state, JobState::Succeeded, "{:?}", ended.error);
    assert!(scene.lines(id).contains("fetching the checkpoint of step 120"), "{}", scene.lines(id));
    for host in others {
        eventually("the copy is removed", || !scene.on(host, "long", 120).exists());
    }
    assert!(scene.on(first, "long", 120).exists(), "it was written there");
    let listed = scene.coordinators.ask(&["checkpoints", "ls", "job-1"]);
    let last = listed.as_array().unwrap().iter().max_by_key(|view| view["step"].as_u64()).unwrap();
    let places: Vec<&str> =
        last["places"].as_array().unwrap().iter().filter_map(|place| place["name"].as_str()).collect();
    assert_eq!(places, [name.as_str()]);
}

#[test]
fn what_two_nodes_wrote_each_to_its_own_disk_goes_on_on_a_third() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let mut scene = Scene::new(&world, &network);
    let job = TinyJob { run_name: "sharded", max_steps: 100_000, more: "strategy = \"fsdp\"", ..LONG };
    let id = scene.submit("2", "2", &job, &[]);
    let begun = scene.until(id, "it has saved", |view| view.checkpoint.is_some() && view.step > 22);
    let names: Vec<String> = begun.parts.iter().map(|part| part.name.clone()).collect();
    let hosts: Vec<usize> =
        names.iter().map(|name| name.strip_prefix("box-").unwrap().parse().unwrap()).collect();
    names.iter().for_each(|name| drop(scene.coordinators.ask(&["drain", name])));
    hosts.iter().for_each(|host| scene.nodes[host - 1] = None);
    let ended = scene.ended(id);
    assert_eq!(ended.state, JobState::Failed, "{:?}", ended.error);
    let saved = ended.checkpoint.unwrap();
    let files = |host: usize| {
        let entries = std::fs::read_dir(scene.on(host, "sharded", saved.step)).unwrap().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
    };
    let (first, second) = (files(hosts[0]), files(hosts[1]));
    for name in ["model.safetensors", "config.json", "tokenizer.json", "optimizer-00001-of-00002.safetensors"]
    {
        assert!(first.contains(name) && !second.contains(name), "{name}: {first:?}, {second:?}");
    }
    let missing = "optimizer-00002-of-00002.safetensors";
    assert!(second.contains(missing) && !first.contains(missing), "{first:?}, {second:?}");
    let part = scene.on(hosts[0], "sharded", saved.step).display().to_string();
    let said = world.run("fleet", &["checkpoint", "verify", &part]).expect(2).all();
    assert!(said.contains("only in part") && said.contains(missing), "{said}");
    // Both are back, and only lend what they have.
    for host in &hosts {
        scene.nodes[host - 1] = Some(scene.coordinators.worker_with_disk(*host, 2));
    }
    let steps = format!("max_steps={}", saved.step + 5);
    let more = scene.submit("2", "1", &job, &["--set", "resume_from_checkpoint=latest", "--set", &steps]);
    let ended = scene.ended(more);
    assert_eq!(ended.state, JobState::Succeeded, "{:?}", ended.error);
    assert!(!names.contains(&ended.parts[0].name), "{:?}", ended.parts);
    assert_eq!(scene.losses(more).keys().next().copied(), Some(saved.step + 1));
    let lines = scene.lines(more);
    assert!(names.iter().all(|name| lines.contains(name)), "{lines}");
    let third: usize = ended.parts[0].name.strip_prefix("box-").unwrap().parse().unwrap();
    let whole = scene.on(third, "sharded", saved.step).display().to_string();
    world.run("fleet", &["checkpoint", "verify", &whole]).expect(0);
}

#[test]
fn a_changed_byte_is_named_and_the_job_goes_back_to_the_checkpoint_before() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let scene = Scene::new(&world, &network);
    let id = scene.submit("1", "1", &LONG, &[]);
    let ended = scene.ended(id);
    let host: usize = ended.parts[0].name.strip_prefix("box-").unwrap().parse().unwrap();
    change_a_byte(&scene.on(host, "long", 120).join("model.safetensors"));
    scene.coordinators.ask(&["drain", &format!("box-{host}")]);
    let more =
        scene.submit("1", "1", &LONG, &["--set", "max_steps=130", "--set", "resume_from_checkpoint=latest"]);
    let ended = scene.ended(more);
    assert_eq!((ended.state, ended.generation), (JobState::Succeeded, 2), "{:?}", ended.error);
    let lines = scene.lines(more);
    for part in [
        "the tensor ",
        "model.safetensors",
        &format!("node box-{host}"),
        "back to the checkpoint of step 110",
    ] {
        assert!(lines.contains(part), "{part}: {lines}");
    }
    assert_eq!(scene.losses(more).keys().next().copied(), Some(111));
}

#[test]
fn what_was_changed_on_one_node_comes_again_from_another() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let scene = Scene::new(&world, &network);
    let first = scene.ended(scene.submit("1", "1", &LONG, &[])).parts[0].name.clone();
    scene.coordinators.ask(&["drain", &first]);
    let more = ["--set", "max_steps=121", "--set", "resume_from_checkpoint=latest"];
    let second = scene.ended(scene.submit("1", "1", &LONG, &more)).parts[0].name.clone();
    let copy = scene.on(second.strip_prefix("box-").unwrap().parse().unwrap(), "long", 120);
    change_a_byte(&copy.join("model.safetensors"));
    for name in ["box-1", "box-2", "box-3"].into_iter().filter(|name| *name != second) {
        scene.coordinators.ask(&["drain", name]);
    }
    let path = world.path("out/checkpoints/long/step-00000120").display().to_string();
    let job = TinyJob { run_name: "on", max_steps: 125, ..LONG };
    let id = scene.submit("1", "1", &job, &["--set", &format!("resume_from_checkpoint={path}")]);
    let ended = scene.ended(id);
    assert_eq!((ended.state, ended.generation), (JobState::Succeeded, 1), "{:?}", ended.error);
    let lines = scene.lines(id);
    assert!(lines.contains("fetching the checkpoint of step 120") && lines.contains(&first), "{lines}");
    assert_eq!(scene.losses(id).keys().next().copied(), Some(121));
    world.run("fleet", &["checkpoint", "verify", &copy.display().to_string()]).expect(0);
}

#[test]
fn nodes_that_have_different_checkpoints_under_one_path_do_not_train_together() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let scene = Scene::new(&world, &network);
    let name = scene.ended(scene.submit("1", "1", &LONG, &[])).parts[0].name.clone();
    let host: usize = name.strip_prefix("box-").unwrap().parse().unwrap();
    // Copied by hand, so that the cluster knows nothing of them.
    for (other, step) in [1, 2, 3].into_iter().filter(|other| *other != host).zip([110, 120]) {
        copy(&scene.on(host, "long", step), &world.path(&format!("disk-{other}/checkpoints/mine/x")));
    }
    scene.coordinators.ask(&["drain", &name]);
    let path = world.path("out/checkpoints/mine/x").display().to_string();
    let job = TinyJob { run_name: "on", max_steps: 140, ..LONG };
    let ended =
        scene.ended(scene.submit("2", "2", &job, &["--set", &format!("resume_from_checkpoint={path}")]));
    let message = ended.error.unwrap().message;
    assert_eq!(ended.state, JobState::Failed);
    for part in
        ["different checkpoints", "goes on from step 110", "goes on from step 120", "fleet checkpoints ls"]
    {
        assert!(message.contains(part), "{part}: {message}");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The last one of a file.
fn change_a_byte(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_node_that_dies_while_it_is_read_is_named_and_read_on_when_it_is_back() {
    let world = World::new();
    let Some(network) = Network::new(4) else { return };
    let mut scene = Scene::new(&world, &network);
    let id = scene.submit("1", "1", &LONG, &[]);
    let ended = scene.ended(id);
    let host: usize = ended.parts[0].name.strip_prefix("box-").unwrap().parse().unwrap();
    scene.coordinators.ask(&["drain", &format!("box-{host}")]);
    // Some megabytes at this rate take long enough.
    let others: Vec<usize> = (1..=3).filter(|other| *other != host).collect();
    others.iter().for_each(|other| network.slow(*other, "2mbit"));
    let resume = ["--set", "max_steps=130", "--set", "resume_from_checkpoint=latest"];
    let more = scene.submit("1", "1", &LONG, &resume);
    eventually("some of it has come", || {
        let dirs = others.iter().map(|other| world.path(&format!("disk-{other}/checkpoints/long")));
        let mut copies = dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
        copies.any(|copy| copy.path().join("model.safetensors").exists())
    });
    scene.nodes[host - 1] = None;
    scene.nodes[host - 1] = Some(scene.coordinators.worker_with_disk(host, 2));
    let ended = scene.ended(more);
    assert_eq!(ended.state, JobState::Succeeded, "{:?}", ended.error);
    assert_eq!(scene.losses(more).keys().next().copied(), Some(121));
    // Gone for good: what is missing and who had it is the job's error.
    let host: usize = ended.parts[0].name.strip_prefix("box-").unwrap().parse().unwrap();
    scene.coordinators.ask(&["drain", &ended.parts[0].name]);
    scene.nodes[host - 1] = None;
    let path =
        format!("resume_from_checkpoint={}", world.path("out/checkpoints/long/step-00000130").display());
    let last = scene.ended(scene.submit("1", "1", &LONG, &["--set", "max_steps=140", "--set", &path]));
    let message = last.error.map(|error| error.message).unwrap_or_default();
    assert!(
        last.state == JobState::Failed && message.contains(&format!("node box-{host} had it")),
        "{message}"
    );
}
