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
const VOCAB_MAX: u32 = 1 << 20;
const SIZE_MAX: u32 = 1 << 16;
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
    Ok((job, warnings))
}

fn job(f: &Fields, file_stem: &OsStr, dir: &Path, warnings: &mut Vec<Warning>) -> Result<Job, JobFileError> {
    let max_seq_len = f.int32("max_seq_len", 2, 1 << 20)?.unwrap_or(256);
    let batch_size = f.int32("batch_size", 1, SIZE_MAX)?.unwrap_or(8);
    let max_steps = max_steps(f)?;
    let path = |key, wanted| f.text(key, wanted)?.map(|path| absolute(f, key, dir, &path)).transpose();
    let model_path = path("model.path", "a Hugging Face directory")?;
    let tokenizer_path = path("tokenizer.path", "a tokenizer.json")?;
    let (model, tokenizer) = match model_path {
        Some(path) => pretrained(f, path, tokenizer_path)?,
        None => fresh(f, max_seq_len, tokenizer_path)?,
    };
    let num_nodes = f.int32("num_nodes", 1, RANKS_MAX)?.unwrap_or(1);
    if num_nodes != 1 {
        let message = format!(
            "`num_nodes` is {num_nodes}, and this version keeps a job's ranks on one node; leave it at 1"
        );
        return Err(f.refuse(&["num_nodes"], message));
    }
    let wanted = wanted(f)?;
    Ok(Job {
        task_name: f.text("task_name", "a name")?.unwrap_or_else(|| "lm".to_owned()),
        run_name: run_name::of(f, file_stem)?,
        output_dir: path("output_dir", "a directory")?.unwrap_or_else(|| dir.join("training_output")),
        working_dir: dir.to_owned(),
        seed: f.int("seed", 0, INT_MAX)?.unwrap_or(42),
        strategy: wanted.strategy,
        devices: devices(f)?,
        num_nodes,
        device: wanted.device,
        executor: wanted.executor,
        precision: wanted.precision,
        batch_size,
        accumulate_grad_batches: f.int32("accumulate_grad_batches", 1, SIZE_MAX)?.unwrap_or(1),
        max_seq_len,
        epochs: f.int32("epochs", 1, 1_000_000)?.unwrap_or(1),
        max_steps,
        logging_steps: f.int("logging_steps", 1, INT_MAX)?.unwrap_or(10),
        log_to_db: f.flag("log_to_db")?.unwrap_or(true),
        max_time_s: f.int("max_time_s", 1, INT_MAX)?,
        threads_per_rank: f.int32("threads_per_rank", 1, 1024)?,
        model,
        tokenizer,
        data: data(f, dir)?,
        optimizer: optimizer(f, max_steps, warnings)?,
        checkpoint: checkpoint(f, dir)?,
        eval: eval(f, batch_size)?,
    })
}

// ---- the run ----------------------------------------------------------------------------------------------------------

/// Above 0 it decides, otherwise `epochs` does.
fn max_steps(f: &Fields) -> Result<Option<u64>, JobFileError> {
    let wanted = "a whole number; 0 or -1 leaves the length to `epochs`";
    let given = f.get("max_steps", wanted, |v| v.int().filter(|n| *n >= -1))?;
    Ok(given.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0))
}

/// What the machine that runs the job has to do, if that is possible with any number of ranks.
fn wanted(f: &Fields) -> Result<Wanted, JobFileError> {
    let device = device(f)?;
    let words = [("auto", Executor::Auto), ("cpu", Executor::Cpu), ("torch", Executor::Torch)];
    let executor = f.word("executor", &words)?.unwrap_or_default();
    let wanted = Wanted { device, executor, precision: precision(f)?, strategy: strategy(f)?, ranks: 1 };
    // With one rank `ddp` is `auto`.
    let strategy = if wanted.strategy == Strategy::Ddp { Strategy::Auto } else { wanted.strategy };
    match (Wanted { strategy, ..wanted }).executor() {
        Ok(_) => Ok(wanted),
        Err(refusal) => {
            let spelling = f.spelling(refusal.key);
            Err(f.refuse(&[refusal.key], format!("`{spelling}` = {} {}", refusal.value, refusal.reason)))
        }
    }
}

fn strategy(f: &Fields) -> Result<Strategy, JobFileError> {
    use Strategy::{Auto, Ddp, Fsdp};
    let words = [("auto", Auto), ("ddp", Ddp), ("fsdp", Fsdp), ("fsdp_native", Fsdp), ("fsdp2", Fsdp)];
    Ok(f.word("strategy", &words)?.unwrap_or(Auto))
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
    let device = f.word("device", &words)?;
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
    let precision = f.word("precision", &words)?;
    let use_amp = f.flag("use_amp")?;
    let spelling = f.spelling("precision");
    match (precision, use_amp) {
        (Some(Fp32), Some(true)) => Err(f.refuse(
            &["use_amp"],
            format!("`use_amp` = true and `{spelling}` = \"32\" contradict each other; keep one"),
        )),
        (Some(Bf16Mixed | Fp16Mixed), Some(false)) => Err(f.refuse(
            &["use_amp"],
            format!("`use_amp` = false and a mixed `{spelling}` contradict each other; keep one"),
        )),
        (Some(precision), _) => Ok(precision),
        (None, Some(true)) => Ok(Bf16Mixed),
        (None, _) => Ok(Fp32),
    }
}

// ---- the model --------------------------------------------------------------------------------------------------------

fn pretrained(
    f: &Fields,
    path: PathBuf,
    tokenizer: Option<PathBuf>,
) -> Result<(Model, Tokenizer), JobFileError> {
    let shape = f.first_with("model.").filter(|name| *name != "model.path");
    let other = SHAPE.iter().copied().find(|name| f.is_given(name)).or(shape);
    if let Some(name) = other {
        let message = format!(
            "`{}` and `model.path` do not go together: the shape comes from {}/config.json; take one out",
            f.spelling(name),
            path.display()
        );
        return Err(f.refuse(&[name], message));
    }
    let tokenizer = Tokenizer::File(tokenizer.unwrap_or_else(|| path.join("tokenizer.json")));
    Ok((Model::Pretrained(path), tokenizer))
}

/// What a pretrained directory decides.
const SHAPE: [&str; 10] = [
    "vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.max_position_embeddings",
    "model.rope_theta",
    "model.tie_word_embeddings",
];

fn fresh(
    f: &Fields,
    max_seq_len: u32,
    tokenizer: Option<PathBuf>,
) -> Result<(Model, Tokenizer), JobFileError> {
    only_llama(f)?;
    let (vocab_size, tokenizer) = vocabulary(f, tokenizer)?;
    let hidden = f.int32("model.hidden_size", 1, SIZE_MAX)?.unwrap_or(256);
    let heads = f.int32("model.num_attention_heads", 1, 4096)?.unwrap_or(if hidden % 64 == 0 {
        hidden / 64
    } else {
        4
    });
    if hidden % heads != 0 {
        let below = hidden / heads * heads;
        let near = if below == 0 { heads.to_string() } else { format!("{below} or {}", below + heads) };
        let message = format!(
            "`model.hidden_size` ({hidden}) is not divisible by `model.num_attention_heads` ({heads}): \
             set the size to {near}, or the heads to a divisor of {hidden}"
        );
        return Err(f.refuse(&["model.hidden_size", "model.num_attention_heads"], message));
    }
    let kv_heads = f.int32("model.num_key_value_heads", 1, 4096)?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let fits: Vec<_> = (1..=heads).filter(|n| heads % n == 0).map(|n| n.to_string()).collect();
        let message = format!(
            "`model.num_key_value_heads` ({kv_heads}) does not divide `model.num_attention_heads` ({heads}): choose one of {}",
            fits.join(", ")
        );
        return Err(f.refuse(&["model.num_key_value_heads"], message));
    }
    let head_dim = f.int32("model.head_dim", 1, SIZE_MAX)?.unwrap_or(hidden / heads);
    if head_dim % 2 != 0 {
        let message = format!(
            "the head dimension is {head_dim} (`model.hidden_size` {hidden}, `model.num_attention_heads` {heads}), and rotary \
             positions need an even one: set `model.head_dim` to {}, or change size or heads",
            head_dim + 1
        );
        return Err(f.refuse(&["model.head_dim", "model.hidden_size", "model.num_attention_heads"], message));
    }
    let positions = f.int32("model.max_position_embeddings", 1, 1 << 24)?.unwrap_or(max_seq_len);
    if positions < max_seq_len {
        let message = format!(
            "`model.max_position_embeddings` ({positions}) is smaller than `max_seq_len` ({max_seq_len}): raise it or shorten the sequences"
        );
        return Err(f.refuse(&["model.max_position_embeddings"], message));
    }
    let config = LlamaConfig {
        vocab_size,
        hidden_size: hidden,
        // two thirds of four times the size, as Llama has it, up to a multiple of 64
        intermediate_size: f
            .int32("model.intermediate_size", 1, 1 << 20)?
            .unwrap_or_else(|| (hidden * 8 / 3).next_multiple_of(64)),
        num_hidden_layers: f.int32("model.num_hidden_layers", 1, 1024)?.unwrap_or(4),
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        max_position_embeddings: positions,
        rms_norm_eps: f.float("model.rms_norm_eps", "a number above 0", |x| x > 0.0)?.unwrap_or(1e-6),
        rope_theta: f.float("model.rope_theta", "a number above 1", |x| x > 1.0)?.unwrap_or(10_000.0),
        tie_word_embeddings: f.flag("model.tie_word_embeddings")?.unwrap_or(false),
        initializer_range: f
            .float("model.initializer_range", "a number of at least 0", |x| x >= 0.0)?
            .unwrap_or(0.02),
        bos_token_id: f.int32("model.bos_token_id", 0, vocab_size - 1)?,
        eos_token_id: f.int32("model.eos_token_id", 0, vocab_size - 1)?,
    };
    Ok((Model::New(config), tokenizer))
}

/// Keys of a Hugging Face `config.json` that may stand in [model] with the one value that fleet implements.
fn only_llama(f: &Fields) -> Result<(), JobFileError> {
    f.word("model.model_type", &[("llama", ())])?;
    f.word("model.hidden_act", &[("silu", ())])?;
    f.get("model.architectures", "[\"LlamaForCausalLM\"]", |v| {
        v.texts().filter(|names| names.iter().all(|name| name == "LlamaForCausalLM"))
    })?;
    for name in ["model.attention_bias", "model.mlp_bias"] {
        f.get(name, "false", |v| v.bool().filter(|b| !b))?;
    }
    f.float("model.attention_dropout", "0", |x| x == 0.0)?;
    f.get("model.rope_scaling", "null", |_| None::<()>)?;
    Ok(())
}

fn vocabulary(f: &Fields, tokenizer: Option<PathBuf>) -> Result<(u32, Tokenizer), JobFileError> {
    let Some(path) = tokenizer else {
        let vocab_size = f.int32("vocab_size", VOCAB_MIN, VOCAB_MAX)?.unwrap_or(2048);
        return Ok((vocab_size, Tokenizer::Train { vocab_size }));
    };
    let given = f.int32("vocab_size", 1, VOCAB_MAX)?;
    let counted = super::vocabulary::count(&path);
    match (given, counted) {
        (Some(given), Ok(counted)) if given < counted => {
            let message = format!(
                "`{}` ({given}) is smaller than the vocabulary of {} ({counted} tokens): leave it out, or raise it",
                f.spelling("vocab_size"),
                path.display()
            );
            Err(f.refuse(&["vocab_size"], message))
        }
        (Some(given), _) => Ok((given, Tokenizer::File(path))),
        (None, Ok(counted)) => Ok((counted, Tokenizer::File(path))),
        (None, Err(why)) => {
            let message = format!("`tokenizer.path`: {why}; without the file, give `vocab_size`");
            Err(f.refuse(&["tokenizer.path"], message))
        }
    }
}

// ---- data, optimizer, checkpoints, evaluation -------------------------------------------------------------------------

/// Names of the files that are read from a folder where `data.include` is not given: all that the reader knows.
pub const READABLE: [&str; 2] =
    ["**/*.{txt,text,md,json,jsonl,ndjson,csv,tsv}", "**/*.{txt,text,md,json,jsonl,ndjson,csv,tsv}.gz"];

fn data(f: &Fields, dir: &Path) -> Result<Data, JobFileError> {
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
    Ok(Data {
        paths: paths.iter().map(|path| absolute(f, "data.path", dir, path)).collect::<Result<_, _>>()?,
        include: globs("data.include", &READABLE)?,
        exclude: globs("data.exclude", &[])?,
        text_field: f.text("data.text_field", "the name of a field")?.unwrap_or_else(|| "text".to_owned()),
        validation_fraction: f
            .float("data.validation_fraction", "a number from 0 to below 1", |x| (0.0..1.0).contains(&x))?
            .unwrap_or(0.05),
        clean: Clean {
            remove_html: f.flag("data.clean.remove_html")?.unwrap_or(false),
            normalize_whitespace: f.flag("data.clean.normalize_whitespace")?.unwrap_or(false),
            min_chars: f.int32("data.clean.min_chars", 0, u32::MAX)?.unwrap_or(0) as usize,
        },
    })
}

fn optimizer(
    f: &Fields,
    max_steps: Option<u64>,
    warnings: &mut Vec<Warning>,
) -> Result<Optimizer, JobFileError> {
    let share = |x: f64| (0.0..1.0).contains(&x);
    let schedules =
        [("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)];
    Ok(Optimizer {
        learning_rate: f.float("optimizer.learning_rate", "a number above 0", |x| x > 0.0)?.unwrap_or(5e-4),
        schedule: f.word("optimizer.schedule", &schedules)?.unwrap_or(Schedule::Cosine),
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

fn checkpoint(f: &Fields, dir: &Path) -> Result<Checkpoint, JobFileError> {
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
    })
}

fn eval(f: &Fields, batch_size: u32) -> Result<Eval, JobFileError> {
    f.word("eval.split", &[("validation", ())])?;
    Ok(Eval {
        eval_steps: f.int("eval.eval_steps", 0, INT_MAX)?.unwrap_or(100),
        batch_size: f.int32("eval.batch_size", 1, SIZE_MAX)?.unwrap_or(batch_size),
        max_eval_examples: f.int("eval.max_eval_examples", 1, INT_MAX)?,
    })
}

/// `path` below `dir` unless it is absolute, without `.` parts. A `~` at its beginning is the home directory, as in a shell.
fn absolute(f: &Fields, key: &'static str, dir: &Path, path: &str) -> Result<PathBuf, JobFileError> {
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
