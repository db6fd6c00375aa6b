//! `fleet eval`: what transformers finds of the same models and texts, and what is wrong with some.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, World};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/golden")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// As tests/parity/eval.py made it.
fn expected() -> Value {
    read(&golden().join("eval.json"))
}

/// A world with `model`, a copy of a golden directory, and the documents as rows of two files.
fn world(name: &str) -> World {
    let world = World::new();
    fs::create_dir(world.path("model")).unwrap();
    for entry in fs::read_dir(golden().join("foreign").join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, world.path("model").join(path.file_name().unwrap())).unwrap();
    }
    let expected = expected();
    let documents = expected["documents"].as_array().unwrap();
    let rows =
        |part: &[Value]| part.iter().map(|text| json!({"text": text}).to_string() + "\n").collect::<String>();
    world.write("a.jsonl", rows(&documents[..11]));
    world.write("b.jsonl", rows(&documents[11..]));
    world
}

fn eval(world: &World, more: &[&str]) -> Finished {
    world.run("fleet", &[&["eval", "--model", "model"], more].concat())
}

#[test]
fn a_model_predicts_as_well_as_transformers_says() {
    let expected = expected();
    let window = expected["max_seq_len"].to_string();
    for (name, want) in expected["models"].as_object().unwrap() {
        let world = world(name);
        let args = ["--data", "a.jsonl", "b.jsonl", "--max-seq-len", &window, "--json"];
        for batch in ["1", "3", "8"] {
            let done =
                eval(&world, &[&args[..], &["--device", "cpu", "--batch-size", batch]].concat()).expect(0);
            let got = &done.json()[0];
            let real =
                |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"));
            let near = |key: &str, want: f64, tolerance: f64| {
                assert!((real(got, key) - want).abs() < tolerance, "{name} {key}: {got}, {want}");
            };
            assert_eq!(got["tokens"], want["tokens"], "{name}");
            near("loss", real(want, "loss"), 1e-5);
            near("accuracy", real(want, "accuracy"), 1e-9);
            near("perplexity", real(want, "loss").exp(), 1e-3);
            // Every window's first token is in the data and not predicted.
            let all = real(got, "tokens") + real(got, "windows");
            let bytes: usize =
                expected["documents"].as_array().unwrap().iter().map(|d| d.as_str().unwrap().len()).sum();
            assert!(
                (0.9 * bytes as f64..=bytes as f64).contains(&real(got, "bytes")),
                "{name}: {got}, {bytes}"
            );
            near("bits_per_byte", real(got, "loss") / 2f64.ln() * all / real(got, "bytes"), 1e-9);
        }
        let done =
            eval(&world, &[&args[..], &["--precision", "bf16-mixed", "--device", "cpu"]].concat()).expect(0);
        let loss = done.json()[0]["loss"].as_f64().unwrap();
        assert!((loss / want["loss"].as_f64().unwrap() - 1.0).abs() < 0.02, "{name}: {loss}");
    }
}

#[test]
fn it_is_told_as_a_table_and_how_text_is_found_can_be_said() {
    let world = world("byte_level");
    let done = eval(&world, &["--data", "a.jsonl"]).expect(0);
    let said = done.stdout.join("\n");
    for name in ["loss ", "perplexity ", "accuracy ", "bits per byte ", "tokens ", "bytes "] {
        assert!(said.lines().any(|line| line.starts_with(name)), "{name}: {said}");
    }
    assert!(said.contains("of at most 96, of 11 documents"), "the model's positions: {said}");
    let rows = json!({"body": "<p>The river</p>", "text": "no"}).to_string() + "\n";
    world.write("c.jsonl", rows.repeat(30));
    let sets = ["--set", "data.text_field=body", "--set", "data.clean.remove_html=true", "--json"];
    let done = eval(&world, &[&["--data", "c.jsonl"], &sets[..]].concat()).expect(0);
    assert_eq!(done.json()[0]["bytes"], 30 * "The river".len());
}

/// Two rows, of which a job holds one out: its first evaluation is that of the model as it is.
#[test]
fn rows_are_evaluated_as_the_trainer_does_it() {
    let world = world("byte_level");
    let row = |asked: &str, said: &str| {
        json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
            .to_string()
            + "\n"
    };
    let rows = [
        row("How quiet was it?", "The river."),
        row("Who counts?", "A machine that learned to count lanterns."),
    ];
    world.write("rows.jsonl", rows.concat());
    world.write("job.toml", "task_name = \"sft\"\nbatch_size = 1\nmax_seq_len = 96\nmax_steps = 1\nmodel.path = \"model\"\ndevice = \"cpu\"\n\
        data = { path = \"rows.jsonl\", chat_template = \"chatml\", validation_fraction = 0.5 }\n");
    let done = world.run("fleet", &["launch", "job.toml", "--json"]).expect(0);
    let trained = done.events("eval")[0]["loss"].as_f64().unwrap();
    let set = ["--set", "data.chat_template=chatml", "--device", "cpu", "--json"];
    let evaluated = |file: &str, row: &str| {
        world.write(file, row);
        eval(&world, &[&["--data", file][..], &set].concat()).expect(0).json()[0].clone()
    };
    let alone = [evaluated("one.jsonl", &rows[0]), evaluated("two.jsonl", &rows[1])];
    let loss = |found: &Value| found["loss"].as_f64().unwrap();
    assert!(alone.iter().any(|found| (loss(found) - trained).abs() < 1e-6), "{alone:?}, {trained}");
    assert!((loss(&alone[0]) - loss(&alone[1])).abs() > 1e-3, "{alone:?}");
    // Of both together every token counts alike, however many are computed at once.
    let weight = |found: &Value| found["tokens"].as_f64().unwrap();
    let mean = alone.iter().map(|found| loss(found) * weight(found)).sum::<f64>()
        / alone.iter().map(weight).sum::<f64>();
    let both = eval(&world, &[&["--data", "rows.jsonl"][..], &set].concat()).expect(0).json()[0].clone();
    assert!((loss(&both) - mean).abs() < 1e-6, "{both}, {mean}");
    assert_eq!((&both["documents"], &both["windows"], &both["rows"]), (&json!(2), &json!(2), &json!(true)));

    let refused = |more: &[&str]| eval(&world, &[&["--data"][..], more].concat()).expect(2).stderr;
    assert!(refused(&["rows.jsonl", "--set", "data.chat_template=none"]).contains("need a chat template"));
    world.write("pairs.jsonl", json!({"prompt": "a", "chosen": "b", "rejected": "c"}).to_string());
    assert!(refused(&["pairs.jsonl"]).contains("data.fields.completion"));
    let sets = ["pairs.jsonl", "--set", "data.fields.completion=chosen", "--json"];
    assert_eq!(eval(&world, &[&["--data"][..], &sets].concat()).expect(0).json()[0]["rows"], true);
}

#[test]
fn what_is_wrong_is_told_in_one_line_by_its_name() {
    let world = world("byte_level");
    world.write("empty.txt", "");
    world.write("blank.txt", "\n \n");
    world.write("bad.txt", b"caf\xe9 caf\xe9");
    let data = ["--data", "a.jsonl"];
    let more = |more: &[&'static str]| [&data[..], more].concat();
    for (args, code, why) in [
        (vec!["--data", "empty.txt"], 2, "empty.txt"),
        (vec!["--data", "blank.txt"], 2, "the data hold no text (1 files, the first"),
        (vec!["--data", "gone.txt"], 2, "gone.txt does not exist"),
        (vec!["--data", "bad.txt"], 2, "bad.txt is not UTF-8 text"),
        (more(&["--max-seq-len", "1"]), 2, "--max-seq-len is 1; give a number from 2"),
        (more(&["--precision", "16"]), 2, "16"),
        (more(&["--batch-size", "0"]), 2, "0"),
        (more(&["--set", "lr=3"]), 2, "`lr` says nothing of how text is read"),
        (more(&["--set", "data.path=b.jsonl"]), 2, "`data.path` says nothing of how text is read"),
        (more(&["--set", "data.text_fild=x"]), 2, "did you mean `data.text_field`?"),
        (more(&["--set", "data.text_field=x"]), 2, "a.jsonl"),
    ] {
        let done = eval(&world, &args).expect(code);
        assert!(done.stderr.contains(why), "{args:?}: {}", done.stderr);
        let errors = done.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!((errors, done.stdout.len()), (1, 0), "{args:?}: {}", done.stderr);
    }
    let refused = |model: &str| {
        let args = ["eval", "--model", model, "--data", "a.jsonl"];
        world.run("fleet", &args).expect(2).stderr
    };
    assert!(refused("nowhere").contains("--model nowhere: there is no such model directory"));

    // A tokenizer that is larger than the embedding.
    let path = world.path("model/tokenizer.json");
    let whole = read(&path);
    let mut larger = whole.clone();
    let added = json!({"id": 100_000, "content": "<|more|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    larger["added_tokens"].as_array_mut().unwrap().push(added);
    larger["model"]["vocab"]["<|more|>"] = json!(100_000);
    fs::write(&path, larger.to_string()).unwrap();
    let said = refused("model");
    assert!(said.contains("the tokenizer has 100001 tokens and the model's vocab_size is"), "{said}");
    fs::remove_file(&path).unwrap();
    assert!(refused("model").contains("tokenizer.json"));
    fs::write(&path, whole.to_string()).unwrap();

    let weights = world.path("model/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    assert!(refused("model").contains("holds values that are NaN or infinite"));
}
