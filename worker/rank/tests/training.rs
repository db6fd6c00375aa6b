//! The whole trainer on real text, spoken to as the agent does: over a socket, with ranks as threads of this process.

#![allow(clippy::unwrap_used)] // a test may panic

use fleet_collectives::Segment;
use fleet_common::codec::{read_frame_blocking, write_frame_blocking};
use fleet_common::events::{CheckpointRecord, EventBody, Outcome};
use fleet_common::exit::Fault;
use fleet_common::ids::JobId;
use fleet_common::job::*;
use fleet_common::protocol::{FromRank, RankStart, ToRank};
use fleet_rank::agent_link::AgentLink;
use fleet_rank::error::Error;
use fleet_rank::generate::{Sampling, generate};
use fleet_rank::trainer;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A job on made-up English, in `dir`.
fn job(dir: &Path) -> Job {
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
    let config = fleet_rank::testing::tiny_config();
    job.model = Model::New(LlamaConfig { vocab_size: 270, max_position_embeddings: 16, ..config });
    job.tokenizer = Tokenizer::Train { vocab_size: 270 };
    job
}

struct Ended {
    /// Of rank 0.
    events: Vec<EventBody>,
    outcomes: Vec<Result<Outcome, Error>>,
}

impl Ended {
    fn losses(&self) -> Vec<f64> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Step(s) = e { Some(s.loss) } else { None })
            .collect()
    }
    fn evaluations(&self) -> Vec<(u64, f64)> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Eval(v) = e { Some((v.step, v.loss)) } else { None })
            .collect()
    }
    fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.events
            .iter()
            .filter_map(|e| if let EventBody::Checkpoint(c) = e { Some(c.clone()) } else { None })
            .collect()
    }
}

/// Runs a gang to its end. Every checkpoint is recorded at once; `stop_after`: rank 0 is asked to stop when it reports that step.
fn launch(job: &Job, world: u32, resume: Option<&str>, stop_after: Option<u64>) -> Ended {
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
                    job_json: job.to_json(),
                    cache_dir: cache.dir().to_string_lossy().into_owned(),
                    resume: resume.map(str::to_owned),
                    run: "c/job-1".into(),
                    threads: 1,
                    device: "cpu".into(),
                    shm_fd: (world > 1).then(|| segment.fd().as_raw_fd()),
                };
                write_frame_blocking(&mut agent, &ToRank::Start(Box::new(start))).unwrap();
                let trainer = scope.spawn(move || {
                    let (mut link, start) = AgentLink::open(socket).unwrap();
                    let outcome = trainer::run(&start, &mut link);
                    link.send(&FromRank::Done(Outcome::Stopped { steps: 0 }));
                    outcome
                });
                let events = scope.spawn(move || listen(agent, stop_after));
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

fn listen(mut agent: UnixStream, stop_after: Option<u64>) -> Vec<EventBody> {
    let mut events = Vec::new();
    loop {
        match read_frame_blocking::<_, FromRank>(&mut agent).unwrap() {
            Some(FromRank::Event(event)) => {
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

fn file(record: &CheckpointRecord, name: &str) -> Vec<u8> {
    std::fs::read(Path::new(&record.path).join(name)).unwrap()
}

#[test]
fn it_learns_evaluates_saves_and_resumes_bit_for_bit() {
    for (world, precision) in [(1, Precision::Fp32), (2, Precision::Fp32), (2, Precision::Bf16Mixed)] {
        let dir = tempfile::tempdir().unwrap();
        let job = Job { precision, batch_size: 4 / world, accumulate_grad_batches: world, ..job(dir.path()) };
        let whole = launch(&job, world, None, None);
        for outcome in &whole.outcomes {
            assert!(matches!(outcome, Ok(Outcome::Succeeded { steps: 12, .. })), "{outcome:?}");
        }
        assert_eq!(whole.losses().len(), 12);
        let evaluations = whole.evaluations();
        assert_eq!(evaluations.iter().map(|e| e.0).collect::<Vec<_>>(), [0, 6, 12]);
        assert!(evaluations[2].1 < 0.9 * evaluations[0].1, "{evaluations:?}");
        let [half, full] = <[CheckpointRecord; 2]>::try_from(whole.checkpoints()).unwrap();
        assert_eq!((half.step, full.step), (6, 12));

        let moved = half.path.replace("step-00000006", "kept");
        std::fs::rename(&half.path, &moved).unwrap();
        let rest = launch(&job, world, Some(&moved), None);
        assert_eq!(rest.losses(), whole.losses()[6..]);
        assert_eq!(rest.evaluations(), evaluations[2..]);
        let again = rest.checkpoints().pop().unwrap();
        for name in ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "config.json"] {
            assert!(file(&again, name) == file(&full, name), "{name} of {world} ranks");
        }
    }
}

#[test]
fn a_stop_is_agreed_on_and_leaves_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { batch_size: 2, max_steps: Some(100_000), ..job(dir.path()) };
    let ended = launch(&job, 2, None, Some(3));
    let Ok(Outcome::Stopped { steps }) = ended.outcomes[0] else { panic!("{:?}", ended.outcomes) };
    assert!(steps >= 3);
    assert!(matches!(ended.outcomes[1], Ok(Outcome::Stopped { steps: other }) if other == steps));
    assert_eq!(ended.checkpoints().last().unwrap().step, steps);
}

#[test]
fn old_checkpoints_make_room_once_newer_ones_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.checkpoint.save_steps = 2;
    let ended = launch(&job, 1, None, None);
    assert_eq!(ended.checkpoints().len(), 6);
    let mut left: Vec<_> = std::fs::read_dir(job.checkpoint_dir())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["step-00000010", "step-00000012"]);
}

#[test]
fn a_loss_that_explodes_ends_the_run_and_names_the_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = job(dir.path());
    job.optimizer.learning_rate = 1e30;
    let ended = launch(&job, 2, None, None);
    for outcome in ended.outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.fault(), Fault::Job);
        assert!(error.to_string().contains("at step"), "{error}");
    }
}

#[test]
fn a_disk_that_fails_is_reported_and_training_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    // A file where the directory of checkpoints should be.
    std::fs::create_dir_all(job.output_dir.clone()).unwrap();
    std::fs::write(job.output_dir.join("checkpoints"), "in the way").unwrap();
    let ended = launch(&job, 1, None, None);
    let failed = |e: &&EventBody| matches!(e, EventBody::CheckpointFailed { .. });
    assert_eq!(ended.events.iter().filter(failed).count(), 2);
    assert_eq!(ended.losses().len(), 12);
    let error = ended.outcomes[0].as_ref().unwrap_err();
    assert_eq!(error.fault(), Fault::Environment);
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    let record = launch(&job, 1, None, None).checkpoints().pop().unwrap();
    let other = Job { seed: 8, ..job };
    let error = launch(&other, 1, Some(&record.path), None).outcomes.remove(0).unwrap_err();
    assert_eq!(error.fault(), Fault::Input);
    assert!(error.to_string().contains("seed"), "{error}");
}

#[test]
fn the_time_limit_ends_a_run_well() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { max_time_s: Some(0), ..job(dir.path()) };
    let ended = launch(&job, 1, None, None);
    assert!(matches!(ended.outcomes[0], Ok(Outcome::Succeeded { steps: 1, .. })), "{:?}", ended.outcomes);
    assert_eq!(ended.checkpoints().len(), 1);
}

#[test]
fn a_checkpoint_generates_the_same_text_from_the_same_seed_and_is_checked_first() {
    let dir = tempfile::tempdir().unwrap();
    let record = launch(&job(dir.path()), 1, None, None).checkpoints().pop().unwrap();
    let checkpoint = Path::new(&record.path);
    let sample = |seed| {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed };
        let mut pieces = String::new();
        let mut emit = |piece: &str| {
            pieces.push_str(piece);
            true
        };
        let generated = generate(checkpoint, "the", 12, &sampling, 1, &mut emit).unwrap();
        assert_eq!(generated.text, pieces);
        generated.text
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));

    let weights = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let greedy = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    let error = generate(checkpoint, "the", 12, &greedy, 1, &mut |_| true).unwrap_err();
    assert_eq!(error.fault(), Fault::Input);
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}
