//! Many `fleet submit` at once, while the coordinator that leads is killed again and again and some of the clients are too. What each of
//! them said is held against the jobs that there are in the end.
//!
//! Half of the submits have a name of their own (`--id`) and are repeated until they print a job, as a script would; the others are not. Each
//! asks for a program with a name of its own, by which its jobs are found.

use crate::sim::random::Random;
use crate::{Client, Coordinators, World};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, PAGE_MAX, Page, Reply, Request};
use std::collections::BTreeMap;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub submits: usize,
    /// Of them at a time.
    pub parallel: usize,
    /// Between two ends of whoever leads.
    pub kill_every: Duration,
    /// Of a hundred clients so many are killed, at any moment of their lives.
    pub killed_percent: u64,
    pub seed: u64,
}

/// How it went; nothing in it is a fault.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub jobs: usize,
    pub leaders_killed: usize,
    pub clients_killed: usize,
    /// Printed the number of a job.
    pub acknowledged: usize,
    /// Of those with a name.
    pub repeated: usize,
    /// Ends without a number, by exit code: how many, and what one of them said.
    pub failed: BTreeMap<u8, (usize, String)>,
}

/// For one named submit to be acknowledged, however often it is repeated.
const PATIENCE: Duration = Duration::from_secs(120);
/// A client that is killed is so within this after its start: before it is heard, while it waits, while it prints.
const LIFE_MAX: Duration = Duration::from_millis(1500);
/// Coordinators are back after this, as a supervisor would start them.
const AWAY: Duration = Duration::from_millis(500);

/// What the processes of one submit said.
struct Story {
    name: String,
    /// Numbers that were printed.
    printed: Vec<JobId>,
    /// The job may be there without a printed number.
    open: bool,
    repeats: usize,
    clients_killed: usize,
    /// Exit codes without a number, with what was said.
    failed: Vec<(u8, String)>,
}

/// Runs the load, and returns every promise that was not kept.
pub fn run(world: &World, load: Load) -> (Tally, Vec<String>) {
    let mut coordinators = Coordinators::start(world, 3);
    let dir = coordinators.data_dir(0).display().to_string();
    let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut cleaner = coordinators.any_client();
    let mut tally = Tally::default();
    let stories: Vec<Story> = std::thread::scope(|scope| {
        let cleaning = scope.spawn(|| clean(&mut cleaner, &over));
        let submitting: Vec<_> = (0..load.parallel)
            .map(|_| {
                let mut canceller = coordinators.any_client();
                let (next, dir) = (&next, &dir);
                scope.spawn(move || {
                    let mut stories = Vec::new();
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= load.submits {
                            return stories;
                        }
                        let story = submit(world, dir, n, load);
                        // So that there is room for more. What is not cancelled in time the cleaner finds.
                        if let Some(job) = story.printed.first() {
                            let _ = canceller.change(Request::Cancel { job: *job, now: true });
                        }
                        stories.push(story);
                    }
                })
            })
            .collect();
        while submitting.iter().any(|thread| !thread.is_finished()) {
            let begun = Instant::now();
            if let Some(leader) = coordinators.leader() {
                coordinators.kill(leader);
                tally.leaders_killed += 1;
                std::thread::sleep(AWAY);
                coordinators.start_again(leader);
            }
            std::thread::sleep(load.kill_every.saturating_sub(begun.elapsed()));
        }
        over.store(true, Ordering::Relaxed);
        let stories = submitting.into_iter().flat_map(|thread| thread.join().expect("no submit panics"));
        let stories = stories.collect();
        cleaning.join().expect("the cleaner does not panic");
        stories
    });
    let jobs = all_jobs(&mut coordinators.any_client());
    for story in &stories {
        tally.acknowledged += usize::from(!story.printed.is_empty());
        tally.repeated += story.repeats;
        tally.clients_killed += story.clients_killed;
        for (code, said) in &story.failed {
            let (count, one) = tally.failed.entry(*code).or_default();
            *count += 1;
            one.clone_from(said);
        }
    }
    tally.jobs = jobs.values().map(Vec::len).sum();
    (tally, stories.iter().filter_map(|story| broken(story, &jobs)).collect())
}

/// Which promise was not kept.
fn broken(story: &Story, jobs: &BTreeMap<String, Vec<JobId>>) -> Option<String> {
    let Story { name, printed, open, .. } = story;
    let found = jobs.get(name).map_or(&[][..], Vec::as_slice);
    match (found, &printed[..]) {
        ([_, _, ..], _) => Some(format!("{name} is there {} times: {found:?}", found.len())),
        ([job], []) if !open => Some(format!("{name} is {job}, and was said not to be submitted")),
        ([] | [_], []) => None,
        ([], printed) => Some(format!("{name} was acknowledged as {printed:?} and is not there")),
        ([job], printed) => {
            let other = printed.iter().find(|printed| *printed != job)?;
            Some(format!("{name} was acknowledged as {other} and is {job}"))
        }
    }
}

fn submit(world: &World, dir: &str, n: usize, load: Load) -> Story {
    let mut random = Random::new(load.seed ^ (n as u64) << 20);
    let (name, named) = (format!("load-{n}"), n.is_multiple_of(2));
    let (printed, failed) = (Vec::new(), Vec::new());
    let mut story = Story { name, printed, open: false, repeats: 0, clients_killed: 0, failed };
    let begun = Instant::now();
    loop {
        let mut command = world.command("fleet");
        command.args(["submit", "--cluster", dir, "--queue"]);
        if named {
            command.args(["--id", &story.name]);
        }
        // No node ever joins: what is to be run is never looked for.
        command.args(["--", &format!("/nowhere/{}", story.name)]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = command.spawn().expect("fleet can be started");
        let kill = random.chance(load.killed_percent, 100);
        if kill {
            story.clients_killed += 1;
            std::thread::sleep(Duration::from_millis(random.range(0..LIFE_MAX.as_millis() as u64)));
            let _ = client.kill(); // it may have ended
        }
        let End { status, printed, said } = end_of(client);
        let code = status.code().map(|code| code as u8);
        match (printed, code) {
            (Some(job), _) => story.printed.push(job),
            (None, None) => story.open = true,
            (None, Some(code)) => {
                story.open |= code == exit::UNKNOWN;
                story.failed.push((code, said));
            }
        }
        let acknowledged = code == Some(exit::SUCCEEDED);
        if acknowledged || !named || begun.elapsed() > PATIENCE {
            return story;
        }
        story.repeats += 1;
    }
}

struct End {
    status: ExitStatus,
    /// The job, if its number was printed: also before a kill.
    printed: Option<JobId>,
    said: String,
}

fn end_of(client: Child) -> End {
    let output = client.wait_with_output().expect("the client is ours");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = text(&output.stdout).lines().next().and_then(|line| line.parse().ok());
    End { status: output.status, printed, said: text(&output.stderr) }
}

/// Ends what waits, so that the cluster has room for more, until it is over.
fn clean(client: &mut Client, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        if let Ok(Reply::Jobs(jobs)) = client.query(Request::Jobs { all: None }) {
            for job in jobs.items.into_iter().filter(|job| job.state == JobState::Queued) {
                let _ = client.change(Request::Cancel { job: job.job, now: true }); // the next round finds it again
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// All jobs that there ever were, by name.
fn all_jobs(client: &mut Client) -> BTreeMap<String, Vec<JobId>> {
    let (mut jobs, mut before) = (BTreeMap::<String, Vec<JobId>>::new(), None);
    loop {
        let page = Page { before, max: PAGE_MAX };
        match client.query(Request::Jobs { all: Some(page) }) {
            Ok(Reply::Jobs(listing)) => {
                for job in listing.items {
                    jobs.entry(job.name).or_default().push(job.job);
                }
                before = listing.next;
                if before.is_none() {
                    return jobs;
                }
            }
            other => panic!("the jobs cannot be listed: {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_that_was_not_kept_is_found() {
        let story = |printed: &[u64], open| Story {
            name: "a".into(),
            printed: printed.iter().map(|job| JobId(*job)).collect(),
            open,
            repeats: 0,
            clients_killed: 0,
            failed: Vec::new(),
        };
        let jobs = |ids: &[u64]| [("a".to_owned(), ids.iter().map(|job| JobId(*job)).collect())].into();
        let kept = |printed: &[u64], open, ids: &[u64]| broken(&story(printed, open), &jobs(ids)).is_none();
        assert!(kept(&[1], false, &[1]) && kept(&[1, 1], true, &[1]));
        assert!(kept(&[], true, &[1]) && kept(&[], true, &[]) && kept(&[], false, &[]));
        assert!(!kept(&[1], false, &[]) && !kept(&[1], false, &[2]) && !kept(&[1, 2], true, &[1]));
        assert!(!kept(&[], false, &[1]), "it was said not to be there");
        assert!(!kept(&[], true, &[1, 2]) && !kept(&[1], true, &[1, 2]));
    }
}
