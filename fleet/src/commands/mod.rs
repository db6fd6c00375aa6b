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

/// Which cluster, and how the answer is printed.
#[derive(clap::Args)]
pub struct ClusterArgs {
    /// A coordinator's data directory, HOST:PORT, or a name; without it the newest local launch
    #[arg(long, env = "FLEET_CLUSTER", value_name = "NAME|HOST:PORT|DIR")]
    pub cluster: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl ClusterArgs {
    pub fn client(&self) -> Result<Client, Failure> {
        // an empty variable is an unset one
        let wish = self.cluster.as_deref().filter(|wish| !wish.is_empty());
        Ok(Client::new(Cluster::find(wish)?))
    }
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
