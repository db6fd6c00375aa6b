//! The job formats: good files, bad files with the one line each gets, and round trips.

use super::Strategy;
use super::formats::Format;
use super::*;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert_eq, proptest};
use proptest::strategy::Strategy as Generator;
use std::path::Path;

const DIR: &str = "/work/dir";

pub(super) fn parse(format: Format, text: &str, sets: &[&str]) -> Result<(Job, Vec<Warning>), JobFileError> {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    load::parse(text, format, "job", "my-run".as_ref(), &sets, Path::new(DIR))
}

/// A job from flat TOML lines, with a data path.
pub(super) fn job(lines: &str) -> Job {
    parse(Format::Toml, &format!("{lines}\n[data]\npath = \"x.txt\"\n"), &[]).unwrap().0
}

pub(super) fn error(text: &str) -> String {
    parse(Format::Toml, text, &["data.path=x"]).expect_err(text).to_string()
}

#[test]
fn an_empty_job_file_with_data_is_the_defaults() {
    let job = job("");
    assert_eq!(job.run_name, "my-run");
    assert_eq!(job.data.paths, [PathBuf::from("/work/dir/x.txt")]);
    assert_eq!(job.output_dir, Path::new("/work/dir/training_output"));
    assert_eq!(job.checkpoint_dir(), Path::new("/work/dir/training_output/checkpoints/my-run"));
    assert_eq!((job.seed, job.epochs, job.max_steps), (42, 1, None));
    assert_eq!((job.optimizer.learning_rate, job.optimizer.warmup_steps), (5e-4, None));
    assert!(!job.checkpoint.overwrite);
    assert_eq!((job.checkpoint.save_steps, job.checkpoint.save_total_limit), (250, 2));
    assert_eq!(job.precision, Precision::Fp32);
    let Model::New(config) = job.model else { panic!("a fresh model") };
    let sizes = ["num_attention_heads", "head_dim", "intermediate_size", "max_position_embeddings"];
    assert_eq!(sizes.map(|key| config[key].as_u64().unwrap()), [4, 64, 704, job.max_seq_len.into()]);
}

#[test]
fn the_three_formats_say_the_same() {
    let toml = "lr = 1e-3\nnum_epochs = 3\ndevices = [0, 1]\nprecision = 32\n[data]\npath = ['a', \"b\"]\n[data.clean]\nremove_html = true\n";
    let yaml = "# a comment\nlr: 1e-3\nnum_epochs: 3\ndevices: [0, 1]\nprecision: 32\ndata:\n  path:\n    - a\n    - b\n  clean: {remove_html: true}\n";
    let json = "{\n  // a comment\n  \"lr\": 1e-3, \"num_epochs\": 3, /* and */ \"devices\": [0, 1,],\n  \"precision\": \"32\",\n  \
                \"data\": {\"path\": [\"a\", \"b\"], \"clean\": {\"remove_html\": true}},\n}\n";
    let wanted = parse(Format::Toml, toml, &[]).unwrap();
    assert_eq!(wanted.0.epochs, 3);
    assert_eq!(wanted.0.data.paths, [PathBuf::from("/work/dir/a"), PathBuf::from("/work/dir/b")]);
    assert!(wanted.0.data.clean.remove_html);
    assert_eq!(parse(Format::Yaml, yaml, &[]).unwrap(), wanted);
    assert_eq!(parse(Format::Json, json, &[]).unwrap(), wanted);
}

#[test]
fn every_spelling_reaches_its_field() {
    type Holds = fn(&Job) -> bool;
    let cases: &[(&str, Holds)] = &[
        ("num_train_epochs = 7", |j| j.epochs == 7),
        ("per_device_train_batch_size = 3", |j| j.batch_size == 3 && j.eval.batch_size == 3),
        ("per_device_batch_size = 3", |j| j.batch_size == 3),
        ("gradient_accumulation_steps = 5", |j| j.accumulate_grad_batches == 5),
        ("accumulate_grad_batches = 5", |j| j.accumulate_grad_batches == 5),
        ("", |j| j.neftune_noise_alpha.is_none()),
        ("neftune_noise_alpha = 0", |j| j.neftune_noise_alpha.is_none()),
        ("neftune_noise_alpha = 5", |j| j.neftune_noise_alpha == Some(5.0)),
        ("strategy = \"fsdp_native\"", |j| j.strategy == Strategy::Fsdp),
        ("", |j| j.transport == Transport::Tcp && j.transport_encryption && j.trace_of(0).is_none()),
        ("transport = \"quic\"", |j| j.transport == Transport::Quic && j.transport_encryption),
        ("trace = \"t.json\"", |j| j.trace_of(3) == Some("/work/dir/t.json.rank-3".into())),
        ("transport_encryption = false", |j| !j.transport_encryption),
        ("strategy = \"hsdp\"", |j| j.strategy == Strategy::Hsdp),
        ("", |j| j.activation_checkpointing == ActivationCheckpointing::None),
        ("activation_checkpointing = \"blocks\"", |j| {
            j.activation_checkpointing == ActivationCheckpointing::Blocks
        }),
        ("activation_checkpointing = 3", |j| j.activation_checkpointing == ActivationCheckpointing::First(3)),
        ("gradient_checkpointing = true", |j| j.activation_checkpointing == ActivationCheckpointing::Blocks),
        ("", |j| j.reshard_after_forward && !j.offload_optimizer),
        ("reshard_after_forward = false", |j| !j.reshard_after_forward),
        ("offload_optimizer = true", |j| j.offload_optimizer),
        ("learning_rate = 1", |j| j.optimizer.learning_rate == 1.0),
        ("optimizer.lr = 0.25", |j| j.optimizer.learning_rate == 0.25),
        ("max_grad_norm = 0", |j| j.optimizer.max_grad_norm == 0.0),
        ("max_steps = 1e3", |j| j.max_steps == Some(1000)),
        ("max_steps = -1", |j| j.max_steps.is_none()),
        ("max_steps = 100\nwarmup_steps = 60", |j| j.optimizer.warmup_steps == Some(60)),
        ("overwrite = true", |j| j.checkpoint.overwrite),
        ("overwrite_output_dir = true", |j| j.checkpoint.overwrite),
        ("resume_from_checkpoint = \"latest\"", |j| j.checkpoint.resume == Resume::Latest),
        ("resume_from_checkpoint = \"c/step-1\"", |j| {
            j.checkpoint.resume == Resume::Path("/work/dir/c/step-1".into())
        }),
        ("checkpoint.resume = \"/c\"", |j| j.checkpoint.resume == Resume::Path("/c".into())),
        ("vocab_size = 300", |j| j.tokenizer == Tokenizer::Train { vocab_size: 300 }),
        ("tokenizer.vocab_size = 300", |j| matches!(&j.model, Model::New(c) if c["vocab_size"] == 300)),
        ("devices = \"auto\"", |j| j.devices == Devices::Auto),
        ("devices = 4", |j| j.devices == Devices::Count(4)),
        ("use_amp = true", |j| j.precision == Precision::Bf16Mixed),
        ("precision = \"bfloat16\"", |j| j.precision == Precision::Bf16Mixed),
        ("precision = \"bf16-mixed\"\nuse_amp = true", |j| j.precision == Precision::Bf16Mixed),
        ("precision = 16", |j| j.precision == Precision::Fp16Mixed),
        ("precision = \"BF16\"", |j| j.precision == Precision::Bf16Mixed),
        ("strategy = \"FULL_SHARD\"", |j| j.strategy == Strategy::Fsdp),
        ("precision = \"bf16-true\"", |j| j.precision == Precision::Bf16True),
        ("precision = \"16-mixed\"\nuse_amp = true", |j| j.precision == Precision::Fp16Mixed),
        ("dtype = \"float16\"\ndevice = \"cpu\"", |j| j.precision == Precision::Fp16Mixed),
        ("use_gpu = false", |j| j.device == Device::Cpu),
        ("use_gpu = true", |j| j.device == Device::Cuda),
        ("device = \"gpu\"", |j| j.device == Device::Cuda),
        ("executor = \"torch\"", |j| j.executor == Executor::Torch),
        ("device = \"pytorch\"", |j| j.device == Device::Auto),
        ("eval_steps = 9", |j| j.eval.eval_steps == 9),
        ("eval.max_eval_examples = 32", |j| j.eval.max_eval_examples == Some(32)),
        ("epochs = 2\nnum_epochs = 2.0", |j| j.epochs == 2),
        ("model.path = \"m\"", |j| j.tokenizer == Tokenizer::File("/work/dir/m/tokenizer.json".into())),
        ("output_dir = \"./out/.\"", |j| j.output_dir == Path::new("/work/dir/out")),
    ];
    for (text, holds) in cases {
        let (job, _) = parse(Format::Toml, text, &["data.path=x"]).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(holds(&job), "{text}: {job:?}");
    }
}

#[test]
fn a_tilde_is_the_home_directory_in_every_path() {
    let home = crate::home::dir().unwrap();
    let text = "output_dir = \"~/out\"\nresume_from_checkpoint = \"~/c\"\n[model]\npath = \"~/m\"\n[tokenizer]\npath = \"~/t.json\"\n\
        [data]\npath = [\"~\", \"a~b\", \"./~x\"]\n";
    let (job, _) = parse(Format::Toml, text, &[]).unwrap();
    assert_eq!((&job.output_dir, &job.model), (&home.join("out"), &Model::Pretrained(home.join("m"))));
    assert_eq!(job.tokenizer, Tokenizer::File(home.join("t.json")));
    assert_eq!(job.checkpoint.resume, Resume::Path(home.join("c")));
    assert_eq!(job.data.paths, [home, PathBuf::from("/work/dir/a~b"), PathBuf::from("/work/dir/~x")]);
    let said = error("output_dir = \"~ann/out\"");
    assert!(said.contains("`output_dir` is \"~ann/out\"") && said.contains("./~ann/out"), "{said}");
}

#[test]
fn quic_without_encryption_is_refused() {
    let said = error("transport = \"quic\"\ntransport_encryption = false");
    assert!(said.contains("QUIC always encrypts; leave `transport_encryption` away"), "{said}");
    let said = error("transport = \"udp\"");
    assert!(said.contains("\"tcp\", \"quic\""), "{said}");
}

#[test]
fn words_of_other_tools_for_the_newest_checkpoint_name_fleets() {
    for word in ["last", "auto", "True", "none"] {
        let said = error(&format!("resume_from_checkpoint = \"{word}\""));
        assert!(said.contains("\"latest\", \"no\" or the directory of a checkpoint is wanted"), "{said}");
    }
}

#[test]
fn set_replaces_any_spelling_and_the_last_one_wins() {
    let sets = ["learning_rate=2e-3", "epochs=4", "epochs=5", "run_name=7", "data.path=/y z.txt"];
    let (job, _) = parse(Format::Toml, "lr = 1\nnum_epochs = 3\n[data]\npath = \"x\"\n", &sets).unwrap();
    assert_eq!((job.optimizer.learning_rate, job.epochs, job.run_name.as_str()), (2e-3, 5, "7"));
    assert_eq!(job.data.paths, [PathBuf::from("/y z.txt")]);

    // a table replaces what it names, and is still text where that is asked for
    let sets = [
        "data={path = 'z', min_chars = 3}",
        "model.rope_parameters={rope_type = 'linear', factor = 2}",
        "data.text_field={}",
    ];
    let (job, _) = parse(Format::Toml, "[data]\npath = \"x\"\nexclude = \"*.md\"\n", &sets).unwrap();
    assert_eq!((job.data.paths, job.data.text_field.as_str()), (vec![PathBuf::from("/work/dir/z")], "{}"));
    assert_eq!((job.data.clean.min_chars, job.data.exclude), (3, vec!["*.md".to_owned()]));
    let Model::New(config) = &job.model else { panic!("{:?}", job.model) };
    assert_eq!(
        (&config["rope_parameters"]["rope_type"], &config["rope_parameters"]["factor"]),
        (&"linear".into(), &2.0.into())
    );

    let bad = |set: &str| parse(Format::Toml, "", &["data.path=x", set]).unwrap_err().to_string();
    assert_eq!(
        bad("data={pth = 3}"),
        "--set data={pth = 3}: unknown key `data.pth`; did you mean `data.path`?"
    );
    assert_eq!(
        bad("learnig_rate=1"),
        "--set learnig_rate=1: unknown key `learnig_rate`; did you mean `learning_rate`?"
    );
    assert_eq!(
        bad("epochs=many"),
        "--set epochs=many: `epochs` is the text \"many\"; a whole number from 1 to 1000000 is wanted"
    );
    assert_eq!(
        bad("export.formats=[\"onnx\"]"),
        "--set export.formats=[\"onnx\"]: `export.formats` is not in this version of fleet: it writes Hugging Face safetensors with every \
         checkpoint; other formats come later"
    );
}

#[test]
fn a_bad_file_gets_one_line_with_place_key_and_cure() {
    let cases = [
        ("\nlearnig_rate = 1", "job:2: unknown key `learnig_rate`; did you mean `learning_rate`?"),
        ("hidden_size = 64", "job:1: unknown key `hidden_size`; did you mean `model.hidden_size`?"),
        (
            "[model]\nhiden_size = 64",
            "job:2: unknown key `model.hiden_size`; did you mean `model.hidden_size`?",
        ),
        ("colour = \"red\"", "job:1: unknown key `colour`"),
        ("[optimizr]\nlr = 1", "job:1: unknown key `optimizr`; did you mean `optimizer`?"),
        (
            "lr_schedular = 1",
            "job:1: unknown key `lr_schedular`; if `lr_scheduler` of other tools is meant: write `optimizer.schedule`, which is \"cosine\", \"linear\" or \"constant\", and `min_lr_ratio`",
        ),
        (
            "strategy = \"zero2\"",
            "job:1: others call so what is `strategy` = \"fsdp\" with `reshard_after_forward` = false",
        ),
        (
            "fsdp_config = { min_num_params = 1 }",
            "job:1: `fsdp_config` is a key of other tools: `-n` of the command, or `devices`, says how many ranks there are, and `strategy` how they share the work",
        ),
        (
            "epochs = \"three\"",
            "job:1: `epochs` is the text \"three\"; a whole number from 1 to 1000000 is wanted",
        ),
        ("epochs = 0", "job:1: `epochs` is 0; a whole number from 1 to 1000000 is wanted"),
        ("num_epochs = 1.5", "job:1: `num_epochs` is 1.5; a whole number from 1 to 1000000 is wanted"),
        ("learning_rate = nan", "job:1: `learning_rate` is NaN; a number above 0 is wanted"),
        ("lr = -1", "job:1: `lr` is -1; a number above 0 is wanted"),
        (
            "run_name = 20240102",
            "job:1: `run_name` is 20240102; a name of at most 250 bytes of letters and digits of any script and . _ - =, not beginning with a dot, in quotes is wanted",
        ),
        ("log_to_db = 1", "job:1: `log_to_db` is 1; true or false is wanted"),
        (
            "model = \"llama\"",
            "job:1: `model` is the text \"llama\"; a table such as { hidden_size = 256 } or { path = \"DIR\" } is wanted",
        ),
        (
            "strategy = \"dpp\"",
            "job:1: `strategy` is the text \"dpp\"; one of \"auto\", \"ddp\", \"fsdp\", \"fsdp_native\", \"fsdp2\", \"hsdp\" is wanted",
        ),
        (
            "devices = [0, 0]",
            "job:1: `devices` is a list of 2; a number of ranks, \"auto\" or a list of different device ids is wanted",
        ),
        (
            "epochs = 2\nnum_train_epochs = 3",
            "job:2: `num_train_epochs` is 3, but `epochs` (job:1), another name of it, is 2; keep one",
        ),
        (
            "learning_rate = 1e-3\n[optimizer]\nlearning_rate = 2e-3",
            "job:3: `optimizer.learning_rate` is 0.002, but `learning_rate` (job:1), another name of it, is 0.001; keep one",
        ),
        (
            "use_amp = true\nprecision = \"32\"",
            "job:1: `use_amp` = true and `precision` = \"32\" contradict each other; keep one",
        ),
        (
            "executor = \"cpu\"\nprecision = \"16-mixed\"",
            "job:2: `precision` = \"16-mixed\" is not computed by the executor cpu; leave `executor` out, or write \"32\" or \"bf16-mixed\" or \"bf16-true\"",
        ),
        (
            "precision = \"bf16-true\"\nuse_amp = true",
            "job:2: `use_amp` = true and `precision` = \"bf16-true\" contradict each other; keep one",
        ),
        (
            "device = \"cuda\"\nexecutor = \"cpu\"",
            "job:2: `executor` = \"cpu\" does not compute on the device cuda; leave it out, or write \"torch\"",
        ),
        (
            "device = \"mps\"\nprecision = \"bf16-mixed\"",
            "job:2: `precision` = \"bf16-mixed\" is not in this version of fleet; on the device mps write \"32\"",
        ),
        (
            "device = \"cuda\"\nuse_gpu = false",
            "job:2: `use_gpu` = false and the `device` contradict each other; keep one",
        ),
        ("num_nodes = 0", "job:1: `num_nodes` is 0; a whole number from 1 to 1024 is wanted"),
        (
            "load_in_4bit = true",
            "job:1: `load_in_4bit` is not in this version of fleet: write `quantization` = \"nf4\" or \"int8\", which quantises the model as it is read",
        ),
        (
            "warmup_ratio = 0.1",
            "job:1: `warmup_ratio` is a key of other tools: write `warmup_steps`, as a number of steps; left out it is 50, and at most a \
             tenth of the run",
        ),
        (
            "[data]\nshuffle = true",
            "job:2: `data.shuffle` is a key of other tools: the data are always shuffled, anew in every epoch, and `seed` says how; take the \
             key out",
        ),
        ("max_length = 512", "job:1: `max_length` is a key of other tools: write `max_seq_len`"),
        (
            "gist_id = \"abc\"",
            "job:1: `gist_id` is not in this version of fleet: describe a new one in [model], or give a Hugging Face directory as `model.path`",
        ),
        (
            "[eval]\ndataset_id = \"lm_tiny_v1\"",
            "job:2: `eval.dataset_id` is not in this version of fleet: give text files or folders as `data.path`; evaluation uses the part that \
             `data.validation_fraction` holds out",
        ),
        (
            "[model]\nhidden_size = 100\nnum_attention_heads = 3",
            "job:2: the model that `[model]` describes cannot be: hidden_size (100) is not a multiple of num_attention_heads (3); set hidden_size to 96 or 102, \
             or num_attention_heads to a divisor of 100",
        ),
        (
            "[model]\nnum_attention_heads = 4\nnum_key_value_heads = 3",
            "job:2: the model that `[model]` describes cannot be: num_attention_heads (4) is not a multiple of num_key_value_heads (3); choose one of 1, 2, 4",
        ),
        (
            "[model]\nhidden_size = 100\nnum_attention_heads = 4",
            "job:2: the model that `[model]` describes cannot be: rotary embeddings turn 25 of head_dim = 25 numbers; it has to be an even number of them",
        ),
        (
            "max_seq_len = 512\nmodel.max_position_embeddings = 256",
            "job:2: `model.max_position_embeddings` (256) is smaller than `max_seq_len` (512): raise it or shorten the sequences",
        ),
        ("vocab_size = 101", "job:1: `vocab_size` is 101; a whole number from 257 to 1048576 is wanted"),
        (
            "model.hidden_act = \"mish\"",
            "job:1: the model that `[model]` describes cannot be: hidden_act is `mish`; fleet computes silu (swish), gelu, gelu_new (gelu_pytorch_tanh, gelu_fast) and relu",
        ),
        (
            "vocab_size = 300\nmodel.path = \"m\"",
            "job:1: `vocab_size` and `model.path` do not go together: the shape comes from /work/dir/m/config.json; take one out",
        ),
        (
            "run_name = \"../up\"",
            "job:1: `run_name` is the text \"../up\"; a name of at most 250 bytes of letters and digits of any script and . _ - =, not beginning with a dot, is wanted",
        ),
        (
            "data.validation_fraction = 1",
            "job:1: `data.validation_fraction` is 1; a number from 0 to below 1 is wanted",
        ),
    ];
    for (text, wanted) in cases {
        assert_eq!(error(text), wanted);
        assert!(!wanted.contains('\n'));
    }
    assert_eq!(
        parse(Format::Toml, "", &[]).unwrap_err().to_string(),
        "job: `data.path` is missing: name the text to train on, a file or a folder, here or with --set data.path=FILE"
    );
}

#[test]
fn what_an_error_offers_is_possible() {
    for key in ["precision", "strategy", "device", "executor", "optimizer.schedule"] {
        let told = error(&format!("{key} = \"nonsense\""));
        let offered: Vec<&str> = told.split('"').skip(3).step_by(2).collect();
        assert!(offered.len() > 1, "{told}");
        for word in offered {
            let text = format!("{key} = \"{word}\"");
            parse(Format::Toml, &text, &["data.path=x"]).unwrap_or_else(|e| panic!("{text}: {e}"));
        }
    }
    assert_eq!(
        error("device = \"cuda:1\""),
        "job:1: `device` has no number: write `device` = \"cuda\" and `devices` = [1]"
    );
    parse(Format::Toml, "device = \"cuda\"\ndevices = [1]", &["data.path=x"]).unwrap();
}

#[test]
fn a_task_that_is_another_one_is_refused_and_a_label_is_a_label() {
    for task in ["KTO", "Reward Model", "text_classification", "seq2seq"] {
        let told = error(&format!("task_name = \"{task}\""));
        assert!(
            told.starts_with(&format!("job:1: `task_name` = \"{task}\"")) && told.contains("\"lm\""),
            "{told}"
        );
    }
    for label in ["lm", "causal_lm", "pretraining", "dpo-ablation-base", "my task"] {
        assert_eq!(job(&format!("task_name = \"{label}\"")).task_name, label);
    }
}

#[test]
fn syntax_errors_name_line_and_format() {
    let line = |format, text: &str| parse(format, text, &[]).unwrap_err().to_string();
    assert!(line(Format::Toml, "lr = 1\nepochs = = 2").starts_with("job:2: not valid TOML: "));
    assert!(line(Format::Toml, "lr = 1\nlr = 2").starts_with("job:2: not valid TOML: duplicate key"));
    assert!(line(Format::Json, "{\n\"lr\": 1\n\"epochs\": 2}").starts_with("job:"));
    assert_eq!(line(Format::Json, "{\"lr\": 1,\n\"lr\": 1}"), "job:2: `lr` is given twice");
    assert_eq!(line(Format::Json, "[1]"), "job:1: a job file is a table of settings, not a list of 1");
    assert!(line(Format::Yaml, "lr: 1\n  epochs: [\n").starts_with("job:"));
    assert_eq!(line(Format::Yaml, "lr: 1\nepoch: 2\n"), "job:2: unknown key `epoch`; did you mean `epochs`?");
    assert_eq!(line(Format::Yaml, "- 1\n"), "job:1: a job file is a table of settings, not a list of 1");
    for text in
        [line(Format::Yaml, "lr: [1\n"), line(Format::Json, "{\"lr\" 1}"), line(Format::Toml, "lr =\n")]
    {
        assert!(!text.contains('\n'), "{text}");
    }
}

#[test]
fn a_null_is_not_given() {
    let (job, _) = parse(
        Format::Json,
        r#"{"max_steps": null, "model": null, "baseline_run_id": null, "data": {"path": "x"}}"#,
        &[],
    )
    .unwrap();
    assert_eq!(job.max_steps, None);
    let beside = r#"{"lr": null, "learning_rate": 0.5, "optimizer": {"lr": null}, "data": {"path": "x"}}"#;
    let (job, _) = parse(Format::Json, beside, &[]).unwrap();
    assert_eq!(job.optimizer.learning_rate, 0.5, "a null does not contradict what another spelling gives");
}

#[test]
fn a_warm_up_longer_than_the_run_is_cut_with_a_warning() {
    let (job, warnings) =
        parse(Format::Toml, "max_steps = 100\nwarmup_steps = 200", &["data.path=x"]).unwrap();
    assert_eq!(job.optimizer.warmup_steps, Some(10));
    assert_eq!(
        warnings,
        [Warning("`warmup_steps` (200) is larger than `max_steps` (100): cut to 10".into())]
    );
}

#[test]
fn no_key_is_taken_for_one_of_the_rotary_embedding_that_does_not_say_so() {
    for key in ["data.type", "checkpoint.factor", "truncate"] {
        assert!(!error(&format!("{key} = 1")).contains("rope"), "{key}");
    }
    assert!(error("rope_theta = 1").contains("did you mean `model.rope_theta`"));
}

#[test]
fn what_of_a_file_counts_for_nothing_is_said() {
    let said = |text: &str| {
        let (job, warnings) = parse(Format::Toml, text, &["data.path=x"]).unwrap();
        (job, warnings.into_iter().map(|warning| warning.0).collect::<Vec<_>>())
    };
    let (job, warnings) = said("max_steps = 100\nnum_train_epochs = 3");
    assert_eq!(job.max_steps, Some(100));
    assert!(
        warnings[0].starts_with("`max_steps` (100) decides how long the run is, and `num_train_epochs` (3)"),
        "{warnings:?}"
    );
    assert!(said("max_steps = -1\nepochs = 3").1.is_empty());
    let (job, warnings) = said("batch_size = 4\neval.batch_size = 16");
    assert_eq!(job.eval.batch_size, 4, "what it takes, and what `fleet config` shows");
    assert!(
        warnings[0].starts_with("`eval.batch_size` (16) is larger than `batch_size` (4)"),
        "{warnings:?}"
    );
    assert!(said("batch_size = 4\neval.batch_size = 2").1.is_empty());
}

#[test]
fn a_given_tokenizer_decides_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 6, "content": "x"}]}"#).unwrap();
    let set = format!("tokenizer.path={}", path.display());
    let (job, _) = parse(Format::Toml, "", &["data.path=x", &set]).unwrap();
    assert!(matches!(job.model, Model::New(config) if config["vocab_size"] == 7));

    let error = parse(Format::Toml, "vocab_size = 3", &["data.path=x", &set]).unwrap_err().to_string();
    assert!(error.starts_with("job:1: `vocab_size` (3) is smaller than the vocabulary of"), "{error}");
    let gone = parse(Format::Toml, "tokenizer.path = \"gone\"", &["data.path=x"]).unwrap_err().to_string();
    assert!(gone.contains("cannot read /work/dir/gone") && gone.contains("hf download"), "{gone}");
}

#[test]
fn a_directory_whose_name_is_not_utf8_is_refused_by_name() {
    use std::os::unix::ffi::OsStrExt;
    let dir = Path::new(std::ffi::OsStr::from_bytes(b"/data/b\xff"));
    let error = parse_toml("data.path = \"x\"", dir).unwrap_err().to_string();
    assert!(error.contains("not UTF-8") && error.contains("start from another one"), "{error}");
}

#[test]
fn a_file_is_read_by_its_extension() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let good = file("good run.jsonc", b"\xef\xbb\xbf{\"data\": {\"path\": \"x\"}, // c\n}");
    let (job, _) = load(&good, &[], Path::new(DIR)).unwrap();
    assert!(job.run_name.starts_with("good-run-"), "{}", job.run_name);
    let missing = load(&dir.path().join("no.toml"), &[], Path::new(DIR)).unwrap_err();
    assert!(matches!(missing, JobFileError::Read { .. }));
    assert!(matches!(load(&file("a.txt", b""), &[], Path::new(DIR)), Err(JobFileError::Extension { .. })));
    assert!(matches!(
        load(&file("b.toml", b"\xff\xfe"), &[], Path::new(DIR)),
        Err(JobFileError::Read { .. })
    ));
    let large = vec![b'\n'; (1 << 20) + 1];
    assert!(matches!(load(&file("c.toml", &large), &[], Path::new(DIR)), Err(JobFileError::TooLarge { .. })));
}

#[test]
fn the_examples_are_good() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(&examples).unwrap() {
        let path = entry.unwrap().path();
        if formats::Format::of(&path).is_ok() {
            load(&path, &["data.path=x".to_owned()], Path::new(DIR)).unwrap_or_else(|e| panic!("{e}"));
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} examples");
}

/// A number in (0, 1) as people write it, of at most six digits.
fn decimal() -> impl Generator<Value = f64> {
    (1u32..1_000_000, 6u32..15).prop_map(|(digits, shift)| format!("{digits}e-{shift}").parse().unwrap())
}

/// Any valid job whose model is fresh.
fn any_job() -> impl Generator<Value = Job> {
    let sizes = (1u32..100, 0u32..5, 1u32..8, 0u32..1000, any::<bool>(), any::<u32>());
    let run = ("[a-z][a-z0-9_.-]{0,12}", any::<u32>(), 1u32..1000, prop::option::of(1u64..1_000_000), 0u8..3);
    let floats = (decimal(), decimal(), decimal(), decimal());
    let texts = (
        prop::collection::vec("[^\u{0}/.]{1,10}", 1..4),
        prop::collection::vec("[ -~]{0,10}", 0..3),
        "\\PC{0,12}",
    );
    (sizes, run, floats, texts).prop_map(
        |(
            (k, kv, dim, vocab, tie, seed),
            (name, n, seq, steps, pick),
            (a, b, c, d),
            (paths, globs, text),
        )| {
            let heads = k * (kv + 1);
            let mut job = job("");
            job.run_name = name;
            job.task_name = format!("t{text}");
            job.seed = seed.into();
            job.devices =
                [Devices::Auto, Devices::Count(n % 1024 + 1), Devices::Ids((0..n % 9 + 1).collect())]
                    [pick as usize]
                    .clone();
            job.precision = if tie { Precision::Bf16Mixed } else { Precision::Fp32 };
            job.strategy = if tie { Strategy::Ddp } else { Strategy::Auto };
            job.max_seq_len = seq + 1;
            job.max_steps = steps;
            job.max_time_s = steps;
            job.threads_per_rank = tie.then_some(n % 1024 + 1);
            job.data.paths = paths.iter().map(|path| Path::new(DIR).join(path)).collect();
            job.data.include = globs.clone();
            job.data.exclude = globs;
            job.data.validation_fraction = d;
            job.data.clean =
                Clean { remove_html: tie, normalize_whitespace: !tie, min_chars: vocab as usize, near_duplicates: tie.then_some(0.75) };
            job.data.weights = if tie { vec![0.5; job.data.paths.len()] } else { Vec::new() };
            job.optimizer.learning_rate = a;
            job.optimizer.min_lr_ratio = b;
            job.optimizer.eps = c;
            job.optimizer.warmup_steps = steps;
            job.checkpoint.overwrite = tie;
            job.optimizer.schedule = [Schedule::Cosine, Schedule::Linear, Schedule::Constant][pick as usize];
            job.checkpoint.resume =
                [Resume::No, Resume::Latest, Resume::Path("/c p/step-1".into())][pick as usize].clone();
            job.eval.max_eval_examples = steps;
            job.tokenizer = Tokenizer::Train { vocab_size: VOCAB_MIN + vocab };
            let lines = format!(
                "model = {{ vocab_size = {}, num_attention_heads = {heads}, num_key_value_heads = {k}, head_dim = {}, hidden_size = {}, \
                 max_position_embeddings = {}, tie_word_embeddings = {tie}, rms_norm_eps = {c:e}{} }}",
                VOCAB_MIN + vocab,
                dim * 2,
                heads * dim * 2,
                seq.max(256) + 1,
                if tie { format!(", eos_token_id = {vocab}") } else { String::new() }
            );
            job.model = self::job(&lines).model;
            job
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn canonical_json_is_an_identity(job in any_job()) {
        prop_assert_eq!(&Job::from_json(&job.to_json()).unwrap(), &job);
    }

    #[test]
    fn a_job_written_as_a_file_loads_as_the_same_job(job in any_job()) {
        let toml = parse(Format::Toml, &job.to_toml(), &[]).unwrap_or_else(|e| panic!("{e}\n{}", job.to_toml()));
        prop_assert_eq!(&toml.0, &job);
        let json = parse(Format::Json, &serde_json::to_string_pretty(&job.to_file()).unwrap(), &[]).unwrap();
        prop_assert_eq!(&json.0, &job);
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in "\\PC{0,80}") {
        for format in [Format::Toml, Format::Yaml, Format::Json] {
            let _ = parse(format, &text, &[&text]);
        }
    }
}
