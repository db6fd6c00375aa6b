//! Models that others made, from the command line: text from them, training that starts from them, and what is wrong with some.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{World, corpus};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// As tests/parity/foreign.py made it.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/golden/foreign").join(name)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A world with `model`, a copy of a golden directory, and a job that trains it on.
fn world(name: &str) -> World {
    let world = World::new();
    fs::create_dir(world.path("model")).unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, world.path("model").join(path.file_name().unwrap())).unwrap();
    }
    world.write("corpus.jsonl", corpus(60));
    world.write(
        "tune.toml",
        "output_dir = \"out\"\nmax_seq_len = 48\nbatch_size = 2\nmax_steps = 4\nthreads_per_rank = 1\nlogging_steps = 1\n\
         [model]\npath = \"model\"\n[data]\npath = \"corpus.jsonl\"\nvalidation_fraction = 0.1\n[optimizer]\nwarmup_steps = 1\n",
    );
    world
}

fn generate(world: &World, model: &str, prompt: &str, more: &[&str]) -> fleet_tests::Finished {
    let args =
        ["generate", "--model", model, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "24"];
    world.run("fleet", &[&args, more].concat())
}

#[test]
fn text_comes_as_transformers_writes_it_and_a_tuned_model_keeps_its_companions() {
    let world = world("byte_level");
    for case in read(&golden("byte_level").join("expected.json"))["cases"].as_array().unwrap() {
        let done = generate(&world, "model", case["prompt"].as_str().unwrap(), &["--json"]).expect(0);
        // Where theirs ends within a character, ours ends before it.
        let text = case["text"].as_str().unwrap().trim_end_matches('\u{fffd}');
        assert_eq!(done.json()[0]["text"], text);
    }
    let done = world.start("fleet", &["launch", "-n", "2", "--json", "tune.toml"]).finish().expect(0);
    let checkpoint = PathBuf::from(done.summary()["checkpoint"].as_str().unwrap());
    let template = "chat_template.jinja";
    assert_eq!(
        fs::read(checkpoint.join(template)).unwrap(),
        fs::read(world.path("model").join(template)).unwrap()
    );
    for name in ["tokenizer_config.json", "generation_config.json"] {
        assert_eq!(read(&checkpoint.join(name)), read(&world.path("model").join(name)), "{name}");
    }
    generate(&world, &checkpoint.display().to_string(), "The river", &[]).expect(0);

    // The checkpoint has all that the run needs to go on.
    fs::rename(world.path("model"), world.path("moved")).unwrap();
    let more = ["--set", "resume_from_checkpoint=latest", "--set", "max_steps=6"];
    let done =
        world.run("fleet", &[&["launch", "-n", "2", "--json", "tune.toml"][..], &more].concat()).expect(0);
    assert_eq!(done.losses().first().unwrap().0, 5);
    let checkpoint = PathBuf::from(done.summary()["checkpoint"].as_str().unwrap());
    for name in ["tokenizer_config.json", "generation_config.json", "config.json"] {
        let before = read(&checkpoint.with_file_name("step-00000004").join(name));
        assert_eq!(read(&checkpoint.join(name)), before, "{name}");
    }
}

#[test]
fn weights_that_are_no_numbers_end_generation_and_training_as_bad_input() {
    let world = world("legacy");
    let weights = world.path("model/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&0x7fc0u16.to_le_bytes()); // NaN in bf16
    fs::write(&weights, bytes).unwrap();
    let text = generate(&world, "model", "The river", &[]).expect(2);
    assert!(text.stdout.concat().is_empty(), "{}", text.all());
    text.says("holds values that are NaN or infinite");
    world
        .run("fleet", &["launch", "-n", "2", "tune.toml"])
        .expect(2)
        .says("holds values that are NaN or infinite");
}
