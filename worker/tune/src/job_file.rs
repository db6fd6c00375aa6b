//! From settings to a job: what the library trains is a job file, parsed as any other.

use crate::dataset::text;
use crate::{Backend, Dataset, LoraConfig, TrainingConfig};
use fleet_common::job::{Dpo, Job, Warning, parse_toml};
use fleet_learn::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// What a run is made of.
pub(crate) struct Plan<'a> {
    pub backend: &'a Backend,
    /// The model's directory.
    pub base: &'a Path,
    /// To go on from.
    pub adapter: Option<&'a Path>,
    pub training: &'a TrainingConfig,
    /// Where there is none to go on from.
    pub lora: &'a LoraConfig,
    /// Preferences are learnt.
    pub dpo: Option<&'a Dpo>,
}

/// Longest name of a run, with room for a number.
const NAME_MAX: usize = 200;

impl Plan<'_> {
    /// The job that learns `data` in the run `name`, and what is to know of its settings. Rows in memory are written down.
    pub fn job(&self, data: &Dataset, name: &str) -> Result<(Job, Vec<Warning>)> {
        let file = self.file(data, name)?;
        let toml = toml::to_string(&file)
            .map_err(|e| Error::Input(format!("the settings are none of a job file: {e}")))?;
        let here = std::env::current_dir()
            .map_err(|e| Error::Environment(format!("there is no directory to work in: {e}")))?;
        parse_toml(&toml, &here).map_err(|e| {
            // Its lines are nobody's; the keys say what is meant.
            let text = e.to_string();
            let message = text.split_once(": ").filter(|(place, _)| place.starts_with("job.toml"));
            Error::Input(message.map_or(text.clone(), |(_, message)| message.to_owned()))
        })
    }

    fn file(&self, data: &Dataset, name: &str) -> Result<Map<String, Value>> {
        let TrainingConfig { output_dir, max_steps, .. } = self.training;
        let task = match (self.dpo, data.has_rows()) {
            (Some(_), _) => "dpo",
            (None, true) => "sft",
            (None, false) => "lm",
        };
        let adapter = match self.adapter {
            Some(path) => json!({"path": text(path)?}),
            None => self.lora.in_a_file(),
        };
        let training = self.training;
        let mut of_data = data.in_a_file(&output_dir.join("data").join(format!("{name}.jsonl")))?;
        of_data.insert("validation_fraction".into(), training.validation_fraction.into());
        let (length, count) = match *max_steps {
            0 => ("epochs", u64::from(training.num_train_epochs)),
            steps => ("max_steps", steps),
        };
        let file = json!({
            "task_name": task,
            "run_name": name,
            "output_dir": text(output_dir)?,
            "seed": self.backend.seed(),
            "precision": self.backend.dtype().name(),
            "batch_size": training.per_device_train_batch_size,
            "accumulate_grad_batches": training.gradient_accumulation_steps,
            "max_seq_len": training.max_seq_len,
            length: count,
            "logging_steps": training.logging_steps,
            "model": {"path": text(self.base)?},
            "adapter": adapter,
            "data": of_data,
            "optimizer": {
                "learning_rate": training.learning_rate,
                "schedule": training.schedule,
                "warmup_steps": training.warmup_steps,
            },
            "checkpoint": {"save_steps": training.save_steps, "save_total_limit": training.save_total_limit},
            "early_stopping": training.early_stopping,
            "dpo": self.dpo,
        });
        let numbers = [
            ("learning_rate", training.learning_rate),
            ("validation_fraction", training.validation_fraction),
            ("lora_dropout", self.lora.lora_dropout),
        ];
        if let Some((name, number)) = numbers.into_iter().find(|(_, number)| !number.is_finite()) {
            return Err(Error::Input(format!("{name} is {number}; give it a number")));
        }
        let mut file = without_nulls(file).as_object().cloned().unwrap_or_default();
        for (key, value) in &training.further {
            if let Some((_, field)) = FIELDS.into_iter().find(|(own, _)| *own == key.as_str()) {
                return Err(Error::Input(format!("{key} is not set by its key; it is {field}")));
            }
            put(&mut file, key, value.clone())?;
        }
        Ok(file)
    }
}

/// Keys that the library's own objects have, which would not know of another value.
const FIELDS: [(&str, &str); 6] = [
    ("run_name", "`TrainingConfig::run_name`"),
    ("output_dir", "`TrainingConfig::output_dir`"),
    ("model.path", "the model that the trainer was made with"),
    ("adapter.path", "the adapter that the model has switched on"),
    ("device", "that of the backend"),
    ("batch_size", "`TrainingConfig::per_device_train_batch_size`"),
];

/// TOML has no null.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(entries) => {
            let some = entries.into_iter().filter(|(_, value)| !value.is_null());
            some.map(|(key, value)| (key, without_nulls(value))).collect::<Map<_, _>>().into()
        }
        other => other,
    }
}

/// At `key`, whose parts are tables.
fn put(file: &mut Map<String, Value>, key: &str, value: Value) -> Result<()> {
    let Some((table, rest)) = key.split_once('.') else {
        file.insert(key.to_owned(), value);
        return Ok(());
    };
    match file.entry(table).or_insert_with(|| json!({})) {
        Value::Object(table) => put(table, rest, value),
        _ => Err(Error::Input(format!("{key}: {table} is no table"))),
    }
}

/// A name of a run that nothing in `output_dir` has yet: `wanted`, with a number where that is taken.
pub(crate) fn free_name(output_dir: &Path, wanted: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() || "._-=".contains(c) { c } else { '-' };
    let name: String = wanted.chars().take(NAME_MAX).map(fits).collect();
    let name = match name.trim_start_matches('.') {
        "" => "run",
        name => name,
    };
    let is_free =
        |name: &String| run_files(output_dir, name).iter().all(|path| path.symlink_metadata().is_err());
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.to_owned()).chain(numbered).find(is_free).expect("numbers do not end")
}

/// What is called by a run's name: its checkpoints, what is saved of it, its job file.
fn run_files(output_dir: &Path, name: &str) -> [PathBuf; 3] {
    [
        output_dir.join("checkpoints").join(name),
        output_dir.join(name),
        output_dir.join(format!("{name}.toml")),
    ]
}

/// Leaves the job beside what it writes, for `fleet launch` and for people.
pub(crate) fn keep(job: &Job) -> Result<()> {
    let path = job.output_dir.join(format!("{}.toml", job.run_name));
    let written =
        std::fs::create_dir_all(&job.output_dir).and_then(|()| std::fs::write(&path, job.to_toml()));
    written.map_err(|e| Error::Environment(format!("cannot write {}: {e}", path.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use crate::DpoConfig;
    use fleet_common::job::{EarlyStopping, Model, Precision, Resume, Schedule, Targets, Watched};

    fn plan<'a>(backend: &'a Backend, training: &'a TrainingConfig, lora: &'a LoraConfig) -> Plan<'a> {
        Plan { backend, base: Path::new("/m"), adapter: None, training, lora, dpo: None }
    }

    #[test]
    fn settings_become_a_job() {
        let dir = tempfile::tempdir().unwrap();
        let backend = Backend::new("cpu").unwrap();
        let mut training = TrainingConfig { output_dir: dir.path().into(), ..TrainingConfig::default() };
        training.set("quantization", "nf4").set("adapter.use_dora", true).set("data.packing", true);
        training.early_stopping =
            Some(EarlyStopping { patience: 5, min_delta: 0.001, metric: Watched::TrainLoss });
        let lora = LoraConfig::default();
        let (job, warnings) = plan(&backend, &training, &lora).job(&"rows.jsonl".into(), "a").unwrap();
        assert_eq!(warnings, []);
        let adapter = job.adapter.as_ref().unwrap();
        assert_eq!((adapter.r, adapter.alpha, adapter.dropout), (Some(8), Some(16.0), Some(0.05)));
        assert_eq!(adapter.target_modules, Some(Targets::Names(lora.target_modules.clone())));
        assert!(adapter.use_dora && job.quantization.is_some() && job.data.rows.as_ref().unwrap().packing);
        assert_eq!((job.batch_size, job.accumulate_grad_batches, job.max_steps), (1, 8, Some(500)));
        let optimizer = &job.optimizer;
        let wanted = (2e-4, Schedule::Cosine, Some(50));
        assert_eq!((optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps), wanted);
        assert_eq!((job.checkpoint.save_steps, job.checkpoint.save_total_limit), (250, 2));
        assert_eq!(job.early_stopping, training.early_stopping);
        assert_eq!((job.precision, job.seed, &job.checkpoint.resume), (Precision::Fp32, 42, &Resume::No));
        assert_eq!((&job.model, job.task_name.as_str()), (&Model::Pretrained("/m".into()), "sft"));
        keep(&job).unwrap();
        let (again, _) = fleet_common::job::load(&dir.path().join("a.toml"), &[], Path::new("/")).unwrap();
        assert_eq!(Job { working_dir: job.working_dir.clone(), ..again }, job);

        // A warm-up that is longer than its run, which is told; and one of text, of epochs.
        let short = TrainingConfig { max_steps: 20, ..training.clone() };
        let (job, warnings) = plan(&backend, &short, &lora).job(&"rows.csv".into(), "a").unwrap();
        assert_eq!((job.optimizer.warmup_steps, warnings.len()), (Some(2), 1));
        let epochs = TrainingConfig { max_steps: 0, num_train_epochs: 3, ..TrainingConfig::default() };
        let (job, warnings) = plan(&backend, &epochs, &lora).job(&"a.txt".into(), "a").unwrap();
        assert_eq!((job.epochs, job.max_steps, job.data.rows, warnings.len()), (3, None, None, 0));
    }

    #[test]
    fn preferences_are_learnt_from_an_adapter_on() {
        let backend = Backend::new("cpu").unwrap();
        let DpoConfig { training, lora, dpo } = DpoConfig::rank_1();
        let adapter = Some(Path::new("/adapter"));
        let new = Plan { dpo: Some(&dpo), ..plan(&backend, &training, &lora) };
        let (job, warnings) = new.job(&"pairs.jsonl".into(), "a").unwrap();
        assert_eq!((job.dpo, job.adapter.unwrap().r, warnings.len()), (Some(dpo.clone()), Some(1), 0));
        let (job, _) = Plan { adapter, ..new }.job(&"pairs.jsonl".into(), "a").unwrap();
        let adapter = job.adapter.unwrap();
        assert_eq!((adapter.path, adapter.r), (Some("/adapter".into()), None));
    }

    #[test]
    fn what_a_job_refuses_is_said_without_a_line() {
        let backend = Backend::new("cpu").unwrap();
        let refused = |key: &str, value: Value| {
            let mut training = TrainingConfig::default();
            training.set(key, value);
            let lora = LoraConfig::default();
            plan(&backend, &training, &lora).job(&"a.txt".into(), "a").unwrap_err().to_string()
        };
        let unknown = refused("adapter.use_dorra", true.into());
        assert!(unknown.starts_with("unknown key") && unknown.contains("adapter.use_dora"), "{unknown}");
        let line = refused("data.packing", true.into());
        assert!(line.starts_with("`data.packing` is for rows of instructions"), "{line}");
        assert!(refused("seed.x", 1.into()).contains("seed is no table"));
        assert!(refused("run_name", "b".into()).contains("`TrainingConfig::run_name`"));
        let wild = TrainingConfig { learning_rate: f64::NAN, ..TrainingConfig::default() };
        let error = plan(&backend, &wild, &LoraConfig::default()).job(&"a.txt".into(), "a").unwrap_err();
        assert!(error.to_string().contains("learning_rate is NaN"), "{error}");
    }

    #[test]
    fn a_run_never_has_the_name_of_another() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(free_name(dir.path(), "sft"), "sft");
        assert_eq!(free_name(dir.path(), ".voice & tone/1"), "voice---tone-1");
        assert_eq!(free_name(dir.path(), "."), "run");
        std::fs::write(dir.path().join("sft.toml"), "").unwrap();
        std::fs::create_dir_all(dir.path().join("checkpoints/sft-2")).unwrap();
        assert_eq!(free_name(dir.path(), "sft"), "sft-3");
    }
}
