//! `fleet profiles`: what data looked like, to compare later data with.

use super::{ListArgs, OutputArgs, Target, connect, list};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::ids::ProfileId;
use fleet_common::protocol::{ProfileView, Reply, Request};

/// List drift profiles, or show one
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List them, newest first
    Ls(ListArgs),
    /// Show one with its features
    Show {
        /// Such as profile-2
        profile: ProfileId,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    match args.action {
        Action::Ls(args) => {
            let take = |reply| match reply {
                Reply::Profiles(listing) => Ok(listing),
                other => Err(other),
            };
            list(&mut client, &args, Request::Profiles, take, json::profile, print)?;
        }
        Action::Show { profile, output } => {
            let view = match block_on(client.ask(Request::Profile(profile)))? {
                Reply::Profile(view) => *view,
                other => return Err(unexpected(&other)),
            };
            if output.json {
                out::json(&json::profile(&view));
                return Ok(exit::SUCCEEDED);
            }
            print(std::slice::from_ref(&view));
            print_features(&view);
        }
    }
    Ok(exit::SUCCEEDED)
}

fn print(profiles: &[ProfileView]) {
    let now = places::unix_ms();
    let rows: Vec<_> = profiles
        .iter()
        .map(|view| {
            vec![
                view.profile.to_string(),
                view.record.name.clone(),
                view.record.run.to_string(),
                view.record.features.len().to_string(),
                format!("{} ago", text::age(now.saturating_sub(view.unix_ms))),
            ]
        })
        .collect();
    out::table(&["PROFILE", "NAME", "RUN", "FEATURES", "MADE"], &rows);
}

fn print_features(view: &ProfileView) {
    let rows: Vec<_> = view
        .record
        .features
        .iter()
        .map(|feature| {
            let range = match (feature.edges.first(), feature.edges.last()) {
                (Some(low), Some(high)) => format!("{low} to {high}"),
                _ => "-".to_owned(),
            };
            vec![
                feature.name.clone(),
                text::thousands(feature.samples),
                format!("{:.4}", feature.mean),
                format!("{:.4}", feature.std_dev),
                range,
            ]
        })
        .collect();
    out::line("");
    out::table(&["FEATURE", "SAMPLES", "MEAN", "DEVIATION", "RANGE"], &rows);
}
