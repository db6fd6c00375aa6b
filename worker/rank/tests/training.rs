//! The whole trainer on real text, spoken to as the agent does: over a socket, with ranks as threads of this process.

#![allow(clippy::unwrap_used)] // a test may panic

mod gang;

use fleet_checkpoint::{Claim, RunDir, Writer, diff, verify};
use fleet_common::events::{CheckpointRecord, EventBody, Outcome};
use fleet_common::exit::Fault;
use fleet_common::job::*;
use fleet_rank::generate::{Sampling, Settings, TextModel};
use gang::{job, launch, watch};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

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
        for record in [&half, &full] {
            assert_eq!((record.writers, record.flaw()), (world, None));
            let manifest = verify(Path::new(&record.path)).unwrap();
            let strategy = if world == 1 { "solo" } else { "ddp" };
            assert_eq!((manifest.world_size, manifest.strategy.as_str()), (world, strategy));
        }
        assert_eq!((half.step, full.step), (6, 12));

        let moved = half.path.replace("step-00000006", "kept");
        std::fs::rename(&half.path, &moved).unwrap();
        let rest = launch(&job, world, Some(&moved), None);
        assert_eq!(rest.losses(), whole.losses()[6..]);
        assert_eq!(rest.evaluations(), evaluations[2..]);
        let again = rest.checkpoints().pop().unwrap();
        for name in ["trainer_state.json", "config.json"] {
            assert!(file(&again, name) == file(&full, name), "{name} of {world} ranks");
        }
        assert_eq!(diff(Path::new(&again.path), Path::new(&full.path)).unwrap(), []);

        let done = launch(&job, world, Some(&again.path), None);
        let told = |event: &EventBody| matches!(event, EventBody::Log { line, .. } if line.contains("nothing is left to do; raise max_steps"));
        assert!(done.losses().is_empty() && done.events.iter().any(told), "{:?}", done.events);
    }
}

#[test]
fn a_job_that_leaves_its_strategy_open_is_told_which_it_has_and_why() {
    let told = |world, strategy| {
        let dir = tempfile::tempdir().unwrap();
        let job = Job { strategy, max_steps: Some(1), ..job(dir.path()) };
        let events = launch(&job, world, None, None).events;
        let line = |event: EventBody| if let EventBody::Log { line, .. } = event { Some(line) } else { None };
        let lines: Vec<String> = events.into_iter().filter_map(line).collect();
        lines.into_iter().filter(|line| line.starts_with("strategy: ")).collect::<Vec<String>>()
    };
    let lines = told(2, Strategy::Auto);
    assert!(matches!(&lines[..], [line] if line.starts_with("strategy: ddp: the model fits (")), "{lines:?}");
    assert_eq!(told(1, Strategy::Auto).len() + told(2, Strategy::Fsdp).len(), 0);
}

/// Training goes on while a checkpoint is written, and nothing of the steps after it gets into it.
#[test]
fn a_save_after_every_step_has_the_state_of_that_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = Job { batch_size: 4, ..job(dir.path()) };
    job.checkpoint = Checkpoint { save_steps: 1, save_total_limit: 20, ..job.checkpoint };
    let whole = launch(&job, 3, None, None);
    let saved = whole.checkpoints();
    assert_eq!(saved.iter().map(|record| record.step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    for at in [2, 7] {
        let other = Job { run_name: format!("from-{at}"), ..job.clone() };
        let rest = launch(&other, 3, Some(&saved[at].path), None);
        assert_eq!(rest.losses(), whole.losses()[at + 1..]);
        let (last, again) = (&saved[11].path, &rest.checkpoints()[10 - at].path);
        assert_eq!(diff(Path::new(last), Path::new(again)).unwrap(), []);
    }
}

#[test]
fn a_save_that_fails_in_the_background_is_told_and_the_last_one_fails_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { batch_size: 2, ..job(dir.path()) };
    let failed = |ended: &gang::Ended| -> Vec<(u64, String)> {
        let of = |event: &EventBody| match event {
            EventBody::CheckpointFailed { step, error } => Some((*step, error.clone())),
            _ => None,
        };
        ended.events.iter().filter_map(of).collect()
    };
    let blocked = |job: &Job, step: u64| {
        let place = fleet_checkpoint::step_dir(&job.checkpoint_dir(), step);
        watch(job, 2, None, None, &|event, _| {
            if matches!(event, EventBody::Started { .. }) {
                std::fs::write(&place, "in the way").unwrap();
            }
        })
    };
    let ended = blocked(&job, 6);
    let told = failed(&ended);
    assert!(
        told.len() == 1 && told[0].0 == 6 && told[0].1.contains("not a checkpoint of this run"),
        "{told:?}"
    );
    assert!(ended.outcomes.iter().all(|outcome| outcome.is_ok()), "{:?}", ended.outcomes);
    assert_eq!(ended.checkpoints().iter().map(|record| record.step).collect::<Vec<_>>(), [12]);

    let ended = blocked(&Job { run_name: "last".into(), ..job }, 12);
    assert_eq!(failed(&ended).iter().map(|(step, _)| *step).collect::<Vec<_>>(), [12]);
    assert_eq!(ended.checkpoints().iter().map(|record| record.step).collect::<Vec<_>>(), [6]);
    let error = ended.outcomes[0].as_ref().unwrap_err();
    assert_eq!(error.fault(), Fault::Environment);
    assert!(error.to_string().contains("the run ended without its last checkpoint"), "{error}");
    assert!(ended.outcomes[1].is_ok(), "rank 0 tells it for all");
}

#[test]
fn libtorch_trains_as_fleets_own_executor_does_and_either_continues_the_other() {
    for precision in [Precision::Fp32, Precision::Bf16Mixed] {
        let dir = tempfile::tempdir().unwrap();
        let own = Job { precision, accumulate_grad_batches: 2, batch_size: 2, ..job(dir.path()) };
        let torch = Job { executor: Executor::Torch, run_name: "torch".into(), ..own.clone() };
        let (own_run, torch_run) = (launch(&own, 1, None, None), launch(&torch, 1, None, None));
        let tolerance = if precision == Precision::Fp32 { 1e-4 } else { 2e-2 };
        let same = |a: &[f64], b: &[f64]| {
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(b) {
                assert!((a / b - 1.0).abs() < tolerance, "{precision:?}: {a} {b}");
            }
        };
        assert_eq!(torch_run.losses().len(), 12, "{:?}", torch_run.outcomes);
        same(&torch_run.losses(), &own_run.losses());
        let losses = |ended: &gang::Ended| ended.evaluations().iter().map(|e| e.1).collect::<Vec<_>>();
        same(&losses(&torch_run), &losses(&own_run));
        let half = &torch_run.checkpoints()[0].path;
        let [own_rest, torch_rest] = [&own, &torch].map(|job| {
            let job = Job { run_name: format!("{}-rest", job.run_name), ..job.clone() };
            launch(&job, 1, Some(half), None)
        });
        assert_eq!(torch_rest.losses(), torch_run.losses()[6..], "bit for bit");
        same(&own_rest.losses(), &torch_run.losses()[6..]);
    }
}

/// transformers runs a model on the whole window, of which the last token is predicted only.
#[test]
fn rotary_embeddings_that_grow_grow_to_the_whole_window_in_both_executors() {
    let dir = tempfile::tempdir().unwrap();
    let rope = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4});
    let sizes = json!({"vocab_size": 270, "max_position_embeddings": 6, "rope_parameters": rope});
    let own = Job { model: Model::New(fleet_learn::testing::tiny_with(sizes)), ..job(dir.path()) };
    let torch = Job { executor: Executor::Torch, run_name: "torch".into(), ..own.clone() };
    let [own, torch] = [own, torch].map(|job| launch(&job, 1, None, None));
    let first = |ended: &gang::Ended| (ended.evaluations()[0].1, ended.losses()[0]);
    let ((own_eval, own_loss), (eval, loss)) = (first(&own), first(&torch));
    assert!((eval / own_eval - 1.0).abs() < 1e-6, "{eval} {own_eval}");
    assert!((loss / own_loss - 1.0).abs() < 1e-6, "{loss} {own_loss}");
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
    let told = ended.events.iter().filter_map(|event| match event {
        EventBody::CheckpointsRemoved { hosts, manifests } if hosts[..] == [0] => Some(manifests.clone()),
        _ => None,
    });
    let gone = ended.checkpoints().into_iter().take(4).map(|saved| saved.manifest_sha256);
    assert_eq!(told.flatten().collect::<Vec<_>>(), gone.collect::<Vec<_>>());
}

#[test]
fn the_token_cache_may_be_emptied_while_a_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { max_steps: Some(200), ..job(dir.path()) };
    let ended = watch(&job, 1, None, None, &|event, cache| {
        if matches!(event, EventBody::Started { .. }) {
            std::fs::remove_dir_all(cache).unwrap();
        }
    });
    assert!(matches!(ended.outcomes[0], Ok(Outcome::Succeeded { steps: 200, .. })), "{:?}", ended.outcomes);
    let saved = ended.checkpoints();
    assert_eq!(saved.len(), 34);
    assert!(!file(saved.last().unwrap(), "tokenizer.json").is_empty());
}

#[test]
fn a_run_that_is_stopped_early_leaves_the_model_that_it_may_overwrite() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = Job { max_steps: Some(100_000), ..job(dir.path()) };
    job.checkpoint = Checkpoint { save_steps: 0, overwrite: true, ..job.checkpoint };
    let place = job.checkpoint_dir();
    let claim = Claim { dir: &place, run: "old", resumed: None, overwrite: false, until: None, reads: &[] };
    let old = RunDir::claim(&claim).unwrap();
    let writer = |step| {
        let mut writer = Writer::begin(&old, step).unwrap();
        writer.write_bytes("config.json", b"{}").unwrap();
        writer.finish(1.0).unwrap().path
    };
    let finished = writer(1_000_000);
    drop(old);
    let ended = launch(&job, 1, None, Some(3));
    assert!(matches!(ended.outcomes[0], Ok(Outcome::Stopped { .. })), "{:?}", ended.outcomes);
    assert_eq!(ended.checkpoints().len(), 1);
    assert!(Path::new(&finished).exists(), "nothing regular was saved");
    // It goes with the first checkpoint of a run that comes to one.
    let whole = Job { max_steps: Some(2), ..job };
    assert!(matches!(launch(&whole, 1, None, None).outcomes[0], Ok(Outcome::Succeeded { .. })));
    assert!(!Path::new(&finished).exists());
}

#[test]
fn the_time_of_steps_is_told_in_parts_that_cover_them() {
    let dir = tempfile::tempdir().unwrap();
    for world in [1, 2] {
        let job = Job { batch_size: 2, logging_steps: 5, run_name: format!("of-{world}"), ..job(dir.path()) };
        let began = Instant::now();
        let ended = launch(&job, world, None, None);
        let took = began.elapsed().as_secs_f64();
        let times = ended.times();
        let steps: Vec<_> = times.iter().map(|times| (times.step, times.steps)).collect();
        assert_eq!(steps, [(1, 1), (5, 4), (10, 5), (12, 2)], "{:?}", ended.outcomes);
        let all = times.iter().skip(1).fold(times[0], |all, times| all.and(times));
        assert!(
            all.parts()
                .iter()
                .all(|(part, s)| *s > 0.0 || world == 1 && ["communication", "waiting"].contains(part)),
            "{all:?}"
        );
        assert!((all.communication_s > 0.0) == (world > 1), "{all:?}");
        assert!(12.0 * all.step_s() < took, "{all:?} of {took} s");
        // What the steps took by another clock.
        let tokens = 12.0 * f64::from(world) * f64::from(job.batch_size * job.max_seq_len);
        let Ok(Outcome::Succeeded { tokens_per_s, .. }) = ended.outcomes[0] else {
            panic!("{:?}", ended.outcomes)
        };
        let (told, measured) = (all.step_s() - all.checkpoint_s, tokens / tokens_per_s / 12.0);
        assert!(told > 0.5 * measured && told < 1.5 * measured + 0.01, "{told} {measured}");
    }
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
fn a_job_that_can_never_fit_is_refused_before_it_takes_memory() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = json!({"vocab_size": 270, "hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 2000});
    let job = Job { model: Model::New(fleet_learn::testing::tiny_with(sizes)), ..job(dir.path()) };
    for outcome in launch(&job, 2, None, None).outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.fault(), Fault::Environment);
        let line = error.to_string();
        assert!(line.starts_with("a step needs at least ") && line.contains("for 2 ranks"), "{line}");
        assert!(line.ends_with("take a smaller model, or a machine with more memory"), "{line}");
    }
}

#[test]
fn a_directory_that_cannot_be_written_is_told_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path());
    // A file where the directory of checkpoints should be.
    std::fs::create_dir_all(job.output_dir.clone()).unwrap();
    std::fs::write(job.output_dir.join("checkpoints"), "in the way").unwrap();
    let ended = launch(&job, 1, None, None);
    assert!(ended.losses().is_empty());
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
        let settings = Settings { max_new_tokens: 12, sampling, stop: Vec::new() };
        let mut model = TextModel::open(checkpoint, &[], None, 1).unwrap();
        let generated = model.answer(&"the".into(), &settings, &mut emit).unwrap();
        assert_eq!(generated.text, pieces);
        generated.text
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));

    let weights = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let error = TextModel::open(checkpoint, &[], None, 1).err().unwrap();
    assert_eq!(error.fault(), Fault::Input);
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}
