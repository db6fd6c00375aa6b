//! Small models and data for examples and tests, made in a moment.

use crate::{Backend, SftConfig, TrainingConfig};
use fleet_common::events::EventBody;
use fleet_common::job::parse_toml;
use fleet_learn::{Error, Result};
use fleet_rank::local;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn sentence(n: usize) -> String {
    const WORDS: [&str; 13] =
        ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "fly", "home"];
    let words: Vec<&str> = (0..12).map(|at| WORDS[(n * n / 3 + at * (n + 1)) % WORDS.len()]).collect();
    words.join(" ")
}

/// So many rows, as a file of JSONL has them.
pub fn lines(rows: usize) -> String {
    let row = |n| json!({"prompt": format!("say {n}"), "completion": format!(" {}", sentence(n))});
    (0..rows).map(|n| format!("{}\n", row(n))).collect()
}

/// Settings of a run of a few steps below `dir`.
pub fn short(dir: &Path) -> TrainingConfig {
    TrainingConfig {
        output_dir: dir.join("tuned"),
        max_steps: 4,
        learning_rate: 1e-2,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 1,
        warmup_steps: Some(0),
        logging_steps: 1,
        max_seq_len: 64,
        ..TrainingConfig::default()
    }
}

/// A small model below `dir` that has seen a few sentences, with a tokenizer.
pub fn tiny_model(dir: &Path) -> Result<PathBuf> {
    let failed = |e: std::io::Error| Error::Environment(format!("{}: {e}", dir.display()));
    let text = dir.join("text");
    std::fs::create_dir_all(&text).map_err(failed)?;
    for n in 0..24 {
        let lines: Vec<String> = (0..20).map(|line| sentence(20 * n + line)).collect();
        std::fs::write(text.join(format!("{n:02}.txt")), lines.join(".\n")).map_err(failed)?;
    }
    let file = json!({
        "run_name": "base",
        "output_dir": "base",
        "device": "cpu",
        "batch_size": 4,
        "max_seq_len": 32,
        "max_steps": 20,
        "data": {"path": "text", "validation_fraction": 0.0},
        "optimizer": {"learning_rate": 1e-2},
        "model": {
            "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    });
    let file = toml::to_string(&file).map_err(|e| Error::Input(e.to_string()))?;
    let (job, _) = parse_toml(&file, dir).map_err(|e| Error::Input(e.to_string()))?;
    let mut newest = None;
    local::train(&job, "cpu", &mut |event| {
        if let EventBody::Checkpoint(saved) = event {
            newest = Some(PathBuf::from(&saved.path));
        }
        ControlFlow::Continue(())
    })?;
    newest.ok_or_else(|| Error::Job("the small model was not saved".into()))
}

/// An adapter for it that was trained for a few steps.
pub fn tiny_adapter(dir: &Path, base: &Path) -> Result<PathBuf> {
    let backend = Backend::new("cpu")?;
    let config = SftConfig { training: short(dir), ..SftConfig::default() };
    let mut trainer = backend.create_sft_trainer(&backend.load_model(base)?, config)?;
    let text = lines(16);
    let rows = text.lines().map(|line| serde_json::from_str(line).expect("it was just written"));
    trainer.train(rows.collect::<Vec<Value>>())?;
    trainer.save_adapter(dir.join("adapter"))
}
