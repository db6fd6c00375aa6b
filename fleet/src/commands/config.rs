//! `fleet config`: the job as fleet understands it, with every default. What it prints is a job file.

use super::{JobArgs, load_job};
use crate::failure::Failure;
use crate::out;
use fleet_checkpoint::ModelDir;
use fleet_common::exit;
use fleet_common::job::{Job, Model, Optimizer};

/// Print a job as fleet understands it, with every default
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print JSON instead of TOML
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let (job, comments) = spelled_out(load_job(&args.job.job, &args.job.sets)?);
    match args.json {
        true => out::json(&job.to_file().into()),
        false => out::lines((job.to_toml() + &comments).trim_end()),
    }
    Ok(exit::SUCCEEDED)
}

/// With what follows from the model, which has to be there for that, and what no job file says, in comments.
fn spelled_out(job: Job) -> (Job, String) {
    let mut comments = String::new();
    let dir = match &job.model {
        Model::Pretrained(dir) => Some(dir),
        Model::New(_) => None,
    };
    if let Some(path) = job.adapter.as_ref().and_then(|adapter| adapter.path.as_ref()) {
        comments +=
            &format!("# What the adapter is stands in {}.\n", path.join("adapter_config.json").display());
    }
    let opened = dir.filter(|_| job.adapter.is_some()).map(|dir| ModelDir::open(dir));
    let family = opened.and_then(|opened| match opened {
        Ok(dir) => Some(dir.family),
        Err(error) => {
            out::note(&format!("warning: what of the adapter is not said hangs on the model: {error}"));
            None
        }
    });
    let job = job.spelled_out(family);
    if job.optimizer.warmup_steps.is_none() {
        let steps = Optimizer::WARMUP_STEPS;
        comments += &format!(
            "# optimizer.warmup_steps: {steps}, and at most a tenth of the run, whose length follows from the data.\n"
        );
    }
    (job, comments)
}
