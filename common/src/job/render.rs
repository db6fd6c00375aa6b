//! A `Job` written back as a job file: every setting by its name, every default spelled out. Loading it gives the same job.

use super::*;
use serde_json::{Map, Value, json};

impl Job {
    /// The job file as an ordered table: scalars first, then the tables. Settings without a value are left out.
    pub fn to_file(&self) -> Map<String, Value> {
        let mut file = table(json!({
            "task_name": self.task_name,
            "run_name": self.run_name,
            "output_dir": self.output_dir,
            "seed": self.seed,
            "strategy": self.strategy,
            "devices": match &self.devices {
                Devices::Auto => json!("auto"),
                Devices::Count(n) => json!(n),
                Devices::Ids(ids) => json!(ids),
            },
            "num_nodes": self.num_nodes,
            "device": self.device,
            "executor": self.executor,
            "precision": self.precision,
            "quantization": self.quantization,
            "batch_size": self.batch_size,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "activation_checkpointing": match self.activation_checkpointing {
                ActivationCheckpointing::None => json!("none"),
                ActivationCheckpointing::Blocks => json!("blocks"),
                ActivationCheckpointing::First(count) => json!(count),
            },
            "neftune_noise_alpha": self.neftune_noise_alpha,
            "reshard_after_forward": self.reshard_after_forward,
            "offload_optimizer": self.offload_optimizer,
            "transport": self.transport,
            "transport_encryption": self.transport_encryption,
            "max_seq_len": self.max_seq_len,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "logging_steps": self.logging_steps,
            "log_to_db": self.log_to_db,
            "max_time_s": self.max_time_s,
            "threads_per_rank": self.threads_per_rank,
            "trace": self.trace,
        }));
        let model = match &self.model {
            Model::New(config) => super::model::in_a_file(config),
            Model::Pretrained(path) => table(json!({ "path": path })),
        };
        // the model's vocabulary is written in [model]; a tokenizer that is trained has the same
        let tokenizer = match &self.tokenizer {
            Tokenizer::Train { .. } => Map::new(),
            Tokenizer::File(path) => table(json!({ "path": path })),
        };
        let mut data = table(json!({
            "path": self.data.paths,
            "include": self.data.include,
            "exclude": self.data.exclude,
            "text_field": self.data.text_field,
            "validation_fraction": self.data.validation_fraction,
            "clean": self.data.clean,
            "weights": (!self.data.weights.is_empty()).then_some(&self.data.weights),
            "bad_rows": (!self.data.bad_rows.stops()).then_some(self.data.bad_rows),
        }));
        let adapter = self.adapter.as_ref().map_or_else(Map::new, super::adapter::in_a_file);
        data.extend(self.data.rows.iter().flat_map(Rows::in_a_file));
        let checkpoint = table(json!({
            "save_steps": self.checkpoint.save_steps,
            "save_total_limit": self.checkpoint.save_total_limit,
            "resume": match &self.checkpoint.resume {
                Resume::No => json!("no"),
                Resume::Latest => json!("latest"),
                Resume::Path(path) => json!(path),
            },
            "overwrite": self.checkpoint.overwrite,
            "keep_best": self.checkpoint.keep_best,
        }));
        let optimizer = table(json!(self.optimizer));
        let eval = table(json!(self.eval));
        for (name, part) in [
            ("model", model),
            ("adapter", adapter),
            ("dpo", self.dpo.as_ref().map_or_else(Map::new, |dpo| table(json!(dpo)))),
            ("tokenizer", tokenizer),
            ("data", data),
            ("optimizer", optimizer),
            ("checkpoint", checkpoint),
            ("eval", eval),
            ("early_stopping", self.early_stopping.map_or_else(Map::new, |stopping| table(json!(stopping)))),
        ] {
            if !part.is_empty() {
                file.insert(name.to_owned(), Value::Object(part));
            }
        }
        file
    }

    /// `to_file` as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.to_file()).expect("a job file has no nulls and its integers fit 63 bits")
    }
}

/// The entries of a JSON object that have a value.
pub(super) fn table(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(entries) => entries.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Map::new(),
    }
}
