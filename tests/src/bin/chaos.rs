//! `make chaos`: three coordinators and two nodes train, while a coordinator is killed or stopped every few seconds.
//!
//! At the end every acknowledged change must be there, the loss curve must be that of an undisturbed run bit for bit, and no step may have
//! been done twice or lost. Prints its seed; the same seed makes the same plan of faults.

use clap::Parser;
use fleet_common::arguments;
use fleet_common::ids::{JobId, RunId};
use fleet_common::protocol::{JobState, Point, Reply, Request, RunKey};
use fleet_tests::sim::random::Random;
use fleet_tests::{Client, Coordinators, Finished, TinyJob, World};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    /// Of the plan of faults.
    #[arg(long)]
    seed: Option<u64>,
    /// Steps of the training job: some hundred a second.
    #[arg(long, default_value_t = 12_000)]
    steps: u64,
}

/// Step and loss, the latter as bits.
type Curve = Vec<(u64, u64)>;

/// Between two changes: many small ones, not as many as possible, since the machine trains too.
const PACE: Duration = Duration::from_millis(5);
/// Two of three coordinators acknowledge a change in less, whatever the third one does.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args = arguments::parse::<Args>();
    fleet_tests::end_worlds_on_signals();
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("seed {seed}");
    // All that was started has ended when this returns.
    match run(seed, args.steps) {
        Ok(()) => {
            println!("passed");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("FAILED with seed {seed}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(seed: u64, steps: u64) -> Result<(), String> {
    let job = TinyJob { max_steps: steps, save_steps: steps / 4, ..TinyJob::default() };
    let calm_curve = undisturbed(&job)?;

    let world = World::new();
    let mut coordinators = Coordinators::start(&world, 3);
    let nodes = [coordinators.worker(3, 2), coordinators.worker(4, 2)];
    let (over, is_over) = mpsc::channel();
    let (acknowledged, acknowledgements) = mpsc::channel();
    let begun = Instant::now();
    let mut random = Random::new(seed);
    let mut faults = Faults { acknowledgements, kills: 0, pauses: 0 };
    let mut writer = coordinators.any_client();
    let (written, curve) = std::thread::scope(|scope| {
        let writer = &mut writer;
        let writing = scope.spawn(move || write(writer, &is_over, &acknowledged));
        // Dropped also when the training panics: the scope waits for the writer.
        let over: Sender<()> = over;
        let curve =
            train(&world, &mut coordinators, &job, |coordinators| faults.strike(coordinators, &mut random));
        drop(over);
        (writing.join().expect("the writer does not panic"), curve)
    });
    let curve = curve.map_err(|why| {
        let said = nodes.iter().map(|node| format!("\na node said:\n{}", node.complaints()));
        format!(
            "{why}, after {} kills and {} pauses{}",
            faults.kills,
            faults.pauses,
            said.collect::<String>()
        )
    })?;
    println!(
        "disturbed: {} steps in {:.0} s, {} kills, {} pauses, {} acknowledged changes, {} attempts of unknown end",
        curve.len(),
        begun.elapsed().as_secs_f64(),
        faults.kills,
        faults.pauses,
        written.acknowledged,
        written.unknown
    );

    let found = points(&mut coordinators.any_client(), written.run);
    let lost = written.steps.iter().filter(|step| !found.contains(step)).count();
    let doubled = found.len() - found.iter().collect::<BTreeSet<_>>().len();
    let done: Vec<u64> = curve.iter().map(|(step, _)| *step).collect();
    let missing = (1..=steps).filter(|step| !done.contains(step)).count();
    let repeated = done.len() - done.iter().collect::<BTreeSet<_>>().len();
    let identical = curve == calm_curve;
    println!("acknowledged changes lost: {lost}, applied twice: {doubled}");
    println!("steps lost: {missing}, done twice: {repeated}; loss curve bit-identical: {identical}");
    match lost + doubled + missing + repeated == 0 && identical {
        true => Ok(()),
        false => Err("something was lost or done twice".to_owned()),
    }
}

/// The same job with nothing that goes wrong.
fn undisturbed(job: &TinyJob) -> Result<Curve, String> {
    let world = World::new();
    let calm = Coordinators::start(&world, 1);
    let _nodes = [calm.worker(0, 2), calm.worker(1, 2)];
    let begun = Instant::now();
    let (file, cluster) = (world.job(job).display().to_string(), calm.data_dir(0).display().to_string());
    let submit = ["submit", "-n", "2", "--wait", "--json", "--cluster", &cluster, &file];
    let curve = curve_of(&world.run("fleet", &submit).expect(0));
    println!("undisturbed: {} steps in {:.0} s", curve.len(), begun.elapsed().as_secs_f64());
    Ok(curve)
}

fn curve_of(said: &Finished) -> Curve {
    said.losses().into_iter().map(|(step, loss)| (step, loss.to_bits())).collect()
}

/// Submits the job, calls `meanwhile` again and again until it has ended, and returns its curve.
fn train(
    world: &World,
    coordinators: &mut Coordinators,
    job: &TinyJob,
    mut meanwhile: impl FnMut(&mut Coordinators) -> Result<(), String>,
) -> Result<Curve, String> {
    let file = world.job(job).display().to_string();
    let submitted = coordinators.ask(&["submit", "-n", "2", &file]);
    let id: JobId = submitted["job"].as_str().and_then(|id| id.parse().ok()).expect("the job has an id");
    let mut client = coordinators.any_client();
    loop {
        meanwhile(coordinators)?;
        let Ok(Reply::Job(view)) = client.query(Request::Job(id)) else { continue };
        match view.state {
            JobState::Succeeded => break,
            state if state.is_final() => return Err(format!("{id} ended as {state:?}: {:?}", view.error)),
            _ => {}
        }
    }
    let cluster = coordinators.data_dir(0).display().to_string();
    let logs = world.run("fleet", &["logs", &id.to_string(), "--json", "--cluster", &cluster]).expect(0);
    Ok(curve_of(&logs))
}

struct Faults {
    /// One for each change that was acknowledged.
    acknowledgements: Receiver<()>,
    kills: u32,
    pauses: u32,
}

impl Faults {
    /// One coordinator dies or stands still while the others go on, then all go on.
    fn strike(&mut self, coordinators: &mut Coordinators, random: &mut Random) -> Result<(), String> {
        let victim = random.index(coordinators.count());
        let away = random.range(0..300);
        if random.chance(2, 3) {
            self.kills += 1;
            coordinators.kill(victim);
            self.go_on(away)?;
            coordinators.start_again(victim);
        } else {
            self.pauses += 1;
            coordinators.signal(victim, Signal::SIGSTOP);
            let gone_on = self.go_on(away);
            coordinators.signal(victim, Signal::SIGCONT);
            gone_on?;
        }
        self.go_on(random.range(100..400))
    }

    /// Until so many more changes are acknowledged.
    fn go_on(&self, changes: u64) -> Result<(), String> {
        self.acknowledgements.try_iter().for_each(drop);
        let next = |_| self.acknowledgements.recv_timeout(PATIENCE);
        let all: Result<(), RecvTimeoutError> = (0..changes).try_for_each(next);
        all.map_err(|_| format!("no change was acknowledged in {} s", PATIENCE.as_secs()))
    }
}

/// What was written beside the training.
struct Written {
    run: RunId,
    acknowledged: usize,
    unknown: usize,
    /// Acknowledged ones.
    steps: Vec<u64>,
}

/// Records one point after the other until it is over, and tells of each that is acknowledged.
fn write(client: &mut Client, over: &Receiver<()>, acknowledged: &Sender<()>) -> Written {
    let Ok(Reply::RunStarted(run)) = client.change(Request::StartRun { name: "chaos".into() }) else {
        panic!("no run was started")
    };
    let mut written = Written { run, acknowledged: 0, unknown: 0, steps: Vec::new() };
    for step in 1.. {
        if over.recv_timeout(PACE) != Err(RecvTimeoutError::Timeout) {
            break;
        }
        let points = vec![Point { series: "n".into(), step, value: step as f64, unix_ms: step }];
        match client.change(Request::RecordMetrics { run, points }) {
            Ok(Reply::Done) => {
                written.acknowledged += 1;
                written.steps.push(step);
                let _ = acknowledged.send(()); // who waits for them may have given up
            }
            Ok(other) => panic!("a point was refused: {other:?}"),
            Err(_) => written.unknown += 1,
        }
    }
    written
}

/// The steps of all points that are recorded.
fn points(client: &mut Client, run: RunId) -> Vec<u64> {
    let (mut steps, mut from) = (Vec::new(), 1);
    loop {
        match client.query(Request::RunMetrics { run: RunKey::Own(run), from }) {
            Ok(Reply::Points { points, next }) => {
                steps.extend(points.iter().map(|point| point.step));
                match next {
                    Some(next) => from = next,
                    None => return steps,
                }
            }
            other => panic!("the points cannot be read: {other:?}"),
        }
    }
}
