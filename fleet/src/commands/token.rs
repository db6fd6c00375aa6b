//! `fleet token`: tokens that let machines and people join.

use super::{OutputArgs, Target, connect, done};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{out, places, text};
use fleet_common::exit;
use fleet_common::files::NewFile;
use fleet_common::net::JoinToken;
use fleet_common::protocol::{Reply, Request, Role, UNLIMITED_USES};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Make tokens that let machines and people join
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Make a token and print it, or write it to a file; it is shown this once
    Create(Create),
    /// List the tokens that are still good for something, without their secrets
    Ls {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Make a token useless
    Revoke {
        /// Its id, as `fleet token ls` shows it
        id: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(clap::Args)]
struct Create {
    /// What its holder may be
    #[arg(long, value_enum)]
    role: Holder,
    /// How long it is good for: 30m, 12h, 7d
    #[arg(long, default_value = "24h", value_parser = seconds)]
    ttl: u64,
    /// How many times it can be used
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// Write it to this file, which only you can read, instead of printing it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Holder {
    Coordinator,
    Worker,
    Client,
    /// A client that also makes tokens for coordinators and admins, revokes, and takes coordinators out
    Admin,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    match args.action {
        Action::Create(args) => create(args, cluster),
        Action::Ls { output } => list(&output, cluster),
        Action::Revoke { id, output } => {
            let mut client = connect(cluster)?;
            done(block_on(client.change(Request::RevokeToken { id: id.clone() }))?)?;
            output.say(&json!({"token": id, "revoked": true}), &format!("nobody joins with {id} any more"));
            Ok(exit::SUCCEEDED)
        }
    }
}

fn list(output: &OutputArgs, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let tokens = match block_on(client.ask(Request::Tokens))? {
        Reply::Tokens(tokens) => tokens,
        other => return Err(unexpected(&other)),
    };
    if output.json {
        out::json(&tokens.iter().map(|token| json!(token)).collect());
        return Ok(exit::SUCCEEDED);
    }
    let now = places::unix_ms();
    let rows: Vec<_> = tokens
        .iter()
        .map(|token| {
            let role = json!(token.role).as_str().unwrap_or_default().to_owned();
            let uses = if token.uses_left == UNLIMITED_USES {
                "any".to_owned()
            } else {
                token.uses_left.to_string()
            };
            vec![
                token.id.clone(),
                role,
                uses,
                format!("in {}", text::age(token.expires_unix_ms.saturating_sub(now))),
            ]
        })
        .collect();
    out::table(&["TOKEN", "ROLE", "USES LEFT", "EXPIRES"], &rows);
    Ok(exit::SUCCEEDED)
}

fn create(args: Create, cluster: Target<'_>) -> Result<u8, Failure> {
    let role = match args.role {
        Holder::Coordinator => Role::Coordinator,
        Holder::Worker => Role::Worker,
        Holder::Client => Role::Client,
        Holder::Admin => Role::Admin,
    };
    let mut client = connect(cluster)?;
    // Begun before there is a token: one that could not be kept would be good for nobody, and open the door for as long as it holds.
    let file = args.out.as_deref().map(|out| NewFile::create(out).map(|file| (out, file))).transpose();
    let file = file.map_err(|e| Failure::input(e.to_string()))?;
    let request = Request::CreateToken { role, ttl_s: args.ttl, uses: args.uses };
    let text = match block_on(client.change(request))? {
        Reply::Token { text } => text,
        other => return Err(unexpected(&other)),
    };
    let Some((out, file)) = file else {
        args.output.say(&json!({"token": text, "ttl_s": args.ttl, "uses": args.uses}), &text);
        return Ok(exit::SUCCEEDED);
    };
    let token: JoinToken = text.parse()?;
    keep(file, &token).map_err(|e| {
        Failure::environment(format!("{e}; end the token with `fleet token revoke {}`", token.id))
    })?;
    let json =
        json!({"id": token.id, "file": out.display().to_string(), "ttl_s": args.ttl, "uses": args.uses});
    args.output.say(&json, &format!("{}: the token {}", out.display(), token.id));
    Ok(exit::SUCCEEDED)
}

fn keep(mut file: NewFile, token: &JoinToken) -> std::io::Result<()> {
    writeln!(file, "{token}")?;
    file.commit()
}

/// `90`, `90s`, `30m`, `12h`, `7d` in seconds.
pub fn seconds(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("write it like 30m, 12h or 7d".to_owned()),
    };
    let seconds = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).filter(|n| *n > 0);
    seconds.ok_or_else(|| "write it like 30m, 12h or 7d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_live_has_a_unit() {
        assert_eq!(
            [seconds("90"), seconds("2m"), seconds("12h"), seconds("1d")],
            [Ok(90), Ok(120), Ok(43_200), Ok(86_400)]
        );
        for bad in ["", "h", "0", "5w", "-1h", "99999999999999999999d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
