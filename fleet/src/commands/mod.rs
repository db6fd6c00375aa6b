//! One command per file, and what they share.

pub mod cancel;
pub mod checkpoints;
pub mod config;
pub mod generate;
pub mod jobs;
pub mod login;
pub mod logs;
pub mod nodes;
pub mod status;
pub mod submit;
pub mod token;

use crate::client::Client;
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::out;
use fleet_common::job::{self, Job};
use std::path::{Path, PathBuf};

/// How the answer is printed.
#[derive(clap::Args)]
pub struct OutputArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A client of the wished cluster, or of the newest local launch. Talks to nobody yet.
pub fn connect(cluster: Option<&str>) -> Result<Client, Failure> {
    Ok(Client::new(Cluster::find(cluster)?))
}

/// A job file and what is laid over it.
#[derive(clap::Args)]
pub struct JobArgs {
    /// Job file: .toml, .yaml or .json
    pub job: PathBuf,
    /// Replace a setting of the job file, such as --set data.path=FILE
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// Reads a job in the current directory and prints its warnings.
pub fn load_job(path: &Path, sets: &[String]) -> Result<Job, Failure> {
    let here = std::env::current_dir()
        .map_err(|e| Failure::environment(format!("the current directory cannot be used: {e}")))?;
    let (job, warnings) = job::load(path, sets, &here)?;
    for warning in warnings {
        out::note(&format!("warning: {warning}"));
    }
    Ok(job)
}
