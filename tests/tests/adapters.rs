//! Adapters from the command line: trained beside a model, killed and resumed, talked to, made one with their model.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::fine_tuning::{
    are_close, checkpoint, instructions, job, launch, whole_and_resumed, with_a_base,
};
use fleet_tests::{Finished, Running, World};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const LORA: &[&str] = &["adapter.r=4", "adapter.dropout=0.1", "lr=1e-2", "eval_steps=10"];
/// Answers of rows, several of which share a sequence.
const SFT: &[&str] = &["task_name=sft", "data.path=rows.json", "data.packing=true", "max_seq_len=384"];

#[test]
fn a_killed_adapter_of_rows_is_resumed_bit_for_bit_and_holds_no_more_than_itself() {
    let (world, base) = with_a_base();
    world.write("rows.json", instructions(120));
    let bytes = |path: &Path| fs::metadata(path).unwrap().len();
    let of_base = bytes(&base.join("model-00001-of-00002.safetensors"));
    for strategy in ["ddp", "fsdp"] {
        let with = format!("strategy={strategy}");
        let [whole, resumed] = whole_and_resumed(&world, |name, more| {
            let file = job(&world, &base, &format!("{name}-{strategy}"));
            launch(&world, "2", &file, &[LORA, SFT, &["batch_size=2", &with], more])
        });
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |done: &Finished| fs::read(checkpoint(done).join(file)).unwrap();
            assert!(read(&whole) == read(&resumed), "{strategy}: {file} differs");
        }
        let held: u64 =
            fs::read_dir(checkpoint(&whole)).unwrap().map(|file| bytes(&file.unwrap().path())).sum();
        assert!(held < of_base, "{held} bytes beside {of_base} of half the base");
        assert!(!checkpoint(&whole).join("config.json").exists());
    }

    // Another base under the same path.
    let weights = base.join("model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    fs::remove_file(base.join("manifest.json")).unwrap();
    let more = ["batch_size=2", "resume_from_checkpoint=latest", "max_steps=40"];
    let file = job(&world, &base, "killed-0-ddp");
    let refused = launch(&world, "2", &file, &[LORA, SFT, &more]).finish().expect(2);
    assert!(refused.all().contains("its base was another model"), "{}", refused.all());
}

/// A copy of the model in `base` with another number.
fn another(world: &World, base: &Path) -> PathBuf {
    let other = world.path("other");
    fs::create_dir(&other).unwrap();
    for file in fs::read_dir(base).unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap();
        if file.is_file() && name != "manifest.json" {
            let mut bytes = fs::read(&file).unwrap();
            if name == "model-00001-of-00002.safetensors" {
                *bytes.last_mut().unwrap() ^= 1;
            }
            fs::write(other.join(name), bytes).unwrap();
        }
    }
    other
}

/// What is made of a model is there as a whole or not at all.
#[test]
fn what_is_stopped_or_has_no_room_leaves_nothing() {
    let (world, base) = with_a_base();
    // Something that takes a while to copy.
    fs::File::create(base.join("notes.txt")).unwrap().set_len(256 << 20).unwrap();
    fs::remove_file(base.join("manifest.json")).unwrap();
    let place = world.path("place");
    fs::create_dir(&place).unwrap();
    let names =
        || -> Vec<_> { fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name()).collect() };
    let output = place.join("few").display().to_string();
    let base = base.display().to_string();
    let quantise = ["quantise", "--model", &base, "--to", "nf4", "--output", &output];
    for (signal, code) in [(Signal::SIGTERM, 128 + 15), (Signal::SIGINT, 128 + 2)] {
        let mut running = world.start("fleet", &quantise);
        while names().is_empty() && !running.has_ended() {
            std::thread::yield_now();
        }
        running.signal(signal);
        running.finish().expect(code);
        assert!(names().is_empty(), "{:?}", names());
    }
    // What runs in the background of a shell is not to hear of its Ctrl-C.
    let fleet = world.command("fleet").get_program().to_str().unwrap().to_owned();
    let kept = place.join("kept").display().to_string();
    let mut command = world.enter(std::process::Command::new("sh"));
    command
        .args(["-c", "trap '' INT; exec \"$@\"", "sh", &fleet])
        .args(&quantise[..5])
        .args(["--output", &kept]);
    let mut running = Running::start(command);
    while names().is_empty() && !running.has_ended() {
        std::thread::yield_now();
    }
    running.signal(Signal::SIGINT);
    running.finish().expect(0);
    fs::remove_dir_all(&kept).unwrap();
    let script = format!("\"$@\"; code=$?; ls -A {} >&2; exit $code", place.display());
    let args = [&[&fleet[..]], &quantise[..]].concat();
    let Some(command) = world.on_a_disk_of("8M", &place, &script, &args) else { return };
    let full = Running::start(command).finish().expect(4);
    let line = full.says("cannot write");
    assert!(line.contains("make room") && !line.contains("checkpoint"), "{line}");
    assert!(!full.all().lines().any(|line| line.starts_with(".tmp-") || line == "few"), "{}", full.all());
}

#[test]
fn ranks_and_strategies_train_the_same_adapter_with_the_same_dropout() {
    let (world, base) = with_a_base();
    let losses = |ranks: &str, name: &str, more: &[&str]| {
        let batch = format!("batch_size={}", 4 / ranks.parse::<u32>().unwrap());
        let file = job(&world, &base, name);
        launch(&world, ranks, &file, &[LORA, &[&batch], more]).finish().expect(0).losses()
    };
    let one = losses("1", "one", &[]);
    for (ranks, name, more) in [
        ("2", "ddp", &["strategy=ddp"][..]),
        ("4", "fsdp", &["strategy=fsdp"]),
        ("2", "again", &["strategy=fsdp", "activation_checkpointing=blocks"]),
    ] {
        are_close(&one, &losses(ranks, name, more), 1e-4, name);
    }
    // And one whose rows have lengths, beside a model in four bits.
    let dora = ["adapter.use_dora=true", "quantization=nf4", "precision=bf16-mixed"];
    let one = losses("1", "dora", &dora);
    assert!(one.last().unwrap().1 < one[0].1 - 0.02, "{one:?}");
    for strategy in ["ddp", "fsdp", "hsdp"] {
        let with = format!("strategy={strategy}");
        are_close(&one, &losses("2", &with, &[&dora[..], &[&with]].concat()), 1e-2, strategy);
    }
}

#[test]
fn an_adapter_is_evaluated_talked_to_gone_on_from_and_made_one_with_its_model() {
    let (world, base) = with_a_base();
    let trained = launch(&world, "1", &job(&world, &base, "trained"), &[LORA]).finish().expect(0);
    let (base, adapter) = (base.display().to_string(), checkpoint(&trained).display().to_string());
    let loss = |more: &[&str]| {
        let args = ["eval", "--data", "corpus.jsonl", "--json"];
        let done = world.run("fleet", &[&args, more].concat()).expect(0);
        serde_json::from_str::<Value>(&done.stdout.concat()).unwrap()["loss"].as_f64().unwrap()
    };
    let file = job(&world, Path::new(&base), "shown");
    let config = ["config", &file, "--set", "adapter.type=lora", "--json"];
    let shown: Value = serde_json::from_str(&world.run("fleet", &config).expect(0).stdout.concat()).unwrap();
    let said = |table: &str, key: &str| shown[table][key].clone();
    assert_eq!((said("adapter", "r"), said("adapter", "alpha")), (16.into(), 32.0.into()), "{shown}");
    assert_eq!((said("adapter", "dropout"), said("adapter", "use_dora")), (0.05.into(), false.into()));
    assert_eq!(said("adapter", "target_modules")[6], "down_proj", "{shown}");
    let out = world.path("out").display().to_string();
    let runs = world.run("fleet", &["runs", "ls", "--local", "--dir", &out, "--json"]).expect(0);
    let runs: Value = serde_json::from_str(&runs.stdout.concat()).unwrap();
    let names: Vec<&str> =
        runs.as_array().unwrap().iter().map(|run| run["run_name"].as_str().unwrap()).collect();
    assert_eq!(names, ["trained", "base"]);
    assert_eq!((&runs[0]["step"], &runs[0]["path"]), (&30.into(), &Value::from(adapter.as_str())));
    let nothing = world.run("fleet", &["runs", "ls", "--local", "--dir", "nothing"]).expect(2);
    nothing.says("name the output_dir of the jobs");

    let of_base = loss(&["--model", &base]);
    let with = loss(&["--model", &base, "--adapter", &adapter]);
    assert!(with < of_base - 0.02, "{with} {of_base}");

    let merge = ["adapter", "merge", "--model", &base, "--adapter", &adapter, "--output", "made", "--json"];
    let merged: Value = serde_json::from_str(&world.run("fleet", &merge).expect(0).stdout.concat()).unwrap();
    assert!(merged["difference"].as_f64().unwrap() < 1e-5, "{merged}");
    assert!((loss(&["--model", "made"]) - with).abs() < 1e-4);

    let unmerge = ["adapter", "unmerge", "--model", "made", "--adapter", &adapter, "--output", "back"];
    let unmerged = world.run("fleet", &unmerge).expect(0);
    assert!(unmerged.all().contains("of the model that they were taken out of"), "{}", unmerged.all());
    assert!((loss(&["--model", "back"]) - of_base).abs() < 1e-5);
    let (half, twice) = (format!("{adapter}=0.5"), format!("{adapter}=2"));
    let combine = ["adapter", "combine", "--adapter", &half, "--adapter", &half, "--output", "sum", "--json"];
    let combined: Value =
        serde_json::from_str(&world.run("fleet", &combine).expect(0).stdout.concat()).unwrap();
    assert!(combined["difference"].as_f64().unwrap() < 1e-6, "{combined}");
    assert!((loss(&["--model", &base, "--adapter", "sum"]) - with).abs() < 1e-5);
    let wrong = ["adapter", "combine", "--adapter", &twice, "--adapter", "x=y", "--output", "other"];
    assert!(world.run("fleet", &wrong).expect(2).all().contains("is no weight; write DIR=0.7"));

    // Beside another model of the same shapes that is told, and refused where it would stay.
    let other = another(&world, Path::new(&base)).display().to_string();
    let eval = ["eval", "--data", "corpus.jsonl", "--adapter", &adapter, "--model"];
    assert!(!world.run("fleet", &[&eval[..], &[&base]].concat()).expect(0).all().contains("another model"));
    let told = world.run("fleet", &[&eval[..], &[&other]].concat()).expect(0);
    told.says("was trained beside another model");
    let merge = ["adapter", "merge", "--model", &other, "--adapter", &adapter, "--output", "forced"];
    world.run("fleet", &merge).expect(2).says("--force");
    assert!(!world.path("forced").exists());
    world.run("fleet", &[&merge[..], &["--force"]].concat()).expect(0);
    // What was combined knows it, too; a run that goes on from it is told.
    let combined = ["adapter", "merge", "--model", &other, "--adapter", "sum", "--output", "again"];
    world.run("fleet", &combined).expect(2).says("was trained beside another model");
    let on = [&format!("adapter.path={adapter}")[..], "max_steps=2"];
    let on = launch(&world, "1", &job(&world, Path::new(&other), "on-another"), &[&on]).finish().expect(0);
    assert!(on.all().contains("was trained beside another model"), "{}", on.all());

    let generate = |more: &[&str]| {
        let args = [
            "generate",
            "--prompt",
            "harbour winter",
            "--max-new-tokens",
            "8",
            "--temperature",
            "0",
            "--json",
        ];
        let done = world.run("fleet", &[&args, more].concat()).expect(0);
        serde_json::from_str::<Value>(&done.stdout.concat()).unwrap()["text"].clone()
    };
    assert_eq!(generate(&["--model", &base, "--adapter", &adapter]), generate(&["--model", "made"]));
    let chat = ["--chat", "--chat-template", "chatml", "--model", &base, "--adapter", &adapter];
    assert!(generate(&chat).is_string());
    fs::write(Path::new(&base).join("chat_template.jinja"), "{% for m in messages %}{% endfor %}").unwrap();
    let chat = ["generate", "--chat", "--prompt", "x", "--model", &base];
    let silent = world.run("fleet", &chat).expect(2);
    assert!(silent.all().contains("writes nothing of the message"), "{}", silent.all());
    fs::remove_file(Path::new(&base).join("chat_template.jinja")).unwrap();
    let consolidate = ["checkpoint", "consolidate", "--out", "one", &adapter];
    world.run("fleet", &consolidate).expect(0);
    assert_eq!(loss(&["--model", &base, "--adapter", "one"]), with);
    let damaged = world.path("one/adapter_model.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let args = ["eval", "--data", "corpus.jsonl", "--model", &base, "--adapter", "one"];
    world.run("fleet", &args).expect(2);
    let alone = world.run("fleet", &["generate", "--prompt", "x", "--model", &adapter]).expect(2);
    assert!(alone.all().contains("give the directory of its base model"), "{}", alone.all());

    // On from there, as an adapter of its own.
    let next = job(&world, Path::new(&base), "next");
    let path = format!("adapter.path={adapter}");
    let more = [path.as_str(), "max_steps=1", "eval_steps=1"];
    let done = launch(&world, "1", &next, &[&more]).finish().expect(0);
    let first = done.stdout.iter().find(|line| line.contains("\"eval\"")).unwrap();
    let first = serde_json::from_str::<Value>(first).unwrap()["loss"].as_f64().unwrap();
    let last = trained.stdout.iter().rfind(|line| line.contains("\"eval\"")).unwrap();
    let last = serde_json::from_str::<Value>(last).unwrap()["loss"].as_f64().unwrap();
    assert!((first - last).abs() < 1e-6, "{first} {last}");
}

#[test]
fn instructions_are_learnt_beside_a_model_in_four_bits() {
    let (world, base) = with_a_base();
    world.write("rows.json", instructions(120));
    let more = ["quantization=nf4", "max_steps=40"];
    let file = job(&world, &base, "sft");
    let evaluations = |done: &Finished| -> Vec<f64> {
        let events = done.stdout.iter().filter(|line| line.contains("\"event\":\"eval\""));
        events.map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
    };
    let packed = launch(&world, "2", &file, &[LORA, SFT, &more]).finish().expect(0);
    let losses = evaluations(&packed);
    assert!(losses.last().unwrap() < &(losses[0] - 0.2), "{losses:?}");

    // Row by row, on one rank, all gradients of a step are of as many tokens as they are.
    let alone = ["data.packing=false", "run_name=alone", "strategy=fsdp"];
    let losses = evaluations(&launch(&world, "4", &file, &[LORA, SFT, &more, &alone]).finish().expect(0));
    assert!(losses.last().unwrap() < &(losses[0] - 0.2), "{losses:?}");

    let (base, adapter) = (base.display().to_string(), checkpoint(&packed).display().to_string());
    let ask = [
        "generate",
        "--model",
        &base,
        "--adapter",
        &adapter,
        "--prompt",
        "Write the river and the stone.",
        "--temperature",
        "0",
    ];
    world.run("fleet", &[&ask[..], &["--max-new-tokens", "4"]].concat()).expect(0);
    let chat = ["--max-new-tokens", "4", "--chat", "--json"];
    let untemplated = world.run("fleet", &[&ask[..], &chat].concat()).expect(2);
    assert!(untemplated.all().contains("has no chat template"), "{}", untemplated.all());

    // One that was trained with a template carries it.
    let named = ["data.chat_template=chatml", "run_name=named", "max_steps=2"];
    let named = launch(&world, "2", &file, &[LORA, SFT, &more, &named]).finish().expect(0);
    assert!(named.all().contains("<|im_end|>, <|im_start|> are no token"), "{}", named.all());
    let adapter = checkpoint(&named);
    let template = fs::read_to_string(adapter.join("chat_template.jinja")).unwrap();
    assert!(template.contains("<|im_start|>") && adapter.join("tokenizer.json").exists());
    let adapter = adapter.display().to_string();
    // Whoever goes on from it learns with that one, and carries it on.
    let path = format!("adapter.path={adapter}");
    let next = [path.as_str(), "run_name=next", "max_steps=1"];
    let next = checkpoint(&launch(&world, "1", &file, &[SFT, &more, &next]).finish().expect(0));
    assert_eq!(fs::read_to_string(next.join("chat_template.jinja")).unwrap(), template);
    let ask =
        ["generate", "--model", &base, "--adapter", &adapter, "--prompt", "Write.", "--temperature", "0"];
    let said = |more: &[&str]| {
        world
            .run("fleet", &[&ask[..], &["--max-new-tokens", "4", "--chat", "--json"], more].concat())
            .expect(0)
    };
    assert_eq!(said(&[]).json()[0]["text"], said(&["--chat-template", "chatml"]).json()[0]["text"]);
    assert!(said(&[]).json()[0]["prompt_tokens"].as_u64() > Some(10));

    world.write("broken.json", r#"[{"instruction": "a", "output": "b"}, {"instruction": "a"}]"#);
    let broken = ["data.path=broken.json", "run_name=broken"];
    let refused = launch(&world, "1", &file, &[LORA, SFT, &more, &broken]).finish();
    assert!(refused.all().contains("row 2"), "{}", refused.all());
}
