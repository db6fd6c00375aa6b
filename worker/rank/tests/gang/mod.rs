//! A gang of ranks as threads of the test, spoken to as the agent does: over a socket.

#![allow(dead_code, reason = "each test program uses a part")]

use fleet_collectives::Segment;
use fleet_common::codec::{read_frame_blocking, write_frame_blocking};
use fleet_common::events::{CheckpointRecord, EventBody, Outcome, Times};
use fleet_common::ids::JobId;
use fleet_common::job::*;
use fleet_common::protocol::{FromRank, RankStart, ToRank};
use fleet_learn::agent_link::AgentLink;
use fleet_learn::{Error, trainer};
use fleet_rank::assemble;
use serde_json::json;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A job on made-up English, in `dir`.
pub fn job(dir: &Path) -> Job {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "fly", "home"];
    let text: String = (0..6000usize).map(|i| format!("{} ", words[(i * i / 3 + i) % words.len()])).collect();
    for (n, part) in text.as_bytes().chunks(text.len() / 12 + 1).enumerate() {
        std::fs::write(dir.join(format!("{n:02}.txt")), part).unwrap();
    }
    let text = r#"
        run_name = "run"
        output_dir = "out"
        seed = 7
        batch_size = 4
        max_seq_len = 16
        max_steps = 12
        logging_steps = 1
        threads_per_rank = 1
        data = { path = ".", include = ["*.txt"], validation_fraction = 0.2 }
        optimizer = { lr = 5e-3, warmup_steps = 2, min_lr_ratio = 0.1, weight_decay = 0.1, beta2 = 0.95 }
        checkpoint = { save_steps = 6, save_total_limit = 2 }
        eval = { eval_steps = 6, batch_size = 2, max_eval_examples = 10 }
    "#;
    let mut job = parse_toml(text, dir).unwrap().0;
    let sizes = json!({"vocab_size": 270, "max_position_embeddings": 16});
    job.model = Model::New(fleet_learn::testing::tiny_with(sizes));
    job.tokenizer = Tokenizer::Train { vocab_size: 270 };
    job
}

pub struct Ended {
    /// Of rank 0.
    pub events: Vec<EventBody>,
    pub outcomes: Vec<Result<Outcome, Error>>,
}

impl Ended {
    pub fn losses(&self) -> Vec<f64> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Step(s) = e { Some(s.loss) } else { None })
            .collect()
    }
    pub fn evaluations(&self) -> Vec<(u64, f64)> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Eval(v) = e { Some((v.step, v.loss)) } else { None })
            .collect()
    }
    pub fn times(&self) -> Vec<Times> {
        self.events.iter().filter_map(|e| if let EventBody::Times(t) = e { Some(*t) } else { None }).collect()
    }
    pub fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Checkpoint(c) = e { Some(c.clone()) } else { None })
            .collect()
    }
}

/// Runs a gang to its end. Every checkpoint is recorded at once; `stop_after`: rank 0 is asked to stop when it reports that step.
pub fn launch(job: &Job, world: u32, resume: Option<&str>, stop_after: Option<u64>) -> Ended {
    watch(job, world, resume, stop_after, &|_, _| ())
}

/// The same; `seen` gets every event as it comes, and the directory of the token cache.
pub fn watch(
    job: &Job,
    world: u32,
    resume: Option<&str>,
    stop_after: Option<u64>,
    seen: &(dyn Fn(&EventBody, &Path) + Sync),
) -> Ended {
    let files = fleet_data::DataFiles::find(job, &|_| {}).unwrap();
    let (cache, _) = fleet_data::TokenCache::build_or_open(job, &files, &|_| {}).unwrap();
    let segment = Segment::create(world as usize, 1).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (mut agent, socket) = UnixStream::pair().unwrap();
                let start = RankStart {
                    job: JobId(1),
                    generation: 1,
                    rank,
                    world_size: world,
                    local_rank: rank,
                    local_world_size: world,
                    host: 0,
                    hosts: 1,
                    job_json: job.to_json(),
                    cache_dir: cache.dir().to_string_lossy().into_owned(),
                    resume: resume.map(str::to_owned),
                    run: "c/job-1".into(),
                    threads: 1,
                    device: "cpu".into(),
                    shm_fd: (world > 1).then(|| segment.fd().as_raw_fd()),
                    network: None,
                };
                write_frame_blocking(&mut agent, &ToRank::Start(Box::new(start))).unwrap();
                let trainer = scope.spawn(move || {
                    let (mut link, start) = AgentLink::open(socket).unwrap();
                    let outcome = trainer::run(&start, &mut link, &assemble::learner);
                    link.send(&FromRank::Done(Outcome::Stopped { steps: 0 }));
                    outcome
                });
                let cache = cache.dir();
                let events = scope.spawn(move || listen(agent, stop_after, &|event| seen(event, cache)));
                (trainer, events)
            })
            .collect();
        let (outcomes, mut events): (Vec<_>, Vec<_>) = ranks
            .into_iter()
            .map(|(trainer, events)| (trainer.join().unwrap(), events.join().unwrap()))
            .unzip();
        Ended { events: events.remove(0), outcomes }
    })
}

fn listen(mut agent: UnixStream, stop_after: Option<u64>, seen: &dyn Fn(&EventBody)) -> Vec<EventBody> {
    let mut events = Vec::new();
    loop {
        match read_frame_blocking::<_, FromRank>(&mut agent).unwrap() {
            Some(FromRank::Event(event)) => {
                seen(&event.body);
                let answer = match &event.body {
                    EventBody::Checkpoint(record) => Some(ToRank::CheckpointCommitted { step: record.step }),
                    EventBody::Step(step) if Some(step.step) == stop_after => Some(ToRank::Stop),
                    _ => None,
                };
                if let Some(answer) = answer {
                    write_frame_blocking(&mut agent, &answer).unwrap();
                }
                events.push(event.body);
            }
            Some(_) | None => return events,
        }
    }
}
