//! The numbers: the same losses on any number of ranks, and the same bits after a kill.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, TinyJob, World};
use std::fs;
use std::path::PathBuf;

/// The checkpoint that the summary names, which must be there.
fn checkpoint(done: &Finished) -> PathBuf {
    let summary = done.summary();
    let path = PathBuf::from(
        summary["checkpoint"].as_str().unwrap_or_else(|| panic!("no checkpoint: {}", done.all())),
    );
    assert!(path.join("manifest.json").is_file(), "{}", path.display());
    path
}

#[test]
fn one_two_and_four_ranks_have_the_same_loss_curve_at_the_same_global_batch() {
    let world = World::new();
    let curve = |ranks: u32, run_name: &'static str| {
        let job = TinyJob { run_name, batch_size: 8 / ranks, ..TinyJob::default() };
        let done = world.launch(ranks, &job, &[]).finish().expect(0);
        assert_eq!(done.summary()["status"], "succeeded");
        assert_eq!(done.summary()["peak_rss_mib"].as_array().map(Vec::len), Some(ranks as usize));
        done.losses()
    };
    let one = curve(1, "one");
    assert_eq!(one.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    assert!(one[19].1 < one[0].1 - 0.3, "it does not learn: {one:?}");
    for (ranks, name) in [(2, "two"), (4, "four")] {
        for (a, b) in one.iter().zip(curve(ranks, name)) {
            assert_eq!(a.0, b.0);
            assert!((a.1 - b.1).abs() <= 1e-4 * a.1, "{ranks} ranks, step {}: {} and {}", a.0, a.1, b.1);
        }
    }
}

#[test]
fn a_killed_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit() {
    let job =
        |run_name| TinyJob { run_name, max_steps: 200, save_steps: 50, batch_size: 8, ..TinyJob::default() };
    let world = World::new();
    let whole = world.launch(2, &job("whole"), &[]).finish().expect(0);
    let mut killed = world.launch(2, &job("killed"), &[]);
    let saved = killed.until("checkpoint", |line| line["event"] == "checkpoint" && line["path"].is_string());
    assert_eq!(saved["step"], 50);
    world.strike_all();
    let killed = killed.finish().expect(128 + 9);
    world.is_empty_soon();
    let resumed =
        world.launch(2, &job("killed"), &["--set", "resume_from_checkpoint=latest"]).finish().expect(0);
    let (whole_losses, losses) = (whole.losses(), resumed.losses());
    let first = losses.first().unwrap_or_else(|| panic!("nothing was left to do: {}", killed.all())).0;
    assert!([51, 101, 151].contains(&first), "resumed at {first}, not after a checkpoint");
    assert_eq!(losses, whole_losses[first as usize - 1..], "the losses differ");
    let weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    for file in weights.into_iter().chain(["tokenizer.json", "config.json"]) {
        let read = |done: &Finished| fs::read(checkpoint(done).join(file)).unwrap();
        assert!(read(&whole) == read(&resumed), "{file} differs");
    }
}

#[test]
fn a_run_goes_on_with_steps_of_another_size_behind_the_sequences_that_were_taken() {
    let world = World::new();
    let go_on = |ranks: u32, max_steps: u64| {
        let job = TinyJob { run_name: "grown", max_steps, ..TinyJob::default() };
        let done = world.launch(ranks, &job, &["--set", "resume_from_checkpoint=latest"]).finish().expect(0);
        let state = fs::read(checkpoint(&done).join("trainer_state.json")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        let steps: Vec<u64> = done.losses().iter().map(|(step, _)| *step).collect();
        let said = ["step", "epoch", "epoch_step", "global_batch"].map(|key| state[key].as_u64().unwrap());
        (steps, said, state["epoch_windows"].as_u64(), state["tokens_seen"].as_u64().unwrap() / 64, done)
    };
    let (steps, said, windows, taken, _) = go_on(1, 6);
    assert_eq!((steps, said, windows, taken), ((1..=6).collect(), [6, 0, 6, 4], None, 24));
    let (steps, said, windows, taken, done) = go_on(3, 9);
    assert_eq!((steps, said, windows, taken), ((7..=9).collect(), [9, 0, 9, 12], Some(60), 60));
    assert!(done.all().contains("took 4 sequences each, those of this job take 12"), "{}", done.all());
    let (steps, said, windows, taken, _) = go_on(2, 10);
    assert_eq!((steps, said, windows, taken), (vec![10], [10, 0, 10, 8], Some(68), 68));
}

#[test]
fn a_launch_tells_where_the_time_went_and_leaves_one_trace_of_all_ranks() {
    let world = World::new();
    let file = world.path("trace.json");
    let trace = file.display().to_string();
    let done = world.launch(2, &TinyJob::default(), &["--trace", &trace]).finish().expect(0);
    let times = &done.summary()["times"];
    let parts = ["data", "forward", "backward", "communication", "waiting", "optimizer", "checkpoint"];
    let shares: f64 = parts.iter().map(|part| times[part]["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-6 && times["step_s"].as_f64() > Some(0.0), "{times}");
    assert!(times["communication"]["s"].as_f64() > Some(0.0), "{times}");
    assert_eq!(times["steps"], 19, "the first one is not counted: {}", done.all());
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let steps_of = |rank: u64| {
        let is_step = |event: &&serde_json::Value| {
            event["pid"] == rank && event["name"].as_str().is_some_and(|name| name.starts_with("step "))
        };
        whole["traceEvents"].as_array().unwrap().iter().filter(is_step).count()
    };
    assert_eq!([steps_of(0), steps_of(1)], [20, 20]);
    let beside = fs::read_dir(file.parent().unwrap())
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("trace.json"));
    assert_eq!(beside.count(), 1, "the ranks' parts are gone");
}

#[test]
fn a_job_trains_in_bf16_evaluates_and_its_checkpoint_generates_text() {
    let world = World::new();
    let more = "precision = \"bf16-mixed\"\naccumulate_grad_batches = 2";
    let job = TinyJob { max_steps: 30, more, ..TinyJob::default() };
    let done = world.launch(2, &job, &["--set", "eval.eval_steps=15"]).finish().expect(0);
    let evals: Vec<f64> = done.events("eval").iter().filter_map(|eval| eval["loss"].as_f64()).collect();
    assert_eq!(evals.len(), 3, "before the first step, in the middle and at the end: {}", done.all());
    assert!(evals[2] < evals[0] - 0.3, "{evals:?}");
    assert_eq!(done.summary()["eval_loss"].as_f64(), Some(evals[2]));
    let model = checkpoint(&done).display().to_string();
    let generate = |seed: &str| {
        let args = [
            "generate",
            "--model",
            &model,
            "--prompt",
            "the river",
            "--max-new-tokens",
            "12",
            "--seed",
            seed,
        ];
        world.run("fleet", &args).expect(0).stdout.join("\n")
    };
    let text = generate("1");
    assert!(text.len() > "the river".len(), "{text}");
    assert_eq!(text, generate("1"));
}

/// The steps whose checkpoints lie where a run wrote its last one.
fn saved_steps(done: &Finished) -> Vec<u64> {
    let names =
        fs::read_dir(checkpoint(done).parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    let steps = names.filter_map(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
    let mut steps: Vec<u64> = steps.collect();
    steps.sort_unstable();
    steps
}

/// The checkpoint of the best evaluation behind a step, and the last one.
fn is_kept(done: &Finished, last: u64) {
    let evaluations = done.events("eval");
    let loss = |event: &serde_json::Value| event["loss"].as_f64().unwrap();
    let least = evaluations[1..].iter().min_by(|a, b| loss(a).total_cmp(&loss(b))).unwrap();
    let state = fs::read_to_string(checkpoint(done).join("trainer_state.json")).unwrap();
    let best = serde_json::from_str::<serde_json::Value>(&state).unwrap()["best"]["step"].as_u64();
    assert_eq!(best, least["step"].as_u64(), "{}", done.all());
    let mut wanted = vec![best.unwrap(), last];
    wanted.dedup();
    assert_eq!(saved_steps(done), wanted, "{}", done.all());
}

#[test]
fn a_run_that_gets_no_better_ends_and_its_best_checkpoint_stays() {
    let world = World::new();
    let usual = [
        "eval.eval_steps=2",
        "save_total_limit=1",
        "keep_best=true",
        "early_stopping.patience=3",
        "early_stopping.min_delta=100",
    ];
    let launch = |run_name, sets: &[&str]| {
        let job = TinyJob { run_name, max_steps: 40, ..TinyJob::default() };
        let sets: Vec<&str> = usual.iter().chain(sets).flat_map(|set| ["--set", set]).collect();
        world.launch(2, &job, &sets).finish().expect(0)
    };
    // The first evaluation behind a step is better than none; the three that follow are so by less than they should.
    let done = launch("one", &[]);
    assert_eq!(done.losses().last().unwrap().0, 8, "{}", done.all());
    assert!(done.all().contains("the run ends at step 8"), "{}", done.all());
    is_kept(&done, 8);
    let again = launch("one", &["resume_from_checkpoint=latest"]);
    assert!(again.losses().is_empty() && again.all().contains("nothing is left to do"), "{}", again.all());

    // Steps that are much too large lead away from it.
    let far = ["early_stopping.min_delta=0", "early_stopping.patience=9", "lr=0.2", "max_steps=12"];
    let done = launch("far", &far);
    is_kept(&done, 12);
}
