//! `fleet secrets`: the values that were given to a job's program with `--env`.

use super::{OutputArgs, Target, connect, done};
use crate::client::{block_on, unexpected};
use crate::environment::EnvArgs;
use crate::failure::Failure;
use crate::out;
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{Reply, Request, Secret, VariableKind, VariableView, listed};
use serde_json::json;

/// Show, give again or remove what was given to a job's program with --env
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List the variables that a job's program gets, secrets without their values
    Ls {
        job: JobId,
        /// With the values of secrets, which only an admin is shown
        #[arg(long)]
        values: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give secrets new values, which count from the job's next start
    Give {
        job: JobId,
        #[command(flatten)]
        env: EnvArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Keep no values: what runs goes on, and is not started again before they were given again
    Remove {
        job: JobId,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    match args.action {
        Action::Ls { job, values, output } => {
            let mut client = connect(cluster)?;
            match block_on(client.ask(Request::Environment { job, values }))? {
                Reply::Environment(variables) => show(&variables, &output),
                other => return Err(unexpected(&other)),
            }
        }
        Action::Give { job, env, output } => {
            if env.is_empty() {
                return Err(Failure::input(
                    "there is nothing to give; name variables with --env or --env-file",
                ));
            }
            let secrets = env.secrets()?;
            let names = listed(secrets.keys().map(String::as_str));
            let json = json!({"job": job.to_string(), "given": secrets.keys().collect::<Vec<_>>()});
            let values = secrets.into_iter().map(|(name, value)| (name, Secret::new(value))).collect();
            let mut client = connect(cluster)?;
            done(block_on(client.change(Request::GiveSecrets { job, values }))?)?;
            output.say(&json, &format!("{job} gets {names} at its next start"));
        }
        Action::Remove { job, output } => {
            let mut client = connect(cluster)?;
            done(block_on(client.change(Request::RemoveSecrets(job)))?)?;
            let text = format!(
                "no secrets of {job} are kept; what its coordinators' logs still have goes as they are cut"
            );
            output.say(&json!({"job": job.to_string(), "removed": true}), &text);
        }
    }
    Ok(exit::SUCCEEDED)
}

fn show(variables: &[VariableView], output: &OutputArgs) {
    if output.json {
        return out::json(&variables.iter().map(|variable| json!(variable)).collect());
    }
    let row = |variable: &VariableView| {
        let value = match (&variable.value, variable.kind) {
            // Nothing in it moves a terminal.
            (Some(value), _) => value.escape_debug().to_string(),
            (None, VariableKind::Removed) => "(not kept)".to_owned(),
            (None, _) => "(not shown)".to_owned(),
        };
        let kind = if variable.kind == VariableKind::Open { "open" } else { "secret" };
        vec![variable.name.clone(), kind.to_owned(), value]
    };
    out::table(&["NAME", "KIND", "VALUE"], &variables.iter().map(row).collect::<Vec<_>>());
}
