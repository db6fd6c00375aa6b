//! The page in a real browser: Chromium, driven by tests/browser/*.mjs. Where node, Chromium or playwright-core are missing the tests say that they
//! skip; `deploy/setup.sh --tests` fetches them.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::protocol::{Feature, NewExport, NewProfile, Point, Reply, Request, RunKey};
use fleet_tests::source::root;
use fleet_tests::{Client, Coordinators, Running, Standing, TinyJob, World, eventually};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// What a browser test needs.
struct Browser {
    chromium: PathBuf,
    playwright: PathBuf,
    /// Pictures of the page, for people.
    shots: PathBuf,
}

/// Where a program of this machine lies.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// `None`, with the reason printed, where it is not there.
fn browser() -> Option<Browser> {
    let built = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    let playwright = built.join("tools/playwright-core");
    let chromium = ["chromium", "chromium-browser", "google-chrome"].into_iter().find_map(find);
    let missing = match (find("node").is_some(), chromium, playwright.join("index.mjs").is_file()) {
        (true, Some(chromium), true) => {
            let shots = built.join("page");
            std::fs::create_dir_all(&shots).unwrap();
            return Some(Browser { chromium, playwright, shots });
        }
        (false, ..) => "node",
        (_, None, _) => "Chromium",
        _ => "playwright-core",
    };
    eprintln!(
        "skipped: there is no {missing}, with which the page is tried; `deploy/setup.sh --tests` fetches it"
    );
    None
}

impl Browser {
    /// Runs a script on the page at this address.
    fn start(&self, world: &World, script: &str, page: &str, more: &[(&str, &str)]) -> Running {
        let mut command = world.enter(Command::new("node"));
        command.arg(root().join("tests/browser").join(script));
        command.env("PAGE", format!("http://{page}/")).env("CHROMIUM", &self.chromium);
        command.env("PLAYWRIGHT", &self.playwright).env("SHOTS", &self.shots);
        command.envs(more.iter().copied());
        Running::start(command)
    }
}

fn worker(world: &World, cluster: &Standing, name: &str, slots: u32) -> Running {
    let mut command = world.command("worker");
    command.args([
        "join",
        &cluster.endpoint.quic,
        "--device",
        "cpu",
        "--slots",
        &slots.to_string(),
        "--name",
        name,
    ]);
    command.arg("--token-file").arg(cluster.data_dir.join("tokens/worker.token"));
    command.arg("--data-dir").arg(world.path(name));
    let mut worker = Running::start(command);
    worker.until("registration", |line| line["node"].is_string());
    worker
}

/// The number of a job that was submitted.
fn submit(world: &World, cluster: &str, args: &[&str]) -> String {
    let done = world.run("fleet", &[&["--cluster", cluster, "submit", "--json"], args].concat()).expect(0);
    let submitted: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
    submitted["job"].as_str().unwrap().trim_start_matches("job-").to_owned()
}

fn status(world: &World, cluster: &str, job: &str) -> Value {
    let done = world.run("fleet", &["--cluster", cluster, "status", job, "--json"]).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap()
}

/// A job that trains for as long as a test may take, with all that a page shows.
fn long() -> TinyJob {
    TinyJob { run_name: "a-long-one", max_steps: 100_000, save_steps: 300, ..TinyJob::default() }
}

#[test]
fn a_page_shows_a_job_while_it_trains_and_nothing_comes_of_hostile_names() {
    let Some(browser) = browser() else { return };
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _workers = [worker(&world, &cluster, "left", 2), worker(&world, &cluster, "right", 1)];
    let file = world.job(&long()).display().to_string();
    let set = [
        "--set",
        "logging_steps=5",
        "--set",
        "checkpoint.save_total_limit=2",
        "--set",
        "eval.eval_steps=100",
    ];
    let job = submit(&world, cluster.cluster(), &[&["-n", "2", &file], &set[..]].concat());
    let name = "<img src=x onerror=document.title='taken'>";
    let program = world
        .write(name, "#!/bin/sh\necho '<script>document.title=1</script><b>bold</b>'\nexec sleep 1000\n");
    make_executable(&program);
    let program = submit(&world, cluster.cluster(), &["--", program.to_str().unwrap()]);
    submit(&world, cluster.cluster(), &["--queue", "-n", "64", "--", "sleep", "1"]);
    let more = [("JOB", job.as_str()), ("PROGRAM", program.as_str())];
    let mut script = browser.start(&world, "live.mjs", &cluster.endpoint.http, &more);
    script.until("end", |line| line["did"] == "passed");
    script.finish().expect(0);
    for job in [job, program] {
        world.run("fleet", &["--cluster", cluster.cluster(), "cancel", &job, "--now"]).expect(0);
    }
}

fn make_executable(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_page_goes_on_when_the_leader_is_killed() {
    let Some(browser) = browser() else { return };
    let world = World::new();
    let mut coordinators = Coordinators::start(&world, 3);
    let _worker = coordinators.worker(0, 1);
    let file = world.job(&long()).display().to_string();
    let cluster = coordinators.data_dir(0).display().to_string();
    let job = submit(&world, &cluster, &[&file]);
    let leader = coordinators.leader().unwrap();
    let other = (0..3).find(|n| *n != leader).unwrap();
    let mut script = browser.start(&world, "leader.mjs", coordinators.http(other), &[("JOB", &job)]);
    script.until("the wish", |line| line["did"] == "kill the leader");
    coordinators.kill(leader);
    script.until("end", |line| line["did"] == "passed");
    script.finish().expect(0);
}

#[test]
fn runs_are_compared_in_one_picture() {
    let Some(browser) = browser() else { return };
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _worker = worker(&world, &cluster, "only", 1);
    let file =
        world.job(&TinyJob { max_steps: 60, save_steps: 60, ..TinyJob::default() }).display().to_string();
    let jobs = ["1e-3", "4e-3"].map(|rate| {
        let (rate, out) = (format!("optimizer.learning_rate={rate}"), format!("output_dir=out-{rate}"));
        submit(&world, cluster.cluster(), &[&file, "--set", &rate, "--set", &out])
    });
    for job in &jobs {
        eventually("it is done", || status(&world, cluster.cluster(), job)["state"] == "succeeded");
    }
    let mut client = Client::new(&cluster.data_dir.join("client"), vec![cluster.endpoint.quic.clone()]);
    let Ok(Reply::RunStarted(run)) = client.change(Request::StartRun { name: "<b>mine</b>".into() }) else {
        panic!("no run")
    };
    let point =
        |step: u64| Point { series: "loss".into(), step, value: 6.0 - step as f64 / 20.0, unix_ms: 1 };
    let points = (1..=60).map(point).collect();
    assert_eq!(client.change(Request::RecordMetrics { run, points }), Ok(Reply::Done));
    export_and_profile(&mut client, &jobs[0]);
    let runs = format!("job-{},job-{},{run}", jobs[0], jobs[1]);
    let mut script = browser.start(&world, "compare.mjs", &cluster.endpoint.http, &[("RUNS", &runs)]);
    script.until("end", |line| line["did"] == "passed");
    script.finish().expect(0);
}

fn export_and_profile(client: &mut Client, job: &str) {
    let job = job.parse().unwrap();
    let export = NewExport {
        job,
        step: 60,
        format: "onnx".into(),
        path: "/models/tiny.onnx".into(),
        bytes: 420_000,
        sha256: "ab".repeat(32),
    };
    assert!(matches!(client.change(Request::RecordExport(export)), Ok(Reply::ExportRecorded(_))));
    // The data of a later run are other ones.
    for counts in [vec![2, 30, 28], vec![20, 30, 10]] {
        let feature = Feature {
            name: "length".into(),
            samples: 60,
            mean: 98.5,
            std_dev: 12.0,
            edges: vec![0.0, 50.0, 100.0, 150.0],
            counts,
        };
        let profile = NewProfile { run: RunKey::Job(job), name: "corpus".into(), features: vec![feature] };
        assert!(matches!(client.change(Request::RecordProfile(profile)), Ok(Reply::ProfileRecorded(_))));
    }
}
