//! `fleet exports`: models that were exported from checkpoints.

use super::{ListArgs, OutputArgs, Target, connect, list};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::ids::ExportId;
use fleet_common::protocol::{ExportView, Reply, Request};

/// List exported models, or show one
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List them, newest first
    Ls(ListArgs),
    /// Show one in full
    Show {
        /// Such as export-2
        export: ExportId,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    match args.action {
        Action::Ls(args) => {
            let take = |reply| match reply {
                Reply::Exports(listing) => Ok(listing),
                other => Err(other),
            };
            list(&mut client, &args, Request::Exports, take, json::export, print)?;
        }
        Action::Show { export, output } => {
            let view = match block_on(client.ask(Request::Export(export)))? {
                Reply::Export(view) => *view,
                other => return Err(unexpected(&other)),
            };
            if output.json {
                out::json(&json::export(&view));
                return Ok(exit::SUCCEEDED);
            }
            print(std::slice::from_ref(&view));
            out::line(&format!("sha256 of the file: {}", view.record.sha256));
            out::line(&format!("sha256 of the checkpoint's manifest: {}", view.manifest_sha256));
        }
    }
    Ok(exit::SUCCEEDED)
}

fn print(exports: &[ExportView]) {
    let now = places::unix_ms();
    let rows: Vec<_> = exports
        .iter()
        .map(|view| {
            vec![
                view.export.to_string(),
                view.record.format.clone(),
                format!("{} step {}", view.record.job, view.record.step),
                format!("{}B", text::short(view.record.bytes)),
                format!("{} ago", text::age(now.saturating_sub(view.unix_ms))),
                view.record.path.clone(),
            ]
        })
        .collect();
    out::table(&["EXPORT", "FORMAT", "CHECKPOINT", "SIZE", "MADE", "PATH"], &rows);
}
