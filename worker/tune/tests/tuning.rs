//! The library as its users have it: on a small model that is made on the fly.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_checkpoint::verify;
use fleet_common::job::{self, Job};
use fleet_tune::testing::{lines, short, tiny_adapter, tiny_model};
use fleet_tune::*;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Of one answer, which is soon known.
fn rows(answer: &str) -> Vec<Value> {
    (0..24).map(|n| json!({"prompt": format!("say {n}"), "completion": format!(" {answer}")})).collect()
}

fn pairs() -> Vec<Value> {
    let pair = |n| json!({"prompt": format!("say {n}"), "chosen": " the cat", "rejected": " no bird"});
    (0..24).map(pair).collect()
}

fn cpu() -> Backend {
    Backend::new("cpu").unwrap()
}

fn logits(model: &mut Model, ids: &[u32]) -> Vec<f32> {
    model.forward(ids, None).unwrap().logits
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn one_object_trains_saves_and_answers() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, lines(40)).unwrap();
    let training = TrainingConfig { max_steps: 30, validation_fraction: 0.1, ..short(dir.path()) };
    let likeliest = Sampling { temperature: 0.0, ..Sampling::default() };
    let settings = Settings { max_new_tokens: 8, sampling: likeliest, ..Settings::default() };
    let tuned = SmoLora::new(&base, file.as_path()).unwrap().with_config(training).with_settings(settings);
    assert!(tuned.result().is_none());
    let mut tuned = tuned.on(&cpu()).unwrap().train().unwrap().save().unwrap();

    let result = tuned.result().unwrap().clone();
    assert!(result.success && result.error_message.is_none(), "{result:?}");
    let metric = |name: &str| result.metrics[name];
    assert!(metric("eval_loss") < metric("initial_eval_loss") - 0.01, "{:?}", result.metrics);
    assert_eq!((metric("steps"), metric("train_loss")), (30.0, result.final_loss));
    assert!(result.final_loss > 0.0);
    assert_eq!(result.samples_trained, 60);
    assert!(result.training_time_seconds > 0.0 && metric("tokens_per_s") > 0.0 && metric("grad_norm") > 0.0);
    let checkpoint = result.adapter_path.unwrap();
    verify(&checkpoint).unwrap();

    // What was saved is an adapter of PEFT's and nothing of a run.
    let saved = tuned.saved_to().unwrap().to_owned();
    assert_eq!(saved, dir.path().join("tuned/sft"));
    let names = |dir: &Path| {
        let names =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    let (here, there) = (names(&saved), names(&checkpoint));
    assert!(
        here.contains(&"adapter_model.safetensors".to_owned()) && here.contains(&"tokenizer.json".to_owned())
    );
    assert!(!here.iter().any(|name| name.contains("optimizer") || name.contains("manifest")), "{here:?}");
    assert!(there.iter().any(|name| name.contains("optimizer")), "{there:?}");
    assert!(matches!(SmoLora::new(&base, file.as_path()).unwrap().save(), Err(Error::Input(_))));

    // It is asked with what it has learnt.
    let text = tuned.inference("say 3").unwrap();
    assert!(!text.is_empty());
    let mut model = cpu().load_model(&base).unwrap();
    let ids = model.encode("say 3").unwrap();
    let of_base = logits(&mut model, &ids);
    assert!(apart(&of_base, &logits(tuned.model(), &ids)) > 1e-4);

    // The job lies beside its checkpoints, for more ranks.
    let kept = dir.path().join("tuned/sft.toml");
    let (job, _) = job::load(&kept, &[], Path::new("/")).unwrap();
    assert_eq!(job.max_steps, Some(30));
    assert_eq!(Job::from_json(&job.to_json()).unwrap().checkpoint_dir(), checkpoint.parent().unwrap());

    // Again it goes on, in a run and a folder of its own.
    let tuned = tuned.train().unwrap().save().unwrap();
    assert_eq!(tuned.saved_to().unwrap(), dir.path().join("tuned/sft-2"));
    assert!(tuned.result().unwrap().metrics["initial_eval_loss"] < 1.1 * metric("eval_loss"));
}

#[test]
fn adapters_are_switched_made_one_with_the_model_and_taken_out_again() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let adapter = tiny_adapter(dir.path(), &base).unwrap();
    let mut model = cpu().load_model(&base).unwrap();
    let ids = model.encode("the cat sat on a mat").unwrap();
    assert_eq!(model.decode(&ids).unwrap().trim(), "the cat sat on a mat");
    let of_base = logits(&mut model, &ids);

    model.adapters_mut().load("a", &adapter).unwrap();
    assert_eq!((model.adapters().list(), model.adapters().active()), (vec!["a"], None));
    assert_eq!(logits(&mut model, &ids), of_base);
    model.adapters_mut().switch_to("a").unwrap();
    let with = logits(&mut model, &ids);
    assert!(apart(&with, &of_base) > 1e-3);
    let generated =
        model.generate_after(&ids, &Settings { max_new_tokens: 3, ..Settings::default() }).unwrap();
    assert_eq!((generated.prompt_tokens, generated.new_tokens <= 3), (ids.len(), true));
    let forward = model.forward(&ids, Some(&ids)).unwrap();
    assert!(forward.loss.unwrap() > 0.0 && forward.vocab_size == 280);

    // One with the model, and out of it again.
    let merged = model.adapters().merge(dir.path().join("merged")).unwrap();
    assert!(merged.changed > 0 && merged.difference < 1e-4);
    let mut whole = cpu().load_model(&merged.output).unwrap();
    assert!(apart(&logits(&mut whole, &ids), &with) < 1e-4);
    whole.adapters_mut().load("a", &adapter).unwrap();
    let back = whole.adapters().unmerge("a", dir.path().join("back")).unwrap();
    assert!(apart(&logits(&mut cpu().load_model(back.output).unwrap(), &ids), &of_base) < 1e-4);
    let copy = model.save_pretrained(dir.path().join("copy")).unwrap();
    assert!(apart(&logits(&mut cpu().load_model(copy).unwrap(), &ids), &with) < 1e-4);

    // Two halves are the whole.
    let halves = [("a", 0.5), ("a", 0.5)];
    let output = dir.path().join("sum");
    let combined = model.adapters_mut().combine(&halves, Combination::Cat, "sum", &output).unwrap();
    assert_eq!(combined.rank, 16);
    model.adapters_mut().switch_to("sum").unwrap();
    assert!(apart(&logits(&mut model, &ids), &with) < 1e-4);
    let saved = model.save_adapter(dir.path().join("saved")).unwrap();
    let mut other = cpu().load_model(&base).unwrap();
    other.load_adapter(&saved).unwrap();
    assert_eq!(other.adapters().active(), Some("saved"));
    assert!(apart(&logits(&mut other, &ids), &with) < 1e-4);
    model.adapters_mut().switch_off();
    model.release();
    assert_eq!(logits(&mut model, &ids), of_base);

    // What cannot be is refused and changes nothing.
    let refused = |result: Result<()>| result.unwrap_err().to_string();
    assert!(refused(model.adapters_mut().load("a", &adapter)).contains("there is an adapter a already"));
    assert!(refused(model.adapters_mut().switch_to("b")).contains("there are a, sum"));
    assert!(
        refused(model.adapters().merge(dir.path().join("x")).map(drop)).contains("no adapter is switched on")
    );
    let (taken, output) = ([("a", 1.0)], dir.path().join("taken"));
    let error = refused(model.adapters_mut().combine(&taken, Combination::Cat, "a", &output).map(drop));
    assert!(error.contains("there is an adapter a already") && !output.exists(), "{error}");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/families/gpt2");
    assert!(cpu().load_model(golden).unwrap().load_adapter(&adapter).is_err());
    assert!(model.forward(&[280], None).unwrap_err().to_string().contains("beyond the model's vocabulary"));
}

#[test]
fn who_has_learnt_by_a_template_is_asked_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let talk = |n| json!({"messages": [{"role": "user", "content": format!("say {n}")}, {"role": "assistant", "content": "the cat"}]});
    let likeliest = Sampling { temperature: 0.0, ..Sampling::default() };
    let settings = Settings { max_new_tokens: 6, sampling: likeliest, ..Settings::default() };
    let mut training = TrainingConfig { max_steps: 20, ..short(dir.path()) };
    training.set("data.chat_template", "chatml").set("accumulate_grad_batches", 2);
    let tuned = SmoLora::new(&base, (0..24).map(talk).collect::<Vec<_>>()).unwrap().on(&cpu()).unwrap();
    let mut tuned = tuned.with_config(training).with_settings(settings.clone()).train().unwrap();
    assert_eq!(tuned.result().unwrap().samples_trained, 80, "what a key sets counts");
    let answer = tuned.inference("say 3").unwrap();
    let chat = tuned.model().chat(None, "say 3", &settings).unwrap().text;
    let text = tuned.model().generate("say 3", &settings).unwrap().text;
    assert!(answer == chat && answer != text, "{answer:?} {chat:?} {text:?}");
}

#[test]
fn preferences_are_learnt_and_measured_on_what_is_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let training = TrainingConfig { max_steps: 12, validation_fraction: 0.2, ..short(dir.path()) };
    let config = DpoConfig { training, ..DpoConfig::default() };
    let mut pipeline = DpoPipeline::new(&cpu(), &base, config).unwrap();
    let result = pipeline.train(pairs()).unwrap();
    let metric = |name: &str| result.metrics[name];
    assert!(result.success, "{result:?}");
    assert!((metric("initial_eval_loss") - std::f64::consts::LN_2).abs() < 1e-3, "{:?}", result.metrics);
    assert!(metric("eval_loss") < 0.65 && metric("eval_rewards/accuracies") > 0.9, "{:?}", result.metrics);
    assert!(metric("rewards/margins") > 0.0 && result.samples_trained == 24);
    let saved = pipeline.save_adapter(dir.path().join("adapter")).unwrap();
    assert!(saved.join("adapter_config.json").is_file());

    // The chosen answer has become likelier than the rejected one.
    let mut model = pipeline.model().unwrap();
    let mut less = |answer: &str| {
        let (prompt, ids) =
            (model.encode("say 99").unwrap(), model.encode(&format!("say 99{answer}")).unwrap());
        let labels: Vec<u32> =
            ids.iter().enumerate().map(|(at, id)| if at < prompt.len() { u32::MAX } else { *id }).collect();
        let count = (ids.len() - prompt.len()) as f64;
        let with = model.forward(&ids, Some(&labels)).unwrap().loss.unwrap() * count;
        let active = model.adapters().active().unwrap().to_owned();
        model.adapters_mut().switch_off();
        let without = model.forward(&ids, Some(&labels)).unwrap().loss.unwrap() * count;
        model.adapters_mut().switch_to(&active).unwrap();
        without - with
    };
    let (chosen, rejected) = (less(" the cat"), less(" no bird"));
    assert!(chosen > rejected, "{chosen} {rejected}");

    let text = json!({"text": "no pair"});
    let error = pipeline.train(vec![text; 8]).unwrap_err().to_string();
    assert!(error.contains("chosen") || error.contains("rejected"), "{error}");
}

#[test]
fn topics_are_learnt_and_evaluated_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let training = TrainingConfig { max_steps: 10, ..short(dir.path()) };
    let model = cpu().load_model(&base).unwrap();
    let config = SftConfig { training, ..SftConfig::default() };
    let mut trainer = cpu().create_sft_trainer(&model, config).unwrap();
    let topics =
        Curriculum::default().topic("cats", rows("the cat sat")).topic("birds & co", rows("one red bird"));
    let done = topics.train(&mut trainer).unwrap();
    assert!(done.success && done.error_message.is_none());
    let ids: Vec<&str> = done.topics.iter().map(|topic| topic.id.as_str()).collect();
    assert_eq!(ids, ["cats", "birds & co"]);
    for topic in &done.topics {
        let (before, after) = topic.evaluations().unwrap();
        assert!(after < before - 0.01, "{}: {before} {after}", topic.id);
        assert!(topic.result.adapter_path.as_ref().unwrap().is_dir());
    }
    // The second went on from the first: its adapter is another one, and of the same rank.
    let paths: Vec<&PathBuf> =
        done.topics.iter().filter_map(|topic| topic.result.adapter_path.as_ref()).collect();
    assert!(paths[0].starts_with(dir.path().join("tuned/checkpoints/cats")));
    assert!(paths[1].starts_with(dir.path().join("tuned/checkpoints/birds---co")));
    let (job, _) = job::load(&dir.path().join("tuned/birds---co.toml"), &[], Path::new("/")).unwrap();
    assert_eq!(job.adapter.unwrap().path.as_ref(), Some(paths[0]));
    assert_eq!(trainer.adapter_path(), Some(paths[1].as_path()));
    assert_eq!(trainer.model().unwrap().adapters().active(), Some("birds---co"));

    let bad = Curriculum::default().topic("nothing", vec![json!({"prompt": "a"}); 8]);
    let error = bad.train(&mut trainer).unwrap_err().to_string();
    assert!(!error.contains('\n') && error.contains("completion"), "{error}");
}

#[test]
fn a_run_is_ended_by_its_listener_and_one_that_fails_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let model = cpu().load_model(&base).unwrap();
    let training = TrainingConfig { max_steps: 100_000, ..short(dir.path()) };
    let sft = |training| SftConfig { training, ..SftConfig::default() };
    let mut trainer = cpu().create_sft_trainer(&model, sft(training.clone())).unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let told = seen.clone();
    trainer.on_event(move |event| {
        told.borrow_mut().push(event.clone());
        match event {
            EventBody::Step(step) if step.step == 3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    let result = trainer.train(rows("the cat")).unwrap();
    assert!(result.success && result.metrics["steps"] >= 3.0 && result.metrics["steps"] < 1000.0);
    assert!(result.adapter_path.unwrap().is_dir());
    let has = |what: fn(&EventBody) -> bool| seen.borrow().iter().any(what);
    assert!(has(|event| matches!(event, EventBody::DataReady(_))));
    assert!(has(|event| matches!(event, EventBody::Started { .. })));
    assert!(has(|event| matches!(event, EventBody::Checkpoint(_))));

    let wild = TrainingConfig { learning_rate: 1e30, max_steps: 10, save_steps: 1, ..training.clone() };
    let mut trainer = cpu().create_sft_trainer(&model, sft(wild)).unwrap();
    let result = trainer.train(rows("the cat")).unwrap();
    assert!(!result.success && result.samples_trained > 0, "{result:?}");
    assert!(result.error_message.unwrap().contains("at step"));

    // What cannot begin is an error, and makes nothing.
    let mut trainer = cpu().create_sft_trainer(&model, sft(training.clone())).unwrap();
    assert!(matches!(trainer.train("no/such/file.jsonl"), Err(Error::Data(_))));
    let wrong = LoraConfig { r: 0, ..LoraConfig::default() };
    let refused = cpu().create_sft_trainer(&model, SftConfig { training: training.clone(), lora: wrong });
    assert_eq!(refused.err().unwrap().to_string(), "r must be positive");
    let half = Backend::create(&BackendConfig {
        backend_type: Some("cpu".into()),
        dtype: Dtype::Float16,
        ..BackendConfig::default()
    });
    let half = half.unwrap();
    let brief = TrainingConfig { max_steps: 2, ..training };
    let result = half.create_sft_trainer(&model, sft(brief)).unwrap().train(rows("the cat")).unwrap();
    assert!(result.success && result.final_loss.is_finite(), "{result:?}");
    assert!(cpu().load_model(dir.path().join("nothing")).is_err());
}

#[test]
fn what_data_are_worth_is_known_before_they_are_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_model(dir.path()).unwrap();
    let model = cpu().load_model(&base).unwrap();
    let training = TrainingConfig { validation_fraction: 0.25, ..short(dir.path()) };
    let mut trainer =
        cpu().create_sft_trainer(&model, SftConfig { training, ..SftConfig::default() }).unwrap();
    let mut given = rows("the cat");
    given.extend([json!({"prompt": "say", "completion": ""}), given[0].clone()]);
    let quality = trainer.quality(given.clone()).unwrap();
    let report = quality.rows.unwrap();
    assert_eq!((report.rows, report.empty, report.duplicates), (26, 1, 1));
    assert!(report.loss_tokens > 0 && report.loss_tokens < report.tokens);
    assert!(quality.held_out > 0 && quality.sequences > 0 && !quality.notes.is_empty());

    // Text in files, of which a run is made as well.
    let text = trainer.quality(Dataset::from(dir.path().join("text"))).unwrap();
    assert!(text.documents > 0 && text.tokens > 1000 && text.rows.is_none());
    let result = trainer.train(dir.path().join("text")).unwrap();
    assert!(result.success && trainer.run_name() == Some("text"));

    // A table with fields of other names.
    let csv = dir.path().join("rows.csv");
    let lines: Vec<String> = (0..16).map(|n| format!("say {n}, it is {n}")).collect();
    std::fs::write(&csv, format!("question,answer\n{}\n", lines.join("\n"))).unwrap();
    let table =
        Dataset::from(csv).field("prompt", "question").unwrap().field("completion", "answer").unwrap();
    assert_eq!(trainer.quality(table).unwrap().rows.unwrap().examples, 16);
}
