//! `fleet checkpoint`: looks into checkpoint directories on this machine. It asks no cluster; what was recorded is `fleet checkpoints`.

use super::OutputArgs;
use crate::failure::Failure;
use crate::{out, text};
use fleet_checkpoint::{
    CheckpointError, Difference, Differs, Manifest, ManifestFile, STATE_FILE, TrainerState,
};
use fleet_common::exit;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Look into a checkpoint's directory: check it, show it, make one file of it, compare two
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Read every byte and hold it against its hash; names the file, the tensor and the rank that wrote it
    Verify {
        dir: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show step, run, strategy, ranks, files and tensors
    Show {
        dir: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Write a checkpoint of several ranks as one file of weights and one of optimizer state
    Consolidate {
        dir: PathBuf,
        /// A directory that is not there yet
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Name the tensors that differ, with their largest difference; exits with 1 where there are any
    Diff {
        first: PathBuf,
        second: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
    },
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        Failure { code: error.fault().exit_code(), message: error.to_string() }
    }
}

pub fn run(args: Args) -> Result<u8, Failure> {
    match args.action {
        Action::Verify { dir, output } => verify(&dir, &output),
        Action::Show { dir, output } => show(&dir, &output),
        Action::Consolidate { dir, out, output } => {
            let manifest = fleet_checkpoint::consolidate(&dir, &out)?;
            let line = format!("{}: step {}, {}", out.display(), manifest.step, sizes(&manifest));
            output.say(&json!({ "path": out, "step": manifest.step, "bytes": manifest.bytes() }), &line);
            Ok(exit::SUCCEEDED)
        }
        Action::Diff { first, second, output } => diff(&first, &second, &output),
    }
}

fn verify(dir: &Path, output: &OutputArgs) -> Result<u8, Failure> {
    let (manifest, wrong) = fleet_checkpoint::inspect(dir)?;
    let lines: Vec<String> = wrong.iter().map(ToString::to_string).collect();
    if output.json {
        out::json(&json!({ "path": dir, "step": manifest.step, "whole": wrong.is_empty(), "errors": lines }));
    } else if wrong.is_empty() {
        out::line(&format!("{} is whole: step {}, {}", dir.display(), manifest.step, sizes(&manifest)));
    } else {
        lines.iter().for_each(|line| out::note(&format!("error: {line}")));
    }
    Ok(wrong.first().map_or(exit::SUCCEEDED, |error| error.fault().exit_code()))
}

fn sizes(manifest: &Manifest) -> String {
    let (files, bytes) = (manifest.files.len(), text::short(manifest.bytes()));
    match manifest.tensors.len() {
        0 => format!("{files} files, {bytes}B"),
        tensors => format!("{tensors} tensors in {files} files, {bytes}B"),
    }
}

fn show(dir: &Path, output: &OutputArgs) -> Result<u8, Failure> {
    let manifest = Manifest::read(dir)?;
    let state = dir.join(STATE_FILE).exists().then(|| TrainerState::read(dir)).transpose()?;
    if output.json {
        let mut value = serde_json::to_value(&manifest)
            .map_err(|e| Failure::environment(format!("the manifest cannot be printed: {e}")))?;
        value["bytes"] = manifest.bytes().into();
        value["missing"] = json!(manifest.missing(dir));
        value["state"] = state.map_or(Value::Null, |state| json!(state));
        out::json(&value);
        return Ok(exit::SUCCEEDED);
    }
    let named = |name: &str| if name.is_empty() { "not said".to_owned() } else { name.to_owned() };
    out::line(&format!(
        "step {} of run {}, loss {}",
        manifest.step,
        named(&manifest.run),
        text::loss(manifest.loss)
    ));
    let world = state.map_or(manifest.world_size, |state| state.world_size);
    out::line(&format!(
        "trained by {world} ranks, strategy {}; {}",
        named(&manifest.strategy),
        sizes(&manifest)
    ));
    show_files(dir, &manifest);
    if !manifest.tensors.is_empty() {
        let rows: Vec<Vec<String>> = manifest
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let bytes = text::short(tensor.bytes().unwrap_or_default());
                let shape = format!("{:?}", tensor.shape);
                vec![
                    name.clone(),
                    format!("{:?}", tensor.dtype),
                    shape,
                    tensor.pieces.len().to_string(),
                    format!("{bytes}B"),
                ]
            })
            .collect();
        out::line("");
        out::table(&["TENSOR", "TYPE", "SHAPE", "PIECES", "SIZE"], &rows);
    }
    Ok(exit::SUCCEEDED)
}

/// With where they are, of a checkpoint that was written to several disks.
fn show_files(dir: &Path, manifest: &Manifest) {
    let missing = manifest.missing(dir);
    let file = |(name, file): (&String, &ManifestFile)| {
        let mut row = vec![name.clone(), file.writer.to_string(), format!("{}B", text::short(file.bytes))];
        if let Some(host) = manifest.disks.get(file.disk as usize) {
            let is_here = if missing.contains(name.as_str()) { "no" } else { "yes" };
            row.extend([host.clone(), is_here.to_owned()]);
        }
        row
    };
    let columns = if manifest.disks.is_empty() { 3 } else { 5 };
    let titles = &["FILE", "RANK", "SIZE", "WRITTEN ON", "HERE"][..columns];
    out::table(titles, &manifest.files.iter().map(file).collect::<Vec<_>>());
}

fn diff(first: &Path, second: &Path, output: &OutputArgs) -> Result<u8, Failure> {
    let found = fleet_checkpoint::diff(first, second)?;
    match output.json {
        true => out::json(&found.iter().map(difference).collect()),
        false if found.is_empty() => out::line("the same tensors, bit for bit"),
        false => {
            let row = |d: &Difference| vec![d.tensor.clone(), said(&d.what)];
            out::table(&["TENSOR", "DIFFERENCE"], &found.iter().map(row).collect::<Vec<_>>());
        }
    }
    Ok(if found.is_empty() { exit::SUCCEEDED } else { exit::JOB_FAILED })
}

fn said(what: &Differs) -> String {
    match what {
        Differs::OnlyInFirst => "only in the first".to_owned(),
        Differs::OnlyInSecond => "only in the second".to_owned(),
        Differs::Shape([a, b]) => format!("{:?} {:?} and {:?} {:?}", a.0, a.1, b.0, b.1),
        Differs::Numbers { count, largest } => {
            format!("{} numbers, by up to {largest:e}", text::thousands(*count))
        }
    }
}

fn difference(found: &Difference) -> Value {
    let tensor = &found.tensor;
    match &found.what {
        Differs::OnlyInFirst => json!({ "tensor": tensor, "only_in": "first" }),
        Differs::OnlyInSecond => json!({ "tensor": tensor, "only_in": "second" }),
        Differs::Shape(both) => {
            let both = both.each_ref().map(|(dtype, shape)| json!({ "dtype": dtype, "shape": shape }));
            json!({ "tensor": tensor, "first": both[0], "second": both[1] })
        }
        // JSON has no infinity.
        Differs::Numbers { count, largest } => {
            json!({ "tensor": tensor, "numbers": count, "largest": largest.is_finite().then_some(largest) })
        }
    }
}
