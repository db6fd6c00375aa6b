//! `fleet web`: logins for the page of a coordinator on an address that others reach.

use super::{OutputArgs, Target, connect};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use fleet_common::exit;
use fleet_common::files::NewFile;
use fleet_common::net::LOGIN_MAX;
use fleet_common::protocol::{Reply, Request};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Logins for the page and the metrics of a coordinator that is reached from elsewhere
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Make a login and print it, or write it to a file: for the page's form, or for a program as `Authorization: Bearer`. It counts for
    /// as long as you are a client of the cluster; `fleet revoke` ends it with you
    Token(Token),
}

#[derive(clap::Args)]
struct Token {
    /// How long it is good for: 30m, 12h, 7d; 90d at most
    #[arg(long, default_value = "12h", value_parser = ttl)]
    ttl: u64,
    /// Its holder may also cancel jobs, drain and undrain nodes, as you
    #[arg(long)]
    operate: bool,
    /// Write it to this file, which only you can read, instead of printing it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let Action::Token(args) = args.action;
    let mut client = connect(cluster)?;
    let file = args.out.as_deref().map(|out| NewFile::create(out).map(|file| (out, file))).transpose();
    let file = file.map_err(|e| Failure::input(e.to_string()))?;
    let request = Request::WebLogin { ttl_s: args.ttl, operates: args.operate };
    let text = match block_on(client.ask(request))? {
        Reply::Token { text } => text,
        other => return Err(unexpected(&other)),
    };
    let Some((out, mut file)) = file else {
        let json = json!({"token": text, "ttl_s": args.ttl, "operate": args.operate});
        args.output.say(&json, &text);
        return Ok(exit::SUCCEEDED);
    };
    let written = writeln!(file, "{text}").and_then(|()| file.commit());
    written.map_err(|e| Failure::environment(format!("the login could not be kept: {e}")))?;
    let shown = out.display().to_string();
    let json = json!({"file": shown, "ttl_s": args.ttl, "operate": args.operate});
    args.output.say(&json, &format!("{shown}: a login for the page"));
    Ok(exit::SUCCEEDED)
}

fn ttl(text: &str) -> Result<u64, String> {
    let seconds = super::token::seconds(text)?;
    match seconds <= LOGIN_MAX.as_secs() {
        true => Ok(seconds),
        false => Err("a login for the page holds for 90d at most".to_owned()),
    }
}
