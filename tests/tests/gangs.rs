//! A generation of a job runs once, and nothing of it outlives it: workers that are killed, and programs that hide.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Running, Standing, World, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

const ANY: &str = "127.0.0.1:0";

/// Whether workers may make control groups, if this machine lets them, or see none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Groups {
    AsTheyAre,
    Hidden,
}

impl Groups {
    /// Both, where a file system may be hidden here.
    fn all() -> Vec<Groups> {
        let hides = Command::new("unshare").args(["-m", "true"]).output();
        let hides = hides.is_ok_and(|output| output.status.success());
        if !hides {
            eprintln!(
                "only with the control groups that there are: this machine does not allow `unshare -m`"
            );
        }
        [Groups::AsTheyAre].into_iter().chain(hides.then_some(Groups::Hidden)).collect()
    }
}

struct Node<'a> {
    world: &'a World,
    cluster: &'a Standing,
    name: &'static str,
    slots: u32,
    groups: Groups,
}

impl Node<'_> {
    fn command(&self) -> Command {
        let worker = self.world.command("worker");
        let mut command = match self.groups {
            Groups::AsTheyAre => worker,
            Groups::Hidden => {
                let script = "mount -t tmpfs tmpfs /sys/fs/cgroup && exec \"$@\"";
                let mut command = self.world.enter(Command::new("unshare"));
                command.args(["-m", "sh", "-c", script, "sh"]).arg(worker.get_program());
                command
            }
        };
        let (quic, slots) = (&self.cluster.endpoint.quic, self.slots.to_string());
        command.args(["join", quic, "--device", "cpu", "--slots", &slots, "--name", self.name]);
        command.arg("--token-file").arg(self.cluster.data_dir.join("tokens/worker.token"));
        command.arg("--data-dir").arg(self.world.path(self.name));
        command
    }

    /// Starts its worker, as a supervisor would again.
    fn start(&self) -> Running {
        let mut worker = Running::start(self.command());
        worker.until("registration", |line| line["node"].is_string());
        if self.groups == Groups::Hidden {
            worker.until_it_says("without control groups");
        }
        worker
    }
}

fn ask(world: &World, cluster: &Standing, args: &[&str]) -> Value {
    let done = world.run("fleet", &[args, &["--json", "--cluster", cluster.cluster()]].concat()).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
}

/// Submits a shell script, which runs in the world's directory.
fn submit(world: &World, cluster: &Standing, args: &[&str], script: &str) -> String {
    let all =
        [&["submit", "--json", "--cluster", cluster.cluster()], args, &["--", "sh", "-c", script]].concat();
    let done = world.run("fleet", &all).expect(0);
    let submitted: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
    submitted["job"].as_str().unwrap().to_owned()
}

fn ends(world: &World, cluster: &Standing, job: &str) -> Value {
    let mut status = Value::Null;
    eventually("the job's end", || {
        status = ask(world, cluster, &["status", job]);
        ["succeeded", "failed", "cancelled"].contains(&status["state"].as_str().unwrap_or_default())
    });
    status
}

/// The numbers that processes have written into this file, each into a line of its own.
fn pids(world: &World, file: &str) -> Vec<u32> {
    let text = fs::read_to_string(world.path(file)).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(|line| line.parse().unwrap()).collect()
}

fn until_there_are(world: &World, file: &str, count: usize) {
    eventually(file, || pids(world, file).len() >= count);
}

/// Those of them that live: a process that is dead and not reaped does not.
fn alive(world: &World, file: &str) -> Vec<u32> {
    let lives = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    };
    pids(world, file).into_iter().filter(lives).collect()
}

/// Ends what a failed test left, also what hides from the world's own end: with a test that fails, the hiding works.
struct AllEnd<'a>(&'a World);

impl Drop for AllEnd<'_> {
    fn drop(&mut self) {
        let files = fs::read_dir(self.0.path("")).into_iter().flatten().flatten();
        let names = files.filter_map(|entry| entry.file_name().into_string().ok());
        let ours =
            |name: &String| ["starts", "children", "hidden", "bare"].iter().any(|end| name.ends_with(end));
        for pid in names.filter(ours).flat_map(|name| alive(self.0, &name)) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}

/// Says nothing, ignores SIGTERM, and has a child in a session of its own. All write their numbers into `NAME.starts` and `NAME.children`.
fn silent(name: &str) -> String {
    format!(
        "trap '' TERM; echo $$ >> {name}.starts
         setsid sh -c 'echo $$ >> {name}.children; exec sleep 1000' &
         while :; do sleep 1; done"
    )
}

#[test]
fn a_worker_that_is_killed_right_after_a_start_never_starts_that_generation_again() {
    for groups in Groups::all() {
        let world = World::new();
        let _all = AllEnd(&world);
        let cluster = world.coordinator(&world.path("cluster"), ANY);
        let node = |name| Node { world: &world, cluster: &cluster, name, slots: 1, groups };
        let (left, right) = (node("left"), node("right"));
        let (killed, _other) = (left.start(), right.start());
        let job = submit(&world, &cluster, &["-n", "2", "--nodes", "2"], &silent("job"));
        until_there_are(&world, "job.starts", 2);
        until_there_are(&world, "job.children", 2);
        killed.signal(Signal::SIGKILL);
        drop(killed);
        assert!(!alive(&world, "job.children").is_empty(), "{groups:?}: they do not notice");

        let _left = left.start();
        // It greeted after it had ended what was left here.
        let status = ends(&world, &cluster, &job);
        assert_eq!(status["state"], "failed", "{groups:?}: {status}");
        let why = status.to_string();
        assert!(why.contains("agent restarted") && why.contains("left"), "{groups:?}: {why}");
        // The job is over only now that the other part has ended, too.
        assert_eq!(alive(&world, "job.starts"), [0; 0], "{groups:?}");
        assert_eq!(alive(&world, "job.children"), [0; 0], "{groups:?}");
        // The node works on; had the job been started again, it would have been before this one.
        let next = submit(&world, &cluster, &["-n", "2", "--nodes", "2"], "true");
        assert_eq!(ends(&world, &cluster, &next)["state"], "succeeded");
        assert_eq!(pids(&world, "job.starts").len(), 2, "{groups:?}: one start for each rank");
    }
}

#[test]
fn a_program_without_an_environment_is_found_by_its_process_group_after_the_worker_was_killed() {
    for groups in Groups::all() {
        let world = World::new();
        let _all = AllEnd(&world);
        let cluster = world.coordinator(&world.path("cluster"), ANY);
        let node = Node { world: &world, cluster: &cluster, name: "box", slots: 1, groups };
        let worker = node.start();
        let script = "exec env -i PATH=\"$PATH\" sh -c 'sleep 1000 & echo $! >> bare; echo $$ >> bare; wait'";
        let job = submit(&world, &cluster, &["-n", "1"], script);
        until_there_are(&world, "bare", 2);
        // What was started is recorded soon; until then only a mark would tell.
        eventually("the record of what was started", || {
            let record = fs::read_to_string(world.path("box/gangs").join(format!("{job}.1/record.json")));
            record.unwrap_or_default().contains("\"pid\"")
        });
        worker.signal(Signal::SIGKILL);
        drop(worker);
        let _worker = node.start();
        assert_eq!(alive(&world, "bare"), [0; 0], "{groups:?}");
        assert_eq!(ends(&world, &cluster, &job)["state"], "failed");
    }
}

#[test]
fn a_worker_without_its_records_starts_nothing_that_may_have_been_started() {
    for (lost, why) in [
        (&["gangs", "process.json"][..], "without its records"),
        (&["process.json"], "without its records"),
        (&["gangs"], "was started again while it ran"),
    ] {
        starts_nothing_twice(lost, why);
    }
}

fn starts_nothing_twice(lost: &[&str], why: &str) {
    let world = World::new();
    let _all = AllEnd(&world);
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let node = Node { world: &world, cluster: &cluster, name: "box", slots: 1, groups: Groups::AsTheyAre };
    let worker = node.start();
    // A rank, which ends with its worker; what a worker without records cannot know of is not part of this.
    let job = submit(&world, &cluster, &["-n", "1"], "echo $$ >> starts; exec sleep 1000");
    until_there_are(&world, "starts", 1);
    worker.signal(Signal::SIGKILL);
    drop(worker);
    for name in lost {
        let path = world.path("box").join(name);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
    let _worker = node.start();
    let status = ends(&world, &cluster, &job);
    assert!(status["state"] == "failed" && status.to_string().contains(why), "{lost:?}: {status}");
    let next = submit(&world, &cluster, &["-n", "1"], "true");
    assert_eq!(ends(&world, &cluster, &next)["state"], "succeeded");
    assert_eq!(pids(&world, "starts").len(), 1);
}

#[test]
fn a_cancelled_job_leaves_nothing_while_another_one_runs_on_the_node() {
    for groups in Groups::all() {
        let world = World::new();
        let _all = AllEnd(&world);
        let cluster = world.coordinator(&world.path("cluster"), ANY);
        let node = Node { world: &world, cluster: &cluster, name: "box", slots: 2, groups };
        let worker = node.start();
        let other = submit(&world, &cluster, &["-n", "1"], &silent("other"));
        // Its parent is gone before it is cancelled; the next has no mark but a parent, and the last has neither.
        let hiding = "(setsid sh -c 'echo $$ >> job.children; exec sleep 1000' &)
             env -i PATH=\"$PATH\" setsid sh -c 'echo $$ >> job.children; exec sleep 1000' &
             (env -i PATH=\"$PATH\" setsid sh -c 'echo $$ >> job.hidden; exec sleep 1000' &)";
        let job = submit(&world, &cluster, &["-n", "1"], &format!("{hiding}\n{}", silent("job")));
        for (file, count) in
            [("job.starts", 1), ("job.children", 3), ("job.hidden", 1), ("other.children", 1)]
        {
            until_there_are(&world, file, count);
        }
        ask(&world, &cluster, &["cancel", &job, "--now"]);
        assert_eq!(ends(&world, &cluster, &job)["state"], "cancelled");
        assert_eq!(alive(&world, "job.starts"), [0; 0], "{groups:?}");
        assert_eq!(alive(&world, "job.children"), [0; 0], "{groups:?}");
        if !worker.complaints().contains("without control groups") {
            assert_eq!(alive(&world, "job.hidden"), [0; 0], "{groups:?}");
        }
        assert_eq!((alive(&world, "other.starts").len(), alive(&world, "other.children").len()), (1, 1));
        let state = ask(&world, &cluster, &["status", &other])["state"].clone();
        assert!(state == "starting" || state == "running", "{state}");
        // Nor does anything outlive the last one, whatever it is.
        ask(&world, &cluster, &["cancel", &other, "--now"]);
        ends(&world, &cluster, &other);
        for file in ["job.hidden", "other.starts", "other.children"] {
            assert_eq!(alive(&world, file), [0; 0], "{groups:?}: {file}");
        }
        // Those of ranks that were started before any job asked for them may take a moment longer.
        eventually("no control group is left", || groups_of(&world.path("box")).is_empty());
    }
}

/// The control groups that the worker with this directory has made, and are there.
fn groups_of(data_dir: &Path) -> Vec<String> {
    let owner: Value =
        serde_json::from_str(&fs::read_to_string(data_dir.join("process.json")).unwrap()).unwrap();
    let Some(parent) = owner["cgroups"].as_str() else { return Vec::new() };
    let prefix = format!("fleet-{:016x}.", owner["number"].as_u64().unwrap());
    let names = fs::read_dir(parent).into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

#[test]
fn a_copy_of_a_data_directory_ends_nothing_of_the_worker_that_it_was_copied_from() {
    let world = World::new();
    let _all = AllEnd(&world);
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let node = |name| Node { world: &world, cluster: &cluster, name, slots: 1, groups: Groups::AsTheyAre };
    let _worker = node("box").start();
    let job = submit(&world, &cluster, &["-n", "1"], &silent("job"));
    until_there_are(&world, "job.children", 1);
    let copied = Command::new("cp").arg("-r").arg(world.path("box")).arg(world.path("copy")).status();
    assert!(copied.unwrap().success());
    let copy = Running::start(node("copy").command()).finish().expect(4);
    copy.says("a data directory of its own");
    assert_eq!((alive(&world, "job.starts").len(), alive(&world, "job.children").len()), (1, 1));
    ask(&world, &cluster, &["cancel", &job, "--now"]);
    ends(&world, &cluster, &job);
    assert_eq!(alive(&world, "job.children"), [0; 0]);
}

#[test]
fn nobody_is_called_by_the_id_of_another_one() {
    let world = World::new();
    let _all = AllEnd(&world);
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let node = |name| Node { world: &world, cluster: &cluster, name, slots: 1, groups: Groups::AsTheyAre };
    let first = node("node-2").start();
    first.until_it_says("is listed as node-2@node-1");
    let _second = node("box").start();
    let nodes = ask(&world, &cluster, &["nodes"]);
    let names: Vec<&str> =
        nodes.as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["node-2@node-1", "box"]);
    let drained = ask(&world, &cluster, &["drain", "node-2"]);
    assert_eq!(drained["node"], "node-2");
    let by_name = ask(&world, &cluster, &["drain", "node-2@node-1"]);
    assert_eq!(by_name["node"], "node-1");
}
