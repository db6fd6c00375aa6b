//! A job file and its `--set` values into a valid `Job`. Reads the job file, and `tokenizer.json` where the vocabulary's size is to be taken
//! from it; what depends on the machine or the data is checked where it is known.

use super::error::{JobFileError, Warning};
use super::fields::Fields;
use super::formats::Format;
use super::*;
use crate::capability::Wanted;
use std::ffi::OsStr;
use std::path::Path;

/// A job file is a few lines of settings.
const JOB_FILE_MAX: u64 = 1 << 20;
/// More ranks than this in one gang are a slip of the finger.
pub const RANKS_MAX: u32 = 1024;
/// The byte alphabet and one token that ends a document.
pub const VOCAB_MIN: u32 = 257;
pub(super) const SIZE_MAX: u32 = 1 << 16;
/// TOML's integers are signed.
const INT_MAX: u64 = i64::MAX as u64;

/// Reads the job file at `path` (TOML, YAML or JSON with comments, by its extension), puts the `key=value` texts of `sets` over it and
/// returns the job with every field decided. Relative paths are taken from `working_dir`, which must be absolute.
pub fn load(path: &Path, sets: &[String], working_dir: &Path) -> Result<(Job, Vec<Warning>), JobFileError> {
    let read = |source| JobFileError::Read { path: path.to_owned(), source };
    let format = Format::of(path)?;
    if std::fs::metadata(path).map_err(read)?.len() > JOB_FILE_MAX {
        return Err(JobFileError::TooLarge { path: path.to_owned(), limit: JOB_FILE_MAX });
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    let stem = path.file_stem().unwrap_or_default();
    parse(&text, format, &path.display().to_string(), stem, sets, working_dir)
}

/// As `load`, of a TOML job file that is in memory and called `job.toml`.
pub fn parse_toml(text: &str, working_dir: &Path) -> Result<(Job, Vec<Warning>), JobFileError> {
    parse(text, Format::Toml, "job.toml", "job".as_ref(), &[], working_dir)
}

/// A job that reads `data` for the model that lies in `model`, as training would, with what `sets` say of how text is found in them.
pub fn of_data(
    model: &Path,
    data: &[PathBuf],
    sets: &[String],
    working_dir: &Path,
    is_rows: bool,
) -> Result<Job, JobFileError> {
    const SAID_ELSEWHERE: [&str; 3] = ["data.path", "data.paths", "data.validation_fraction"];
    for set in sets {
        let (key, value) = super::set::parse(set)?;
        if !key.starts_with("data.") || SAID_ELSEWHERE.contains(&key.as_str()) {
            let message = format!(
                "`{key}` says nothing of how text is read; data.text_field, data.include, data.exclude and those of data.clean do, and of rows \
                 data.format, data.fields, data.chat_template and data.loss_on"
            );
            return Err(JobFileError::Refused { place: value.place, message });
        }
    }
    let text = |path: &Path| {
        let message =
            || format!("{} has a name that is not UTF-8, as a job's paths are; rename it", path.display());
        path.to_str()
            .map(str::to_owned)
            .ok_or_else(|| JobFileError::Refused { place: "--data".into(), message: message() })
    };
    let data = data.iter().map(|path| text(path)).collect::<Result<Vec<_>, _>>()?;
    let task = is_rows.then_some("sft");
    let file =
        serde_json::json!({"task_name": task, "model": {"path": text(model)?}, "data": {"path": data}});
    let job = parse(&file.to_string(), Format::Json, "--data", "data".as_ref(), sets, working_dir)?;
    Ok(job.0)
}

pub(super) fn parse(
    text: &str,
    format: Format,
    file: &str,
    file_stem: &OsStr,
    sets: &[String],
    working_dir: &Path,
) -> Result<(Job, Vec<Warning>), JobFileError> {
    let sets = sets.iter().map(|text| super::set::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let fields = Fields::new(file, format.parse(text, file)?, sets)?;
    if working_dir.to_str().is_none() {
        let message = format!(
            "the directory {} has a name that is not UTF-8, as a job's paths are; start from another one",
            working_dir.display()
        );
        return Err(fields.refuse(&[], message));
    }
    let mut warnings = Vec::new();
    let job = job(&fields, file_stem, working_dir, &mut warnings)?;
    warnings.extend(super::idle::warnings(&fields, &job));
    Ok((job, warnings))
}

fn job(f: &Fields, file_stem: &OsStr, dir: &Path, warnings: &mut Vec<Warning>) -> Result<Job, JobFileError> {
    let max_seq_len = f.int32("max_seq_len", 2, 1 << 20)?.unwrap_or(256);
    let batch_size = f.int32("batch_size", 1, SIZE_MAX)?.unwrap_or(8);
    let (max_steps, epochs) = length(f, warnings)?;
    let eval = eval(f, batch_size, warnings)?;
    let path = |key, wanted| f.text(key, wanted)?.map(|path| absolute(f, key, dir, &path)).transpose();
    let (model, tokenizer) = super::model::model(f, dir, max_seq_len)?;
    let wanted = wanted(f)?;
    let adapter = super::adapter::adapter(f, dir, &model)?;
    let is_of_adapter = adapter.is_some();
    let rows = rows::rows(f, dir, &tokenizer)?;
    Ok(Job {
        task_name: task_name(f, &rows)?,
        run_name: run_name::of(f, file_stem)?,
        output_dir: path("output_dir", "a directory")?.unwrap_or_else(|| dir.join("training_output")),
        working_dir: dir.to_owned(),
        seed: f.int("seed", 0, INT_MAX)?.unwrap_or(42),
        strategy: wanted.strategy,
        devices: devices(f)?,
        num_nodes: f.int32("num_nodes", 1, RANKS_MAX)?,
        device: wanted.device,
        executor: wanted.executor,
        precision: wanted.precision,
        batch_size,
        accumulate_grad_batches: f.int32("accumulate_grad_batches", 1, SIZE_MAX)?.unwrap_or(1),
        activation_checkpointing: activation_checkpointing(f)?,
        neftune_noise_alpha: f
            .float("neftune_noise_alpha", "a number from 0, which is none, to 1000", |x| {
                (0.0..=1e3).contains(&x)
            })?
            .filter(|alpha| *alpha > 0.0),
        reshard_after_forward: f.flag("reshard_after_forward")?.unwrap_or(true),
        offload_optimizer: f.flag("offload_optimizer")?.unwrap_or(false),
        transport: transport(f)?,
        transport_encryption: f.flag("transport_encryption")?.unwrap_or(true),
        max_seq_len,
        epochs,
        max_steps,
        logging_steps: f.int("logging_steps", 1, INT_MAX)?.unwrap_or(10),
        log_to_db: f.flag("log_to_db")?.unwrap_or(true),
        max_time_s: f.int("max_time_s", 1, INT_MAX)?,
        threads_per_rank: f.int32("threads_per_rank", 1, 1024)?,
        trace: path("trace", "a file")?,
        dpo: super::dpo::dpo(f, dir, &model, adapter.as_ref())?,
        quantization: super::adapter::quantization(f, adapter.as_ref())?,
        adapter,
        model,
        tokenizer,
        data: data(f, dir, rows)?,
        optimizer: optimizer(f, is_of_adapter, max_steps, warnings)?,
        early_stopping: super::early_stopping::early_stopping(f, eval.eval_steps)?,
        checkpoint: checkpoint(f, dir, eval.eval_steps)?,
        eval,
    })
}

// ---- the run ----------------------------------------------------------------------------------------------------------

/// A label, unless it says that the run shall learn something else than text and rows.
fn task_name(f: &Fields, rows: &Option<Rows>) -> Result<String, JobFileError> {
    let usual = match rows {
        Some(rows) if rows.format == Some(RowFormat::Preference) => "dpo",
        Some(_) => "sft",
        None => "lm",
    };
    let name = f.text("task_name", "a name")?.unwrap_or_else(|| usual.to_owned());
    let plain: String = name.to_lowercase().replace(['_', ' '], "-");
    if !OTHER_TASKS.contains(&plain.as_str()) {
        return Ok(name);
    }
    let message = format!(
        "`task_name` = \"{name}\" is not in this version of fleet, which learns plain text (\"lm\") and rows of instructions (\"sft\") and of preferences (\"dpo\"); write one of these (or a label of your own), if that is wanted"
    );
    Err(f.refuse(&["task_name"], message))
}

/// What other tools call tasks that are neither.
const OTHER_TASKS: [&str; 26] = [
    "kto",
    "simpo",
    "cpo",
    "ppo",
    "grpo",
    "rlhf",
    "rl",
    "rm",
    "reward",
    "reward-modeling",
    "reward-model",
    "distillation",
    "classification",
    "text-classification",
    "sequence-classification",
    "seq-cls",
    "token-classification",
    "token-cls",
    "ner",
    "regression",
    "question-answering",
    "qa",
    "summarization",
    "translation",
    "seq2seq",
    "mlm",
];

/// `max_steps` and `epochs`. Above 0 the first one decides, otherwise the second.
fn length(f: &Fields, warnings: &mut Vec<Warning>) -> Result<(Option<u64>, u32), JobFileError> {
    let wanted = "a whole number; 0 or -1 leaves the length to `epochs`";
    let given = f.get("max_steps", wanted, |v| v.int().filter(|n| *n >= -1))?;
    let max_steps = given.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
    let epochs = f.int32("epochs", 1, 1_000_000)?;
    // What `fleet config` writes where nothing was said is no mistake.
    if let (Some(steps), Some(epochs)) = (max_steps, epochs.filter(|epochs| *epochs != 1)) {
        let spelling = f.spelling("epochs");
        warnings.push(Warning(format!(
            "`max_steps` ({steps}) decides how long the run is, and `{spelling}` ({epochs}) counts for nothing: leave one of them out"
        )));
    }
    Ok((max_steps, epochs.unwrap_or(1)))
}

/// What the machine that runs the job has to do, if that is possible with any number of ranks.
fn wanted(f: &Fields) -> Result<Wanted, JobFileError> {
    let device = device(f)?;
    let words = [("auto", Executor::Auto), ("cpu", Executor::Cpu), ("torch", Executor::Torch)];
    let executor = f.word("executor", &words)?.unwrap_or_default();
    let (precision, strategy) = (precision(f)?, strategy(f)?);
    let wanted = Wanted { device, executor, precision, strategy, ..Wanted::ANYTHING };
    // With one rank every strategy is `auto`.
    match (Wanted { strategy: Strategy::Auto, ..wanted }).executor() {
        Ok(_) => Ok(wanted),
        Err(refusal) => {
            let spelling = f.spelling(refusal.key);
            Err(f.refuse(&[refusal.key], format!("`{spelling}` = {} {}", refusal.value, refusal.reason)))
        }
    }
}

fn strategy(f: &Fields) -> Result<Strategy, JobFileError> {
    use Strategy::{Auto, Ddp, Fsdp, Hsdp};
    let words = [
        ("auto", Auto),
        ("ddp", Ddp),
        ("fsdp", Fsdp),
        ("fsdp_native", Fsdp),
        ("fsdp2", Fsdp),
        ("hsdp", Hsdp),
    ];
    let possible =
        |strategy: &Strategy| Wanted { strategy: *strategy, ..Wanted::ANYTHING }.executor().is_ok();
    let others = [
        ("full_shard", Fsdp),
        ("zero3", Fsdp),
        ("zero_3", Fsdp),
        ("deepspeed_stage_3", Fsdp),
        ("hybrid_shard", Hsdp),
        ("ddp_find_unused_parameters_true", Ddp),
        ("ddp_find_unused_parameters_false", Ddp),
    ];
    const ZERO_2: [&str; 4] = ["shard_grad_op", "zero2", "zero_2", "deepspeed_stage_2"];
    let is_zero_2 = |v: &super::value::Value| Some(ZERO_2.contains(&v.text()?));
    if f.get("strategy", "a word", |v| Some(is_zero_2(v)))?.flatten() == Some(true) {
        let message = "others call so what is `strategy` = \"fsdp\" with `reshard_after_forward` = false";
        return Err(f.refuse(&["strategy"], message.to_owned()));
    }
    Ok(f.word_of("strategy", &words, &others, possible)?.unwrap_or(Auto))
}

fn devices(f: &Fields) -> Result<Devices, JobFileError> {
    let wanted = "a number of ranks, \"auto\" or a list of different device ids";
    let given = f.get("devices", wanted, |v| match &v.kind {
        super::value::Kind::List(items) => {
            let ids: Vec<u32> =
                items.iter().map(|i| i.int().and_then(|n| u32::try_from(n).ok())).collect::<Option<_>>()?;
            let different = ids.iter().collect::<std::collections::BTreeSet<_>>().len() == ids.len();
            (!ids.is_empty() && ids.len() <= RANKS_MAX as usize && different).then_some(Devices::Ids(ids))
        }
        _ if v.text() == Some("auto") || v.int() == Some(-1) => Some(Devices::Auto),
        _ => v
            .int()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| (1..=RANKS_MAX).contains(n))
            .map(Devices::Count),
    })?;
    Ok(given.unwrap_or(Devices::Auto))
}

/// Names of devices as PyTorch has them.
fn device(f: &Fields) -> Result<Device, JobFileError> {
    use Device::{Auto, Cpu, Cuda, Mps};
    let words = [
        ("auto", Auto),
        ("cpu", Cpu),
        ("cuda", Cuda),
        ("gpu", Cuda),
        ("mps", Mps),
        ("mlx", Mps),
        ("pytorch", Auto),
    ];
    let possible = |device: &Device| Wanted { device: *device, ..Wanted::ANYTHING }.executor().is_ok();
    let number = |text: &str| text.to_ascii_lowercase().strip_prefix("cuda:")?.parse::<u32>().ok();
    if let Some(Some(number)) = f.get("device", "a word", |v| Some(v.text().and_then(number)))? {
        let message = format!("`device` has no number: write `device` = \"cuda\" and `devices` = [{number}]");
        return Err(f.refuse(&["device"], message));
    }
    let device = f.word_of("device", &words, &[], possible)?;
    let use_gpu = f.flag("use_gpu")?;
    match (device, use_gpu) {
        (Some(Cpu), Some(true)) => Err(f.refuse(
            &["use_gpu"],
            "`use_gpu` = true and `device` = \"cpu\" contradict each other; keep one".to_owned(),
        )),
        (Some(Cuda | Mps), Some(false)) => Err(f.refuse(
            &["use_gpu"],
            "`use_gpu` = false and the `device` contradict each other; keep one".to_owned(),
        )),
        (None | Some(Auto), Some(true)) => Ok(Cuda),
        (None | Some(Auto), Some(false)) => Ok(Cpu),
        (device, _) => Ok(device.unwrap_or(Auto)),
    }
}

fn precision(f: &Fields) -> Result<Precision, JobFileError> {
    use Precision::{Bf16Mixed, Bf16True, Fp16Mixed, Fp32};
    let words = [
        ("32", Fp32),
        ("bf16-mixed", Bf16Mixed),
        ("16-mixed", Fp16Mixed),
        ("bf16-true", Bf16True),
        ("float32", Fp32),
        ("bfloat16", Bf16Mixed),
        ("float16", Fp16Mixed),
    ];
    // As PyTorch Lightning and accelerate abbreviate.
    let short =
        [("bf16", Bf16Mixed), ("16", Fp16Mixed), ("fp16", Fp16Mixed), ("fp32", Fp32), ("32-true", Fp32)];
    let possible =
        |precision: &Precision| Wanted { precision: *precision, ..Wanted::ANYTHING }.executor().is_ok();
    let precision = f.word_of("precision", &words, &short, possible)?;
    let use_amp = f.flag("use_amp")?;
    let spelling = f.spelling("precision");
    match (precision, use_amp) {
        (Some(precision @ (Fp32 | Bf16True)), Some(true)) => {
            let word = if precision == Fp32 { "32" } else { "bf16-true" };
            let message =
                format!("`use_amp` = true and `{spelling}` = \"{word}\" contradict each other; keep one");
            Err(f.refuse(&["use_amp"], message))
        }
        (Some(Bf16Mixed | Fp16Mixed), Some(false)) => Err(f.refuse(
            &["use_amp"],
            format!("`use_amp` = false and a mixed `{spelling}` contradict each other; keep one"),
        )),
        (Some(precision), _) => Ok(precision),
        (None, Some(true)) => Ok(Bf16Mixed),
        (None, _) => Ok(Fp32),
    }
}

fn transport(f: &Fields) -> Result<Transport, JobFileError> {
    let transport = f.word("transport", &[("tcp", Transport::Tcp), ("quic", Transport::Quic)])?;
    if transport == Some(Transport::Quic) && f.flag("transport_encryption")? == Some(false) {
        let message = "QUIC always encrypts; leave `transport_encryption` away, or set `transport` = \"tcp\"";
        return Err(f.refuse(&["transport_encryption", "transport"], message.to_owned()));
    }
    Ok(transport.unwrap_or_default())
}

fn activation_checkpointing(f: &Fields) -> Result<ActivationCheckpointing, JobFileError> {
    use ActivationCheckpointing::{Blocks, First, None as No};
    let wanted = "\"none\", \"blocks\", or how many blocks, from the first on, are computed a second time";
    let given = f.get("activation_checkpointing", wanted, |v| match (v.text(), v.bool(), v.int()) {
        (Some("none"), ..) | (_, Some(false), _) | (.., Some(0)) => Some(No),
        (Some("blocks"), ..) | (_, Some(true), _) => Some(Blocks),
        (.., Some(count)) => u32::try_from(count).ok().map(First),
        _ => None,
    })?;
    Ok(given.unwrap_or_default())
}

// ---- data, optimizer, checkpoints, evaluation -------------------------------------------------------------------------

/// Names of the files that are read from a folder where `data.include` is not given: all that the reader knows.
pub const READABLE: [&str; 2] = [
    "**/*.{txt,text,md,json,jsonl,ndjson,csv,tsv,parquet}",
    "**/*.{txt,text,md,json,jsonl,ndjson,csv,tsv}.{gz,zst}",
];

fn data(f: &Fields, dir: &Path, rows: Option<Rows>) -> Result<Data, JobFileError> {
    let cure = "name the text to train on, a file or a folder, here or with --set data.path=FILE";
    let paths = f
        .get("data.path", "a file, a folder or a list of them", |v| {
            v.texts().filter(|paths| !paths.is_empty() && paths.iter().all(|path| !path.trim().is_empty()))
        })?
        .ok_or_else(|| f.missing("data.path", cure))?;
    let globs = |name, default: &[&str]| -> Result<Vec<String>, JobFileError> {
        let given = f.texts(name, "a glob or a list of globs, such as \"**/*.txt\"")?;
        Ok(given.unwrap_or_else(|| default.iter().map(|glob| (*glob).to_owned()).collect()))
    };
    let bad_rows = if rows.is_some() { BadRows::Stop } else { rows::bad_rows(f)? };
    Ok(Data {
        weights: weights(f, paths.len())?,
        bad_rows,
        paths: paths.iter().map(|path| absolute(f, "data.path", dir, path)).collect::<Result<_, _>>()?,
        include: globs("data.include", if rows.is_some() { &rows::READABLE } else { &READABLE })?,
        exclude: globs("data.exclude", &[])?,
        text_field: f.text("data.text_field", "the name of a field")?.unwrap_or_else(|| "text".to_owned()),
        validation_fraction: f
            .float("data.validation_fraction", "a number from 0 to below 1", |x| (0.0..1.0).contains(&x))?
            .unwrap_or(0.05),
        clean: Clean {
            remove_html: f.flag("data.clean.remove_html")?.unwrap_or(false),
            normalize_whitespace: f.flag("data.clean.normalize_whitespace")?.unwrap_or(false),
            min_chars: f.int32("data.clean.min_chars", 0, u32::MAX)?.unwrap_or(0) as usize,
            near_duplicates: f.float(
                "data.clean.near_duplicates",
                "a similarity from above 0 to 1, such as 0.8",
                |x| 0.0 < x && x <= 1.0,
            )?,
        },
        rows,
    })
}

/// The most that a path of the data may weigh.
const WEIGHT_MAX: f64 = 100.0;

fn weights(f: &Fields, paths: usize) -> Result<Vec<f64>, JobFileError> {
    const KEY: &str = "data.weights";
    let wanted = "a list of numbers from above 0 to 100, one for each path in data.path, such as [1, 0.5]";
    let is_weight = |weight: &f64| 0.0 < *weight && *weight <= WEIGHT_MAX;
    let weights = f.get(KEY, wanted, |v| v.floats().filter(|weights| weights.iter().all(is_weight)))?;
    let weights = weights.unwrap_or_default();
    if !weights.is_empty() && weights.len() != paths {
        let message = format!(
            "`{KEY}` has {} numbers, and `data.path` names {paths}; give one for each path",
            weights.len()
        );
        return Err(f.refuse(&[KEY], message));
    }
    Ok(if weights.iter().all(|weight| *weight == 1.0) { Vec::new() } else { weights })
}

fn optimizer(
    f: &Fields,
    is_of_adapter: bool,
    max_steps: Option<u64>,
    warnings: &mut Vec<Warning>,
) -> Result<Optimizer, JobFileError> {
    let share = |x: f64| (0.0..1.0).contains(&x);
    let usual_rate = match (super::dpo::is_wanted(f)?, is_of_adapter) {
        (false, _) => 5e-4,
        // A whole model moves far by small steps; the few numbers of an adapter take larger ones.
        (true, false) => 5e-7,
        (true, true) => 1e-5,
    };
    let schedules =
        [("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)];
    let as_transformers = [("constant_with_warmup", Schedule::Constant)];
    Ok(Optimizer {
        learning_rate: f
            .float("optimizer.learning_rate", "a number above 0", |x| x > 0.0)?
            .unwrap_or(usual_rate),
        schedule: f
            .word_of("optimizer.schedule", &schedules, &as_transformers, |_| true)?
            .unwrap_or(Schedule::Cosine),
        warmup_steps: warmup_steps(f, max_steps, warnings)?,
        min_lr_ratio: f
            .float("optimizer.min_lr_ratio", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?
            .unwrap_or(0.0),
        weight_decay: f
            .float("optimizer.weight_decay", "a number of at least 0", |x| x >= 0.0)?
            .unwrap_or(0.01),
        beta1: f.float("optimizer.beta1", "a number from 0 to below 1", share)?.unwrap_or(0.9),
        beta2: f.float("optimizer.beta2", "a number from 0 to below 1", share)?.unwrap_or(0.999),
        eps: f.float("optimizer.eps", "a number above 0", |x| x > 0.0)?.unwrap_or(1e-8),
        max_grad_norm: f
            .float("optimizer.max_grad_norm", "a number of at least 0, where 0 turns clipping off,", |x| {
                x >= 0.0
            })?
            .unwrap_or(1.0),
    })
}

/// A warm-up longer than a run whose length is known is cut to a tenth of it; the others are cut when the data are.
fn warmup_steps(
    f: &Fields,
    max_steps: Option<u64>,
    warnings: &mut Vec<Warning>,
) -> Result<Option<u64>, JobFileError> {
    let given = f.int("optimizer.warmup_steps", 0, INT_MAX)?;
    match (given, max_steps) {
        (Some(warmup), Some(steps)) if warmup > steps => {
            let (spelling, tenth) = (f.spelling("optimizer.warmup_steps"), steps / 10);
            warnings.push(Warning(format!(
                "`{spelling}` ({warmup}) is larger than `max_steps` ({steps}): cut to {tenth}"
            )));
            Ok(Some(tenth))
        }
        _ => Ok(given),
    }
}

/// `eval_steps`: how often the job evaluates; 0: never.
fn checkpoint(f: &Fields, dir: &Path, eval_steps: u64) -> Result<Checkpoint, JobFileError> {
    let wanted = "\"latest\", \"no\" or the directory of a checkpoint";
    // Words of other tools, unless a directory is called so.
    let is_word = |text: &str| {
        const WORDS: [&str; 9] = ["last", "newest", "auto", "true", "yes", "false", "none", "null", "never"];
        WORDS.contains(&text.to_lowercase().as_str()) && !dir.join(text).is_dir()
    };
    let given = f.get("checkpoint.resume", wanted, |v| match (v.bool(), v.text()) {
        (Some(true), _) => Some("latest".to_owned()),
        (Some(false), _) => Some("no".to_owned()),
        (None, text) => text.filter(|text| !is_word(text)).map(str::to_owned),
    })?;
    let keep_best = f.flag("checkpoint.keep_best")?.unwrap_or(false);
    if keep_best && eval_steps == 0 {
        let message = format!(
            "`{}` keeps what an evaluation finds the best, and `eval_steps` = 0 makes none; raise it",
            f.spelling("checkpoint.keep_best")
        );
        return Err(f.refuse(&["checkpoint.keep_best"], message));
    }
    let resume = match given.as_deref() {
        Some("latest") => Resume::Latest,
        Some("no" | "") | None => Resume::No,
        Some(path) => Resume::Path(absolute(f, "checkpoint.resume", dir, path)?),
    };
    Ok(Checkpoint {
        save_steps: f.int("checkpoint.save_steps", 0, INT_MAX)?.unwrap_or(250),
        save_total_limit: f.int32("checkpoint.save_total_limit", 1, 1_000_000)?.unwrap_or(2),
        resume,
        overwrite: f.flag("checkpoint.overwrite")?.unwrap_or(false),
        keep_best,
    })
}

/// Of `batch_size` sequences at most at once: then evaluation needs no memory of its own, and its loss is the same.
fn eval(f: &Fields, most: u32, warnings: &mut Vec<Warning>) -> Result<Eval, JobFileError> {
    f.word("eval.split", &[("validation", ())])?;
    let given = f.int32("eval.batch_size", 1, SIZE_MAX)?.unwrap_or(most);
    if given > most {
        let (eval, train) = (f.spelling("eval.batch_size"), f.spelling("batch_size"));
        warnings.push(Warning(format!(
            "`{eval}` ({given}) is larger than `{train}` ({most}): evaluation takes {most} sequences at once, in the memory that training has, and its loss is the same"
        )));
    }
    Ok(Eval {
        eval_steps: f.int("eval.eval_steps", 0, INT_MAX)?.unwrap_or(100),
        batch_size: given.min(most),
        max_eval_examples: f.int("eval.max_eval_examples", 1, INT_MAX)?,
    })
}

/// `path` below `dir` unless it is absolute, without `.` parts. A `~` at its beginning is the home directory, as in a shell.
pub(super) fn absolute(
    f: &Fields,
    key: &'static str,
    dir: &Path,
    path: &str,
) -> Result<PathBuf, JobFileError> {
    let whole = match path.strip_prefix('~') {
        Some(below) if below.is_empty() || below.starts_with('/') => {
            let home =
                crate::home::dir().map_err(|e| f.refuse(&[key], format!("`{key}` is {path:?}: {e}")))?;
            home.join(below.trim_start_matches('/'))
        }
        Some(_) => {
            let message = format!(
                "`{key}` is {path:?}, and of other users' homes fleet knows nothing; write the whole path, or ./{path} for a file of that name"
            );
            return Err(f.refuse(&[key], message));
        }
        None => dir.join(path),
    };
    Ok(whole.components().collect())
}
